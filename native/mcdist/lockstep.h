// Which pages were sent a moment ago, and to whom: hosts that run the same clone ask for the same
// pages at the same time, and one answer feeds them all (paper section 3.5, lockstep detection).
// Bounded in time and number; what is forgotten costs a page sent twice.
#pragma once

#include <algorithm>
#include <deque>
#include <unordered_map>
#include <utility>

#include "mcdist/queue.h"

namespace sf::mcdist {

class SentMemory {
 public:
  static constexpr TimeNs kMemory = kSecond;
  static constexpr size_t kPages = 65536;

  explicit SentMemory(const PolicyConfig& config)
      : window_(config.lockstep_window),
        requests_(config.lockstep_requests),
        flight_window_(config.flight_window),
        retry_window_(config.retry_window) {}

  enum class Verdict : uint8_t {
    kUnknown,  // not sent lately
    kIgnore,   // on its way
    kLost,     // sent, and asked again: this packet was lost, or is late
  };
  struct Question {
    bool retry = false;
    uint8_t fragments = 0;  // 0: all
    // Who names fragments saw the answer and lost part of it. Not said of subscribers, who report
    // it as well: what repairs the block is on its way.
    bool lost_part = false;
    TimeNs met = 0;  // when the peer that asks was first heard
  };
  // `peers`: that are known.
  Verdict ask(const Target& target, const Question& question, size_t peers, TimeNs now) {
    auto found = sent_.find(target);
    if (found == sent_.end()) return Verdict::kUnknown;
    Sent& sent = found->second;
    const bool part = question.lost_part;
    TimeNs window = window_;
    if (part || sent.at < question.met) window = std::min(window, flight_window_);
    // Parts sent again meet those of others that lost them, who are late by their switch's queue.
    if (question.retry || (part && sent.fragments != 0)) window = retry_window_;
    if (covers(sent.fragments, question.fragments) && now - sent.at < window &&
        sent.ignored < std::max<size_t>(requests_, 2 * peers)) {
      sent.ignored++;
      return Verdict::kIgnore;
    }
    return question.retry || part ? Verdict::kLost : Verdict::kUnknown;
  }

  // Whole, after `since`, as far as that is remembered.
  bool sent_since(const Target& target, TimeNs since) const {
    const auto found = sent_.find(target);
    return found != sent_.end() && found->second.at > since && found->second.fragments == 0;
  }

  void sent(const Target& target, uint8_t fragments, TimeNs now) {
    auto [at, fresh] = sent_.try_emplace(target);
    const Sent& before = at->second;
    // Parts sent shortly after each other count as one.
    const bool more =
        !fresh && fragments != 0 && before.fragments != 0 && now - before.at < retry_window_;
    at->second =
        Sent{now, 0, static_cast<uint8_t>(more ? fragments | before.fragments : fragments)};
    order_.emplace_back(now, target);
    while (!order_.empty() && (order_.size() > kPages || now - order_.front().first > kMemory)) {
      auto oldest = sent_.find(order_.front().second);
      // A page sent again since has a later entry of its own.
      if (oldest != sent_.end() && oldest->second.at == order_.front().first) sent_.erase(oldest);
      order_.pop_front();
    }
  }

 private:
  struct Sent {
    TimeNs at = 0;
    uint32_t ignored = 0;
    uint8_t fragments = 0;  // 0: all
  };
  // Does a send of `had` (0: all) include all that `wanted` (0: all) asks for?
  static bool covers(uint8_t had, uint8_t wanted) {
    return had == 0 || (wanted != 0 && (wanted & ~had) == 0);
  }

  const TimeNs window_;
  const uint32_t requests_;
  const TimeNs flight_window_;
  const TimeNs retry_window_;
  std::unordered_map<Target, Sent, TargetHash> sent_;
  std::deque<std::pair<TimeNs, Target>> order_;
};

}  // namespace sf::mcdist
