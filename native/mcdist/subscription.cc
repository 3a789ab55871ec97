#include "mcdist/subscription.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

namespace sf::mcdist {
namespace {

// Blocks looked at in one call: it is made under a lock that faults need.
constexpr unsigned kMaxLook = 256;

}  // namespace

void Subscription::start(TimeNs now) {
  if (on()) return;
  state_ = State::kWaiting;
  new_server(now);
}

void Subscription::stop() {
  state_ = State::kOff;
  reported_.clear();
  due_.clear();
  given_up_.clear();
  settling_.clear();
}

void Subscription::new_server(TimeNs now) {
  if (!on()) return;
  stop();
  begin(0);
  state_ = State::kWaiting;
  heard_ = now;
}

void Subscription::begin(uint64_t block) {
  state_ = State::kPushed;
  start_ = cursor_ = frontier_ = announced_ = examined_ = block;
  settling_.clear();
  swept_ = 0;
}

void Subscription::passed(uint64_t block) {
  frontier_ = std::max(frontier_, std::min(block, blocks_));
}

void Subscription::end(uint64_t block) {
  passed(block);
  state_ = State::kEnded;
  settling_.clear();
}

void Subscription::pushed(PageIndex page, TimeNs now, uint32_t packets) {
  if (!on()) return;
  const uint64_t block = page / kBlockPages;
  if (state_ != State::kPushed) begin(block);
  heard_ = now;
  if (block > cursor_) {
    cursor_ = block;
    settling_.emplace_back(block, packets_ + 1 + config_.settle_packets);
  }
  packets_ += packets;
  while (!settling_.empty() && settling_.front().second <= packets_) {
    passed(settling_.front().first);
    settling_.pop_front();
  }
}

void Subscription::announced(bool pushing, PageIndex position, TimeNs now) {
  if (!on()) return;
  const uint64_t block = position >= pages_ ? blocks_ : position / kBlockPages;
  if (!pushing) {
    // While waiting: it may not have known yet that we wait. Unless all was pushed before.
    if (state_ == State::kPushed) end(block);
    if (state_ == State::kWaiting && block == blocks_) end(0);
    return;
  }
  if (state_ != State::kPushed) return begin(block);
  heard_ = now;
  // What the announce before told was sent well before this one.
  passed(announced_);
  announced_ = block;
  cursor_ = std::max(cursor_, block);
}

void Subscription::watch(TimeNs now) {
  if (state_ == State::kWaiting && now - heard_ >= config_.begin_wait) end(0);
  if (state_ == State::kPushed && now - heard_ >= config_.silence) end(cursor_);
}

bool Subscription::covers(PageIndex page) const {
  const uint64_t block = page / kBlockPages;
  if (state_ == State::kOff) return false;
  if (state_ == State::kWaiting || reported_.contains(block)) return true;
  if (block >= start_ && block < frontier_) return block >= examined_;
  if (block >= start_ && state_ == State::kPushed) return true;
  return block >= swept_;
}

void Subscription::forget(uint64_t block) {
  auto found = reported_.find(block);
  if (found == reported_.end()) return;
  due_.erase({found->second.due, block});
  reported_.erase(found);
}

void Subscription::arrived(PageIndex page, TimeNs now) {
  if (reported_.empty()) return;
  const uint64_t block = page / kBlockPages;
  auto found = reported_.find(block);
  if (found == reported_.end()) return;
  if (const TimeNs asked = std::exchange(found->second.asked_at, 0); asked != 0) {
    const TimeNs rtt = now - asked;
    const TimeNs error = smoothed_ == 0 ? rtt / 2 : std::abs(rtt - smoothed_);
    variation_ = smoothed_ == 0 ? error : variation_ + (error - variation_) / 4;
    smoothed_ = smoothed_ == 0 ? rtt : smoothed_ + (rtt - smoothed_) / 8;
  }
  BlockReport report;
  report.block = block;
  look_(&report);
  if (report.wanted == 0) forget(block);
}

void Subscription::examine() {
  for (unsigned i = 0; i < kMaxLook; i++) {
    if (examined_ >= frontier_ || reported_.size() >= config_.window) return;
    BlockReport report;
    report.block = examined_++;
    look_(&report);
    looked_ += kBlockPages * report.fragments;
    lost_ += report.missing.count();
    if (report.wanted == 0) continue;
    reported_[report.block] = Reported{};
    due_.insert({0, report.block});
  }
}

void Subscription::collect(TimeNs now, TimeNs timeout, size_t max, std::vector<BlockReport>* out) {
  if (!on()) return;
  watch(now);
  examine();
  if (state_ == State::kPushed && now - sent_at_ < config_.gap) {
    size_t ready = 0;
    for (auto it = due_.begin(); it != due_.end() && it->first <= now; ++it) {
      if (++ready >= config_.gap_reports) break;
    }
    if (ready < config_.gap_reports) return;
  }
  // While it is pushed a block asked again too soon counts as lost twice, and slows the push.
  if (smoothed_ != 0 && state_ == State::kEnded) {
    timeout = std::max(config_.timeout_min, smoothed_ + 4 * variation_);
  }
  const size_t before = out->size();
  while (!due_.empty() && due_.begin()->first <= now && out->size() < max) {
    BlockReport report;
    report.block = due_.begin()->second;
    look_(&report);
    Reported& state = reported_.find(report.block)->second;
    const unsigned left = report.missing.count() + report.need;
    if (state.tries == 0 || left < state.missing) state.tries = 0;
    if (report.wanted == 0 || state.tries >= config_.tries) {
      if (report.wanted != 0) given_up_.push_back(report.block);
      forget(report.block);
      continue;
    }
    state.missing = left;
    due_.erase(due_.begin());
    state.due = now + (timeout << std::min<unsigned>(state.tries, 3));
    state.asked_at = state.tries == 0 ? now : 0;
    state.tries++;
    due_.insert({state.due, report.block});
    out->push_back(report);
  }
  if (out->size() == before) return;
  sent_at_ = now;
  reports_sent_ += out->size() - before;
}

bool Subscription::sweep(uint64_t* block) {
  if (state_ != State::kPushed && state_ != State::kEnded) return false;
  if (!given_up_.empty()) {
    *block = given_up_.front();
    given_up_.pop_front();
    return true;
  }
  for (;;) {
    if (swept_ >= start_ && swept_ < frontier_) swept_ = frontier_;
    if (swept_ >= blocks_ || (state_ == State::kPushed && swept_ >= start_)) return false;
    *block = swept_++;
    if (!reported_.contains(*block)) return true;
  }
}

bool Subscription::done() const {
  return state_ == State::kEnded && reported_.empty() && given_up_.empty() &&
         examined_ >= frontier_ &&
         (swept_ >= blocks_ || (swept_ >= start_ && frontier_ >= blocks_));
}

TimeNs Subscription::due_at(TimeNs last_sent) const {
  if (!on()) return kNever;
  if (examined_ < frontier_ && reported_.size() < config_.window) return 0;
  TimeNs due = last_sent + config_.keepalive;
  if (state_ == State::kWaiting) due = std::min(due, heard_ + config_.begin_wait);
  if (state_ == State::kPushed) due = std::min(due, heard_ + config_.silence);
  if (due_.empty()) return due;
  const TimeNs report = due_.begin()->first;
  return std::min(due,
                  state_ == State::kPushed ? std::max(report, sent_at_ + config_.gap) : report);
}

bool Subscription::keepalive(TimeNs now, TimeNs last_sent) const {
  return on() && now - last_sent >= config_.keepalive;
}

void Subscription::take_loss(uint64_t* lost, uint64_t* sent) {
  *lost = lost_;
  *sent = looked_;
  lost_ = looked_ = 0;
}

}  // namespace sf::mcdist
