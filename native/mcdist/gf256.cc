// Multiply-add over rows, for each kind of processor.
//
// Multiplication by a constant is linear over the bits of a byte, so it is an 8x8 matrix of bits:
// GFNI multiplies by any such matrix (its own multiplication has another polynomial). And it is
// the sum of the products of the two halves of a byte: a shuffle looks both up in tables of 16.
#include "mcdist/gf256.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sf::mcdist::gf256 {
namespace {

constexpr uint8_t product(uint8_t a, uint8_t b) {
  unsigned sum = 0;
  for (unsigned shifted = a, bits = b; bits != 0; bits >>= 1) {
    if ((bits & 1) != 0) sum ^= shifted;
    shifted <<= 1;
    if ((shifted & 0x100) != 0) shifted ^= 0x11d;
  }
  return static_cast<uint8_t>(sum);
}

constexpr std::array<uint8_t, 256> make_inverses() {
  std::array<uint8_t, 256> power = {};  // of 2, which generates the field
  std::array<uint8_t, 256> inverses = {};
  uint8_t each = 1;
  for (unsigned i = 0; i < 255; i++, each = product(each, 2)) power[i] = each;
  for (unsigned i = 0; i < 255; i++) inverses[power[i]] = power[(255 - i) % 255];
  return inverses;
}
constexpr auto kInverses = make_inverses();

// Products of c with the 16 low halves, then with the 16 high halves.
struct Halves {
  alignas(32) uint8_t low[16];
  uint8_t high[16];
};
constexpr std::array<Halves, 256> make_halves() {
  std::array<Halves, 256> out = {};
  for (unsigned c = 0; c < 256; c++) {
    for (unsigned i = 0; i < 16; i++) {
      out[c].low[i] = product(static_cast<uint8_t>(c), static_cast<uint8_t>(i));
      out[c].high[i] = product(static_cast<uint8_t>(c), static_cast<uint8_t>(i << 4));
    }
  }
  return out;
}
constexpr auto kHalves = make_halves();

void portable(uint8_t* dst, const uint8_t* src, uint8_t c, size_t size) {
  const Halves& table = kHalves[c];
  for (size_t i = 0; i < size; i++) dst[i] ^= table.low[src[i] & 15] ^ table.high[src[i] >> 4];
}
bool always() { return true; }

#if defined(__x86_64__)

// As GF2P8AFFINEQB wants them: byte 7 - i of the matrix gives bit i of the product.
constexpr std::array<uint64_t, 256> make_matrices() {
  std::array<uint64_t, 256> out = {};
  for (unsigned c = 0; c < 256; c++) {
    for (unsigned bit = 0; bit < 8; bit++) {
      const unsigned column = product(static_cast<uint8_t>(c), static_cast<uint8_t>(1 << bit));
      for (unsigned i = 0; i < 8; i++) {
        if ((column >> i & 1) != 0) out[c] |= uint64_t{1} << ((7 - i) * 8 + bit);
      }
    }
  }
  return out;
}
constexpr auto kMatrices = make_matrices();

__attribute__((target("gfni,avx512f,avx512bw"))) void gfni_avx512(uint8_t* dst, const uint8_t* src,
                                                                  uint8_t c, size_t size) {
  const __m512i matrix = _mm512_set1_epi64(static_cast<int64_t>(kMatrices[c]));
  size_t i = 0;
  for (; i + 64 <= size; i += 64) {
    const __m512i in = _mm512_loadu_si512(src + i);
    const __m512i sum =
        _mm512_xor_si512(_mm512_loadu_si512(dst + i), _mm512_gf2p8affine_epi64_epi8(in, matrix, 0));
    _mm512_storeu_si512(dst + i, sum);
  }
  if (i == size) return;
  const __mmask64 rest = (uint64_t{1} << (size - i)) - 1;
  const __m512i in = _mm512_maskz_loadu_epi8(rest, src + i);
  const __m512i sum = _mm512_xor_si512(_mm512_maskz_loadu_epi8(rest, dst + i),
                                       _mm512_gf2p8affine_epi64_epi8(in, matrix, 0));
  _mm512_mask_storeu_epi8(dst + i, rest, sum);
}
bool has_gfni_avx512() {
  return __builtin_cpu_supports("gfni") && __builtin_cpu_supports("avx512f") &&
         __builtin_cpu_supports("avx512bw");
}

__attribute__((target("gfni,avx2"))) void gfni_avx2(uint8_t* dst, const uint8_t* src, uint8_t c,
                                                    size_t size) {
  const __m256i matrix = _mm256_set1_epi64x(static_cast<int64_t>(kMatrices[c]));
  size_t i = 0;
  for (; i + 32 <= size; i += 32) {
    auto* out = reinterpret_cast<__m256i*>(dst + i);
    const __m256i in = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i));
    const __m256i part = _mm256_gf2p8affine_epi64_epi8(in, matrix, 0);
    _mm256_storeu_si256(out, _mm256_xor_si256(_mm256_loadu_si256(out), part));
  }
  portable(dst + i, src + i, c, size - i);
}
bool has_gfni_avx2() { return __builtin_cpu_supports("gfni") && __builtin_cpu_supports("avx2"); }

__attribute__((target("avx2"))) void avx2(uint8_t* dst, const uint8_t* src, uint8_t c,
                                          size_t size) {
  const Halves& table = kHalves[c];
  const __m256i low =
      _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table.low)));
  const __m256i high =
      _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table.high)));
  const __m256i half = _mm256_set1_epi8(15);
  size_t i = 0;
  for (; i + 32 <= size; i += 32) {
    auto* out = reinterpret_cast<__m256i*>(dst + i);
    const __m256i in = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i));
    const __m256i part = _mm256_xor_si256(
        _mm256_shuffle_epi8(low, _mm256_and_si256(in, half)),
        _mm256_shuffle_epi8(high, _mm256_and_si256(_mm256_srli_epi64(in, 4), half)));
    _mm256_storeu_si256(out, _mm256_xor_si256(_mm256_loadu_si256(out), part));
  }
  portable(dst + i, src + i, c, size - i);
}
bool has_avx2() { return __builtin_cpu_supports("avx2"); }

__attribute__((target("ssse3"))) void ssse3(uint8_t* dst, const uint8_t* src, uint8_t c,
                                            size_t size) {
  const Halves& table = kHalves[c];
  const __m128i low = _mm_load_si128(reinterpret_cast<const __m128i*>(table.low));
  const __m128i high = _mm_load_si128(reinterpret_cast<const __m128i*>(table.high));
  const __m128i half = _mm_set1_epi8(15);
  size_t i = 0;
  for (; i + 16 <= size; i += 16) {
    auto* out = reinterpret_cast<__m128i*>(dst + i);
    const __m128i in = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i));
    const __m128i part =
        _mm_xor_si128(_mm_shuffle_epi8(low, _mm_and_si128(in, half)),
                      _mm_shuffle_epi8(high, _mm_and_si128(_mm_srli_epi64(in, 4), half)));
    _mm_storeu_si128(out, _mm_xor_si128(_mm_loadu_si128(out), part));
  }
  portable(dst + i, src + i, c, size - i);
}
bool has_ssse3() { return __builtin_cpu_supports("ssse3"); }

#endif

constexpr Kernel kKernels[] = {
#if defined(__x86_64__)
    {"gfni-avx512", &has_gfni_avx512, &gfni_avx512},
    {"gfni-avx2", &has_gfni_avx2, &gfni_avx2},
    {"avx2", &has_avx2, &avx2},
    {"ssse3", &has_ssse3, &ssse3},
#endif
    {"portable", &always, &portable},
};

}  // namespace

uint8_t multiply(uint8_t a, uint8_t b) { return kHalves[a].low[b & 15] ^ kHalves[a].high[b >> 4]; }
uint8_t inverse(uint8_t a) { return kInverses[a]; }

std::span<const Kernel> kernels() { return kKernels; }

const Kernel& kernel() {
  for (const Kernel& each : kKernels) {
    if (each.supported()) return each;
  }
  return kKernels[std::size(kKernels) - 1];
}

}  // namespace sf::mcdist::gf256
