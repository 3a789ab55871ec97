// What the mcdist server decides, without I/O and without a clock: which request is answered, which
// is ignored, in what order and how fast (paper section 3.5: first come first served, lockstep
// detection, flow control). The caller passes the time in, so that tests and a simulator with
// virtual time drive the code that runs.
//
// States of a page:  idle -> queued (request) -> sent (next + sent) -> idle (forgotten after a
// time) Invariants:
//  - A page is at most once in the queue; requests for a queued page merge into that entry.
//  - Urgent before prefetch; within each, first come first served.
//  - The queue, what a peer may have in it, and the memory of what was sent are bounded.
// Left out: push counters, end-game, parity. Not thread-safe.
#pragma once

#include <cstdint>
#include <deque>
#include <list>
#include <unordered_map>

#include "common/page.h"

namespace sf::mcdist {

using TimeNs = int64_t;
constexpr TimeNs kMicrosecond = 1000;
constexpr TimeNs kMillisecond = 1000 * kMicrosecond;
constexpr TimeNs kSecond = 1000 * kMillisecond;
constexpr TimeNs kNever = INT64_MAX;

struct PolicyConfig {
  // Flow control, bytes on the wire a second. The increase and the cut are the paper's (10 KB/s
  // each 10 ms; 3/4 of the clients' mean receive rate). The start is above what two cores can send,
  // so that a LAN is not slowed before it has lost anything.
  double start_rate = 1e9;
  // Clients that only fault receive little; 3/4 of that would starve them. Half of a 1 Gbit/s link.
  double min_rate = 64e6;
  double max_rate = 10e9;
  double increase_per_s = 1e6;
  double cut = 0.75;
  // A cut needs more than this share of pages reported lost (mean over clients) in an interval with
  // at least loss_min_pages sent. The paper cuts at each loss (0): on a link with random loss that
  // spirals down to nothing (5% of packets are 14% of pages, and on busy cores some retries come
  // for answers that are merely late). What keeps queues short meanwhile is the clients' own
  // window.
  double loss_tolerance = 0.4;
  uint32_t loss_min_pages = 32;
  TimeNs loss_interval = 100 * kMillisecond;

  // Lockstep: a first request for a page sent less than this ago is ignored, up to so many times.
  // One that lost the answer asks again after its time-out, so a window too long costs only that.
  TimeNs lockstep_window = 50 * kMillisecond;
  uint32_t lockstep_requests = 64;
  // A retry that crosses with the answer is ignored too. Just below the clients' shortest time-out:
  // a page sent later than that before its retry was sent late, and is most likely still on its
  // way.
  TimeNs retry_window = 9 * kMillisecond;

  uint32_t queue_pages = 65536;  // each of urgent and prefetch
  uint32_t peer_pages = 2048;    // likewise, of one peer
};

class Policy {
 public:
  enum class Verdict : uint8_t {
    kQueued,
    kMerged,     // was queued already
    kLockstep,   // sent a moment ago: ignored
    kQueueFull,  // dropped; the client's time-out asks again
    kPeerFull,   // dropped: this peer has too much queued
  };
  struct Item {
    PageIndex page = 0;
    uint8_t fragments = 0;  // mask of fragments wanted; 0: all
    uint32_t peer = 0;      // the first that asked
    Urgency urgency = Urgency::kFault;
  };

  explicit Policy(const PolicyConfig& config) : config_(config), rate_(config.start_rate) {}

  Verdict request(uint32_t peer, PageIndex page, Urgency urgency, bool retry, uint8_t fragments,
                  TimeNs now);
  // A client's own estimate of what it receives, bytes a second.
  void report(uint32_t peer, double receive_rate, TimeNs now);
  void forget(uint32_t peer);

  // The next page to send now; false: nothing queued, or the rate does not allow it yet.
  bool next(TimeNs now, Item* out);
  // What sending it cost. To be called for each item that next() gave.
  void sent(const Item& item, uint64_t wire_bytes, TimeNs now);
  // When next() can give something: `now` or later, kNever if nothing is queued.
  TimeNs ready_at(TimeNs now) const;

  size_t queued() const { return index_.size(); }
  double rate() const { return rate_; }
  double mean_receive_rate(TimeNs now) const;
  uint64_t cuts() const { return cuts_; }

 private:
  struct Entry {
    std::list<Item>::iterator at;
  };
  struct Peer {
    uint32_t queued[2] = {0, 0};
    double rate = 0;
    TimeNs reported = -kSecond * 3600;
  };
  struct Sent {
    TimeNs at = 0;
    uint32_t ignored = 0;
    uint8_t fragments = 0;  // 0: all
  };
  void advance(TimeNs now);
  double burst() const;

  const PolicyConfig config_;
  std::list<Item> queue_[2];  // by Urgency
  std::unordered_map<PageIndex, Entry> index_;
  std::unordered_map<uint32_t, Peer> peers_;
  std::unordered_map<PageIndex, Sent> sent_;
  std::deque<std::pair<TimeNs, PageIndex>> sent_order_;

  bool started_ = false;
  double rate_;
  double tokens_ = 0;
  TimeNs last_ = 0;
  TimeNs interval_start_ = 0;
  uint64_t interval_sent_ = 0;
  uint64_t interval_lost_ = 0;
  uint64_t cuts_ = 0;
};

}  // namespace sf::mcdist
