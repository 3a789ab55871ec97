// The servers of one generation that a client has heard of, by the tag of their boot ids: their
// keys, where they take requests, what they hold. Only packets that opened with the generation's
// key get one in here. Bounded: the one heard longest ago makes room, never the current one.
// Pointers are good until the next admit(). Not thread-safe.
#pragma once

#include <netinet/in.h>

#include <memory>
#include <vector>

#include "mcdist/policy.h"
#include "mcdist/wire.h"

namespace sf::mcdist {

struct Sender {
  std::unique_ptr<SenderKey> key;
  uint64_t counter = 0;      // the highest heard: a packet that has it, or less, may be a replay
  TimeNs heard = 0;          // when
  sockaddr_in address = {};  // sin_port 0: not known (never announced, never welcomed us)
  uint64_t cookie = 0;       // given to us; 0: none
  uint64_t held = 0;         // pages, as announced
  bool complete = false;
  TimeNs tried = 0;  // when it became the current one last
  TimeNs left = 0;   // when it was left, since it was silent
  // Nothing was heard of it since.
  bool silent() const { return left != 0 && heard <= left; }
};

inline bool same_address(const sockaddr_in& a, const sockaddr_in& b) {
  return a.sin_addr.s_addr == b.sin_addr.s_addr && a.sin_port == b.sin_port;
}

class SenderTable {
 public:
  static constexpr size_t kMaxSenders = 32;

  Sender* find(uint32_t tag) {
    for (auto& sender : senders_) {
      if (tag_of(sender->key->boot()) == tag) return sender.get();
    }
    return nullptr;
  }
  Sender* find(const BootId& boot) {
    Sender* found = find(tag_of(boot));
    return found != nullptr && found->key->boot() == boot ? found : nullptr;
  }
  // `keep` (may be null) stays. A boot id that begins as another one takes its place, unless that
  // is `keep`: then nullptr.
  Sender* admit(std::unique_ptr<SenderKey> key, const Sender* keep) {
    if (Sender* same = find(tag_of(key->boot()))) {
      if (same == keep) return nullptr;
      *same = Sender{};
      same->key = std::move(key);
      return same;
    }
    if (senders_.size() >= kMaxSenders) {
      size_t oldest = senders_.size();
      for (size_t i = 0; i < senders_.size(); i++) {
        if (senders_[i].get() == keep) continue;
        if (oldest == senders_.size() || senders_[i]->heard < senders_[oldest]->heard) oldest = i;
      }
      senders_.erase(senders_.begin() + static_cast<ptrdiff_t>(oldest));
    }
    senders_.push_back(std::make_unique<Sender>());
    senders_.back()->key = std::move(key);
    return senders_.back().get();
  }
  // A server has one life at a time: what had this address before is forgotten.
  void settle(const Sender* now) {
    std::erase_if(senders_, [now](const auto& other) {
      return other.get() != now && same_address(other->address, now->address);
    });
  }
  // Whoever announces itself does so each second: not heard for three, it is most likely dead.
  static constexpr TimeNs kFresh = 3 * kSecond;

  // Whom to turn to instead of the server at `current`: not one that was silent when it was tried
  // last and since; if somebody who answers is looked for (`heard_since`, else 0), one that was
  // heard after that; of those the one tried longest ago; of those one that is complete, or holds
  // most. A server at `own` address serves this very host's replica: never, but for `home`, the one
  // that was set, for a host's clone may be cloned on that host. nullptr: nobody is left.
  Sender* other(const sockaddr_in& current, const in_addr& own, const sockaddr_in& home,
                TimeNs heard_since) {
    Sender* best = nullptr;
    for (auto& sender : senders_) {
      if (sender->address.sin_port == 0 || same_address(sender->address, current)) continue;
      if (excluded(*sender, own, home)) continue;
      if (sender->held == 0 && !sender->complete) continue;
      if (best == nullptr || better(*sender, *best, heard_since)) best = sender.get();
    }
    return best;
  }
  // How many servers other() may choose from, the current one among them.
  size_t usable(const sockaddr_in& current, const in_addr& own, const sockaddr_in& home) const {
    size_t others = 0;
    for (const auto& sender : senders_) {
      if (sender->address.sin_port == 0 || same_address(sender->address, current)) continue;
      if (excluded(*sender, own, home)) continue;
      others += sender->held > 0 || sender->complete ? 1 : 0;
    }
    return others + 1;
  }
  // Of those but the current one, how many were not found silent.
  size_t hopeful(const sockaddr_in& current, const in_addr& own, const sockaddr_in& home) const {
    size_t others = 0;
    for (const auto& sender : senders_) {
      if (sender->address.sin_port == 0 || same_address(sender->address, current)) continue;
      if (excluded(*sender, own, home) || sender->silent()) continue;
      others += sender->held > 0 || sender->complete ? 1 : 0;
    }
    return others;
  }
  size_t size() const { return senders_.size(); }
  Sender* at(const sockaddr_in& address) {
    for (auto& sender : senders_) {
      if (same_address(sender->address, address)) return sender.get();
    }
    return nullptr;
  }

 private:
  static bool excluded(const Sender& sender, const in_addr& own, const sockaddr_in& home) {
    return sender.address.sin_addr.s_addr == own.s_addr && !same_address(sender.address, home);
  }
  static bool better(const Sender& a, const Sender& b, TimeNs heard_since) {
    if (a.silent() != b.silent()) return b.silent();
    const bool fresh = a.heard >= heard_since;
    if (fresh != (b.heard >= heard_since)) return fresh;
    if (a.tried != b.tried) return a.tried < b.tried;
    if (a.complete != b.complete) return a.complete;
    if (a.held != b.held) return a.held > b.held;
    return a.heard > b.heard;
  }

  std::vector<std::unique_ptr<Sender>> senders_;
};

}  // namespace sf::mcdist
