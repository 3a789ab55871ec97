#include "mcdist/requester.h"

#include <algorithm>
#include <bit>

namespace sf::mcdist {
namespace {

// Pages of prefetch ranges looked at in one call: it is made under a lock that faults need.
constexpr size_t kMaxLook = 16384;
constexpr unsigned kMaxBackoff = 8;
constexpr uint64_t kLossMemory = 4096;  // symbols or pages

}  // namespace

void Requester::Rtt::sample(TimeNs rtt) {
  backoff = 1;
  if (!known) {
    known = true;
    smoothed = rtt;
    variation = rtt / 2;
    return;
  }
  const TimeNs error = rtt > smoothed ? rtt - smoothed : smoothed - rtt;  // RFC 6298
  variation += (error - variation) / 4;
  smoothed += (rtt - smoothed) / 8;
}

TimeNs Requester::timeout(Urgency urgency) const {
  const Rtt* rtt = &rtt_[static_cast<size_t>(urgency)];
  const unsigned backoff = rtt->backoff;
  if (!rtt->known) rtt = &rtt_[0];
  if (!rtt->known) return config_.rto_initial;
  const TimeNs least = urgency == Urgency::kFault ? config_.rto_min : config_.rto_min_prefetch;
  const TimeNs base = std::max(rtt->smoothed + 4 * rtt->variation, least);
  return std::min(base * backoff, config_.rto_max);
}

void Requester::round_trip(TimeNs rtt) {
  if (!rtt_[0].known) rtt_[0].sample(rtt);
}

void Requester::set_due(PageIndex page, Page* state, TimeNs due) {
  if (state->due != kNever) due_.erase({state->due, page});
  state->due = due;
  if (due != kNever) due_.insert({due, page});
}

void Requester::erase(Pages::iterator it) {
  set_due(it->first, &it->second, kNever);
  if (it->second.asked) in_flight_[static_cast<size_t>(it->second.urgency)]--;
  if (it->second.urgency == Urgency::kFault) fault_since_.erase({it->second.since, it->first});
  pages_.erase(it);
}

bool Requester::want(PageIndex page, Urgency urgency, TimeNs now) {
  auto found = pages_.find(page);
  if (found == pages_.end()) {
    Page state;
    state.urgency = urgency;
    state.since = now;
    pages_.emplace(page, state);
    if (urgency == Urgency::kFault) {
      fault(page, &pages_.find(page)->second, now);
    } else {
      fresh_[1].push_back(page);
    }
    return true;
  }
  Page& state = found->second;
  if (urgency == Urgency::kPrefetch || state.urgency == Urgency::kFault) return false;
  // Now somebody waits for it. Asked again at once, so that the server moves it to the front; that
  // is no retry: nothing was lost.
  if (state.asked) in_flight_[1]--;
  state.asked = false;
  state.urgency = Urgency::kFault;
  state.since = now;
  set_due(page, &state, kNever);
  fault(page, &state, now);
  return true;
}

void Requester::fault(PageIndex page, Page* state, TimeNs now) {
  fault_since_.insert({now, page});
  if (peers_ <= config_.crowd_peers) return fresh_[0].push_back(page);
  random_ ^= random_ << 13;  // xorshift64
  random_ ^= random_ >> 7;
  random_ ^= random_ << 17;
  const auto most = static_cast<uint64_t>(peers_ * config_.crowd_delay);
  set_due(page, state, now + static_cast<TimeNs>(random_ % (most + 1)));
}

bool Requester::prefetch(PageIndex first, uint64_t count) {
  if (count == 0) return true;
  if (!ranges_.empty() && ranges_.back().first + ranges_.back().second == first) {
    ranges_.back().second += count;
    return true;
  }
  if (ranges_.size() >= config_.max_ranges) return false;
  ranges_.emplace_back(first, count);
  return true;
}

// The window grows while answers come soon, shrinks while they come late, and halves when more than
// a quarter of a window timed out: random loss is no congestion, overflowing buffers lose far more.
void Requester::outcome(bool lost) {
  (lost ? epoch_losses_ : epoch_answers_)++;
  const uint32_t events = epoch_losses_ + epoch_answers_;
  if (events < window_) return;
  if (epoch_losses_ * 4 > events) {
    window_ = std::max(config_.prefetch_window_min, window_ / 2);
    slow_start_ = false;
  } else if (rtt_[1].smoothed > config_.prefetch_delay) {
    window_ = std::max(config_.prefetch_window_min, window_ - window_ / 4);
    slow_start_ = false;
  } else {
    window_ = std::min(config_.prefetch_window_max, slow_start_ ? window_ * 2 : window_ + 16);
  }
  epoch_answers_ = epoch_losses_ = 0;
}

bool Requester::arrived(PageIndex page, TimeNs now) {
  if (subscription_.on()) subscription_.arrived(page, now);
  auto found = pages_.find(page);
  if (found == pages_.end()) return false;
  const Page& state = found->second;
  if (state.asked && state.tries == 0 && state.negatives == 0) {
    rtt_[static_cast<size_t>(state.urgency)].sample(now - state.asked_at);
    loss(0, 1);
  }
  if (state.urgency == Urgency::kPrefetch && state.asked) outcome(false);
  erase(found);
  return true;
}

Requester::Refusal Requester::refused(PageIndex page, TimeNs now, uint32_t servers) {
  auto found = pages_.find(page);
  if (found == pages_.end()) return Refusal::kUnknown;
  Page& state = found->second;
  if (!state.asked || state.refused) return Refusal::kAgain;
  state.refused = true;
  const uint32_t round = ++state.negatives / servers;
  if (round >= config_.negative_tries) {
    erase(found);
    return Refusal::kGiveUp;
  }
  // A source that is itself being filled may hold it soon.
  const bool all = state.negatives % servers == 0;
  set_due(page, &state, all ? now + (config_.rto_min << (round - 1)) : now);
  return Refusal::kAgain;
}

void Requester::forget(PageIndex page) {
  auto found = pages_.find(page);
  if (found != pages_.end()) erase(found);
}

void Requester::clear() {
  pages_.clear();
  due_.clear();
  fault_since_.clear();
  fresh_[0].clear();
  fresh_[1].clear();
  ranges_.clear();
  in_flight_[0] = in_flight_[1] = 0;
  subscription_.stop();
}

void Requester::subscribe(bool on, TimeNs now) {
  if (!on) return subscription_.stop();
  if (subscription_.on()) return;
  ranges_.clear();
  subscription_.start(now);
  last_sent_ = 0;  // say so at once
}

void Requester::new_server(TimeNs now) {
  subscription_.new_server(now);
  ask_again(now);
}

void Requester::loss(uint64_t lost, uint64_t sent) {
  lost_ += lost;
  sent_ += sent;
  if (sent_ <= kLossMemory) return;
  lost_ /= 2;
  sent_ /= 2;
}

uint16_t Requester::loss_permille() {
  uint64_t lost, sent;
  subscription_.take_loss(&lost, &sent);
  loss(lost, sent);
  return sent_ == 0 ? 0 : static_cast<uint16_t>(lost_ * 1000 / sent_);
}

void Requester::collect_reports(TimeNs now, size_t max, std::vector<BlockReport>* out) {
  // Not sooner than the server's own wait for other clients' reports, and its queue, allow.
  const TimeNs timeout = std::max(this->timeout(Urgency::kPrefetch), config_.rto_min_prefetch);
  subscription_.collect(now, timeout, max, out);
}

void Requester::mark_asked(PageIndex page, Page* state, TimeNs now) {
  TimeNs wait = timeout(state->urgency);
  for (uint8_t i = 0; i < state->tries && wait < config_.rto_max; i++) wait *= 2;
  if (!state->asked) in_flight_[static_cast<size_t>(state->urgency)]++;
  state->asked = true;
  state->refused = false;
  state->asked_at = now;
  set_due(page, state, now + std::min(wait, config_.rto_max));
}

bool Requester::ask_now(PageIndex page, TimeNs now, Run* out) {
  auto found = pages_.find(page);
  if (found == pages_.end() || found->second.asked || found->second.due != kNever) return false;
  const size_t kind = static_cast<size_t>(found->second.urgency);
  if (kind != 0 || in_flight_[kind] >= config_.fault_window) return false;
  mark_asked(page, &found->second, now);
  *out = Run{};
  out->first = page;
  out->urgent = true;
  return true;
}

void Requester::ask(PageIndex page, Page* state, TimeNs now, bool retry, std::vector<Run>* out) {
  mark_asked(page, state, now);
  Run run;
  run.first = page;
  run.urgent = state->urgency == Urgency::kFault;
  run.retry = retry;
  run.fragments = missing_(page);
  if (!out->empty() && run.fragments == 0) {
    Run& last = out->back();
    if (last.fragments == 0 && last.first + last.count == page && last.count < kMaxRunPages &&
        last.urgent == run.urgent && last.retry == run.retry) {
      last.count++;
      return;
    }
  }
  out->push_back(run);
}

void Requester::collect_timeouts(TimeNs now, size_t max_runs, std::vector<Run>* out) {
  while (!due_.empty() && due_.begin()->first <= now && out->size() < max_runs) {
    const PageIndex page = due_.begin()->second;
    auto found = pages_.find(page);
    Page& state = found->second;
    if (present_(page)) {  // by someone else than the network, e.g. a zero map
      erase(found);
      continue;
    }
    if (!state.asked) {  // held back
      set_due(page, &state, kNever);
      fresh_[0].push_back(page);
      continue;
    }
    // After a negative answer nothing was lost: the question is simply put again.
    const bool lost = state.negatives == 0;
    if (!state.refused) retries_++;
    if (lost) {
      if (state.tries < 255) state.tries++;
      loss(1, 1);
      Rtt& rtt = rtt_[static_cast<size_t>(state.urgency)];
      if (rtt.backoff < kMaxBackoff && now - rtt.backed_off_at > config_.rto_min) {
        rtt.backoff *= 2;
        rtt.backed_off_at = now;
      }
      if (state.urgency == Urgency::kPrefetch) outcome(true);
    }
    ask(page, &state, now, true, out);
  }
}

void Requester::collect(TimeNs now, bool drained, size_t max_runs, std::vector<Run>* out) {
  more_ = false;
  if (drained) collect_timeouts(now, max_runs, out);
  for (size_t kind = 0; kind < (drained ? 2 : 1); kind++) {
    const uint32_t window = kind == 0 ? config_.fault_window : window_;
    auto& fresh = fresh_[kind];
    while (!fresh.empty() && in_flight_[kind] < window && out->size() < max_runs) {
      const PageIndex page = fresh.front();
      fresh.pop_front();
      auto found = pages_.find(page);
      if (found == pages_.end() || found->second.asked ||
          static_cast<size_t>(found->second.urgency) != kind) {
        continue;
      }
      if (present_(page)) {
        erase(found);
        continue;
      }
      ask(page, &found->second, now, false, out);
    }
  }
  if (!drained) return;
  // Many pages in few requests: wait until a quarter of the window is free.
  if (in_flight_[1] > window_ - window_ / 4) return;
  collect_ranges(now, max_runs, out);
  collect_sweep(now, max_runs, out);
}

void Requester::collect_ranges(TimeNs now, size_t max_runs, std::vector<Run>* out) {
  size_t looked = 0;
  while (!ranges_.empty() && in_flight_[1] < window_ && out->size() < max_runs) {
    if (++looked > kMaxLook) {
      more_ = true;
      break;
    }
    auto& range = ranges_.front();
    const PageIndex page = range.first++;
    if (--range.second == 0) ranges_.pop_front();
    if (present_(page) || pages_.contains(page) || subscription_.covers(page)) continue;
    Page state;
    state.urgency = Urgency::kPrefetch;
    state.since = now;
    auto added = pages_.emplace(page, state).first;
    ask(page, &added->second, now, false, out);
  }
}

void Requester::collect_sweep(TimeNs now, size_t max_runs, std::vector<Run>* out) {
  if (!subscription_.on()) return;
  for (size_t looked = 0; in_flight_[1] < window_ && out->size() + kBlockPages <= max_runs;) {
    BlockReport block;
    if (++looked > kMaxLook / kBlockPages) {
      more_ = true;
      return;
    }
    if (!subscription_.sweep(&block.block)) break;
    look_(&block);
    for (uint32_t wanted = block.wanted; wanted != 0; wanted &= wanted - 1) {
      const PageIndex page =
          block.block * kBlockPages + static_cast<PageIndex>(std::countr_zero(wanted));
      if (pages_.contains(page)) continue;
      Page state;
      state.urgency = Urgency::kPrefetch;
      state.since = now;
      auto added = pages_.emplace(page, state).first;
      ask(page, &added->second, now, false, out);
    }
  }
  if (subscription_.done()) subscription_.stop();
}

TimeNs Requester::due_at() const {
  return std::min(due_.empty() ? kNever : due_.begin()->first, subscription_.due_at(last_sent_));
}

void Requester::ask_again(TimeNs now) {
  std::vector<PageIndex> asked;
  for (const auto& entry : due_) asked.push_back(entry.second);
  for (PageIndex page : asked) {
    Page& state = pages_.find(page)->second;
    state.tries = 0;
    set_due(page, &state, now);
  }
}

bool Requester::oldest_fault(PageIndex* page, TimeNs* since) const {
  if (fault_since_.empty()) return false;
  *since = fault_since_.begin()->first;
  *page = fault_since_.begin()->second;
  return true;
}

}  // namespace sf::mcdist
