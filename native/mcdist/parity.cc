#include "mcdist/parity.h"

#include <cstring>

namespace sf::mcdist {

bool encode_parity(unsigned fragments, const SymbolSet& cover, unsigned first, unsigned count,
                   const BlockReader& read, uint8_t* out) {
  if (!valid_cover(fragments, cover) || first > kMaxParities || count > kMaxParities - first) {
    return false;
  }
  const size_t size = symbol_bytes(fragments);
  std::memset(out, 0, count * size);
  for (unsigned i = cover.next(0); i < kMaxSymbols;) {
    const unsigned page = i / fragments;
    const uint8_t* bytes = read(page);
    if (bytes == nullptr) return false;
    for (; i / fragments == page && i < kMaxSymbols; i = cover.next(i + 1)) {
      const unsigned fragment = i % fragments;
      for (unsigned j = 0; j < count; j++) {
        gf256::multiply_add(out + j * size, bytes + fragment_offset(fragment, fragments),
                            parity_coefficient(i, first + j), fragment_length(fragment, fragments));
      }
    }
  }
  return true;
}

}  // namespace sf::mcdist
