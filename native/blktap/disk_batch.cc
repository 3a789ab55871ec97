// Several small writes at once: what a connection found in its buffer.
//
// Pages written for the first time have to be marked in the live map before their writes are
// answered. Done one by one that is two system calls a page; together it is two a block of the map
// (64 MiB of disk).
//
// The stretches' locks are held from the first byte to the last mark: whoever saw a page's data but
// not its mark would fill it up from below, and undo what is then acknowledged. So a failed write
// may give back only what no other one of them has marked.
#include <algorithm>
#include <array>
#include <mutex>
#include <shared_mutex>

#include "blktap/disk.h"

namespace sf {

void Disk::write_many(std::span<Write> writes) {
  std::array<Write*, kMaxWrites> together;
  size_t count = 0;
  for (auto& one : writes) {
    Stretch stretch;
    stretch.cover(one.off, one.len);
    const bool whole = stretch.end() >= one.off + one.len;
    // Its own turn, after what came before it.
    if (!whole || count == together.size()) {
      write_together({together.data(), count});
      count = 0;
    }
    if (whole) {
      together[count++] = &one;
    } else {
      one.error = write(one.off, one.len, one.data, ReadMode::kNowait);
    }
  }
  write_together({together.data(), count});
}

// Each lies in one stretch.
void Disk::write_together(std::span<Write* const> writes) {
  if (writes.size() <= 1) {
    for (auto* one : writes) {
      one->error = write(one->off, one->len, one->data, ReadMode::kNowait);
    }
    return;
  }
  std::shared_lock gate(gate_);
  if (closed_) {
    for (auto* one : writes) one->error = ESHUTDOWN;
    return;
  }
  std::array<size_t, kMaxWrites> numbers;
  for (size_t i = 0; i < writes.size(); i++) {
    numbers[i] = page_lock_number(writes[i]->off / kPageBytes);
  }
  const auto sorted = numbers.begin() + static_cast<ptrdiff_t>(writes.size());
  std::sort(numbers.begin(), sorted);
  const auto distinct = std::unique(numbers.begin(), sorted);
  std::array<std::unique_lock<std::mutex>, kMaxWrites> locks;
  for (auto number = numbers.begin(); number != distinct; ++number) {
    locks[static_cast<size_t>(number - numbers.begin())] = std::unique_lock(page_locks_[*number]);
  }
  ReadGate::Section section(chain_.slices->readers());

  std::array<Slice::Mark, kMaxWrites> marks;
  std::array<Write*, kMaxWrites> marked;
  size_t fresh_count = 0;
  Stretch stretch;
  for (auto* one : writes) {
    stretch.cover(one->off, one->len);
    lookup(&stretch);
    Written written;
    one->error = write_data(stretch, one->off, one->len, one->data, ReadMode::kNowait, &written);
    if (one->error != 0 || !written.fresh) continue;
    marks[fresh_count] = {stretch.first, stretch.count};
    marked[fresh_count++] = one;
  }
  if (fresh_count > 0) {
    top_->mark_present({marks.data(), fresh_count});
    std::unique_lock lock(index_lock_);
    for (size_t i = 0; i < fresh_count; i++) {
      if (marks[i].error == 0) {
        index_.set(marks[i].first, marks[i].count, top_number_);
      } else {
        marked[i]->error = marks[i].error;
      }
    }
  }
  uint64_t bytes = 0;
  uint64_t done = 0;
  for (auto* one : writes) {
    if (one->error == 0) {
      done++;
      bytes += one->len;
    } else if (one->error != EAGAIN) {
      stretch.cover(one->off, one->len);
      lookup(&stretch);
      give_back(stretch);
    }
    one->error = count_error(one->error);
  }
  stats_.writes.fetch_add(done, std::memory_order_relaxed);
  stats_.bytes_written.fetch_add(bytes, std::memory_order_relaxed);
}

}  // namespace sf
