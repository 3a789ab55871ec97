#include "blktap/byte_stream.h"

#include <errno.h>
#include <time.h>

namespace sf::nbd {

uint64_t now_ms() {
  timespec ts = {};
  ::clock_gettime(CLOCK_MONOTONIC, &ts);
  return static_cast<uint64_t>(ts.tv_sec) * 1000 + static_cast<uint64_t>(ts.tv_nsec) / 1000000;
}

bool wait_until(int fd, short events, uint64_t deadline_ms) {
  for (;;) {
    const uint64_t now = now_ms();
    if (now >= deadline_ms) return false;
    pollfd one = {fd, events, 0};
    const int n = ::poll(&one, 1, static_cast<int>(deadline_ms - now));
    if (n > 0) return true;
    if (n < 0 && errno != EINTR) return false;
  }
}

}  // namespace sf::nbd
