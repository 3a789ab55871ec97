#include "blktap/chain.h"

#include <algorithm>
#include <cstring>

namespace sf {

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
      error = chain.slices->at(entry).data().read(off, n, out, mode);
    }
    if (error != 0) return error;
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

uint64_t chain_extent(const Chain& chain, const SliceIndex& index, uint64_t off, uint64_t limit,
                      bool* hole) {
  const uint64_t end = off + limit;
  uint64_t at = off;
  while (at < end) {
    const PageIndex page = at / kPageBytes;
    uint64_t run_end = std::min(end, (page + 1) * kPageBytes);
    bool zero = false;
    const uint64_t base_pages = index.base_run(page);
    const SliceIndex::Entry entry = base_pages > 0 ? SliceIndex::kBase : index.get(page);
    if (entry == SliceIndex::kBase) {
      if (base_pages > (end - at) / kPageBytes) {
        run_end = end;
      } else if (base_pages > 0) {
        run_end = std::min(end, (page + base_pages) * kPageBytes);
      }
      run_end = at + chain.base->extent(at, run_end - at, &zero);
    } else {
      zero = entry == SliceIndex::kZero;
    }
    if (at == off) {
      *hole = zero;
    } else if (zero != *hole) {
      break;
    }
    at = run_end;
  }
  return at - off;
}

uint32_t chain_depth(const Chain& chain, uint32_t top, SliceIndex::Entry entry) {
  if (entry == SliceIndex::kBase) return top + 1;
  if (entry == SliceIndex::kZero) return 1;
  return top - std::min(top, chain.slices->height(entry)) + 1;
}

}  // namespace sf
