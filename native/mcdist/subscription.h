// A client that wants all of a generation: it lets the server push, tells what it lost of each
// block once the push is past it, and says which blocks have to be asked for page by page. No I/O,
// no clock; a part of Requester.
//
// States:  off -> waiting (start) -> pushed (a pushed packet, or an announce that says so)
//          pushed -> ended (announced, or silent for too long)    ended -> pushed (it begins again)
//          waiting -> ended (no push began in time)               any -> off (stop, or all is done)
// A block is, while pushed or ended:
//   behind `start_`           nothing of it is pushed to us: swept, that is, asked for page by page
//   start_ .. frontier_ - 1   the push is past it: reported if something of it is lacking
//   from frontier_            pushed: it will come. Ended: swept
// Invariants:
//  - A block is reported only when packets that were sent after it have come, enough of them that
//    it is no matter of order, or when the push is over.
//  - At most `window` blocks are reported and not repaired; the others wait as two numbers.
//  - A reported block is asked again after a time-out; given up after some without a change, its
//    pages are then asked for one by one, which ends in a page or in an error for each.
// Not thread-safe.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <set>
#include <unordered_map>
#include <vector>

#include "common/page.h"
#include "mcdist/policy.h"
#include "mcdist/wire.h"

namespace sf::mcdist {

struct SubscriptionConfig {
  TimeNs begin_wait = 60 * kMillisecond;  // for a push to begin
  TimeNs silence = 400 * kMillisecond;    // more than an announce's period of 250 ms, lost ones too
  uint32_t settle_packets = 32;           // the sender may send a block's last packets that late
  uint32_t window = 256;                  // blocks: 32 MiB
  // Reports wait that long for more of them: one request packet holds about 40. Less than the time
  // for which the server gathers them itself.
  TimeNs gap = 2 * kMillisecond;
  uint32_t gap_reports = 16;  // so many go at once
  uint8_t tries = 6;
  // Of what repairs a block, the least: above the server's own retry_window and repair_gather.
  TimeNs timeout_min = 13 * kMillisecond;
  TimeNs keepalive = 100 * kMillisecond;
};

class Subscription {
 public:
  // Fills in what is wanted and missing of report->block.
  using Look = std::function<void(BlockReport* report)>;

  Subscription(const SubscriptionConfig& config, uint64_t pages, Look look)
      : config_(config),
        blocks_((pages + kBlockPages - 1) / kBlockPages),
        pages_(pages),
        look_(std::move(look)) {}

  bool on() const { return state_ != State::kOff; }
  bool pushing() const { return state_ == State::kPushed; }
  void start(TimeNs now);
  void stop();
  void new_server(TimeNs now);  // it knows nothing of us

  // Packets of one block, one of them of `page`.
  void pushed(PageIndex page, TimeNs now, uint32_t packets = 1);
  void announced(bool pushing, PageIndex position, TimeNs now);
  // Something of the block came.
  void arrived(PageIndex page, TimeNs now);

  // Does the page come without being asked for, or will it be asked for from here?
  bool covers(PageIndex page) const;
  // Appends the reports to be sent now, at most `max`. `timeout`: until they are asked again, as
  // long as it was not measured.
  void collect(TimeNs now, TimeNs timeout, size_t max, std::vector<BlockReport>* out);
  // The next block to be asked for page by page; false: none (now).
  bool sweep(uint64_t* block);
  // When collect() has something to do again.
  TimeNs due_at(TimeNs last_sent) const;
  // A request is to be sent if only to be remembered by the server.
  bool keepalive(TimeNs now, TimeNs last_sent) const;
  // Nothing is left to be done for it, but what has been asked for.
  bool done() const;

  uint64_t reports() const { return reports_sent_; }
  uint64_t reported_blocks() const { return reported_.size(); }
  // Symbols that the push lost on the way to us, and those looked at, since asked last.
  void take_loss(uint64_t* lost, uint64_t* sent);

 private:
  enum class State : uint8_t { kOff, kWaiting, kPushed, kEnded };
  struct Reported {
    TimeNs due = 0;
    TimeNs asked_at = 0;  // 0: asked more than once, or repaired in part
    unsigned missing = 0;
    uint8_t tries = 0;
    bool give_up = false;
  };
  void begin(uint64_t block);
  void passed(uint64_t block);
  void end(uint64_t block);
  void watch(TimeNs now);
  void examine();
  void forget(uint64_t block);

  const SubscriptionConfig config_;
  const uint64_t blocks_;
  const uint64_t pages_;
  const Look look_;

  State state_ = State::kOff;
  TimeNs heard_ = 0;  // something of the push
  uint64_t start_ = 0, cursor_ = 0, frontier_ = 0;
  uint64_t announced_ = 0;                              // block of the announce before
  uint64_t packets_ = 0;                                // pushed ones
  std::deque<std::pair<uint64_t, uint64_t>> settling_;  // block, packets_ when it is the frontier
  uint64_t examined_ = 0;                               // start_ .. frontier_
  uint64_t swept_ = 0;
  std::deque<uint64_t> given_up_;  // to be swept, at most `window`
  std::unordered_map<uint64_t, Reported> reported_;
  std::set<std::pair<TimeNs, uint64_t>> due_;
  TimeNs sent_at_ = 0;
  TimeNs smoothed_ = 0, variation_ = 0;  // from a report to the first page that repairs it
  uint64_t reports_sent_ = 0;
  uint64_t lost_ = 0, looked_ = 0;
};

}  // namespace sf::mcdist
