// Which server the client asks: the one that was set, or another one that holds the generation as
// soon as the current one is silent or refuses a page.
#include <algorithm>

#include "mcdist/client.h"

namespace sf::mcdist {
namespace {

// No word for so long, and so many time-outs of what was asked: the server is silent.
constexpr TimeNs kSilence = 500 * kMillisecond;
constexpr uint64_t kSilentRetries = 3;

}  // namespace

void Client::watch_server(TimeNs now) {
  {
    std::lock_guard lock(mutex_);
    if (lost_ || closing_ || requester_.idle()) return;
    const TimeNs since = std::max({last_word_, busy_since_, turned_at_});
    if (since != silent_since_) {
      silent_since_ = since;
      retries_then_ = requester_.retries();
    }
    // At most a third of the time in which the source counts as lost: another one gets its turn.
    if (now - since < std::min(kSilence, options_.source_timeout / 3)) return;
    const uint64_t retries = requester_.retries() - retries_then_;
    if (cookie_ == 0 ? greetings_ < kSilentRetries : retries < kSilentRetries) return;
  }
  turn_to_other(now, true);
}

bool Client::turn_to_other(TimeNs now, bool ask_again) {
  std::lock_guard lock(mutex_);
  Sender* other = senders_.other(server_, options_.interface_address, home_);
  if (server_set_) return false;
  if (other != nullptr) {
    other->tried = now;
    turn_to(other->address, other->cookie, now);
  } else if (!same_address(server_, home_)) {
    turn_to(home_, 0, now);
  } else {
    return false;
  }
  if (ask_again) requester_.new_server(now);
  count(counters_.fail_overs);
  current_ = cookie_ == 0 ? nullptr : other;
  turned_at_ = now;
  return true;
}

}  // namespace sf::mcdist
