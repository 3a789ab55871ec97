// Who listens to a generation, as far as the policy needs to know it: what each peer says it
// receives and loses, who subscribed, whom multicast does not reach. All but summary(), which is
// called once a window, takes constant time.
#pragma once

#include <algorithm>
#include <list>
#include <unordered_map>
#include <vector>

#include "mcdist/policy_config.h"

namespace sf::mcdist {

// What a peer says of itself with each request.
struct PeerReport {
  double receive_rate = 0;  // bytes a second
  bool unicast_only = false;
  bool subscribe = false;
  bool history = false;
  uint64_t room_bytes = 0;  // of its receive buffer; 0: not told
};

class Audience {
 public:
  struct Peer {
    uint32_t id = 0;
    double rate = 0;
    TimeNs met = 0;  // first heard
    TimeNs heard = 0;
    bool unicast_only = false;
    bool subscribed = false;
    bool present = false;  // counted by present()
    bool history = false;
    uint64_t round = 0;  // the push it took part in
    uint64_t lost = 0;   // symbols, in window `window`
    uint64_t window = 0;
    uint64_t credit = UINT64_MAX;  // of bytes sent to the group: it has room up to there
  };
  // Means over the peers heard lately that multicast reaches. A quarter at each end (with three:
  // one at each end) is left out, and nobody receives more than was sent: one liar, or one slow
  // host, moves nothing.
  struct Summary {
    size_t peers = 0;
    double loss = 0;          // share of the symbols sent
    double receive_rate = 0;  // bytes a second
  };

  // A clone that others' answers feed, or that computes, asks for nothing; it is there
  // nevertheless.
  static constexpr TimeNs kPresence = 30 * kSecond;

  explicit Audience(TimeNs silence) : silence_(silence) {}

  Peer& heard(uint32_t id, const PeerReport& report, TimeNs now) {
    expire(now);
    auto [found, fresh] = index_.try_emplace(id);
    if (fresh) {
      order_.push_back(Peer{});
      order_.back().id = id;
      order_.back().met = newest_met_ = now;
      found->second = std::prev(order_.end());
      if (oldest_live_ == order_.end()) oldest_live_ = found->second;
      if (oldest_present_ == order_.end()) oldest_present_ = found->second;
    } else {
      silent_most_ = std::max(silent_most_, now - found->second->heard);
      leave(*found->second);
      detach(found->second);
      order_.splice(order_.end(), order_, found->second);
      if (oldest_live_ == order_.end()) oldest_live_ = found->second;
      if (oldest_present_ == order_.end()) oldest_present_ = found->second;
    }
    Peer& peer = *found->second;
    present_ += peer.present ? 0 : 1;
    peer.present = true;
    if (last_ != id) {
      other_ = last_;
      other_heard_ = last_heard_;
      last_ = id;
    }
    last_heard_ = now;
    if (first_heard_ == kNever) first_heard_ = now;
    peer.rate = report.receive_rate;
    peer.unicast_only = report.unicast_only;
    peer.subscribed = report.subscribe && !report.unicast_only;
    peer.heard = now;
    subscribers_ += peer.subscribed ? 1 : 0;
    return peer;
  }
  Peer* find(uint32_t id) {
    auto found = index_.find(id);
    return found == index_.end() ? nullptr : &*found->second;
  }
  void forget(uint32_t id) {
    auto found = index_.find(id);
    if (found == index_.end()) return;
    leave(*found->second);
    present_ -= found->second->present ? 1 : 0;
    detach(found->second);
    order_.erase(found->second);
    index_.erase(found);
  }
  // Those not heard for long are no subscribers any more, until they are heard again.
  void expire(TimeNs now) {
    for (; oldest_live_ != order_.end() && now - oldest_live_->heard > silence_; ++oldest_live_) {
      leave(*oldest_live_);
    }
    for (; oldest_present_ != order_.end() && now - oldest_present_->heard > kPresence;
         ++oldest_present_) {
      oldest_present_->present = false;
      present_--;
    }
  }
  // Heard within kPresence.
  size_t present() const { return present_; }
  size_t peers() const { return order_.size(); }
  size_t subscribers() const { return subscribers_; }
  // When the one that is new was first heard.
  TimeNs newest_met() const { return newest_met_; }
  // Was anybody heard within `span`?
  bool anybody(TimeNs span, TimeNs now) const {
    return first_heard_ != kNever && now - last_heard_ <= span;
  }
  // Was anybody but `id` heard within `span`? Others may just be on their way in the first one. A
  // peer that came back after a longer silence shows that silence of twice that means little here.
  bool others(uint32_t id, TimeNs span, TimeNs now) const {
    if (silent_most_ > span) span = 2 * silent_most_;
    if (first_heard_ == kNever || now - first_heard_ <= span) return true;
    if (last_ != 0 && last_ != id) return now - last_heard_ <= span;
    return other_ != 0 && now - other_heard_ <= span;
  }
  void lose(Peer& peer, uint64_t symbols, uint64_t window) {
    if (peer.window != window) peer.lost = 0;
    peer.window = window;
    peer.lost += symbols;
  }

  Summary summary(uint64_t window, uint64_t symbols, double sent_rate, TimeNs since) {
    losses_.clear();
    rates_.clear();
    for (auto at = order_.rbegin(); at != order_.rend() && at->heard >= since; ++at) {
      if (at->unicast_only) continue;
      const double lost = at->window == window ? static_cast<double>(at->lost) : 0;
      losses_.push_back(symbols == 0 ? 0 : std::min(1.0, lost / static_cast<double>(symbols)));
      rates_.push_back(std::min(at->rate, sent_rate));
    }
    return {losses_.size(), trimmed(&losses_), trimmed(&rates_)};
  }

  // Up to where those who subscribed have room: all of them, and all but the quarter that has
  // least. UINT64_MAX: nobody says.
  struct Credit {
    uint64_t all = UINT64_MAX;
    uint64_t most = UINT64_MAX;
  };
  Credit credit(TimeNs since) {
    credits_.clear();
    for (auto at = order_.rbegin(); at != order_.rend() && at->heard >= since; ++at) {
      if (at->subscribed) credits_.push_back(at->credit);
    }
    const size_t n = credits_.size();
    if (n == 0) return {};
    const auto least = credits_.begin() + static_cast<std::ptrdiff_t>(n == 3 ? 1 : n / 4);
    std::nth_element(credits_.begin(), least, credits_.end());
    return {*std::min_element(credits_.begin(), least + 1), *least};
  }

 private:
  void leave(Peer& peer) {
    subscribers_ -= peer.subscribed ? 1 : 0;
    peer.subscribed = false;
  }
  static double trimmed(std::vector<double>* values) {
    if (values->empty()) return 0;
    std::sort(values->begin(), values->end());
    const size_t n = values->size();
    const size_t cut = n == 3 ? 1 : n / 4;
    double sum = 0;
    for (size_t i = cut; i < n - cut; i++) sum += (*values)[i];
    return sum / static_cast<double>(n - 2 * cut);
  }

  void detach(std::list<Peer>::iterator peer) {
    if (oldest_live_ == peer) ++oldest_live_;
    if (oldest_present_ == peer) ++oldest_present_;
  }

  const TimeNs silence_;
  std::list<Peer> order_;                                 // heard last at the end
  std::list<Peer>::iterator oldest_live_ = order_.end();  // all before it are silent
  std::unordered_map<uint32_t, std::list<Peer>::iterator> index_;
  std::list<Peer>::iterator oldest_present_ = order_.end();
  size_t subscribers_ = 0, present_ = 0;
  TimeNs silent_most_ = 0;
  TimeNs newest_met_ = 0;
  uint32_t last_ = 0, other_ = 0;  // the two heard last
  TimeNs first_heard_ = kNever, last_heard_ = 0, other_heard_ = 0;
  std::vector<double> losses_, rates_;
  std::vector<uint64_t> credits_;
};

}  // namespace sf::mcdist
