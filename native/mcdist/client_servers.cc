// Which server the client asks: the one that was set, or another one that holds the generation as
// soon as the current one is silent or refuses a page. Others are known by their announces, or were
// named with the one that was set, for where no announce comes by.
#include <algorithm>

#include "mcdist/client.h"

namespace sf::mcdist {
namespace {

// No word for so long, and so many time-outs of what was asked: the server is silent.
constexpr TimeNs kSilence = 500 * kMillisecond;
constexpr uint64_t kSilentRetries = 3;
// One that has not answered since it was turned to gets less while there are others that were not
// found silent: so that all are tried within half the time in which the source counts as lost. But
// it gets this much.
constexpr TimeNs kLeastPatience = 50 * kMillisecond;
constexpr uint64_t kUnansweredGreetings = 2;

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
    TimeNs patience = std::min(kSilence, options_.source_timeout / 3);
    uint64_t least = kSilentRetries;
    const auto hopeful = static_cast<TimeNs>(servers_hopeful());
    if (turned_at_ > last_word_ && hopeful > 0) {
      least = kUnansweredGreetings;
      patience =
          std::min(patience, std::max(kLeastPatience, options_.source_timeout / 2 / hopeful));
    }
    if (now - since < patience) return;
    const uint64_t retries = requester_.retries() - retries_then_;
    if (cookie_ == 0 ? greetings_ < least : retries < kSilentRetries) return;
  }
  turn_to_other(now, true);
}

bool Client::turn_to_other(TimeNs now, bool ask_again) {
  std::lock_guard lock(mutex_);
  if (server_set_) return false;
  const bool silent = ask_again;
  Sender* before = senders_.at(server_);
  if (silent && before != nullptr) before->left = now;
  Sender* other = senders_.other(server_, options_.interface_address, home_,
                                 silent ? now - SenderTable::kFresh : 0);
  Named* named = unheard();
  if (named != nullptr && (other == nullptr || other->silent() || named->tried <= other->tried)) {
    named->tried = now;
    other = nullptr;
    turn_to(named->address, 0, now);
  } else if (other != nullptr) {
    other->tried = now;
    turn_to(other->address, other->cookie, now);
  } else if (!same_address(server_, home_)) {
    turn_to(home_, 0, now);
  } else {
    return false;
  }
  if (ask_again) requester_.new_server(now);
  arm(now);
  count(counters_.fail_overs);
  current_ = cookie_ == 0 ? nullptr : other;
  turned_at_ = now;
  return true;
}

Client::Named* Client::unheard() {
  Named* best = nullptr;
  for (Named& one : named_) {
    if (same_address(one.address, server_) || senders_.at(one.address) != nullptr) continue;
    if (best == nullptr || one.tried < best->tried) best = &one;
  }
  return best;
}

size_t Client::servers_usable() {
  size_t servers = senders_.usable(server_, options_.interface_address, home_);
  for (const Named& one : named_) {
    if (!same_address(one.address, server_) && senders_.at(one.address) == nullptr) servers++;
  }
  return servers;
}

size_t Client::servers_hopeful() {
  const size_t servers = senders_.hopeful(server_, options_.interface_address, home_);
  return servers +
         static_cast<size_t>(std::count_if(named_.begin(), named_.end(), [this](const Named& one) {
           return one.tried == 0 && senders_.at(one.address) == nullptr;
         }));
}

}  // namespace sf::mcdist
