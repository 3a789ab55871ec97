// What the NBD server serves: a disk's writable top, or the view of a generation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "blktap/data_file.h"
#include "blktap/read_plan.h"
#include "common/page.h"
#include "common/status.h"

namespace sf {

// Errors are errno values, 0 for success. Offsets and lengths are in bytes, of any alignment, and
// within size(): the caller has checked them. All calls may come from many threads at once.
class Device {
 public:
  enum class Access : uint8_t { kRead, kWrite };
  enum class Zero : uint8_t {
    kTrim,      // may become holes; pages covered in part stay as they are
    kZeroes,    // may become holes
    kAllocate,  // keeps or takes the space, so that a later write of it needs none (until a fork)
  };
  struct Extent {
    uint64_t bytes = 0;
    bool hole = false;   // reads as zeros, takes no space. A page not fetched yet is none.
    uint32_t depth = 0;  // qemu:allocation-depth: see chain_extent()
  };

  virtual ~Device() = default;
  virtual uint64_t size() const = 0;
  virtual bool writable() const = 0;

  // EAGAIN with kNowait if it would wait for a device, ENODATA if a page is not on this host yet.
  // `*zero` tells that all bytes are known to be zeros; `out` is filled in either case.
  virtual int read(uint64_t off, size_t len, uint8_t* out, ReadMode mode, bool* zero) = 0;
  // What read() would do, for the caller to carry out later: pieces that are zeros are in `out`
  // already. Then the caller tells how it went, and gets the request's error. After an error
  // (EAGAIN: too many files at once, or it would wait to open one) it shall read() instead, and may
  // wait.
  virtual int plan_read(uint64_t off, size_t len, uint8_t* out, ReadPlan* plan) = 0;
  virtual int carried_out(int error) = 0;
  // With kNowait: EAGAIN if bytes from below the top would have to be read first.
  virtual int write(uint64_t off, size_t len, const uint8_t* data, ReadMode mode) = 0;
  // Several writes, in order, each with an error of its own; as write() with kNowait, but what they
  // have in common is done once.
  struct Write {
    uint64_t off = 0;
    size_t len = 0;
    const uint8_t* data = nullptr;
    int error = 0;
  };
  static constexpr size_t kMaxWrites = 64;
  virtual void write_many(std::span<Write> writes) {  // at most kMaxWrites
    for (auto& one : writes) one.error = write(one.off, one.len, one.data, ReadMode::kNowait);
  }
  // Reads as zeros afterwards. With `fast`: EOPNOTSUPP, and nothing has changed, if bytes would
  // have to be written or fetched for it: kAllocate, or a page covered in part that is not zeros.
  virtual int zero(uint64_t off, uint64_t len, Zero mode, bool fast) = 0;
  // Everything acknowledged before the call is durable after it.
  virtual int flush() = 0;

  // The pages that must arrive before the request can be done; whole-page writes need none.
  virtual void missing(uint64_t off, uint64_t len, Access access,
                       std::vector<PageIndex>* out) const = 0;
  // Calls `done` once on any thread, possibly this one, when the page is here or never will be.
  virtual void want(PageIndex page, std::function<void(const Status&)> done) = 0;

  // Bytes from `off`, at most `limit`, in one state; at least one. Looks at a bounded number of
  // pages, so the next extent may have the same state.
  virtual Extent extent(uint64_t off, uint64_t limit) const = 0;

  // Asks the kernel to read these bytes ahead; does not wait. The caller bounds `len`.
  virtual void cache(uint64_t off, uint64_t len) = 0;
};

}  // namespace sf
