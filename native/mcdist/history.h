// The order in which pages of a generation were first faulted on, so that later clones are sent
// them before they ask.
//
// Kept over forks: the record of one generation begins that of the next one of the same VM or disk
// (entries(), then the seed), by page number: a page that was written since is sent as it is now. A
// page sent from the record causes no fault, so nobody can tell whether it was of use. Hence each
// entry has an age, the generations since it was last faulted on. After kMaxAge it is left out; if
// it is still of use, the first clone that faults on it brings it back.
//
// One replay for all who ask: it goes through the list once, to the group, or to the only one that
// asked; who asks while it runs makes it go on from the beginning up to where it was.
//
// Bounded by a number of entries: what comes after is not remembered.
#pragma once

#include <unordered_map>
#include <vector>

#include "mcdist/policy_config.h"

namespace sf::mcdist {

class History {
 public:
  static constexpr uint8_t kMaxAge = 8;

  // Of `seed`, what lies beyond the generation's end is left out.
  History(uint32_t bound, uint64_t pages, const std::vector<HistoryEntry>& seed) : bound_(bound) {
    for (const HistoryEntry& entry : seed) {
      if (entry.page >= pages || entry.age >= kMaxAge) continue;
      add(entry.page, static_cast<uint8_t>(entry.age + 1));
    }
  }

  void faulted(PageIndex page) {
    if (bound_ == 0) return;
    if (const auto known = place_.find(page); known != place_.end()) {
      order_[known->second].age = 0;
      return;
    }
    add(page, 0);
  }
  // `peer` wants what others faulted on. Begins after `delay`, since hosts of a fork ask together.
  void replay(uint32_t peer, TimeNs delay, TimeNs now) {
    if (!replaying_) starts_ = now + delay;
    left_ = order_.size();
    peer_ = replaying() && peer_ != peer ? 0 : peer;
    replaying_ = left_ > 0;
    asked_at_ = now;
  }
  bool replaying() const { return replaying_; }
  TimeNs starts() const { return starts_; }
  // The only peer that asked, or 0.
  uint32_t peer() const { return peer_; }
  // When the last one asked: what the group was sent since all of them were sent.
  TimeNs asked_at() const { return asked_at_; }
  bool next(PageIndex* page) {
    if (!replaying_) return false;
    if (at_ >= order_.size()) at_ = 0;
    *page = order_[at_++].page;
    if (--left_ == 0) {
      replaying_ = false;
      at_ = 0;
    }
    return true;
  }
  size_t size() const { return order_.size(); }
  const std::vector<HistoryEntry>& entries() const { return order_; }

 private:
  void add(PageIndex page, uint8_t age) {
    if (order_.size() >= bound_) return;
    if (!place_.try_emplace(page, static_cast<uint32_t>(order_.size())).second) return;
    order_.push_back({page, age});
  }

  const uint32_t bound_;
  std::vector<HistoryEntry> order_;
  std::unordered_map<PageIndex, uint32_t> place_;  // in order_
  bool replaying_ = false;
  size_t at_ = 0, left_ = 0;
  uint32_t peer_ = 0;
  TimeNs asked_at_ = 0, starts_ = 0;
};

}  // namespace sf::mcdist
