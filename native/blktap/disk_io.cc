// Reading and writing the top of a disk.
#include <errno.h>

#include <algorithm>
#include <cstring>
#include <shared_mutex>

#include "blktap/disk.h"
#include "blktap/files.h"

namespace sf {

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

int Disk::plan_read(uint64_t off, size_t len, uint8_t* out, ReadPlan* plan) {
  const int error = plan_chain(
      chain_, [&](Stretch* s) { lookup(s); }, off, len, out, plan);
  if (error != 0) return error;  // the caller reads it otherwise then, where it counts
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
  Written written;
  int error = write_data(stretch, off, len, data, mode, &written);
  if (error == 0 && written.fresh) error = mark(stretch.first, stretch.count, PageState::kPresent);
  if (error != 0 && written.touched) give_back(stretch);
  return error;
}

int Disk::write_data(const Stretch& stretch, uint64_t off, size_t len, const uint8_t* data,
                     ReadMode mode, Written* written) {
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
  written->touched = true;
  for (PageIndex page = stretch.first; page <= last; page++) {
    written->fresh = written->fresh || stretch.entry(page) != top_number_;
  }
  error = top_->data().writev(off - head_bytes, parts, 3);
  if (error != 0) write_failed(error);
  return error;
}

// A flush tells what it met, and a file that is read too; a write has nobody else to do so.
void Disk::write_failed(int error) {
  store_->file_errors()->report(file_error("write " + top_->pages().path(), error));
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
  if (error != 0) write_failed(error);
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

}  // namespace sf
