// Reading and writing the top of a disk.
#include <errno.h>

#include <algorithm>
#include <cstring>
#include <shared_mutex>

#include "blktap/disk.h"

namespace sf {
namespace {

constexpr uint8_t kZeroes[kPageBytes] = {};

}  // namespace

void Disk::lookup(Stretch* stretch) const {
  std::shared_lock lock(index_lock_);
  index_.get(stretch->first, stretch->count, stretch->entries.data());
}

int Disk::read(uint64_t off, size_t len, uint8_t* out, ReadMode mode, bool* zero) {
  *zero = true;
  const int error = read_chain(
      chain_, [&](Stretch* s) { lookup(s); }, off, len, out, mode, zero);
  if (error != 0) return count_error(error);
  stats_.reads.fetch_add(1, std::memory_order_relaxed);
  stats_.bytes_read.fetch_add(len, std::memory_order_relaxed);
  return 0;
}

int Disk::write(uint64_t off, size_t len, const uint8_t* data, ReadMode mode) {
  const size_t total = len;
  Stretch stretch;
  while (len > 0) {
    stretch.cover(off, len);
    const size_t n = std::min<uint64_t>(len, stretch.end() - off);
    std::shared_lock gate(gate_);
    if (closed_) return ESHUTDOWN;
    std::lock_guard page(page_lock(stretch.first));
    ReadGate::Section section(chain_.slices->readers());
    lookup(&stretch);
    const int error = write_stretch(stretch, off, n, data, mode);
    if (error != 0) return count_error(error);
    off += n;
    data += n;
    len -= n;
  }
  stats_.writes.fetch_add(1, std::memory_order_relaxed);
  stats_.bytes_written.fetch_add(total, std::memory_order_relaxed);
  return 0;
}

int Disk::write_stretch(const Stretch& stretch, uint64_t off, size_t len, const uint8_t* data,
                        ReadMode mode) {
  const uint64_t end = off + len;
  const PageIndex last = stretch.first + stretch.count - 1;
  // A page written in part for the first time is filled up from below, so that the slice has all
  // of it; a page written whole never looks below.
  uint8_t head[kPageBytes];
  uint8_t tail[kPageBytes];
  size_t head_bytes = off % kPageBytes;
  size_t tail_bytes = (kPageBytes - end % kPageBytes) % kPageBytes;
  if (stretch.entry(stretch.first) == top_number_) head_bytes = 0;
  if (stretch.entry(last) == top_number_) tail_bytes = 0;
  const bool below = head_bytes != 0 || (tail_bytes != 0 && end != chain_.size);
  if (below && mode == ReadMode::kNowait) return EAGAIN;
  bool zero = true;
  int error = 0;
  if (head_bytes != 0) {
    error =
        read_stretch(chain_, stretch, off - head_bytes, head_bytes, head, ReadMode::kBlock, &zero);
  }
  if (error == 0 && tail_bytes != 0) error = fill_tail(stretch, end, tail_bytes, tail);
  if (error != 0) return error;
  iovec parts[3] = {{head, head_bytes}, {const_cast<uint8_t*>(data), len}, {tail, tail_bytes}};
  error = top_->data().writev(off - head_bytes, parts, 3);
  bool fresh = false;
  for (PageIndex page = stretch.first; page <= last; page++) {
    fresh = fresh || stretch.entry(page) != top_number_;
  }
  if (error == 0 && fresh) error = mark(stretch.first, stretch.count, PageState::kPresent);
  if (error != 0) give_back(stretch);
  return error;
}

// The rest of a page: what is below, and zeros beyond the disk's end.
int Disk::fill_tail(const Stretch& stretch, uint64_t off, size_t len, uint8_t* out) {
  const size_t inside = std::min<uint64_t>(len, chain_.size - off);
  std::memset(out + inside, 0, len - inside);
  bool zero = true;
  if (inside == 0) return 0;
  return read_stretch(chain_, stretch, off, inside, out, ReadMode::kBlock, &zero);
}

// After a failed write: what it put into pages that are not the top's takes space for nothing,
// which a full file system needs, not least for the map. None of them is marked: the states of a
// stretch are 16 aligned bytes of the map, written in one piece or not at all.
void Disk::give_back(const Stretch& stretch) {
  for (PageIndex page = stretch.first; page < stretch.first + stretch.count; page++) {
    if (stretch.entry(page) != top_number_) top_->punch(page, 1);
  }
}

int Disk::mark(PageIndex first, uint64_t count, PageState state) {
  const int error = top_->mark(first, count, state);
  if (error != 0) return error;
  std::unique_lock lock(index_lock_);
  index_.set(first, count, state == PageState::kZero ? SliceIndex::kZero : top_number_);
  return 0;
}

uint64_t Disk::untouched_run(PageIndex page) const {
  ReadGate::Section section(chain_.slices->readers());
  if (!chain_.base->all_zero()) return 0;
  std::shared_lock lock(index_lock_);
  return index_.base_run(page);
}

int Disk::zero(uint64_t off, uint64_t len, bool edges) {
  const uint64_t total = len;
  Stretch stretch;
  while (len > 0) {
    // An area that nobody wrote, over nothing, is zeros already; a discard of a whole disk stays
    // cheap in time and memory. A write that comes in between is concurrent with this request.
    const uint64_t untouched = untouched_run(off / kPageBytes);
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
    const int error = zero_stretch(stretch, off, n, edges);
    if (error != 0) return count_error(error);
    off += n;
    len -= n;
  }
  stats_.zeroes.fetch_add(1, std::memory_order_relaxed);
  stats_.bytes_zeroed.fetch_add(total, std::memory_order_relaxed);
  return 0;
}

int Disk::zero_stretch(const Stretch& stretch, uint64_t off, uint64_t len, bool edges) {
  auto is_zero = [&](PageIndex page) {
    const SliceIndex::Entry entry = stretch.entry(page);
    return entry == SliceIndex::kZero || (entry == SliceIndex::kBase && chain_.base->all_zero());
  };
  const uint64_t end = off + len;
  const PageIndex whole_first = (off + kPageBytes - 1) / kPageBytes;
  const PageIndex whole_end = end == chain_.size ? pages_of(end) : end / kPageBytes;
  if (edges) {
    // At most two pages are covered in part; a page that is zeros has nothing to be zeroed.
    for (PageIndex page : {off / kPageBytes, (end - 1) / kPageBytes}) {
      const uint64_t from = std::max(off, page * kPageBytes);
      const uint64_t to = std::min(end, (page + 1) * kPageBytes);
      if ((page >= whole_first && page < whole_end) || is_zero(page)) continue;
      Stretch one;
      one.first = page;
      one.count = 1;
      one.entries[0] = stretch.entry(page);
      const int error = write_stretch(one, from, to - from, kZeroes, ReadMode::kBlock);
      if (error != 0) return error;
      if (off / kPageBytes == (end - 1) / kPageBytes) break;
    }
  }
  for (PageIndex page = whole_first; page < whole_end;) {
    if (is_zero(page)) {
      page++;
      continue;
    }
    const bool own = stretch.entry(page) == top_number_;
    PageIndex next = page + 1;
    while (next < whole_end && !is_zero(next) && (stretch.entry(next) == top_number_) == own) {
      next++;
    }
    int error = mark(page, next - page, PageState::kZero);
    // The bytes go after the state: a hole behind a page marked `data` would be the same zeros.
    if (error == 0 && own) error = top_->punch(page, next - page);
    if (error != 0) return error;
    page = next;
  }
  return 0;
}

}  // namespace sf
