#include "blktap/chain.h"

#include <errno.h>

#include <algorithm>
#include <cassert>
#include <cstring>

namespace sf {

int pin_slice(const Chain& chain, SliceIndex::Entry entry, ReadMode mode, CachedFile::Pin* out) {
  const int error = chain.slices->at(entry).pages().pin(mode, out);
  assert(error != ESTALE);
  return error;
}

int read_slice(const Chain& chain, SliceIndex::Entry entry, uint64_t off, size_t len, uint8_t* out,
               ReadMode mode) {
  CachedFile::Pin pin;
  const int error = pin_slice(chain, entry, mode, &pin);
  return error == 0 ? pin.read(off, len, out, mode) : error;
}

namespace {

// Has the slice's file pinned by `plan`, once.
int pin_for(const Chain& chain, SliceIndex::Entry entry, ReadPlan* plan,
            const CachedFile::Pin** out) {
  const CachedFile* file = &chain.slices->at(entry).pages();
  for (const auto& pin : plan->pins) {
    *out = &pin;
    if (pin.file() == file) return 0;
  }
  if (plan->pins.size() == ReadPlan::kMaxPins) return EAGAIN;
  CachedFile::Pin pin;
  const int error = pin_slice(chain, entry, ReadMode::kNowait, &pin);
  if (error != 0) return error;
  plan->pins.push_back(std::move(pin));
  *out = &plan->pins.back();
  return 0;
}

}  // namespace

int read_stretch(const Chain& chain, const Stretch& stretch, uint64_t off, size_t len, uint8_t* out,
                 ReadMode mode, bool* zero) {
  const uint64_t end = off + len;
  while (off < end) {
    const PageIndex first = off / kPageBytes;
    const SliceIndex::Entry entry = stretch.entry(first);
    PageIndex next = first + 1;
    while (next * kPageBytes < end && stretch.entry(next) == entry) next++;
    const size_t n = std::min(end, next * kPageBytes) - off;
    int error = 0;
    if (entry == SliceIndex::kZero) {
      std::memset(out, 0, n);
    } else if (entry == SliceIndex::kBase) {
      error = chain.base->read(off, n, out, mode, zero);
    } else {
      *zero = false;
      error = read_slice(chain, entry, off, n, out, mode);
    }
    if (error != 0) return error;
    off += n;
    out += n;
  }
  return 0;
}

int plan_stretch(const Chain& chain, const Stretch& stretch, uint64_t off, size_t len, uint8_t* out,
                 ReadPlan* plan) {
  const uint64_t end = off + len;
  while (off < end) {
    const PageIndex first = off / kPageBytes;
    const SliceIndex::Entry entry = stretch.entry(first);
    PageIndex next = first + 1;
    while (next * kPageBytes < end && stretch.entry(next) == entry) next++;
    const size_t n = std::min(end, next * kPageBytes) - off;
    if (entry == SliceIndex::kZero) {
      std::memset(out, 0, n);
    } else if (entry == SliceIndex::kBase) {
      const int error = chain.base->plan_read(off, n, out, plan);
      if (error != 0) return error;
    } else {
      const CachedFile::Pin* pin = nullptr;
      const int error = pin_for(chain, entry, plan, &pin);
      if (error != 0) return error;
      plan->segments.push_back({pin->ref(), off, n, out, pin->file()});
    }
    off += n;
    out += n;
  }
  return 0;
}

void chain_missing(const Chain& chain, const SliceIndex& index, uint64_t off, uint64_t len,
                   Device::Access access, std::vector<PageIndex>* out) {
  if (!chain.base->fills() || len == 0) return;
  const PageIndex first = off / kPageBytes;
  const PageIndex last = (off + len - 1) / kPageBytes;
  auto check = [&](PageIndex page) {
    if (chain.base->absent(page) && index.get(page) == SliceIndex::kBase) out->push_back(page);
  };
  if (access == Device::Access::kRead) {
    for (PageIndex page = first; page <= last; page++) check(page);
    return;
  }
  // Only the pages at the two ends can be written in part.
  const bool head = off % kPageBytes != 0;
  const bool tail = (off + len) % kPageBytes != 0 && off + len != chain.size;
  if (head || (tail && first == last)) check(first);
  if (tail && first != last) check(last);
}

uint32_t chain_depth(const Chain& chain, uint32_t top, SliceIndex::Entry entry) {
  if (entry == SliceIndex::kBase) return top + 1;
  if (entry == SliceIndex::kZero) return 1;
  return top - std::min(top, chain.slices->height(entry)) + 1;
}

uint64_t base_mask(const SliceIndex& index, PageIndex first) {
  static_assert(SliceIndex::kLeafPages == 64);
  if (index.base_run(first) >= SliceIndex::kLeafPages) return ~uint64_t{0};
  const uint64_t count = std::min(SliceIndex::kLeafPages, index.pages() - first);
  std::array<SliceIndex::Entry, SliceIndex::kLeafPages> entries;
  index.get(first, count, entries.data());
  uint64_t mask = 0;
  for (uint64_t i = 0; i < count; i++) {
    if (entries[i] == SliceIndex::kBase) mask |= uint64_t{1} << i;
  }
  return mask;
}

}  // namespace sf
