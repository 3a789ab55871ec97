// The erasure code of mcdist: parity symbols over some symbols of a block (the *cover*).
//
// Parity j (0..126) over a cover is the sum over i in the cover of coefficient(i, j) * symbol i in
// GF(2^8), byte by byte; fragments shorter than a symbol are padded with zeros. The coefficients
// are those of a Cauchy matrix: 1 / (y_i + x_j) with y_i = i and x_j = 128 + j. Every square part
// of such a matrix can be inverted, so any n parities over a cover repair any n lost symbols of it.
// A coefficient depends on i and j alone, not on the cover.
//
// Symbols here are symbol_bytes(fragments) bytes; `fragments` is 1 to 4.
#pragma once

#include <functional>

#include "mcdist/gf256.h"
#include "mcdist/symbols.h"

namespace sf::mcdist {

constexpr unsigned kMaxParities = 127;

// `symbol` is below 128, `parity` below kMaxParities.
inline uint8_t parity_coefficient(unsigned symbol, unsigned parity) {
  return gf256::inverse(static_cast<uint8_t>(symbol ^ (128 + parity)));
}

// What a cover from the network must be: 1 to 4 fragments, symbols of the block, at least one.
inline bool valid_cover(unsigned fragments, const SymbolSet& cover) {
  return fragments >= 1 && fragments <= kMaxFragments && !cover.empty() &&
         cover.within(SymbolSet::Block(fragments));
}

// The 4096 bytes of a page of the block (0..31), good until the next call; nullptr: cannot be read.
using BlockReader = std::function<const uint8_t*(unsigned page)>;

// Writes parities first .. first + count - 1 over `cover` to `out`, count *
// symbol_bytes(fragments) bytes. Reads each page of the cover once, in order. False, and `out` is
// of no use: a page cannot be read, the cover is not valid, or first + count > kMaxParities.
bool encode_parity(unsigned fragments, const SymbolSet& cover, unsigned first, unsigned count,
                   const BlockReader& read, uint8_t* out);

}  // namespace sf::mcdist
