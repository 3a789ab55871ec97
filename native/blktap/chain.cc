#include "blktap/chain.h"

#include <algorithm>
#include <cstring>

namespace sf {

SliceIndex::Entry SliceTable::add(std::shared_ptr<Slice> slice) {
  const size_t number = owned_.size() + 1;
  if (number > kCapacity) return 0;
  auto& block = blocks_[number / kBlock];
  if (block == nullptr) block = std::make_unique<std::array<const Slice*, kBlock>>();
  (*block)[number % kBlock] = slice.get();
  owned_.push_back(std::move(slice));
  return static_cast<SliceIndex::Entry>(number);
}

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
      error = chain.slices->at(entry).read(off, n, out, mode);
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
  const bool tail = (off + len) % kPageBytes != 0;
  if (head || (tail && first == last)) check(first);
  if (tail && first != last) check(last);
}

uint64_t chain_extent(const Chain& chain, const SliceIndex& index, uint64_t off, uint64_t limit,
                      bool* hole) {
  const uint64_t end = off + limit;
  uint64_t at = off;
  while (at < end) {
    const PageIndex page = at / kPageBytes;
    bool zero = false;
    uint64_t pages = 0;
    const SliceIndex::Entry entry = index.run(page, &pages);
    uint64_t run_end = end;
    if (pages <= (end - page * kPageBytes) / kPageBytes)
      run_end = std::min(end, (page + pages) * kPageBytes);
    if (entry == SliceIndex::kBase) {
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

ReadResult View::read(PageIndex page, uint8_t* out) {
  if (page >= pages()) return ReadResult::kError;
  const SliceIndex::Entry entry = index_.get(page);
  if (entry == SliceIndex::kZero) return ReadResult::kZero;
  if (entry == SliceIndex::kBase) {
    const ReadResult result = chain_.base->read_page(page, out);
    // A clone's disk serves its own clones: what it does not hold yet is fetched from its source,
    // and whoever asked asks again.
    if (result == ReadResult::kAbsent) chain_.base->want(page, [](const Status&) {});
    return result;
  }
  const Slice& slice = chain_.slices->at(entry);
  if (slice.read(page * kPageBytes, kPageBytes, out, ReadMode::kBlock) != 0) {
    return ReadResult::kError;
  }
  return is_zero_page(out) ? ReadResult::kZero : ReadResult::kData;
}

int View::read(uint64_t off, size_t len, uint8_t* out, ReadMode mode, bool* zero) {
  *zero = true;
  return read_chain(
      chain_, [&](Stretch* s) { index_.get(s->first, s->count, s->entries.data()); }, off, len, out,
      mode, zero);
}

}  // namespace sf
