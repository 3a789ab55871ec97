// Which slice holds a page: the merged index of a chain, the same cost at every depth.
//
// A radix tree, fan-out 64, of 32-bit slice numbers. Nodes carry a reference count; a copy of an
// index shares all nodes and costs nothing, whatever the disk's size, and a change then copies only
// the nodes on its path. So a generation's view keeps the index of its instant while the disk's own
// goes on, and both are read in at most `levels` steps.
//
// A child is one 64-bit word in its parent, in one of these states:
//   0        nothing: all pages are kBase
//   run      one entry for the pages `first` to `last` of a leaf, the others kBase; no node. With
//   all
//            64 it is *uniform*, and then it stands for a subtree of any height
//   leaf     64 pages: a bitmap of those that are not kBase, and their numbers packed in that
//   order,
//            as 0, 1, 2 or 4 bytes over the smallest of them (0 bytes: all are equal)
//   inner    64 children: a bitmap of those that are not 0, and their words packed
// Invariant: a word has the first of these states that can hold its pages; so whoever writes whole
// areas in one slice, or trims them, pays for no node below them. A leaf is as narrow as it could
// be when it was last packed anew, which is whenever a number does not fit.
//
// Memory: bytes() counts what malloc gave, its overhead too. Written in sequence by one slice a GiB
// takes less than a KiB; at random by 1,000 slices, single pages of 8 GiB, 1.8 MiB (7 bytes a
// page), of 1 TiB 4.4 MiB. A kept copy costs the nodes on the paths to what was changed since.
//
// Threads: an index object is changed by one thread at a time while nobody else uses that same
// object (Disk has a lock for it); copies of it may be read meanwhile, and destroyed, without
// locks: a node reachable from two indices is never changed.
// Left out: giving memory back when malloc fails (std::bad_alloc, as everywhere).
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "common/page.h"

namespace sf {

namespace slice_index {
struct Node;
}

class SliceIndex {
 public:
  using Entry = uint32_t;
  static constexpr Entry kBase = 0;               // in no slice: what the base has
  static constexpr Entry kZero = 0xffffffff;      // all zeros
  static constexpr Entry kMaxSlice = 0xfffffffe;  // slices are numbered 1 to kMaxSlice
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
  // The entry of `page`, and in `*count` (at least 1) a number of pages from it on that share it:
  // as far as one node tells, so the next page may have the same again. May reach beyond the disk.
  Entry run(PageIndex page, uint64_t* count) const;
  // The same if the entry is kBase, else 0.
  uint64_t base_run(PageIndex page) const;
  void set(PageIndex page, uint64_t count, Entry entry);

  // Bytes of the nodes of this index and all its copies, shared ones once.
  size_t bytes() const { return static_cast<size_t>(bytes_->load(std::memory_order_relaxed)); }

 private:
  using Word = uint64_t;
  using Node = slice_index::Node;
  struct Place;
  using Counter = std::atomic<int64_t>;

  Place locate(PageIndex page) const;
  Node* allocate(size_t bytes);
  Node* resize(Node* node, size_t bytes);
  void free(Node* node);
  void release(Word word, unsigned level);
  Word set_in(Word word, unsigned level, uint64_t first, uint64_t count, Entry entry);
  Word set_leaf(Word word, uint64_t first, uint64_t count, Entry entry);
  bool splice(Word* word, uint64_t first, uint64_t count, Entry entry);
  Word pack(Word old, const Entry* entries);
  Node* own_inner(Word word, unsigned level);
  Node* put(Node* node, unsigned child, Word word);

  uint64_t pages_ = 0;
  unsigned levels_ = 0;  // of inner nodes above the leaves
  Word root_ = 0;
  std::shared_ptr<Counter> bytes_;
};

}  // namespace sf
