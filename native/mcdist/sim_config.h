// What a simulated run is made of, and what it gives. Times are virtual nanoseconds.
#pragma once

#include <string>
#include <vector>

#include "mcdist/peers.h"
#include "mcdist/policy.h"
#include "mcdist/requester.h"

namespace sf::mcdist {

// What a client does: touches pages one after the other, computing between them.
struct SimTrace {
  std::vector<uint32_t> pages;
  std::vector<uint32_t> compute_ns;  // before each
};

// Clients behind links alike, which multicast reaches at the same moment: they share one event for
// each answer. Their links are one link for what is multicast (each would carry the same) and no
// limit for what goes to one of them (the server's link is narrower, shared by all).
struct SimSegment {
  uint32_t clients = 0;
  double bytes_per_s = 0;  // towards a client; 0: no limit
  TimeNs delay = 50 * kMicrosecond;
  uint64_t queue_bytes = 512 * 1024;
  double loss = 0;  // of each packet, for each client by itself, both ways
};

struct SimChange {
  enum class Kind : uint8_t {
    kDie,            // clients first..first+count-1 are gone for good
    kPart,           // nothing passes to or from them
    kHeal,           // ... passes again
    kServerDie,      // for good
    kServerRestart,  // knows nobody any more
  };
  TimeNs at = 0;
  Kind kind = Kind::kDie;
  uint32_t first = 0;
  uint32_t count = 0;
};

struct SimConfig {
  uint64_t seed = 1;
  uint64_t pages = 0;
  unsigned fragments = 3;
  bool unicast =
      false;  // a baseline without Policy: each request is answered to who asked, in turn
  double zero_share = 0;  // of the pages
  PolicyConfig policy;
  RequesterConfig requester;
  uint32_t max_peers = PeerTable::kMaxPeers;

  double server_bytes_per_s = 125e6;  // its link, each way
  // The send buffer, as socket.cc sets it: when so much is unsent the server waits (its own link
  // loses nothing).
  uint64_t server_send_bytes = 128 * 1024;
  uint64_t server_receive_bytes = 32 << 20;  // socket.cc's; what comes beyond is dropped
  // What the host spends: a request of one run, a page sent, waking a thread that waits.
  TimeNs request_cpu = 2 * kMicrosecond;
  TimeNs page_cpu = 6 * kMicrosecond;
  TimeNs wake = 15 * kMicrosecond;

  std::vector<SimSegment> segments;
  std::vector<SimTrace> traces;  // client i has trace i mod size
  uint32_t jitter_pages = 1;     // each client touches the pages of such a window in its own order
  double private_share = 0;      // of the touches go to a page of the client's own choice
  double speed_spread = 0;       // clients compute faster or slower by up to this share
  double skip_share = 0;         // of the touches a client does not make
  TimeNs join_spread = 0;        // clients start within this time, evenly
  std::vector<std::pair<uint32_t, TimeNs>> joins;  // client, when: instead of the above
  bool history = false;                            // clients ask for what others faulted on
  bool prefetch_all = false;                       // each client subscribes to the whole generation
  std::vector<SimChange> changes;

  TimeNs source_timeout = 30 * kSecond;
  // What must hold; the run ends with an error when it does not.
  TimeNs max_wait = 10 * kSecond;  // of one fault (unless the source is lost)
  double max_bytes_ratio = 0;      // sent, over what all pages asked for once would cost; 0: any
  TimeNs check_interval = 100 * kMillisecond;
  TimeNs max_time = 3600 * kSecond;
};

// Waiting and computing are looked at in blocks of so many touches: a clone runs at speed once all
// further blocks spend at most this share of their time waiting.
constexpr uint32_t kSpeedTouches = 128;
constexpr double kSpeedWaitShare = 0.1;

struct SimSample {
  TimeNs at = 0;
  uint64_t sent_bytes = 0;
  uint64_t dropped_bytes = 0;  // by segments' queues
  double rate = 0;             // the policy's limit, bytes a second
  uint64_t queued = 0;
  uint64_t done = 0;
};

struct SimResult {
  TimeNs end = 0;
  uint64_t events = 0;
  uint64_t sent_bytes = 0;  // by the server, with UDP and IP headers
  uint64_t sent_packets = 0;
  uint64_t received_bytes = 0;  // by all clients, before losses of their own
  uint64_t pages_served = 0;
  uint64_t zero_pages_served = 0;
  uint64_t distinct_pages = 0;  // of those served
  uint64_t requests = 0;        // packets sent by clients
  uint64_t request_bytes = 0;
  uint64_t pages_requested = 0;  // in them, retries included
  uint64_t retries = 0;
  uint64_t requests_dropped = 0;  // the server's link or buffer was full, or lost
  uint64_t dropped_bytes = 0;     // by segments' queues
  uint64_t lockstep_ignored = 0;
  uint64_t merged = 0;
  uint64_t queue_dropped = 0;
  uint64_t welcomes = 0;
  uint64_t evicted_peers = 0;
  uint64_t refused_peers = 0;  // packets of newcomers
  uint64_t cuts = 0;
  uint64_t cuts_undone = 0;
  uint64_t pages_pushed = 0;
  uint64_t unicast_answers = 0;
  uint64_t reports = 0;         // of blocks
  uint64_t repair_symbols = 0;  // plain ones sent for them
  uint64_t parity_symbols = 0;
  uint64_t pages_repaired = 0;  // by parity, of all clients
  uint64_t announces = 0;
  uint64_t max_queued = 0;
  TimeNs max_wait = 0;
  // Of each client; kNever if it did not get so far.
  std::vector<TimeNs> start, first_page, at_speed, finished, waited;
  std::vector<uint64_t> faults;
  std::vector<uint8_t> outcome;  // SimOutcome
  std::vector<SimSample> samples;
};
enum class SimOutcome : uint8_t { kFinished = 0, kSourceLost = 1, kDied = 2, kPageFailed = 3 };

}  // namespace sf::mcdist
