// What the mcdist server decides, without I/O and without a clock: which request is answered, which
// is ignored, what is sent, to whom, in what order and how fast (paper section 3.5). The caller
// passes the time in, so that tests and a simulator with virtual time drive the code that runs.
//
// The order of what is sent: faults, announces, repair of what was pushed, then prefetches, history
// and push in turn. All of it is paced by one rate, announces excepted.
//
// States of a page:  idle -> queued (request) -> sent (next + sent) -> idle (forgotten in time).
// Invariants:
//  - next() gives nothing that sent() is not told of before the next call.
//  - All memory is bounded: by the parts' bounds, by a bit a page, and by the peers, which the
//    caller bounds and says forget() of.
//  - Nothing here walks the peers but the end of a flow control window.
// The parts: queue, lockstep, audience, flow, push, repair, history (files of that name). Not
// thread-safe. Defaults and their reasons: policy_config.h.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "mcdist/audience.h"
#include "mcdist/flow.h"
#include "mcdist/history.h"
#include "mcdist/lockstep.h"
#include "mcdist/policy_config.h"
#include "mcdist/push.h"
#include "mcdist/queue.h"
#include "mcdist/repair.h"
#include "mcdist/wire.h"

namespace sf::mcdist {

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
    enum class Kind : uint8_t {
      kPage,      // symbols of `page`; or that it is zero, or cannot be given
      kParity,    // `parities` of them over `parity.cover`, from index parity.index; page: of the
                  // block the first
      kAnnounce,  // see Announce; pushing, cursor, position
    };
    Kind kind = Kind::kPage;
    PageIndex page = 0;
    uint8_t fragments = 0;  // kPage: mask of fragments wanted, 0: all; kParity: symbols in a page
    uint32_t peer = 0;      // answered by unicast; 0: the group
    Urgency urgency = Urgency::kPrefetch;
    bool repair = false;
    bool pushed = false;
    bool replayed = false;  // from the record of first faults
    uint8_t cursor = 0;
    Parity parity;
    uint8_t parities = 0;
    PageIndex position = 0;
    uint32_t peers = 0;  // kAnnounce: heard lately
  };
  // What became of an item.
  enum class Outcome : uint8_t {
    kData,
    kZero,
    kRefused,  // not held, or unreadable. Pushed: nothing was sent
  };

  Policy(const PolicyConfig& config, uint64_t pages);
  Policy(const Policy&) = delete;
  Policy& operator=(const Policy&) = delete;

  // With each request, before what it asks: what the peer says of itself.
  void heard(uint32_t peer, const PeerReport& report, TimeNs now);
  // `symbols`: in a page, as this server cuts it. `page` is within the generation.
  Verdict request(uint32_t peer, PageIndex page, Urgency urgency, bool retry, uint8_t fragments,
                  TimeNs now);
  // Of a block that was pushed. `report` was decoded: it is within the generation.
  Repair::Verdict report(uint32_t peer, const BlockReport& report, TimeNs now);
  void forget(uint32_t peer);
  // A server makes itself known to who does not know it: an announce, soon.
  void introduce(uint32_t peer, TimeNs now);

  // The send buffer was full: the local link is the limit.
  void waited() { flow_.waited(); }
  // More than kIdleBytes of what was sent before has not left yet. To be said before next() if
  // uses_idle_time(): what is pushed in idle time must not lie before a fault.
  static constexpr uint64_t kIdleBytes = 16384;
  bool uses_idle_time() const { return push_.counting(); }
  void link_busy(bool busy) { link_busy_ = busy; }

  // What to send now; false: nothing, or the rate does not allow it yet.
  bool next(TimeNs now, Item* out);
  // What sending it cost. To be called for each item that next() gave.
  void sent(const Item& item, Outcome outcome, uint64_t wire_bytes, TimeNs now);
  // When next() can give something: `now` or later, kNever if nothing is to come.
  TimeNs ready_at(TimeNs now) const;

  size_t queued() const { return queue_.size(); }
  size_t subscribers() const { return audience_.subscribers(); }
  double rate() const { return flow_.rate(); }
  double noise() const { return flow_.noise(); }
  double mean_receive_rate(TimeNs now);
  uint64_t cuts() const { return flow_.cuts(); }
  uint64_t cuts_undone() const { return flow_.undone(); }
  bool pushing() const { return push_.running(); }
  PageIndex push_position() const { return push_.position(); }
  size_t history_pages() const { return history_.size(); }
  const std::vector<HistoryEntry>& history() const { return history_.entries(); }

 private:
  bool endgame(uint32_t peer, PageIndex page, bool lost, TimeNs now) const;
  bool next_repair(TimeNs now, Item* out);
  bool next_idle(TimeNs now, Item* out);
  bool next_announce(TimeNs now, Item* out);
  bool window_open(TimeNs now);
  bool wants_announces(TimeNs now) const;
  void advance(TimeNs now);

  const PolicyConfig config_;
  const uint64_t pages_;
  PageQueue queue_;
  SentMemory memory_;
  Audience audience_;
  FlowControl flow_;
  Push push_;
  Repair repair_;
  History history_;
  std::vector<uint64_t> unusual_;  // a bit a page: sent as zero or refused; no parity over it
  Repair::Order order_;            // under way: its symbols are sent page by page
  uint32_t turn_ = 0;
  bool link_busy_ = false;
  unsigned symbols_ = 1;  // in a page, seen in reports

  // The window: no more is pushed than those who subscribed have room for.
  uint64_t group_bytes_ = 0;       // sent to the group, ever
  Audience::Credit credit_{0, 0};  // as looked at last
  TimeNs credit_look_ = 0;
  TimeNs pushed_at_ = 0, push_wait_ = 0;  // until the next page, from the last one

  TimeNs announce_at_ = kNever;  // to the group
  TimeNs announced_ = 0;
  uint32_t farewells_ = 0;              // announces of a push's end still to be sent soon
  std::deque<uint32_t> introductions_;  // to peers that multicast does not reach
};

}  // namespace sf::mcdist
