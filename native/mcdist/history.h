// The order in which pages of a generation were first faulted on, so that later clones are sent
// them first. Bounded: what comes after the bound is not remembered.
//
// One replay for all who ask: it goes through the list once, to the group; who asks while it runs
// makes it go on from the beginning up to where it was.
#pragma once

#include <vector>

#include "mcdist/policy_config.h"

namespace sf::mcdist {

class History {
 public:
  History(uint32_t bound, uint64_t pages)
      : bound_(bound), seen_(bound == 0 ? 0 : (pages + 63) / 64) {}

  void faulted(PageIndex page) {
    if (order_.size() >= bound_) return;
    uint64_t& word = seen_[page / 64];
    const uint64_t bit = uint64_t{1} << (page % 64);
    if ((word & bit) != 0) return;
    word |= bit;
    order_.push_back(page);
  }
  // `peer` wants what others faulted on.
  void replay(uint32_t peer) {
    left_ = order_.size();
    peer_ = replaying() && peer_ != peer ? 0 : peer;
    replaying_ = left_ > 0;
  }
  bool replaying() const { return replaying_; }
  // The only peer that asked, or 0.
  uint32_t peer() const { return peer_; }
  bool next(PageIndex* page) {
    if (!replaying_) return false;
    if (at_ >= order_.size()) at_ = 0;
    *page = order_[at_++];
    if (--left_ == 0) {
      replaying_ = false;
      at_ = 0;
    }
    return true;
  }
  size_t size() const { return order_.size(); }

 private:
  const uint32_t bound_;
  std::vector<uint64_t> seen_;
  std::vector<PageIndex> order_;
  bool replaying_ = false;
  size_t at_ = 0, left_ = 0;
  uint32_t peer_ = 0;
};

}  // namespace sf::mcdist
