// Zeroing at the top of a disk: TRIM, WRITE_ZEROES, and the latter with NO_HOLE or FAST_ZERO.
//
// A page zeroed whole becomes a state, and nothing is written; its old bytes in the top are punched
// out. A page covered in part is written to, unless it is known to be zeros. With NO_HOLE a page
// becomes data of the top: zeros with space of their own. That holds until the next fork, after
// which the page lies in a sealed slice and a write of it takes space anew.
#include <errno.h>

#include <algorithm>
#include <mutex>
#include <shared_mutex>

#include "blktap/disk.h"

namespace sf {
namespace {

constexpr uint8_t kZeroes[kPageBytes] = {};

}  // namespace

// The last page of a disk ends where the disk does: zeroed up to there it is zeroed whole.
PageIndex Disk::end_of_whole(uint64_t end) const {
  return end == chain_.size ? pages_of(end) : end / kPageBytes;
}

bool Disk::known_zero(PageIndex page, SliceIndex::Entry entry) const {
  if (entry == SliceIndex::kZero) return true;
  if (entry != SliceIndex::kBase) return false;
  bool zero = false;
  return chain_.base->extent(page * kPageBytes, kPageBytes, &zero) == kPageBytes && zero;
}

// Nothing but a page covered in part, at one of the two ends, can ask for more than its state.
bool Disk::zero_is_fast(uint64_t off, uint64_t len, Zero mode) const {
  if (mode != Zero::kZeroes) return mode == Zero::kTrim;
  const uint64_t end = off + len;
  ReadGate::Section section(chain_.slices->readers());
  std::shared_lock lock(index_lock_);
  auto free = [&](PageIndex page) { return known_zero(page, index_.get(page)); };
  return (off % kPageBytes == 0 || free(off / kPageBytes)) &&
         (end % kPageBytes == 0 || end == chain_.size || free(end / kPageBytes));
}

int Disk::zero(uint64_t off, uint64_t len, Zero mode, bool fast) {
  if (fast && !zero_is_fast(off, len, mode)) return EOPNOTSUPP;
  const uint64_t total = len;
  Stretch stretch;
  while (len > 0) {
    // An area that nobody wrote, over nothing, is zeros already; a discard of a whole disk stays
    // cheap in time and memory. A write that comes in between is concurrent with this request.
    const uint64_t untouched = mode == Zero::kAllocate ? 0 : untouched_run(off / kPageBytes);
    if (untouched > 0) {
      const uint64_t pages = std::min(untouched, len / kPageBytes + 1);
      const uint64_t n = std::min(len, (off / kPageBytes + pages) * kPageBytes - off);
      off += n;
      len -= n;
      continue;
    }
    stretch.cover(off, len);
    const uint64_t n = std::min(len, stretch.end() - off);
    std::shared_lock gate(gate_);
    if (closed_) return ESHUTDOWN;
    std::lock_guard page(page_lock(stretch.first));
    ReadGate::Section section(chain_.slices->readers());
    lookup(&stretch);
    const int error = zero_stretch(stretch, off, n, mode);
    if (error != 0) return count_error(error);
    off += n;
    len -= n;
  }
  stats_.zeroes.fetch_add(1, std::memory_order_relaxed);
  stats_.bytes_zeroed.fetch_add(total, std::memory_order_relaxed);
  return 0;
}

int Disk::zero_stretch(const Stretch& stretch, uint64_t off, uint64_t len, Zero mode) {
  const PageIndex whole_first = (off + kPageBytes - 1) / kPageBytes;
  const PageIndex whole_end = end_of_whole(off + len);
  if (mode != Zero::kTrim) {
    const int error = zero_edges(stretch, off, len, mode == Zero::kAllocate);
    if (error != 0) return error;
  }
  if (whole_first >= whole_end) return 0;
  return mode == Zero::kAllocate ? allocate_pages(stretch, whole_first, whole_end)
                                 : zero_pages(stretch, whole_first, whole_end);
}

// At most two pages are covered in part; one that is zeros has nothing to be zeroed, but is written
// if it shall have its space.
int Disk::zero_edges(const Stretch& stretch, uint64_t off, uint64_t len, bool allocate) {
  const uint64_t end = off + len;
  const PageIndex pages[] = {off / kPageBytes, (end - 1) / kPageBytes};
  for (size_t i = 0; i < (pages[0] == pages[1] ? 1 : 2); i++) {
    const PageIndex page = pages[i];
    const uint64_t from = std::max(off, page * kPageBytes);
    const uint64_t to = std::min(end, (page + 1) * kPageBytes);
    if (to - from == kPageBytes || (from % kPageBytes == 0 && to == chain_.size)) continue;
    if (!allocate && known_zero(page, stretch.entry(page))) continue;
    Stretch one;
    one.first = page;
    one.count = 1;
    one.entries[0] = stretch.entry(page);
    const int error = write_stretch(one, from, to - from, kZeroes, ReadMode::kBlock);
    if (error != 0) return error;
  }
  return 0;
}

int Disk::zero_pages(const Stretch& stretch, PageIndex first, PageIndex end) {
  // Not known_zero(): asking the base of each page costs more than the state it saves.
  auto is_zero = [&](PageIndex page) {
    const SliceIndex::Entry entry = stretch.entry(page);
    return entry == SliceIndex::kZero || (entry == SliceIndex::kBase && chain_.base->all_zero());
  };
  for (PageIndex page = first; page < end;) {
    if (is_zero(page)) {
      page++;
      continue;
    }
    const bool own = stretch.entry(page) == top_number_;
    PageIndex next = page + 1;
    while (next < end && !is_zero(next) && (stretch.entry(next) == top_number_) == own) next++;
    int error = mark(page, next - page, PageState::kZero);
    // The bytes go after the state: a hole behind a page marked `data` would be the same zeros.
    if (error == 0 && own) error = top_->punch(page, next - page);
    if (error != 0) return error;
    page = next;
  }
  return 0;
}

// Like a write of zeros: the bytes, then the states.
int Disk::allocate_pages(const Stretch& stretch, PageIndex first, PageIndex end) {
  int error = top_->allocate_zeroes(first, end - first);
  if (error != 0) write_failed(error);
  if (error == 0) error = mark(first, end - first, PageState::kPresent);
  if (error != 0) {
    Stretch given;
    given.first = first;
    given.count = end - first;
    for (PageIndex page = first; page < end; page++) {
      given.entries[page - first] = stretch.entry(page);
    }
    give_back(given);
  }
  return error;
}

}  // namespace sf
