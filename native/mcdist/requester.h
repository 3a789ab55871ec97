// What the mcdist client decides, without I/O and without a clock: which pages to ask for now, when
// to ask again, how many prefetches may be under way (receiver-driven retransmission, paper section
// 3.5). The counterpart of Policy; a simulator drives this code too.
//
// States of a page:
//   (none) -> waiting (want) -> asked (collect) -> (none) (arrived)
//   waiting -> held back (a fault among many peers: crowd()) -> waiting -> asked
//   asked -> asked (time-out: collect again, flagged as a retry, doubled time-out)
//   asked -> refused (negative answer) -> asked ... -> given up (negative answers used up)
//   range (prefetch) -> asked; a range costs one entry however long it is
// All of a generation is had by a subscription (subscription.h): pages come by a push, by repair of
// blocks reported, and the rest by requests as above.
// Invariants:
//  - A page is under way at most once; asked again it is at most made urgent.
//  - Time-outs come from measured round trips of first requests only (Karn), kept apart for faults
//    and prefetches, which queue differently at the server.
//  - Faults are sent before prefetches, retries before first requests.
//  - Bounded: pages asked per kind by the windows, ranges by max_ranges. Waiting faults are as many
//    as their waiters in the replica, which the replica's users bound.
// Not thread-safe.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

#include "common/page.h"
#include "mcdist/policy.h"
#include "mcdist/subscription.h"
#include "mcdist/wire.h"

namespace sf::mcdist {

struct RequesterConfig {
  // Above PolicyConfig::retry_window, or the first retry is ignored; docs/mcdist.md has what was
  // measured.
  TimeNs rto_min = 10 * kMillisecond;
  TimeNs rto_min_prefetch = 40 * kMillisecond;  // nobody waits
  TimeNs rto_max = 250 * kMillisecond;          // also how late a restarted server is noticed
  TimeNs rto_initial = 50 * kMillisecond;
  uint32_t fault_window = 1024;
  uint32_t prefetch_window_start = 128;
  uint32_t prefetch_window_min = 64;
  uint32_t prefetch_window_max = 1024;  // 4 MiB; the receive buffer holds more than that
  // The window shrinks while prefetches take longer than this: more under way would only lie in
  // queues, and the server's is the faults' too.
  TimeNs prefetch_delay = 4 * kMillisecond;
  uint32_t max_ranges = 65536;
  // With more peers than these a fault is asked after a random wait, up to so long for each peer:
  // thousands that touch the same page at the same time need one answer, not a question each.
  uint32_t crowd_peers = 64;
  // Above what a question costs the server, or it never catches up.
  TimeNs crowd_delay = 4 * kMicrosecond;
  uint64_t seed = 1;             // of these waits
  uint32_t negative_tries = 10;  // some 5 s in all: a source may itself wait for its source
  SubscriptionConfig subscription;
};

class Requester {
 public:
  // `present(page)`: no need to ask. `missing(page)`: mask of fragments not received yet, 0 for
  // all. `look(report)`: fills in what is wanted and missing of report->block; needed by
  // subscribe() alone, and so is the number of `pages`.
  Requester(const RequesterConfig& config, std::function<bool(PageIndex)> present,
            std::function<uint8_t(PageIndex)> missing, uint64_t pages = 0,
            Subscription::Look look = nullptr)
      : config_(config),
        present_(std::move(present)),
        missing_(std::move(missing)),
        look_(look),
        subscription_(config.subscription, pages, std::move(look)),
        random_(config.seed | 1),
        window_(config.prefetch_window_start) {}

  // Is anything under way that arrived() could be told of?
  bool expects() const { return !pages_.empty() || subscription_.reported_blocks() > 0; }
  // True if there is something new to send.
  bool want(PageIndex page, Urgency urgency, TimeNs now);
  // False: too many ranges, nothing was taken.
  bool prefetch(PageIndex first, uint64_t count);

  // The page is in the replica (by whoever asked). True if it was under way here.
  bool arrived(PageIndex page, TimeNs now);
  // All pages that are wanted, by a push if the server pushes. Ends by itself when no more can be
  // had.
  void subscribe(bool on, TimeNs now);
  bool subscribed() const { return subscription_.on(); }
  const Subscription& subscription() const { return subscription_; }
  // Packets that a push cursor of our server sent of a block, and what our server announced.
  void pushed(PageIndex page, TimeNs now, uint32_t packets = 1) {
    subscription_.pushed(page, now, packets);
  }
  void announced(bool pushing, PageIndex position, TimeNs now) {
    subscription_.announced(pushing, position, now);
  }
  // How many the server says to have heard lately.
  void crowd(uint32_t peers) { peers_ = peers; }
  bool crowded() const { return peers_ > config_.crowd_peers; }
  // Another server, or the same one restarted: it knows nothing of us.
  void new_server(TimeNs now);
  // A request was sent, of whatever kind.
  void sent(TimeNs now) { last_sent_ = now; }
  // True if one has to be sent although there is nothing to ask for.
  bool keepalive(TimeNs now) const { return subscription_.keepalive(now, last_sent_); }
  // Of what was sent to us lately, in 1/1000: of the symbols of blocks pushed, or of pages asked
  // for.
  uint16_t loss_permille();

  enum class Refusal : uint8_t { kUnknown, kAgain, kGiveUp };  // kGiveUp: no longer under way
  // `servers`: how many may be asked in turn; only after all of them refused it is waited.
  Refusal refused(PageIndex page, TimeNs now, uint32_t servers = 1);
  void forget(PageIndex page);  // no longer under way, without an answer
  void clear();

  // Appends up to `max_runs` runs of what is to be asked now; they count as asked. While answers
  // may lie unread in a socket (not `drained`), nothing is taken for lost, and nothing is
  // prefetched: on a host that lags behind it may have come already because others asked.
  void collect(TimeNs now, bool drained, size_t max_runs, std::vector<Run>* out);
  // Likewise the reports of blocks. To be called before collect().
  void collect_reports(TimeNs now, size_t max, std::vector<BlockReport>* out);
  // Asks for one page that was just wanted, ahead of collect(). False: leave it to collect(), by
  // due_at().
  bool ask_now(PageIndex page, TimeNs now, Run* out);
  // True if collect() stopped early and is to be called again at once.
  bool more() const { return more_; }
  // When collect() has something to do again, kNever if nothing is under way.
  TimeNs due_at() const;
  // Asks at once for all that is under way (a new server knows nothing of it).
  void ask_again(TimeNs now);
  // A round trip measured without a page.
  void round_trip(TimeNs rtt);

  bool idle() const { return pages_.empty() && ranges_.empty() && !subscription_.on(); }
  size_t faults() const { return fault_since_.size(); }  // wanted and not here
  size_t faults_asked() const { return in_flight_[0]; }
  size_t under_way() const { return pages_.size(); }
  uint64_t retries() const { return retries_; }  // since no answer came, not even a refusal
  uint32_t window() const { return window_; }
  TimeNs timeout(Urgency urgency) const;
  TimeNs smoothed_rtt(Urgency urgency) const { return rtt_[static_cast<size_t>(urgency)].smoothed; }
  // The page that has waited longest, and since when; false if there is none.
  bool oldest_fault(PageIndex* page, TimeNs* since) const;

 private:
  struct Page {
    Urgency urgency = Urgency::kFault;
    bool asked = false;  // counts in in_flight_
    uint8_t tries = 0;   // time-outs so far, saturating
    uint32_t negatives = 0;
    bool refused = false;  // since asked last; siblings' questions bring negative answers as well
    TimeNs since = 0;
    TimeNs asked_at = 0;
    TimeNs due = kNever;  // in due_ unless kNever
  };
  using Pages = std::unordered_map<PageIndex, Page>;
  struct Rtt {
    bool known = false;
    TimeNs smoothed = 0;
    TimeNs variation = 0;
    // Doubled by a time-out, back to 1 by a sample (RFC 6298): when all answers are late, those to
    // questions not yet asked will be too.
    unsigned backoff = 1;
    TimeNs backed_off_at = 0;
    void sample(TimeNs rtt);
  };
  void fault(PageIndex page, Page* state, TimeNs now);
  void set_due(PageIndex page, Page* state, TimeNs due);
  void erase(Pages::iterator it);
  void mark_asked(PageIndex page, Page* state, TimeNs now);
  void ask(PageIndex page, Page* state, TimeNs now, bool retry, std::vector<Run>* out);
  void collect_timeouts(TimeNs now, size_t max_runs, std::vector<Run>* out);
  void collect_ranges(TimeNs now, size_t max_runs, std::vector<Run>* out);
  void collect_sweep(TimeNs now, size_t max_runs, std::vector<Run>* out);
  void outcome(bool lost);
  void loss(uint64_t lost, uint64_t sent);

  const RequesterConfig config_;
  const std::function<bool(PageIndex)> present_;
  const std::function<uint8_t(PageIndex)> missing_;
  const Subscription::Look look_;
  Subscription subscription_;
  Pages pages_;
  std::set<std::pair<TimeNs, PageIndex>> due_;
  std::set<std::pair<TimeNs, PageIndex>> fault_since_;
  std::deque<PageIndex> fresh_[2];  // wanted, not asked yet; may hold pages gone since
  std::deque<std::pair<PageIndex, uint64_t>> ranges_;
  uint32_t in_flight_[2] = {0, 0};
  Rtt rtt_[2];

  uint32_t peers_ = 1;
  uint64_t random_;
  uint32_t window_;
  bool slow_start_ = true;
  bool more_ = false;
  uint32_t epoch_answers_ = 0;
  uint32_t epoch_losses_ = 0;
  uint64_t retries_ = 0;
  TimeNs last_sent_ = 0;
  uint64_t lost_ = 0, sent_ = 0;  // symbols or pages; older ones count less
};

}  // namespace sf::mcdist
