// Arithmetic in GF(2^8), polynomial 0x11d (x^8 + x^4 + x^3 + x^2 + 1), for the parity code.
//
// One operation is hot: dst ^= c * src over a row of bytes. It has one function for each kind of
// processor; which one is used is decided once, when the program starts. All of them give the same
// bytes as the portable one, for every length and alignment.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace sf::mcdist::gf256 {

uint8_t multiply(uint8_t a, uint8_t b);
uint8_t inverse(uint8_t a);  // of 0: 0

// dst[i] ^= c * src[i] for i < size. The rows do not overlap.
using MultiplyAdd = void (*)(uint8_t* dst, const uint8_t* src, uint8_t c, size_t size);

struct Kernel {
  const char* name;
  bool (*supported)();  // by the processor this runs on
  MultiplyAdd multiply_add;
};

// All there are, the fastest first; the last is the portable one.
std::span<const Kernel> kernels();
// The first that is supported.
const Kernel& kernel();

inline void multiply_add(uint8_t* dst, const uint8_t* src, uint8_t c, size_t size) {
  static const MultiplyAdd chosen = kernel().multiply_add;
  chosen(dst, src, c, size);
}

}  // namespace sf::mcdist::gf256
