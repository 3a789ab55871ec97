// The members a server has heard of, and what makes their requests fresh: a packet counts only if
// it carries the cookie this server gave its sender and a counter not seen from it. So a recorded
// request, sent again by anyone from anywhere (also after a restart of the server, also after the
// peer's entry was evicted) moves no page; it gets at most a welcome, which is no longer than it.
#pragma once

#include <netinet/in.h>

#include <list>
#include <memory>
#include <unordered_map>

#include "mcdist/policy.h"
#include "mcdist/wire.h"

namespace sf::mcdist {

struct Peer {
  BootId boot{};
  uint32_t id = 0;  // never given twice
  uint64_t cookie = 0;
  ReplayWindow window;
  std::unique_ptr<SenderKey> key;
  sockaddr_in address = {};  // its last fresh request came from there
  TimeNs heard = 0;
};

class PeerTable {
 public:
  static constexpr size_t kMaxPeers = 16384;
  // Who was heard since keeps its place: with more members than places, each newcomer would
  // otherwise push out one that is about to ask, and all would be greeted and nobody answered.
  static constexpr TimeNs kKeep = 5 * kSecond;

  Peer* find(const BootId& boot, TimeNs now) {
    auto found = index_.find(boot);
    if (found == index_.end()) return nullptr;
    order_.splice(order_.begin(), order_, found->second);
    found->second->heard = now;
    return &*found->second;
  }
  // nullptr: evicted.
  Peer* find(uint32_t id) {
    auto found = ids_.find(id);
    return found == ids_.end() ? nullptr : &*found->second;
  }
  bool room(TimeNs now) const {
    return order_.size() < kMaxPeers || now - order_.back().heard >= kKeep;
  }
  // If there is room. The peer heard longest ago makes it; its id is written to `evicted` (0:
  // none).
  Peer& admit(std::unique_ptr<SenderKey> key, uint64_t cookie, TimeNs now, uint32_t* evicted) {
    *evicted = 0;
    if (order_.size() >= kMaxPeers) {
      *evicted = order_.back().id;
      index_.erase(order_.back().boot);
      ids_.erase(order_.back().id);
      order_.pop_back();
    }
    const BootId boot = key->boot();
    order_.push_front(Peer{boot, ++last_id_, cookie, {}, std::move(key), {}, now});
    index_[boot] = ids_[last_id_] = order_.begin();
    return order_.front();
  }
  size_t size() const { return order_.size(); }

 private:
  std::list<Peer> order_;  // heard last first
  std::unordered_map<BootId, std::list<Peer>::iterator, IdHash> index_;
  std::unordered_map<uint32_t, std::list<Peer>::iterator> ids_;
  uint32_t last_id_ = 0;
};

}  // namespace sf::mcdist
