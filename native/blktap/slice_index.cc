#include "blktap/slice_index.h"

#include <algorithm>
#include <cstring>

namespace sf {

namespace {
constexpr uint64_t kFanout = uint64_t{1} << SliceIndex::kFanoutBits;
}

struct SliceIndex::Node {
  std::atomic<uint32_t> refs{1};
};
struct SliceIndex::Leaf : Node {
  Entry entries[kLeafPages] = {};
};
struct SliceIndex::Inner : Node {
  Node* children[kFanout] = {};
};

SliceIndex::Leaf* SliceIndex::zero_leaf() {
  static Leaf* leaf = [] {
    auto* made = new Leaf();  // its first reference is never given back
    std::fill(std::begin(made->entries), std::end(made->entries), kZero);
    return made;
  }();
  return leaf;
}

SliceIndex::SliceIndex(uint64_t pages) : pages_(pages), bytes_(std::make_shared<Counter>(0)) {
  while ((uint64_t{1} << (kFanoutBits * (levels_ + 1))) < pages) levels_++;
}

SliceIndex::SliceIndex(const SliceIndex& other)
    : pages_(other.pages_), levels_(other.levels_), root_(other.root_), bytes_(other.bytes_) {
  if (root_ != nullptr) root_->refs.fetch_add(1, std::memory_order_relaxed);
}

SliceIndex& SliceIndex::operator=(const SliceIndex& other) {
  if (this == &other) return *this;
  if (other.root_ != nullptr) other.root_->refs.fetch_add(1, std::memory_order_relaxed);
  release(root_, levels_);
  pages_ = other.pages_;
  levels_ = other.levels_;
  root_ = other.root_;
  bytes_ = other.bytes_;
  return *this;
}

SliceIndex::~SliceIndex() { release(root_, levels_); }

void SliceIndex::release(Node* node, unsigned level) {
  if (node == nullptr || node->refs.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  if (level == 0) {
    bytes_->fetch_sub(sizeof(Leaf), std::memory_order_relaxed);
    delete static_cast<Leaf*>(node);
    return;
  }
  auto* inner = static_cast<Inner*>(node);
  for (Node* child : inner->children) release(child, level - 1);
  bytes_->fetch_sub(sizeof(Inner), std::memory_order_relaxed);
  delete inner;
}

// Takes over one reference to `node`, gives back one to a node nobody else holds.
SliceIndex::Node* SliceIndex::unique(Node* node, unsigned level) {
  // Acquire pairs with the release of the last other holder, whose reads are then over.
  if (node != nullptr && node->refs.load(std::memory_order_acquire) == 1) return node;
  if (level == 0) {
    auto* leaf = new Leaf();
    bytes_->fetch_add(sizeof(Leaf), std::memory_order_relaxed);
    if (node != nullptr) {
      std::memcpy(leaf->entries, static_cast<Leaf*>(node)->entries, sizeof leaf->entries);
    }
    release(node, level);
    return leaf;
  }
  auto* inner = new Inner();
  bytes_->fetch_add(sizeof(Inner), std::memory_order_relaxed);
  if (node != nullptr) {
    for (size_t i = 0; i < kFanout; i++) {
      Node* child = static_cast<Inner*>(node)->children[i];
      if (child != nullptr) child->refs.fetch_add(1, std::memory_order_relaxed);
      inner->children[i] = child;
    }
  }
  release(node, level);
  return inner;
}

SliceIndex::Node* SliceIndex::set_in(Node* node, unsigned level, uint64_t first, uint64_t count,
                                     Entry entry) {
  if (level == 0) {
    if (count == kLeafPages && entry == kZero) {
      release(node, level);
      zero_leaf()->refs.fetch_add(1, std::memory_order_relaxed);
      return zero_leaf();
    }
    node = unique(node, level);
    auto* entries = static_cast<Leaf*>(node)->entries;
    std::fill(entries + first, entries + first + count, entry);
    return node;
  }
  node = unique(node, level);
  auto* inner = static_cast<Inner*>(node);
  const unsigned shift = kFanoutBits * level;  // pages of one child: 1 << shift
  const uint64_t end = first + count;
  for (uint64_t i = first >> shift; i <= (end - 1) >> shift; i++) {
    const uint64_t start = i << shift;
    const uint64_t from = std::max(first, start);
    const uint64_t to = std::min(end, start + (uint64_t{1} << shift));
    inner->children[i] = set_in(inner->children[i], level - 1, from - start, to - from, entry);
  }
  return node;
}

void SliceIndex::set(PageIndex page, uint64_t count, Entry entry) {
  if (count == 0) return;
  root_ = set_in(root_, levels_, page, count, entry);
}

SliceIndex::Entry SliceIndex::get(PageIndex page) const {
  Entry entry = kBase;
  get(page, 1, &entry);
  return entry;
}

void SliceIndex::get(PageIndex page, size_t count, Entry* out) const {
  const Node* node = root_;
  for (unsigned level = levels_; level > 0 && node != nullptr; level--) {
    node = static_cast<const Inner*>(node)->children[(page >> (kFanoutBits * level)) % kFanout];
  }
  if (node == nullptr) {
    std::fill(out, out + count, kBase);
    return;
  }
  std::memcpy(out, static_cast<const Leaf*>(node)->entries + page % kLeafPages,
              count * sizeof(Entry));
}

uint64_t SliceIndex::base_run(PageIndex page) const {
  const Node* node = root_;
  for (unsigned level = levels_; level > 0; level--) {
    if (node == nullptr) {
      const uint64_t covered = uint64_t{1} << (kFanoutBits * (level + 1));
      return covered - page % covered;
    }
    node = static_cast<const Inner*>(node)->children[(page >> (kFanoutBits * level)) % kFanout];
  }
  return node == nullptr ? kLeafPages - page % kLeafPages : 0;
}

}  // namespace sf
