// What the mcdist server decides by: all of it can be set in serve() (`policy`), each default with
// its reason. Sizes in bytes on the wire, times in nanoseconds, rates in bytes a second.
#pragma once

#include <cstdint>
#include <vector>

#include "common/page.h"

namespace sf::mcdist {

using TimeNs = int64_t;
constexpr TimeNs kMicrosecond = 1000;
constexpr TimeNs kMillisecond = 1000 * kMicrosecond;
constexpr TimeNs kSecond = 1000 * kMillisecond;
constexpr TimeNs kNever = INT64_MAX;

enum class PushMode : uint8_t {
  kOff,
  kSubscribers,  // while anybody wants all of the generation: all of it, in order
  kBehind,       // the paper's: counters that start behind each requested page, idle time only
};

struct PageRange {
  PageIndex first = 0;
  uint64_t count = 0;
};

// A page in the record of first faults, see history.h.
struct HistoryEntry {
  PageIndex page = 0;
  uint8_t age = 0;
};

struct PolicyConfig {
  // --- Flow control (flow.h) ---
  // The increase and the cut are the paper's: 10 KB/s each 10 ms; 3/4 of the clients' mean receive
  // rate. Below the 125 MB/s of the slowest link that is common; doubled each two windows at first.
  double start_rate = 100e6;
  // A liar, or a window of bad luck, gets no lower: a thousand pages a second.
  double min_rate = 4e6;
  double max_rate = 10e9;
  double increase_per_s = 1e6;
  double cut = 0.75;
  // The cut lasts until the queues are empty; then the rate goes on at this share of what arrived.
  // The paper stays at the cut (set it to `cut`): with its increase 1 Gbit/s would be found again
  // after 30 s.
  double recover = 0.97;
  // Loss above the share that does not depend on the rate (noise) that makes a cut. The paper cuts
  // at each loss (0), which ends at nothing on a link that loses at random.
  double loss_tolerance = 0.025;
  bool learn_noise = true;
  // A window is long against a round trip and a report's way, short against what a rate too high
  // may lose: two of them at twice 1 Gbit/s are 10 MB.
  TimeNs window = 40 * kMillisecond;
  uint32_t window_symbols = 64;  // fewer sent: no verdict
  // Growth of a probe, and the windows between probes: from the first to the second number, doubled
  // at each that failed. 1.15 over the limit for 80 ms each 2 s costs 0.5%.
  double probe = 1.15;
  uint32_t probe_windows = 4;
  uint32_t probe_windows_max = 50;

  // --- Lockstep (lockstep.h) ---
  // A first request for a page sent less than this ago is ignored, up to so many times (or two a
  // peer if that is more: with many peers many ask). One that lost the answer asks again after its
  // time-out, so a window too long costs only that.
  TimeNs lockstep_window = 50 * kMillisecond;
  uint32_t lockstep_requests = 64;
  // A request that shows that the answer was missed (a mask of fragments, or a peer that joined
  // since) is ignored only if the page was sent less than this ago: a send buffer and a round trip.
  TimeNs flight_window = 2 * kMillisecond;
  // A retry that crosses with the answer is ignored too. Just below the clients' shortest time-out:
  // a page sent later than that before its retry was sent late, and is most likely still on its
  // way.
  TimeNs retry_window = 9 * kMillisecond;

  // --- Queues (queue.h) ---
  uint32_t queue_pages = 65536;  // each of urgent and prefetch
  uint32_t peer_pages = 2048;    // likewise, of one peer

  // --- Push (push.h) ---
  PushMode push = PushMode::kSubscribers;
  // From the first subscription to the first page: who joins with the others misses nothing. Less
  // if all who are there subscribed and nobody new came for so long; twice that if somebody did
  // not.
  TimeNs push_delay = 20 * kMillisecond;
  // A subscriber not heard of for so long is no reason to push. Clients speak each 100 ms.
  TimeNs subscriber_silence = 2 * kSecond;
  uint32_t push_counters = 16;  // kBehind: more than clients on a host changes little (paper)

  // --- Repair (repair.h) ---
  bool parity = true;
  // Reports of a block are gathered for so long, unless there is one subscriber: about the time
  // in which the other receivers of the same packets have found the same block to be lacking.
  TimeNs repair_gather = 3 * kMillisecond;

  // --- End-game: answers by unicast. A page that the group was not sent yet is always news. ---
  double endgame_share = 0.9;  // of the pages sent to the group; above 1: never
  // Nobody else heard for so long; kNever: never. Long, and longer once somebody came back after
  // more: a clone that others' answers feed is silent as well, and would have to ask for all of it.
  TimeNs endgame_silence = 30 * kSecond;
  std::vector<PageRange> disjoint;  // not pushed, answered by unicast

  // --- Packing: a page that LZ4 makes fit one packet goes so. It saves 8 to 17 us of a 1 Gbit/s
  // link on average, for 3.6 us of the server's one thread a page: off, since it pays below some 2
  // Gbit/s only (docs/mcdist-compression.md). ---
  bool pack = false;

  // --- Being found: announces to the group while no client was heard. A replica is turned to only
  // by clients that have heard of it before their server died. A source is told to its clients. ---
  TimeNs announce_unheard = kNever;

  // --- History ---
  uint32_t history_pages = 65536;     // first faults remembered in their order; 0: none
  std::vector<HistoryEntry> history;  // to begin with: the record of the generation before
};

}  // namespace sf::mcdist
