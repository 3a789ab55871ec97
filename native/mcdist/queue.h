// The pages a server has been asked for and not sent yet.
//
// Invariants:
//  - A page is at most once in the queue for the group, and once for each peer that is answered by
//    unicast; requests for a queued page merge into that entry.
//  - Urgent before prefetch; within each, first come first served.
//  - Bounded: each of urgent and prefetch, and what one peer has in either.
#pragma once

#include <cstddef>
#include <list>
#include <unordered_map>

#include "mcdist/policy_config.h"

namespace sf::mcdist {

// A page and who gets it: a peer (unicast) or 0, the group.
struct Target {
  PageIndex page = 0;
  uint32_t peer = 0;
  bool operator==(const Target& other) const = default;
};
struct TargetHash {
  size_t operator()(const Target& t) const {
    return static_cast<size_t>((t.page ^ uint64_t{t.peer} << 40) * 0x9e3779b97f4a7c15U);
  }
};

class PageQueue {
 public:
  enum class Verdict : uint8_t { kQueued, kMerged, kQueueFull, kPeerFull };
  struct Entry {
    Target target;
    uint8_t fragments = 0;  // mask of fragments wanted; 0: all
    uint32_t owner = 0;     // the peer that asked first
    Urgency urgency = Urgency::kFault;
  };

  PageQueue(uint32_t queue_pages, uint32_t peer_pages)
      : queue_pages_(queue_pages), peer_pages_(peer_pages) {}

  // Merged if it is queued already: then with the fragments of both and the greater urgency.
  bool merge(const Target& target, Urgency urgency, uint8_t fragments);
  Verdict add(const Entry& entry);
  bool pop(Urgency urgency, Entry* out);
  bool empty(Urgency urgency) const { return queue_[static_cast<size_t>(urgency)].empty(); }
  size_t size() const { return index_.size(); }

 private:
  struct Share {
    uint32_t queued[2] = {0, 0};
  };
  void release(uint32_t owner, size_t kind);

  const uint32_t queue_pages_;
  const uint32_t peer_pages_;
  std::list<Entry> queue_[2];  // by Urgency
  std::unordered_map<Target, std::list<Entry>::iterator, TargetHash> index_;
  std::unordered_map<uint32_t, Share> shares_;  // of peers that have something queued
};

}  // namespace sf::mcdist
