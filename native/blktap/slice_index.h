// Which slice holds a page: the merged index of a chain, the same cost at every depth.
//
// A radix tree (fan-out 64) of 16-bit entries. Nodes carry a reference count; a copy of an index
// shares all nodes and costs nothing, whatever the disk's size, and a change then copies only the
// nodes on its path. So a generation's view keeps the index of its instant while the disk's own
// goes on, and both are read in at most `levels` steps.
//
// Memory: a leaf covers 64 pages (256 KiB) in about 144 bytes, an inner node 64 children in about
// 528. A GiB written in full costs 0.6 MiB; pages far apart cost up to a leaf each, and
// the inner nodes above it once more for every copy of the index that is kept. Areas never
// written cost nothing; areas trimmed whole share one static leaf.
//
// Threads: an index object is changed by one thread at a time while nobody else uses that same
// object (Disk has a lock for it); copies of it may be read meanwhile, and destroyed, without
// locks: a node reachable from two indices is never changed.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "common/page.h"

namespace sf {

class SliceIndex {
 public:
  using Entry = uint16_t;
  static constexpr Entry kBase = 0;           // in no slice: what the base has
  static constexpr Entry kZero = 0xffff;      // all zeros
  static constexpr Entry kMaxSlice = 0xfffe;  // slices are numbered 1 to kMaxSlice, oldest first
  static constexpr unsigned kFanoutBits = 6;
  static constexpr uint64_t kLeafPages = uint64_t{1} << kFanoutBits;

  explicit SliceIndex(uint64_t pages);
  SliceIndex(const SliceIndex& other);
  SliceIndex& operator=(const SliceIndex& other);
  ~SliceIndex();

  uint64_t pages() const { return pages_; }
  Entry get(PageIndex page) const;
  // The entries of `count` pages from `page`; all must lie in one leaf (64 aligned pages).
  void get(PageIndex page, size_t count, Entry* out) const;
  // A number of pages from `page` on that are known to be kBase without looking at each; 0 if the
  // leaf has to be looked at. May reach beyond the end of the disk.
  uint64_t base_run(PageIndex page) const;
  void set(PageIndex page, uint64_t count, Entry entry);

  // Bytes of the nodes of this index and all its copies, shared ones once.
  size_t bytes() const { return static_cast<size_t>(bytes_->load(std::memory_order_relaxed)); }

 private:
  struct Node;
  struct Leaf;
  struct Inner;
  using Counter = std::atomic<int64_t>;

  static Leaf* zero_leaf();
  void release(Node* node, unsigned level);
  Node* unique(Node* node, unsigned level);
  Node* set_in(Node* node, unsigned level, uint64_t first, uint64_t count, Entry entry);

  uint64_t pages_ = 0;
  unsigned levels_ = 0;   // of inner nodes above the leaves
  Node* root_ = nullptr;  // at every level null means: all kBase
  std::shared_ptr<Counter> bytes_;
};

}  // namespace sf
