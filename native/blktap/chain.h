// What reads of a disk and of a view share: slices by number, a base, and a merged index.
#pragma once

#include <algorithm>
#include <array>
#include <memory>
#include <utility>
#include <vector>

#include "blktap/base.h"
#include "blktap/device.h"
#include "blktap/slice_index.h"
#include "blktap/slice_table.h"

namespace sf {

struct Chain {
  uint64_t size = 0;  // bytes
  std::shared_ptr<Base> base;
  std::shared_ptr<SliceTable> slices;
};

// A stretch of up to 64 pages in one index leaf, with their entries.
struct Stretch {
  PageIndex first = 0;
  size_t count = 0;
  std::array<SliceIndex::Entry, SliceIndex::kLeafPages> entries;

  // The pages that [off, off + len) touches, as far as one leaf goes. `len` must not be 0.
  void cover(uint64_t off, uint64_t len) {
    first = off / kPageBytes;
    const PageIndex last = (off + len - 1) / kPageBytes;
    count = std::min(last - first + 1, SliceIndex::kLeafPages - first % SliceIndex::kLeafPages);
  }
  uint64_t end() const { return (first + count) * kPageBytes; }
  SliceIndex::Entry entry(PageIndex page) const { return entries[page - first]; }
};

// The data file of an entry that is a slice; it and read_slice() in a section of
// chain.slices->readers() that began before the entry was looked up and that outlives the pin. So
// the slice is no merged one (merge.cc retires those after the readers are gone), and ESTALE cannot
// be. As CachedFile::pin().
int pin_slice(const Chain& chain, SliceIndex::Entry entry, ReadMode mode, CachedFile::Pin* out);
int read_slice(const Chain& chain, SliceIndex::Entry entry, uint64_t off, size_t len, uint8_t* out,
               ReadMode mode);

// Reads [off, off + len), which lies in `stretch`. In a section of chain.slices->readers() that
// began before the stretch was looked up.
int read_stretch(const Chain& chain, const Stretch& stretch, uint64_t off, size_t len, uint8_t* out,
                 ReadMode mode, bool* zero);

// `lookup(Stretch*)` fills in the entries of a stretch.
template <typename Lookup>
int read_chain(const Chain& chain, const Lookup& lookup, uint64_t off, size_t len, uint8_t* out,
               ReadMode mode, bool* zero) {
  ReadGate::Section section(chain.slices->readers());
  Stretch stretch;
  while (len > 0) {
    stretch.cover(off, len);
    lookup(&stretch);
    const size_t n = std::min<uint64_t>(len, stretch.end() - off);
    const int error = read_stretch(chain, stretch, off, n, out, mode, zero);
    if (error != 0) return error;
    off += n;
    out += n;
    len -= n;
  }
  return 0;
}

// Device::plan_read() of what lies in `stretch`. EAGAIN if that would wait for a descriptor, or if
// the plan would pin more than kMaxPins files.
int plan_stretch(const Chain& chain, const Stretch& stretch, uint64_t off, size_t len, uint8_t* out,
                 ReadPlan* plan);

template <typename Lookup>
int plan_chain(const Chain& chain, const Lookup& lookup, uint64_t off, size_t len, uint8_t* out,
               ReadPlan* plan) {
  plan->keep = {chain.base, chain.slices};
  plan->section = std::make_shared<ReadGate::Section>(chain.slices->readers());
  Stretch stretch;
  while (len > 0) {
    stretch.cover(off, len);
    lookup(&stretch);
    const size_t n = std::min<uint64_t>(len, stretch.end() - off);
    const int error = plan_stretch(chain, stretch, off, n, out, plan);
    if (error != 0) return error;
    off += n;
    out += n;
    len -= n;
  }
  return 0;
}

// Device::missing(), extent() and cache() over an index. Not to be changed meanwhile.
void chain_missing(const Chain& chain, const SliceIndex& index, uint64_t off, uint64_t len,
                   Device::Access access, std::vector<PageIndex>* out);
// extent() and cache() in a section of chain.slices->readers(), extent() with shape() shared too.
// `top`: the height of the slice at depth 1. See extent.cc for what the depths are.
Device::Extent chain_extent(const Chain& chain, const SliceIndex& index, uint32_t top, uint64_t off,
                            uint64_t limit);
void chain_cache(const Chain& chain, const SliceIndex& index, uint64_t off, uint64_t len);

// Depth of an entry as QEMU's qemu:allocation-depth counts it, seen from a slice of height `top`: 1
// for that slice itself, more below; the base is one below the oldest slice. Entries that are zeros
// count as the top's. The caller holds chain.slices->shape() shared.
uint32_t chain_depth(const Chain& chain, uint32_t top, SliceIndex::Entry entry);

// Which of the 64 pages from `first` (a multiple of 64) are the base's.
uint64_t base_mask(const SliceIndex& index, PageIndex first);

}  // namespace sf
