// Pages nobody asked for yet. A cursor walks the generation for those who want all of it; or, the
// paper's way, counters start behind each requested page. One bitmap of what the group was sent,
// by whatever way, so that nothing is pushed twice.
//
// A round of the cursor: idle -> waiting (push_delay) -> running -> idle, and back
// to running if all who listened were silent for a time. The next round begins with
// an empty bitmap, for somebody who took part in none, when nobody else is subscribed: to the
// others the pages would come twice. Who joins while a round runs gets the rest of it and asks for
// what was before.
#pragma once

#include <algorithm>
#include <bit>
#include <vector>

#include "mcdist/policy_config.h"

namespace sf::mcdist {

class Push {
 public:
  Push(const PolicyConfig& config, uint64_t pages)
      : config_(config), pages_(pages), sent_((pages + 63) / 64) {
    for (const PageRange& range : config.disjoint) {
      const PageIndex end =
          range.count > pages - std::min(range.first, pages) ? pages : range.first + range.count;
      if (disjoint_.empty()) disjoint_.resize(sent_.size());
      for (PageIndex page = range.first; page < end; page++) set(&disjoint_, page);
    }
  }

  void begin(TimeNs now, bool fresh) {
    if (fresh) {
      std::fill(sent_.begin(), sent_.end(), 0);
      sent_count_ = 0;
    }
    round_++;
    position_ = 0;
    begun_ = now;
    starts_ = now + config_.push_delay;
    running_ = true;
  }
  void start_at(TimeNs at) { starts_ = at; }
  TimeNs begun() const { return begun_; }
  void stop() { running_ = false; }  // nobody listens
  void resume() { running_ = position_ < pages_; }
  bool running() const { return running_; }
  TimeNs starts() const { return starts_; }
  uint64_t round() const { return round_; }
  // The cursor's next page: all before it were sent, or cannot be.
  PageIndex position() const { return position_; }
  // False: the end; the round is over.
  bool next(PageIndex* page) {
    position_ = unsent(position_);
    if (position_ >= pages_) {
      position_ = pages_;
      running_ = false;
      return false;
    }
    *page = position_++;
    return true;
  }

  // The paper's counters: one starts behind each requested page, unless that was sent.
  void requested(PageIndex page) {
    if (config_.push != PushMode::kBehind || ++page >= pages_ || has(sent_, page)) return;
    if (std::find(counters_.begin(), counters_.end(), page) != counters_.end()) return;
    if (counters_.size() >= config_.push_counters) {
      counters_[oldest_++ % counters_.size()] = page;
    } else {
      counters_.push_back(page);
    }
  }
  bool counting() const { return !counters_.empty(); }
  // `counter`: which, from 0. Each in turn.
  bool next_behind(PageIndex* page, uint8_t* counter) {
    while (!counters_.empty()) {
      turn_ = (turn_ + 1) % counters_.size();
      const PageIndex at = unsent(counters_[turn_]);
      if (at < pages_) {
        counters_[turn_] = at + 1;
        *page = at;
        *counter = static_cast<uint8_t>(turn_);
        return true;
      }
      counters_.erase(counters_.begin() + static_cast<std::ptrdiff_t>(turn_));
    }
    return false;
  }

  void sent(PageIndex page) {
    if (has(sent_, page)) return;
    set(&sent_, page);
    sent_count_++;
  }
  bool was_sent(PageIndex page) const { return has(sent_, page); }
  uint64_t sent_count() const { return sent_count_; }
  bool disjoint(PageIndex page) const { return !disjoint_.empty() && has(disjoint_, page); }

 private:
  using Bits = std::vector<uint64_t>;
  static bool has(const Bits& bits, PageIndex i) { return (bits[i / 64] >> (i % 64) & 1) != 0; }
  static void set(Bits* bits, PageIndex i) { (*bits)[i / 64] |= uint64_t{1} << (i % 64); }
  // The first page from `page` that may be pushed, or one past the end.
  PageIndex unsent(PageIndex page) const {
    for (size_t word = page / 64; word < sent_.size(); word++) {
      uint64_t open = ~(sent_[word] | (disjoint_.empty() ? 0 : disjoint_[word]));
      if (word == page / 64) open &= ~uint64_t{0} << (page % 64);
      if (open != 0) return word * 64 + static_cast<unsigned>(std::countr_zero(open));
    }
    return pages_;
  }

  const PolicyConfig& config_;
  const uint64_t pages_;
  Bits sent_, disjoint_;  // disjoint_ is empty if there are no such ranges
  uint64_t sent_count_ = 0;
  PageIndex position_ = 0;
  TimeNs begun_ = 0, starts_ = 0;
  uint64_t round_ = 0;
  bool running_ = false;
  std::vector<PageIndex> counters_;
  size_t turn_ = 0, oldest_ = 0;
};

}  // namespace sf::mcdist
