#include "mcdist/policy.h"

#include <algorithm>
#include <cmath>

namespace sf::mcdist {
namespace {

// Which sent pages are remembered, to tell lockstep and loss: for this long, and so many.
constexpr TimeNs kSentMemory = kSecond;
constexpr size_t kSentPages = 65536;
// A client that has not reported for this long is no longer part of the mean.
constexpr TimeNs kReportMemory = 2 * kSecond;

double seconds(TimeNs time) { return static_cast<double>(time) / static_cast<double>(kSecond); }

// Does a send of `had` (0: all) include all that `wanted` (0: all) asks for?
bool covers(uint8_t had, uint8_t wanted) {
  return had == 0 || (wanted != 0 && (wanted & ~had) == 0);
}

}  // namespace

Policy::Verdict Policy::request(uint32_t peer, PageIndex page, Urgency urgency, bool retry,
                                uint8_t fragments, TimeNs now) {
  advance(now);
  const size_t kind = static_cast<size_t>(urgency);
  auto queued = index_.find(page);
  if (queued != index_.end()) {
    Item& item = *queued->second.at;
    item.fragments = item.fragments == 0 || fragments == 0 ? 0 : item.fragments | fragments;
    if (urgency == Urgency::kFault && item.urgency == Urgency::kPrefetch) {
      auto owner = peers_.find(item.peer);
      if (owner != peers_.end() && owner->second.queued[1] > 0) {
        owner->second.queued[1]--;
        owner->second.queued[0]++;
      }
      item.urgency = Urgency::kFault;
      queue_[0].splice(queue_[0].end(), queue_[1], queued->second.at);
    }
    return Verdict::kMerged;
  }
  auto sent = sent_.find(page);
  if (sent != sent_.end() && covers(sent->second.fragments, fragments)) {
    const TimeNs age = now - sent->second.at;
    if (age < (retry ? config_.retry_window : config_.lockstep_window) &&
        sent->second.ignored < config_.lockstep_requests) {
      sent->second.ignored++;
      return Verdict::kLockstep;
    }
  }
  if (retry && sent != sent_.end()) interval_lost_++;
  if (queue_[kind].size() >= config_.queue_pages) return Verdict::kQueueFull;
  Peer& owner = peers_[peer];
  if (owner.queued[kind] >= config_.peer_pages) return Verdict::kPeerFull;
  owner.queued[kind]++;
  queue_[kind].push_back(Item{page, fragments, peer, urgency});
  index_[page] = Entry{std::prev(queue_[kind].end())};
  return Verdict::kQueued;
}

void Policy::report(uint32_t peer, double receive_rate, TimeNs now) {
  Peer& state = peers_[peer];
  state.rate = receive_rate;
  state.reported = now;
}

void Policy::forget(uint32_t peer) { peers_.erase(peer); }

bool Policy::next(TimeNs now, Item* out) {
  advance(now);
  if (tokens_ <= 0) return false;
  for (auto& queue : queue_) {
    if (queue.empty()) continue;
    *out = queue.front();
    queue.pop_front();
    index_.erase(out->page);
    auto owner = peers_.find(out->peer);
    if (owner != peers_.end()) {
      uint32_t& held = owner->second.queued[static_cast<size_t>(out->urgency)];
      if (held > 0) held--;
    }
    return true;
  }
  return false;
}

void Policy::sent(const Item& item, uint64_t wire_bytes, TimeNs now) {
  tokens_ -= static_cast<double>(wire_bytes);
  interval_sent_++;
  sent_[item.page] = Sent{now, 0, item.fragments};
  sent_order_.emplace_back(now, item.page);
  while (!sent_order_.empty() &&
         (sent_order_.size() > kSentPages || now - sent_order_.front().first > kSentMemory)) {
    auto oldest = sent_.find(sent_order_.front().second);
    // A page sent again since has a later entry of its own.
    if (oldest != sent_.end() && oldest->second.at == sent_order_.front().first) {
      sent_.erase(oldest);
    }
    sent_order_.pop_front();
  }
}

TimeNs Policy::ready_at(TimeNs now) const {
  if (index_.empty()) return kNever;
  if (tokens_ > 0) return now;
  return last_ + static_cast<TimeNs>(std::ceil((1 - tokens_) / rate_ * 1e9));
}

double Policy::mean_receive_rate(TimeNs now) const {
  double sum = 0;
  size_t count = 0;
  for (const auto& [id, peer] : peers_) {
    if (now - peer.reported > kReportMemory) continue;
    sum += peer.rate;
    count++;
  }
  return count == 0 ? 0 : sum / static_cast<double>(count);
}

// Two milliseconds' worth: what a timer that wakes late must be able to catch up.
double Policy::burst() const { return std::max(65536.0, rate_ * 0.002); }

void Policy::advance(TimeNs now) {
  if (!started_) {
    started_ = true;
    last_ = interval_start_ = now;
    tokens_ = burst();
  }
  if (now <= last_) return;
  const double elapsed = seconds(now - last_);
  last_ = now;
  rate_ = std::min(config_.max_rate, rate_ + config_.increase_per_s * elapsed);
  tokens_ = std::min(burst(), tokens_ + rate_ * elapsed);

  if (now - interval_start_ < config_.loss_interval || interval_sent_ < config_.loss_min_pages) {
    return;
  }
  size_t clients = 0;
  for (const auto& [id, peer] : peers_) clients += now - peer.reported <= kReportMemory ? 1 : 0;
  const double lost = static_cast<double>(interval_lost_) /
                      static_cast<double>(std::max<size_t>(clients, 1) * interval_sent_);
  if (lost > config_.loss_tolerance) {
    // Never up: a rate the clients have not been seen to receive is no reason to send faster.
    rate_ = std::max(config_.min_rate, std::min(rate_, config_.cut * mean_receive_rate(now)));
    tokens_ = std::min(tokens_, burst());
    cuts_++;
  }
  interval_start_ = now;
  interval_sent_ = interval_lost_ = 0;
}

}  // namespace sf::mcdist
