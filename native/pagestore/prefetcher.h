// Fills a replica in the background: goes through its absent pages in order and asks for them as
// prefetches, so many bytes a second at most. Without a limit it first has the fetcher subscribe,
// if it can and nearly all is needed: then all hosts that fill take the same packets. What is left
// when that has ended (refused pages, say) is asked for in order as well.
//
// States:  idle -> running -> done | failed      (start() from each but closed; closed is the end)
//          running <-> paused
//   done: no page is absent that a user of the replica may read. If a user is added later, it runs
//         again by itself. A replica that is complete has nothing left to look at.
//   failed: the source is gone, a replica cannot store pages, or pages were refused. The pages that
//         are here stay.
// Invariants:
//  - Bytes asked for since start() <= rate x time since start() + burst. A page that turns out to
//  be
//    zero costs nothing: it came as a few bytes. Pages asked for again after a loss are not
//    counted.
//  - At most kWindowPages are asked for and not here. The fetcher has a window of its own below
//  that.
//  - Whatever is waited for goes first: at the client and the server by its urgency, and here no
//  new
//    pages are asked for while somebody waits for one, up to kMaxYields turns.
//  - One thread for all prefetchers of the process, which takes them in turns; it never blocks on
//  the
//    network or on a file.
//  - After close() nothing is asked for, and nobody is called.
// Left out: an order other than by number (a clone reads what its siblings read; it comes by
// itself).
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <mutex>

#include "pagestore/replica.h"

namespace sf {

class PrefetchLoop;

class Prefetcher {
 public:
  using Clock = std::chrono::steady_clock;
  // More was not faster, and a fault waited longer (docs/mcdist.md).
  static constexpr uint64_t kWindowPages = 256;
  // Pages of one turn: what a fault that comes just after it may have to wait behind.
  static constexpr uint64_t kBatchPages = 64;
  static constexpr unsigned kMaxYields = 10;
  static constexpr unsigned kMaxPageErrors = 16;  // in a row
  static constexpr std::chrono::milliseconds kTick{5};
  static constexpr std::chrono::seconds kStall{120};  // no page came: given up

  enum class State : uint8_t { kIdle, kRunning, kPaused, kDone, kFailed, kClosed };
  struct Progress {
    State state = State::kIdle;
    uint64_t total = 0;    // pages of the replica
    uint64_t present = 0;  // of those, here (data or zero)
    uint64_t skipped = 0;  // absent, and nobody needs them; as of the last pass
    uint64_t rate = 0;     // bytes a second; 0: no limit
    uint64_t burst_bytes = 0;
    // Since start():
    uint64_t asked_bytes = 0;  // as the limit counts them
    uint64_t pages = 0;        // that came because they were asked for here
    uint64_t failed_pages = 0;
    uint64_t yields = 0;  // turns given up for whoever waited
    double elapsed_ms = 0;
    double bytes_per_s = 0;  // lately
    uint64_t under_way = 0;
    Status error;  // of kFailed
  };

  // `on_end` is called on the loop's thread each time it becomes done or failed; must not block.
  static std::shared_ptr<Prefetcher> Make(std::shared_ptr<Replica> replica,
                                          std::function<void()> on_end);
  ~Prefetcher();

  // Starts, from the first page, or sets the rate of one that runs. Does nothing when closed.
  void start(uint64_t rate_bytes_per_s);
  void pause();
  void resume();
  void close();
  Progress progress() const;

 private:
  friend class PrefetchLoop;
  Prefetcher(std::shared_ptr<Replica> replica, std::function<void()> on_end);
  // When it wants its next turn; max() for not before wake().
  Clock::time_point turn(Clock::time_point now);
  // With mutex_ held:
  Clock::time_point ask(Clock::time_point now);
  void end(State state, const Status& error);
  uint64_t budget(Clock::time_point now);
  void arrived(uint64_t run, PageIndex page, const Status& status);
  void sample(uint64_t bytes, Clock::time_point now) const;
  bool subscribe(Clock::time_point now);  // false: what is left is to be asked for
  void unsubscribe();
  bool wants_most() const;

  const std::shared_ptr<Replica> replica_;
  const std::function<void()> on_end_;
  std::shared_ptr<PrefetchLoop> loop_;
  std::weak_ptr<Prefetcher> self_;

  mutable std::mutex mutex_;
  State state_ = State::kIdle;
  uint64_t run_ = 0;  // counts starts: late answers to an earlier one do not count
  uint64_t rate_ = 0;
  double tokens_ = 0;  // bytes
  Clock::time_point filled_at_;
  Clock::time_point started_;
  Clock::time_point ended_;
  Clock::time_point heard_;  // when a page came last
  PageIndex cursor_ = 0;
  uint64_t users_version_ = 0;  // at the start of the pass
  uint64_t skipped_ = 0, passed_ = 0;
  uint64_t under_way_ = 0;
  uint64_t asked_bytes_ = 0, pages_ = 0, failed_pages_ = 0, yields_ = 0;
  unsigned errors_in_row_ = 0;
  unsigned yielded_ = 0;  // in a row
  bool announce_ = false;
  bool subscribed_ = false;
  bool tried_ = false;                       // to subscribe, in this pass
  uint64_t seen_known_ = 0, seen_data_ = 0;  // of the replica, while subscribed
  Status first_error_;
  Status error_;
  mutable double bytes_per_s_ = 0;
  mutable Clock::time_point sampled_;
};

}  // namespace sf
