#include "blktap/slice_index.h"

#include <malloc.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>

#include "blktap/slice_index_node.h"

#ifdef __x86_64__
#pragma GCC target("popcnt")  // as slice_index_node.h, whose functions are inlined here
#endif

namespace sf {

using namespace slice_index;

namespace {
constexpr size_t kMallocOverhead = sizeof(size_t);  // before each piece of glibc's heap
}

// Where a look-up ends: a word that is no inner node, standing for the 64^(level + 1) pages there.
struct SliceIndex::Place {
  Word word;
  unsigned level;
};

SliceIndex::SliceIndex(uint64_t pages) : pages_(pages), bytes_(std::make_shared<Counter>(0)) {
  while ((uint64_t{1} << (kFanoutBits * (levels_ + 1))) < pages) levels_++;
}

SliceIndex::SliceIndex(const SliceIndex& other)
    : pages_(other.pages_), levels_(other.levels_), root_(other.root_), bytes_(other.bytes_) {
  if (is_node(root_)) node_of(root_)->refs.fetch_add(1, std::memory_order_relaxed);
}

SliceIndex& SliceIndex::operator=(const SliceIndex& other) {
  if (this == &other) return *this;
  if (is_node(other.root_)) {
    node_of(other.root_)->refs.fetch_add(1, std::memory_order_relaxed);
  }
  release(root_, levels_);
  pages_ = other.pages_;
  levels_ = other.levels_;
  root_ = other.root_;
  bytes_ = other.bytes_;
  return *this;
}

SliceIndex::~SliceIndex() { release(root_, levels_); }

SliceIndex::Node* SliceIndex::allocate(size_t bytes) {
  auto* node = static_cast<Node*>(std::malloc(bytes));
  if (node == nullptr) throw std::bad_alloc();
  bytes_->fetch_add(static_cast<int64_t>(::malloc_usable_size(node) + kMallocOverhead),
                    std::memory_order_relaxed);
  new (&node->refs) std::atomic<uint32_t>(1);
  return node;
}

// Of a node nobody else holds. Its contents stay, as far as they fit.
SliceIndex::Node* SliceIndex::resize(Node* node, size_t bytes) {
  const size_t before = ::malloc_usable_size(node);
  // Room that malloc could not use elsewhere anyway is kept.
  if (bytes <= before && before - bytes < 2 * sizeof(size_t)) return node;
  node = static_cast<Node*>(std::realloc(static_cast<void*>(node), bytes));
  if (node == nullptr) throw std::bad_alloc();
  const size_t after = ::malloc_usable_size(node);
  bytes_->fetch_add(static_cast<int64_t>(after) - static_cast<int64_t>(before),
                    std::memory_order_relaxed);
  return node;
}

void SliceIndex::free(Node* node) {
  bytes_->fetch_sub(static_cast<int64_t>(::malloc_usable_size(node) + kMallocOverhead),
                    std::memory_order_relaxed);
  std::free(node);
}

void SliceIndex::release(Word word, unsigned level) {
  if (!is_node(word)) return;
  Node* node = node_of(word);
  // Acquire and release: the last holder sees all reads of the others over.
  if (node->refs.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  if (level > 0) {
    const Word* children = payload<Word>(node);
    const unsigned count = ones(node->bitmap);
    for (unsigned i = 0; i < count; i++) release(children[i], level - 1);
  }
  free(node);
}

// Takes over the reference to `word` and gives back an inner node that nobody else holds.
SliceIndex::Node* SliceIndex::own_inner(Word word, unsigned level) {
  if (!is_node(word)) {
    const unsigned count = word == 0 ? 0 : kFanout;
    Node* node = allocate(sizeof(Node) + count * sizeof(Word));
    node->least = 0;
    node->bitmap = word == 0 ? 0 : kAll;
    std::fill_n(payload<Word>(node), count, word);
    return node;
  }
  Node* old = node_of(word);
  if (old->refs.load(std::memory_order_acquire) == 1) return old;
  const unsigned count = ones(old->bitmap);
  Node* node = allocate(sizeof(Node) + count * sizeof(Word));
  node->least = 0;
  node->bitmap = old->bitmap;
  Word* children = payload<Word>(node);
  std::memcpy(children, payload<Word>(old), count * sizeof(Word));
  for (unsigned i = 0; i < count; i++) {
    if (is_node(children[i])) {
      node_of(children[i])->refs.fetch_add(1, std::memory_order_relaxed);
    }
  }
  release(word, level);
  return node;
}

// Puts `word` in the place of a child whose reference the caller has taken over.
SliceIndex::Node* SliceIndex::put(Node* node, unsigned child, Word word) {
  const uint64_t bit = uint64_t{1} << child;
  const unsigned at = rank(node->bitmap, child);
  const unsigned count = ones(node->bitmap);
  const bool had = (node->bitmap & bit) != 0;
  if (had && word != 0) {
    payload<Word>(node)[at] = word;
  } else if (word != 0) {
    node = resize(node, sizeof(Node) + (count + 1) * sizeof(Word));
    Word* children = payload<Word>(node);
    std::memmove(children + at + 1, children + at, (count - at) * sizeof(Word));
    children[at] = word;
    node->bitmap |= bit;
  } else if (had) {
    Word* children = payload<Word>(node);
    std::memmove(children + at, children + at + 1, (count - at - 1) * sizeof(Word));
    node->bitmap &= ~bit;
    node = resize(node, sizeof(Node) + (count - 1) * sizeof(Word));
  }
  return node;
}

// The word for 64 entries; `old`, whose reference it takes over, gives its memory if it can.
SliceIndex::Word SliceIndex::pack(Word old, const Entry* entries) {
  uint64_t bitmap = 0;
  Entry least = kZero;
  Entry most = 1;
  bool zeros = false;
  for (unsigned i = 0; i < kFanout; i++) {
    const Entry entry = entries[i];
    bitmap |= uint64_t{entry != kBase} << i;
    zeros = zeros || entry == kZero;
    // Off by one, so that kZero is no largest number and kBase no smallest.
    least = std::min(least, entry - 1);
    most = std::max(most, entry + 1);
  }
  least += least == kZero ? 0 : 1;
  most -= 1;
  const unsigned count = ones(bitmap);
  unsigned code = 3;
  if (bitmap == 0 || least > most || (least == most && !zeros)) {
    code = 0;  // one entry; of zeros alone, least is kZero
  } else if (most - least < 0xff) {
    code = 1;
  } else if (most - least < 0xffff) {
    code = 2;
  }
  const unsigned first = static_cast<unsigned>(std::countr_zero(bitmap));
  const unsigned last = 63 - static_cast<unsigned>(std::countl_zero(bitmap));
  if (bitmap == 0 || (code == 0 && last - first + 1 == count)) {
    release(old, 0);
    return bitmap == 0 ? 0 : make_run(first, last, entries[first]);
  }
  const size_t bytes = sizeof(Node) + count * kWidths[code];
  Node* node = nullptr;
  if (is_node(old) && node_of(old)->refs.load(std::memory_order_acquire) == 1) {
    node = resize(node_of(old), bytes);
  } else {
    node = allocate(bytes);
    release(old, 0);
  }
  node->bitmap = bitmap;
  node->least = code == 0 ? entries[first] : code == 3 ? 0 : least;
  if (code == 1) fill_codes<uint8_t>(node, entries);
  if (code == 2) fill_codes<uint16_t>(node, entries);
  if (code == 3) fill_codes<uint32_t>(node, entries);
  return word_of(node, code);
}

SliceIndex::Word SliceIndex::set_leaf(Word word, uint64_t first, uint64_t count, Entry entry) {
  const uint64_t last = first + count - 1;
  if (word == 0) return make_run(first, last, entry);
  if (is_run(word) && run_entry(word) == entry && first <= run_last(word) + 1 &&
      last + 1 >= run_first(word)) {
    return make_run(std::min<uint64_t>(first, run_first(word)),
                    std::max<uint64_t>(last, run_last(word)), entry);
  }
  if (is_node(word) && entry != kBase && splice(&word, first, count, entry)) return word;
  Entry entries[kLeafPages];
  expand(word, 0, kFanout, entries);
  std::fill_n(entries + first, count, entry);
  return pack(word, entries);
}

// The common case of set_leaf: a leaf of this index alone, whose width has room for the entry.
// False if it has not, or if the leaf is to become something smaller: then pack() does it.
bool SliceIndex::splice(Word* word, uint64_t first, uint64_t count, Entry entry) {
  Node* node = node_of(*word);
  const unsigned width = width_of(*word);
  if (node->refs.load(std::memory_order_acquire) != 1 || !encodes(node->least, entry, width)) {
    return false;
  }
  const uint64_t pages = low_bits(static_cast<unsigned>(count)) << first;
  const unsigned total = ones(node->bitmap);
  const unsigned had = ones(node->bitmap & pages);
  const auto added = static_cast<unsigned>(count);
  const unsigned at = rank(node->bitmap, static_cast<unsigned>(first));
  const unsigned now = total - had + added;
  if (now > total) node = resize(node, sizeof(Node) + now * kWidths[width]);
  node->bitmap |= pages;
  bool equal = true;
  if (width == 1) equal = splice_codes<uint8_t>(node, at, had, added, total, entry);
  if (width == 2) equal = splice_codes<uint16_t>(node, at, had, added, total, entry);
  if (width == 3) equal = splice_codes<uint32_t>(node, at, had, added, total, entry);
  *word = word_of(node, width);
  if (!equal) return true;
  const uint64_t shifted = node->bitmap >> std::countr_zero(node->bitmap);
  return width == 0 && (shifted & (shifted + 1)) != 0;  // in one piece it is a run
}

SliceIndex::Word SliceIndex::set_in(Word word, unsigned level, uint64_t first, uint64_t count,
                                    Entry entry) {
  const unsigned shift = kFanoutBits * level;  // pages of one child: 1 << shift
  if (count == uint64_t{kFanout} << shift) {
    release(word, level);
    return uniform(entry);
  }
  if (level == 0) return set_leaf(word, first, count, entry);
  if (word == uniform(entry)) return word;
  Node* node = own_inner(word, level);
  const uint64_t end = first + count;
  Word last = 0;
  for (uint64_t i = first >> shift; i <= (end - 1) >> shift; i++) {
    const uint64_t start = i << shift;
    const uint64_t from = std::max(first, start);
    const uint64_t to = std::min(end, start + (uint64_t{1} << shift));
    const auto child = static_cast<unsigned>(i);
    const bool has = ((node->bitmap >> child) & 1) != 0;
    const Word old = has ? payload<Word>(node)[rank(node->bitmap, child)] : 0;
    last = set_in(old, level - 1, from - start, to - from, entry);
    node = put(node, child, last);
  }
  // It has become uniform only if the child changed last is.
  const Word* children = payload<Word>(node);
  if (node->bitmap != 0 &&
      (node->bitmap != kAll || !is_uniform(last) ||
       !std::all_of(children, children + kFanout, [&](Word child) { return child == last; }))) {
    return word_of(node, 0);
  }
  free(node);
  return last;
}

void SliceIndex::set(PageIndex page, uint64_t count, Entry entry) {
  if (count == 0) return;
  // What lies beyond the end goes with the last page, so that the end is as uniform as the rest.
  const uint64_t all = uint64_t{1} << (kFanoutBits * (levels_ + 1));
  if (page + count >= pages_) count = all - page;
  root_ = set_in(root_, levels_, page, count, entry);
}

inline SliceIndex::Place SliceIndex::locate(PageIndex page) const {
  Word word = root_;
  unsigned level = levels_;
  if (word == 0) return {word, level};  // a child's word, if it is there, is not 0
  for (unsigned shift = kFanoutBits * level; level > 0 && !is_run(word); level--) {
    const auto* node = node_of(word);
    const uint64_t bits = up_to(node->bitmap, static_cast<unsigned>(page >> shift));
    if (!has_top(bits)) return {0, level - 1};
    word = payload<Word>(node)[ones(bits) - 1];
    shift -= kFanoutBits;
  }
  return {word, level};
}

SliceIndex::Entry SliceIndex::get(PageIndex page) const {
  const Word word = locate(page).word;
  const unsigned at = page % kFanout;
  if (is_node(word)) return leaf_entry(node_of(word), width_of(word), at);
  return at >= run_first(word) && at <= run_last(word) ? run_entry(word) : kBase;
}

void SliceIndex::get(PageIndex page, size_t count, Entry* out) const {
  expand(locate(page).word, page % kFanout, static_cast<unsigned>(count), out);
}

SliceIndex::Entry SliceIndex::run(PageIndex page, uint64_t* count) const {
  const Place place = locate(page);
  const uint64_t covered = uint64_t{kFanout} << (kFanoutBits * place.level);
  if (place.word == 0 || is_uniform(place.word)) {
    *count = covered - page % covered;
    return run_entry(place.word);
  }
  Entry entries[kLeafPages];
  const unsigned first = page % kFanout;
  expand(place.word, first, kFanout - first, entries);
  uint64_t same = 1;
  while (same < kFanout - first && entries[same] == entries[0]) same++;
  *count = same;
  return entries[0];
}

uint64_t SliceIndex::base_run(PageIndex page) const {
  uint64_t count = 0;
  return run(page, &count) == kBase ? count : 0;
}

}  // namespace sf
