// Counters of both sides. Written by one thread each, read by any.
#pragma once

#include <atomic>
#include <cstdint>

namespace sf::mcdist {

using Counter = std::atomic<uint64_t>;

inline void count(Counter& counter, uint64_t by = 1) {
  counter.fetch_add(by, std::memory_order_relaxed);
}

// name, for tables of counters and their JavaScript properties
#define SF_MCDIST_SERVER_COUNTERS(X)                                                    \
  X(requests)          /* request packets accepted */                                   \
  X(pages_requested)   /* pages in them */                                              \
  X(pages_served)      /* pages sent as bytes, whole or in part */                      \
  X(zero_pages_served) /* pages told to be zero */                                      \
  X(negative_answers)  /* pages refused: not held, or unreadable */                     \
  X(payload_bytes)     /* page bytes sent */                                            \
  X(wire_bytes)        /* all bytes sent, with UDP and IP headers */                    \
  X(packets_sent)                                                                       \
  X(merged)           /* pages asked that were queued already */                        \
  X(lockstep_ignored) /* pages asked that were sent a moment ago */                     \
  X(pages_pushed)     /* of those served: asked for by nobody */                        \
  X(pages_replayed)   /* pages sent since earlier clones touched them first */          \
  X(unicast_answers)  /* pages answered to one peer alone */                            \
  X(reports)          /* blocks reported to lack something */                           \
  X(reports_ignored)  /* of those: what repairs them was on its way */                  \
  X(reports_dropped)  /* of those: not taken, too many are gathered */                  \
  X(repair_symbols)   /* symbols sent again for reports, as they are */                 \
  X(parity_symbols)   /* parity symbols sent for reports */                             \
  X(packed_pages)     /* pages sent compressed, each in one packet */                   \
  X(announces)                                                                          \
  X(retries)       /* pages asked again after a client's time-out */                    \
  X(queue_dropped) /* pages not taken: the queue, or the peer's share of it, is full */ \
  X(welcomes)                                                                           \
  X(peers_refused) /* packets of newcomers: all places are taken by peers just heard */ \
  X(replays)       /* authentic packets seen before */                                  \
  X(auth_failures) /* packets that did not open with the generation's key */            \
  X(bad_packets)   /* packets malformed, or of a kind not sent to a server */           \
  X(send_errors)   /* packets the system did not take */                                \
  X(send_waits)    /* times it had no room: the local link is the limit */

#define SF_MCDIST_CLIENT_COUNTERS(X)                                                  \
  X(requests)         /* request packets sent */                                      \
  X(pages_requested)  /* pages in them, retries included */                           \
  X(urgent_requested) /* of those, because somebody waits */                          \
  X(retries)          /* pages asked again after a time-out */                        \
  X(pages_filled)     /* pages that came and were new here */                         \
  X(pages_overheard)  /* of those, not asked for from here */                         \
  X(zero_pages_filled)                                                                \
  X(payload_bytes) /* page bytes filled */                                            \
  X(wire_bytes_sent)                                                                  \
  X(wire_bytes_received)                                                              \
  X(duplicates)       /* fragments of pages, or zero pages, that were here already */ \
  X(negative_answers) /* pages refused that were wanted here */                       \
  X(pages_failed)                                                                     \
  X(prefetch_dropped) /* prefetches not taken: too many ranges */                     \
  X(welcomes)                                                                         \
  X(announces)                                                                        \
  X(pushed_packets)  /* that nobody asked for: sent by a push cursor */               \
  X(blocks_reported) /* blocks told to lack something, again each time */             \
  X(parities_received)                                                                \
  X(packed_pages)   /* pages that came compressed, each in one packet */              \
  X(pages_repaired) /* pages filled of which a part came out of parities */           \
  X(fail_overs)     /* times another server became the one that is asked */           \
  X(auth_failures)                                                                    \
  X(wrong_generation)                                                                 \
  X(unknown_sender) /* packets of a server that has not made itself known */          \
  X(bad_packets)                                                                      \
  X(fill_errors) /* pages that came and could not be stored */                        \
  X(send_errors)

#define SF_DECLARE_COUNTER(name) Counter name{0};
struct ServerCounters {
  SF_MCDIST_SERVER_COUNTERS(SF_DECLARE_COUNTER)
};
struct ClientCounters {
  SF_MCDIST_CLIENT_COUNTERS(SF_DECLARE_COUNTER)
};
#undef SF_DECLARE_COUNTER

}  // namespace sf::mcdist
