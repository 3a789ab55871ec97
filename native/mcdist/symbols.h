// A block is 32 consecutive pages; its symbols are their fragments: symbol i of a block is fragment
// i % fragments of page i / fragments. A set of them is 128 bits, whatever the number of fragments.
#pragma once

#include <bit>
#include <cstdint>

#include "common/page.h"

namespace sf::mcdist {

constexpr unsigned kMaxFragments = 4;  // a page at the smallest MTU
constexpr PageIndex kBlockPages = 32;  // what parity packets span
constexpr unsigned kMaxSymbols = kBlockPages * kMaxFragments;

// Each packet of a page has so many bytes of it; the last one is padded with zeros to that.
inline size_t symbol_bytes(unsigned fragments) { return (kPageBytes + fragments - 1) / fragments; }
inline size_t fragment_offset(unsigned index, unsigned fragments) {
  return index * symbol_bytes(fragments);
}
// Without the padding.
inline size_t fragment_length(unsigned index, unsigned fragments) {
  const size_t offset = fragment_offset(index, fragments);
  const size_t size = symbol_bytes(fragments);
  return offset + size <= kPageBytes ? size : kPageBytes - offset;
}

class SymbolSet {
 public:
  static constexpr size_t kWireBytes = 16;

  constexpr SymbolSet() = default;
  // Symbols 0 to count - 1. `count` is at most 128.
  static constexpr SymbolSet First(unsigned count) {
    SymbolSet set;
    set.low_ = count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
    set.high_ = count <= 64 ? 0 : count >= 128 ? ~uint64_t{0} : (uint64_t{1} << (count - 64)) - 1;
    return set;
  }
  // All symbols of a block. `fragments` is 1 to 4.
  static constexpr SymbolSet Block(unsigned fragments) {
    return First(static_cast<unsigned>(kBlockPages) * fragments);
  }
  // The symbols of page `page` (0 to 31).
  static constexpr SymbolSet Page(unsigned page, unsigned fragments) {
    return First((page + 1) * fragments) - First(page * fragments);
  }
  // The symbols of the pages whose bits are set: bit p is page p.
  static constexpr SymbolSet Pages(uint32_t pages, unsigned fragments) {
    SymbolSet set;
    for (; pages != 0; pages &= pages - 1) {
      set |= Page(static_cast<unsigned>(std::countr_zero(pages)), fragments);
    }
    return set;
  }
  // On the wire: a 128-bit number, big-endian, bit i of which is symbol i.
  static SymbolSet Decode(const uint8_t* in) {
    SymbolSet set;
    for (int i = 0; i < 8; i++) {
      set.high_ = set.high_ << 8 | in[i];
      set.low_ = set.low_ << 8 | in[i + 8];
    }
    return set;
  }
  void encode(uint8_t* out) const {
    for (int i = 0; i < 8; i++) {
      out[i] = static_cast<uint8_t>(high_ >> (56 - 8 * i));
      out[i + 8] = static_cast<uint8_t>(low_ >> (56 - 8 * i));
    }
  }

  constexpr bool empty() const { return (low_ | high_) == 0; }
  constexpr unsigned count() const {
    return static_cast<unsigned>(std::popcount(low_) + std::popcount(high_));
  }
  // `symbol` is below 128 in the three below.
  constexpr bool has(unsigned symbol) const {
    return ((symbol < 64 ? low_ >> symbol : high_ >> (symbol - 64)) & 1) != 0;
  }
  constexpr void add(unsigned symbol) {
    (symbol < 64 ? low_ : high_) |= uint64_t{1} << (symbol & 63);
  }
  constexpr void remove(unsigned symbol) {
    (symbol < 64 ? low_ : high_) &= ~(uint64_t{1} << (symbol & 63));
  }
  // The lowest symbol of the set that is not below `from`; 128: there is none.
  constexpr unsigned next(unsigned from) const {
    if (from < 64) {
      const uint64_t rest = low_ >> from << from;
      if (rest != 0) return static_cast<unsigned>(std::countr_zero(rest));
      from = 64;
    }
    if (from >= kMaxSymbols) return kMaxSymbols;
    const uint64_t rest = high_ >> (from - 64) << (from - 64);
    return rest == 0 ? kMaxSymbols : 64 + static_cast<unsigned>(std::countr_zero(rest));
  }
  // Calls `each` with the symbols in order.
  template <typename Each>
  constexpr void for_each(Each&& each) const {
    for (unsigned i = next(0); i < kMaxSymbols; i = next(i + 1)) each(i);
  }

  // True if all of this set is in `other`.
  constexpr bool within(const SymbolSet& other) const { return (*this - other).empty(); }
  constexpr SymbolSet& operator|=(const SymbolSet& other) {
    low_ |= other.low_;
    high_ |= other.high_;
    return *this;
  }
  friend constexpr SymbolSet operator|(SymbolSet a, const SymbolSet& b) { return a |= b; }
  friend constexpr SymbolSet operator&(SymbolSet a, const SymbolSet& b) {
    a.low_ &= b.low_;
    a.high_ &= b.high_;
    return a;
  }
  friend constexpr SymbolSet operator-(SymbolSet a, const SymbolSet& b) {
    a.low_ &= ~b.low_;
    a.high_ &= ~b.high_;
    return a;
  }
  friend constexpr bool operator==(const SymbolSet&, const SymbolSet&) = default;

 private:
  uint64_t low_ = 0;
  uint64_t high_ = 0;
};

}  // namespace sf::mcdist
