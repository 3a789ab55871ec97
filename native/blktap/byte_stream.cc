#include "blktap/byte_stream.h"

#include <errno.h>
#include <time.h>

namespace sf::nbd {

uint64_t now_ms() { return now_ns() / 1000000; }

uint64_t now_ns() {
  timespec ts = {};
  ::clock_gettime(CLOCK_MONOTONIC, &ts);
  return static_cast<uint64_t>(ts.tv_sec) * 1000000000u + static_cast<uint64_t>(ts.tv_nsec);
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
