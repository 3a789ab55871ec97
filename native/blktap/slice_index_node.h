// The nodes of a SliceIndex: how 64 children, or the slice numbers of 64 pages, are packed.
//
// slice_index.h has the states of a word and who may change a node. Nothing here looks at reference
// counts or allocates; a caller of the functions that write has made room.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cstdint>
#include <cstring>

// Ranks in bitmaps: one instruction on every processor that runs VMs, a call without this.
#ifdef __x86_64__
#pragma GCC push_options
#pragma GCC target("popcnt")
#endif

namespace sf::slice_index {

using Entry = uint32_t;
constexpr Entry kBaseEntry = 0;
constexpr Entry kZeroEntry = 0xffffffff;
constexpr unsigned kFanoutBits = 6;

// A node's bytes: this, then the packed numbers of a leaf or the packed words of an inner node.
struct Node {
  std::atomic<uint32_t> refs;
  Entry least;      // of a leaf: what its packed numbers are counted from
  uint64_t bitmap;  // which of 64 pages or children are packed here
};

// What stands for 64 pages, or for the 64 children of a higher level.
using Word = uint64_t;

constexpr unsigned kFanout = 1u << kFanoutBits;
constexpr uint64_t kAll = ~uint64_t{0};

// Words. Bit 0: a run, with `first` in bits 1 to 6, `last` in 7 to 12, the entry in 32 to 63.
// Otherwise a node's address, and in bits 1 and 2 the width of a leaf's numbers (kWidths).
constexpr Word kRun = 1;
constexpr Word kWidthMask = 6;
constexpr Word kTagMask = 15;
constexpr std::array<unsigned, 4> kWidths = {0, 1, 2, 4};

constexpr bool is_node(Word word) { return word != 0 && (word & kRun) == 0; }
constexpr bool is_run(Word word) { return (word & kRun) != 0; }
constexpr unsigned run_first(Word word) { return (word >> 1) & 63; }
constexpr unsigned run_last(Word word) { return (word >> 7) & 63; }
constexpr Entry run_entry(Word word) { return static_cast<Entry>(word >> 32); }
constexpr Word make_run(uint64_t first, uint64_t last, Entry entry) {
  return entry == kBaseEntry ? 0 : Word{entry} << 32 | last << 7 | first << 1 | kRun;
}
constexpr Word uniform(Entry entry) { return make_run(0, kFanout - 1, entry); }
constexpr bool is_uniform(Word word) { return word == uniform(run_entry(word)) && word != 0; }
constexpr unsigned width_of(Word word) { return (word & kWidthMask) >> 1; }

constexpr uint64_t low_bits(unsigned count) {
  return count >= 64 ? kAll : (uint64_t{1} << count) - 1;
}
// How many set bits come before bit `at`.
inline unsigned rank(uint64_t bitmap, unsigned at) {
  return static_cast<unsigned>(__builtin_popcountll(bitmap & ((uint64_t{1} << at) - 1)));
}
inline unsigned ones(uint64_t bitmap) {
  return static_cast<unsigned>(__builtin_popcountll(bitmap));
}

inline Node* node_of(Word word) { return reinterpret_cast<Node*>(word & ~kTagMask); }
inline Word word_of(const Node* node, unsigned code) {
  return reinterpret_cast<Word>(node) | Word{code} << 1;
}
template <typename To>
To* payload(Node* node) {
  return reinterpret_cast<To*>(node + 1);
}
template <typename To>
const To* payload(const Node* node) {
  return reinterpret_cast<const To*>(node + 1);
}

// A width's largest code stands for kZero, the others for a distance from the leaf's `least`; four
// bytes hold the entry itself, and `least` is 0.
constexpr std::array<uint64_t, 4> kZeroCode = {kAll, 0xff, 0xffff, kAll};
inline Entry decode(Entry least, uint64_t code, unsigned width) {
  return code == kZeroCode[width] ? kZeroEntry : least + static_cast<Entry>(code);
}
inline Entry encode(Entry least, Entry entry) {
  return entry == kZeroEntry ? kZeroEntry : entry - least;  // cut to its width
}
inline bool encodes(Entry least, Entry entry, unsigned width) {
  if (width == 0) return entry == least;
  return width == 3 || entry == kZeroEntry || (entry >= least && entry - least < kZeroCode[width]);
}

// A look-up has no branch that depends on which pages are present: it would be guessed wrong often.
// `up_to(bitmap, at)` has bit `at` on top, and as many bits set as the packed array has up to it.
// So the element looked for ends there, or, if it is absent, the one before, or the node's header.
inline uint64_t up_to(uint64_t bitmap, unsigned at) { return bitmap << (~at & 63); }
constexpr bool has_top(uint64_t bits) { return static_cast<int64_t>(bits) < 0; }

inline Entry leaf_entry(const Node* leaf, unsigned width, unsigned at) {
  const uint64_t bits = up_to(leaf->bitmap, at);
  const unsigned bytes = kWidths[width];
  uint64_t window = 0;
  std::memcpy(&window, payload<uint8_t>(leaf) + ones(bits) * bytes - sizeof window, sizeof window);
  const uint64_t code = window >> 1 >> (63 - 8 * bytes);
  return decode(leaf->least, code, width) & (has_top(bits) ? ~Entry{0} : 0);
}

template <typename Code, unsigned kWidth>
inline void unpack(const Node* leaf, unsigned first, unsigned count, Entry* out) {
  const Code* code = payload<Code>(leaf) + rank(leaf->bitmap, first);
  uint64_t left = (leaf->bitmap >> first) & low_bits(count);
  const Entry least = leaf->least;
  if (left == low_bits(count)) {
    for (unsigned i = 0; i < count; i++) out[i] = decode(least, code[i], kWidth);
    return;
  }
  std::fill_n(out, count, kBaseEntry);
  for (; left != 0; left &= left - 1) {
    out[std::countr_zero(left)] = decode(least, *code++, kWidth);
  }
}

// Entries of `count` pages from `first` of the 64 pages that `word` (no inner node) stands for.
inline void expand(Word word, unsigned first, unsigned count, Entry* out) {
  if (!is_node(word)) {
    const Entry entry = run_entry(word);
    if (word == 0 || is_uniform(word)) {
      std::fill_n(out, count, entry);
      return;
    }
    for (unsigned i = 0; i < count; i++) {
      const bool in = first + i >= run_first(word) && first + i <= run_last(word);
      out[i] = in ? entry : kBaseEntry;
    }
    return;
  }
  const auto* leaf = node_of(word);
  switch (width_of(word)) {
    case 0:
      for (unsigned i = 0; i < count; i++) {
        out[i] = leaf->least & -static_cast<Entry>((leaf->bitmap >> (first + i)) & 1);
      }
      return;
    case 1:
      return unpack<uint8_t, 1>(leaf, first, count, out);
    case 2:
      return unpack<uint16_t, 2>(leaf, first, count, out);
    default:
      return unpack<uint32_t, 3>(leaf, first, count, out);
  }
}

template <typename Code>
void fill_codes(Node* leaf, const Entry* entries) {
  Code* code = payload<Code>(leaf);
  for (uint64_t left = leaf->bitmap; left != 0; left &= left - 1) {
    *code++ = static_cast<Code>(encode(leaf->least, entries[std::countr_zero(left)]));
  }
}

// Puts `count` equal codes at `at`, in the place of `had` of `total`. True if all are equal now.
template <typename Code>
bool splice_codes(Node* leaf, unsigned at, unsigned had, unsigned count, unsigned total,
                  Entry entry) {
  Code* codes = payload<Code>(leaf);
  const auto code = static_cast<Code>(encode(leaf->least, entry));
  std::memmove(codes + at + count, codes + at + had, (total - at - had) * sizeof(Code));
  std::fill_n(codes + at, count, code);
  const unsigned now = total - had + count;
  return codes[0] == codes[now - 1] && std::memcmp(codes, codes + 1, (now - 1) * sizeof(Code)) == 0;
}

}  // namespace sf::slice_index

#ifdef __x86_64__
#pragma GCC pop_options
#endif
