// Which slice holds the pages of a number. Indices (slice_index.h) hold numbers.
//
// A number is given to a slice when it is opened and is not given again while the store is open. A
// merge moves a slice's pages to another slice's file: it points the number there, and all indices
// that hold it stay right. Slots are never freed before the table; who owns the slices is the
// business of the store's nodes (store.h), which clear a slot when no index can hold its number.
//
// at() is called inside a section of readers(): what it returned may be destroyed once the section
// is over. Heights tell how many slices lie below (1: none); they change under shape().
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <mutex>

#include "blktap/read_gate.h"
#include "blktap/rwlock.h"
#include "blktap/slice.h"
#include "blktap/slice_index.h"

namespace sf {

class SliceTable {
 public:
  using Number = SliceIndex::Entry;

  ~SliceTable();
  Number add(const Slice* slice, uint32_t height);  // 0 if there are no numbers left
  void point(Number number, const Slice* slice) { slot(number).slice.store(slice); }
  void set_height(Number number, uint32_t height) { slot(number).height = height; }

  const Slice& at(Number number) const { return *slot(number).slice.load(); }
  uint32_t height(Number number) const { return slot(number).height; }
  ReadGate& readers() const { return readers_; }
  RwLock& shape() const { return shape_; }

 private:
  static constexpr size_t kBlock = 4096;
  static constexpr size_t kBlocks = 16384;  // 67 million slices opened, of 16 bytes each
  struct Slot {
    std::atomic<const Slice*> slice{nullptr};
    std::atomic<uint32_t> height{0};
  };
  using Block = std::array<Slot, kBlock>;
  Slot& slot(Number number) const {
    return (*blocks_[number / kBlock].load(std::memory_order_acquire))[number % kBlock];
  }

  std::array<std::atomic<Block*>, kBlocks> blocks_ = {};
  std::mutex mutex_;  // guards next_
  size_t next_ = 1;
  mutable ReadGate readers_;
  mutable RwLock shape_;
};

inline SliceTable::~SliceTable() {
  for (auto& block : blocks_) delete block.load();
}

inline SliceTable::Number SliceTable::add(const Slice* slice, uint32_t height) {
  std::lock_guard lock(mutex_);
  if (next_ > SliceIndex::kMaxSlice || next_ / kBlock >= kBlocks) return 0;
  auto& block = blocks_[next_ / kBlock];
  if (block.load() == nullptr) block.store(new Block(), std::memory_order_release);
  const auto number = static_cast<Number>(next_++);
  point(number, slice);
  set_height(number, height);
  return number;
}

}  // namespace sf
