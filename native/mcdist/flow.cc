#include "mcdist/flow.h"

#include <algorithm>
#include <cmath>

namespace sf::mcdist {
namespace {

// A window in which less than this share of the rate was sent does not show that the rate is good:
// there was nothing to send, or the local link was slower.
constexpr double kFull = 0.7;
// And below this share of the start, what is lost is no matter of the rate.
constexpr double kTellingShare = 0.25;
// Clients that take less than this share of what is sent, for so many windows in a row, are too
// slow even if their buffers still hold it. Their own estimates lag by two or three windows.
constexpr double kSlowShare = 0.7;
constexpr uint32_t kSlowWindows = 5;
constexpr double kLag = 1.2;
constexpr double kMaxNoise = 0.5;
// Less than this share of the rate left although the send buffer was full.
constexpr double kLinkShare = 0.95;
constexpr double kStartGrowth = 2;

double seconds(TimeNs time) { return static_cast<double>(time) / static_cast<double>(kSecond); }

}  // namespace

void FlowControl::advance(TimeNs now) {
  if (!started_) {
    started_ = true;
    last_ = window_start_ = now;
    tokens_ = burst();
  }
  if (now <= last_) return;
  const double elapsed = seconds(now - last_);
  last_ = now;
  if (!local_limit_) rate_ = std::min(config_.max_rate, rate_ + config_.increase_per_s * elapsed);
  tokens_ = std::min(burst(), tokens_ + rate_ * elapsed);
}

TimeNs FlowControl::ready_at(TimeNs now) const {
  if (tokens_ > 0) return now;
  return last_ + static_cast<TimeNs>(std::ceil((1 - tokens_) / rate_ * 1e9));
}

void FlowControl::sent(uint64_t wire_bytes, uint64_t symbols, bool group) {
  tokens_ -= static_cast<double>(wire_bytes);
  bytes_ += wire_bytes;
  if (!group) return;
  group_bytes_ += wire_bytes;
  symbols_ += symbols;
}

void FlowControl::enter(State state, double rate, uint32_t settle) {
  state_ = state;
  rate_ = std::clamp(rate, config_.min_rate, config_.max_rate);
  tokens_ = std::min(tokens_, burst());
  settle_ = settle;
}

void FlowControl::congested(double loss, double delivered) {
  cuts_++;
  before_ = state_ == State::kStart ? State::kStart : State::kCruise;
  rate_before_ = rate_;
  loss_before_ = loss;
  delivered_ = delivered;
  slow_windows_ = 0;
  // Never up: a rate the clients have not been seen to receive is no reason to send faster.
  enter(State::kDrain, std::min(rate_, config_.cut * delivered), 1);
}

void FlowControl::judge(const Audience::Summary& heard, TimeNs now) {
  const double elapsed = seconds(now - window_start_);
  const double sent_rate = static_cast<double>(bytes_) / elapsed;
  const double group_rate = static_cast<double>(group_bytes_) / elapsed;
  const uint64_t symbols = symbols_;
  window_++;
  window_start_ = now;
  bytes_ = group_bytes_ = symbols_ = 0;
  local_limit_ = waited_ && sent_rate < kLinkShare * rate_;
  waited_ = false;
  smooth_ += 0.3 * (group_rate - smooth_);  // over about as long as the clients' own estimate
  if (settle_ > 0) {
    settle_--;
    return;
  }
  if (symbols < config_.window_symbols || heard.peers == 0) {
    slow_windows_ = 0;
    // A drain that sent nothing has drained.
    if (state_ == State::kDrain) enter(State::kCruise, config_.recover * delivered_, 1);
    if (state_ == State::kProbe) enter(State::kCruise, rate_before_, 0);
    return;
  }
  const bool full = sent_rate >= kFull * rate_;
  // Clients too slow look like a loss of what they did not take.
  const double taken = smooth_ > 0 ? heard.receive_rate / smooth_ / (1 - noise_) : 1;
  const bool telling = full || group_rate >= kTellingShare * config_.start_rate;
  slow_windows_ = telling && taken < kSlowShare ? slow_windows_ + 1 : 0;
  const bool slow = slow_windows_ >= kSlowWindows;
  const double loss = slow ? std::max(heard.loss, 1 - taken) : heard.loss;
  // Three standard deviations of what noise alone would give in one client's window.
  const double spread = 3 * std::sqrt(noise_ * (1 - noise_) / static_cast<double>(symbols));
  const bool lossy = loss > noise_ + config_.loss_tolerance + spread;
  // What arrived: by what was reported lost, which tells it of this window but not of packets sent
  // for repair; bounded by what the clients say, which lags.
  const double said = heard.receive_rate / (1 - noise_);
  const double implied = group_rate * (1 - loss) / (1 - noise_);
  const double delivered = slow ? said : said > 0 ? std::min(implied, kLag * said) : implied;
  if (!lossy && config_.learn_noise) noise_ += 0.1 * (loss - noise_);

  switch (state_) {
    case State::kStart:
      if (lossy && telling) return congested(loss, delivered);
      // No faster before the clients are seen to take what is sent.
      if (full && !local_limit_ && taken >= kSlowShare)
        enter(State::kStart, rate_ * kStartGrowth, 1);
      return;
    case State::kDrain:
      if (config_.learn_noise && loss - noise_ > 0.5 * (loss_before_ - noise_)) {
        undone_++;
        noise_ = std::min(loss, kMaxNoise);
        return enter(before_, rate_before_, 1);
      }
      until_probe_ = probe_wait_;
      return enter(State::kCruise, config_.recover * delivered_, 1);
    case State::kCruise:
      if (lossy && telling) return congested(loss, delivered);
      if (!full || local_limit_ || config_.probe <= 1 || taken < kSlowShare) return;
      if (until_probe_ > 0 && --until_probe_ > 0) return;
      rate_before_ = rate_;
      return enter(State::kProbe, rate_ * config_.probe, 1);
    case State::kProbe:
      if (!full) return enter(State::kCruise, rate_before_, 0);
      if (lossy) {
        probe_wait_ = std::min(2 * probe_wait_, config_.probe_windows_max);
        until_probe_ = probe_wait_;
        return enter(State::kCruise, rate_before_, 1);
      }
      probe_wait_ = config_.probe_windows;
      until_probe_ = 1;
      return enter(State::kCruise, rate_, 0);
  }
}

}  // namespace sf::mcdist
