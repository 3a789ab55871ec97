// What lies where: extents of a chain for BLOCK_STATUS, and reading ahead for CACHE.
//
// Depths, as qemu:allocation-depth has them (QEMU's docs/interop/nbd.rst):
//   0      nowhere: zeros that no slice and no base holds (a hole of a base image, a page that a
//          replica knows to be zero, a disk over nothing)
//   1      the newest slice: the top of a disk, or the slice a generation was sealed as
//   n      the n-th slice from there downwards
//   last   one more than there are slices: data of the base. A page of a replica that is not on
//          this host yet is of that kind: data, no hole, for its content is not known to be zeros.
// A page zeroed after it held data (TRIM, WRITE_ZEROES) is a hole at depth 1: the index does not
// keep which slice says so, and whoever copies the newest slice alone must not miss it.
#include <algorithm>

#include "blktap/chain.h"

namespace sf {
namespace {

constexpr unsigned kMaxSteps = 256;  // of at most one leaf each

// Calls `each(off, bytes, entry)` for runs of pages with one entry until it says false.
template <typename Each>
void for_each_run(const SliceIndex& index, uint64_t off, uint64_t end, const Each& each) {
  Stretch stretch;
  while (off < end) {
    const PageIndex page = off / kPageBytes;
    const uint64_t untouched = index.base_run(page);
    if (untouched > 0) {
      const uint64_t pages = std::min(untouched, (end - off) / kPageBytes + 1);
      const uint64_t n = std::min(end, (page + pages) * kPageBytes) - off;
      if (!each(off, n, SliceIndex::kBase)) return;
      off += n;
      continue;
    }
    stretch.cover(off, end - off);
    index.get(stretch.first, stretch.count, stretch.entries.data());
    for (size_t i = 0; i < stretch.count;) {
      size_t next = i + 1;
      while (next < stretch.count && stretch.entries[next] == stretch.entries[i]) next++;
      const uint64_t n = std::min(end, (stretch.first + next) * kPageBytes) - off;
      if (!each(off, n, stretch.entries[i])) return;
      off += n;
      i = next;
    }
  }
}

}  // namespace

Device::Extent chain_extent(const Chain& chain, const SliceIndex& index, uint32_t top, uint64_t off,
                            uint64_t limit) {
  Device::Extent out;
  unsigned steps = 0;
  // False when `more` does not go on in the same state.
  auto add = [&](const Device::Extent& more) {
    if (out.bytes > 0 && (more.hole != out.hole || more.depth != out.depth)) return false;
    const uint64_t before = out.bytes;
    out = more;
    out.bytes += before;
    return ++steps < kMaxSteps;
  };
  for_each_run(index, off, off + limit, [&](uint64_t at, uint64_t n, SliceIndex::Entry entry) {
    if (entry != SliceIndex::kBase) {
      return add({n, entry == SliceIndex::kZero, chain_depth(chain, top, entry)});
    }
    for (uint64_t done = 0; done < n;) {
      bool zero = false;
      const uint64_t part = chain.base->extent(at + done, n - done, &zero);
      if (!add({part, zero, zero ? 0u : top + 1})) return false;
      done += part;
    }
    return true;
  });
  return out;
}

void chain_cache(const Chain& chain, const SliceIndex& index, uint64_t off, uint64_t len) {
  for_each_run(index, off, off + len, [&](uint64_t at, uint64_t n, SliceIndex::Entry entry) {
    if (entry == SliceIndex::kBase) {
      chain.base->cache(at, n);
    } else if (entry != SliceIndex::kZero) {
      // A hint: one that would wait for a descriptor is not worth it.
      CachedFile::Pin pin;
      if (pin_slice(chain, entry, ReadMode::kNowait, &pin) == 0) pin.ref().read_ahead(at, n);
    }
    return true;
  });
}

}  // namespace sf
