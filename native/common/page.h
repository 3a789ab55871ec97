// Pages and the two sides that move them: who provides a generation's pages, who fetches them.
//
// A generation is an immutable image of 4 KiB pages (RAM or disk alike). Everything in native/ that
// moves bytes speaks of generations through the two interfaces below, so that memory, disk and the
// network never know each other.
#pragma once

#include <poll.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace sf {

constexpr size_t kPageBytes = 4096;
using PageIndex = uint64_t;

// kZero: the page is known to be all zeros and has no bytes anywhere.
enum class PageState : uint8_t { kAbsent = 0, kPresent = 1, kZero = 2 };

enum class ReadResult : uint8_t {
  kData,    // 4096 bytes were written to `out`
  kZero,    // the page is all zeros; `out` was not touched
  kAbsent,  // not held here (yet): ask elsewhere
  kError,   // it is held here and cannot be read (I/O error, the VM is gone)
};

// Holds (part of) a generation and reads its pages: a parent's memory, a disk's view, a replica.
// Implementations are thread-safe; read() may block on local I/O, never on the network.
class PageProvider {
 public:
  virtual ~PageProvider() = default;
  virtual uint64_t pages() const = 0;
  // How many of them it can read now.
  virtual uint64_t held() const { return pages(); }
  virtual ReadResult read(PageIndex page, uint8_t* out) = 0;
};

enum class Urgency : uint8_t { kFault = 0, kPrefetch = 1 };

// A thread that has nothing else to do until `waits` is 0 or one of `watched` is ready (its
// `revents` say so, as those of poll()).
struct Lending {
  static constexpr size_t kMaxWatched = 8;
  const std::atomic<uint32_t>& waits;
  std::span<pollfd> watched = {};
};

// Gets absent pages into a replica (the mcdist client). want() never blocks; the answer arrives as
// Replica::fill(), fill_zero() or fail() on any thread. A page asked again while it is under way is
// not asked twice.
class PageFetcher {
 public:
  virtual ~PageFetcher() = default;
  virtual void want(PageIndex page, Urgency urgency) = 0;
  // want() of each as a fault, by a thread that is lent to the fetcher: it may have it receive
  // (other pages too) as long as the thread has nothing else to do. False: it has no use for it, or
  // no longer; the thread is to wait by itself.
  virtual bool fetch(std::span<const PageIndex> pages, const Lending& lending) {
    (void)lending;
    for (PageIndex page : pages) want(page, Urgency::kFault);
    return false;
  }
  // Asks for a run of pages nobody waits for yet. False: it has too much to do, nothing was taken.
  virtual bool prefetch(PageIndex first, uint64_t count) {
    for (; count > 0; first++, count--) want(first, Urgency::kPrefetch);
    return true;
  }
  // From now on all pages that the replica's users need, in whatever order is fastest, until none
  // is left that can be had so; or no more of that. False: it cannot, pages have to be asked for.
  virtual bool subscribe(bool on) {
    (void)on;
    return false;
  }
  virtual bool subscribed() const { return false; }
};

// Reads a generation through a replica, and may have made some of its pages its own since.
// Thread-safe.
class PageUser {
 public:
  virtual ~PageUser() = default;
  // Which of the 64 pages from `first` (a multiple of 64) it may still read: bit i is first + i.
  virtual uint64_t needs(PageIndex first) const = 0;
};

}  // namespace sf
