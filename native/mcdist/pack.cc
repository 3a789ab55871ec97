#include "mcdist/pack.h"

#include <lz4.h>

#include "common/page.h"

namespace sf::mcdist {

Packer::Packer() : state_(std::make_unique<uint64_t[]>((LZ4_sizeofState() + 7) / 8)) {}

size_t Packer::pack(const uint8_t* page, uint8_t* out, size_t limit) {
  const int packed = LZ4_compress_fast_extState(
      state_.get(), reinterpret_cast<const char*>(page), reinterpret_cast<char*>(out), kPageBytes,
      static_cast<int>(limit < kPageBytes ? limit : kPageBytes), 1);
  return packed > 0 ? static_cast<size_t>(packed) : 0;
}

bool unpack_page(const uint8_t* data, size_t size, uint8_t* out) {
  if (size == 0 || size > kPageBytes) return false;
  return LZ4_decompress_safe(reinterpret_cast<const char*>(data), reinterpret_cast<char*>(out),
                             static_cast<int>(size), kPageBytes) == kPageBytes;
}

}  // namespace sf::mcdist
