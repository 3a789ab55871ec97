// How fast a server sends: a token bucket whose rate follows what the clients receive (paper
// section 3.5, flow control).
//
// The paper raises the rate linearly and cuts it, at each loss, to a fraction of the clients' mean
// receive rate. So does this, but a loss is not taken for congestion before it was seen to depend
// on the rate. States, judged at the end of each window in which the rate was what held it back:
//
//   start   the rate is doubled each two windows until something is lost
//   drain   cut to `cut` of what arrived. Is as much lost as before? Then that share is noise, of
//           which there is no less at a lower rate, and the cut is undone. Else the clients'
//           receive rate was the limit: go on at `recover` of it
//   cruise  linear increase
//   probe   now and then `probe` times the rate: kept if nothing more is lost, else taken back,
//           and the next one comes later
//
// The first window after each change is not judged: reports of what went before still come in.
// With recover = cut, probe = 1, loss_tolerance = 0 and learn_noise = false it is the paper's.
#pragma once

#include "mcdist/audience.h"
#include "mcdist/policy_config.h"

namespace sf::mcdist {

class FlowControl {
 public:
  explicit FlowControl(const PolicyConfig& config)
      : config_(config),
        rate_(config.start_rate),
        until_probe_(config.probe_windows),
        probe_wait_(config.probe_windows) {}

  void advance(TimeNs now);
  bool allows() const { return tokens_ > 0; }
  TimeNs ready_at(TimeNs now) const;  // when allows()
  // What was to be sent did not fit: if less than the rate left in this window, a higher one would
  // only fill the send buffer, and the rate does not grow.
  void waited() { waited_ = true; }
  // `symbols`: of pages, to the group.
  void sent(uint64_t wire_bytes, uint64_t symbols, bool group);

  // Symbols lost are counted in the window they are reported in.
  uint64_t window() const { return window_; }
  uint64_t window_symbols() const { return symbols_; }
  double group_rate() const { return smooth_; }  // of what is sent to the group, smoothed
  bool window_over(TimeNs now) const { return started_ && now - window_start_ >= config_.window; }
  // Ends the window. `heard`: of the window's symbols, rates as reported lately.
  void judge(const Audience::Summary& heard, TimeNs now);

  double rate() const { return rate_; }
  double noise() const { return noise_; }
  uint64_t cuts() const { return cuts_; }
  uint64_t undone() const { return undone_; }

 private:
  enum class State : uint8_t { kStart, kDrain, kCruise, kProbe };
  void enter(State state, double rate, uint32_t settle);
  void congested(double loss, double delivered);
  double burst() const { return std::max(65536.0, rate_ * 0.002); }

  const PolicyConfig config_;
  bool started_ = false;
  double rate_;
  double tokens_ = 0;
  TimeNs last_ = 0;

  State state_ = State::kStart;
  State before_ = State::kStart;  // kDrain: where it came from
  double rate_before_ = 0;        // kDrain, kProbe
  double loss_before_ = 0;        // kDrain
  double delivered_ = 0;          // kDrain: what arrived
  uint32_t settle_ = 1;           // windows not to be judged
  uint32_t slow_windows_ = 0;     // in a row in which clients took much less than was sent
  uint32_t until_probe_;
  uint32_t probe_wait_;
  double noise_ = 0;
  bool waited_ = false;       // in this window
  bool local_limit_ = false;  // in the last one

  uint64_t window_ = 1;
  TimeNs window_start_ = 0;
  uint64_t bytes_ = 0, group_bytes_ = 0, symbols_ = 0;
  double smooth_ = 0;
  uint64_t cuts_ = 0, undone_ = 0;
};

}  // namespace sf::mcdist
