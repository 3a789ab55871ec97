// Pages packed with LZ4, so that a whole page goes in one packet. Format: one LZ4 block
// (lz4_Block_format.md), without frame, that unpacks to exactly 4096 bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace sf::mcdist {

// One for each thread: keeps 16 KiB to work in.
class Packer {
 public:
  Packer();
  // Packs the 4096 bytes of `page` into at most `limit` bytes at `out`. Returns how many, or 0: it
  // does not fit, so it does not pay.
  size_t pack(const uint8_t* page, uint8_t* out, size_t limit);

 private:
  std::unique_ptr<uint64_t[]> state_;
};

// Writes 4096 bytes to `out`. False: `data` is not a page packed so; then `out` is of no use.
// `size` may be anything, `data` hostile.
bool unpack_page(const uint8_t* data, size_t size, uint8_t* out);

}  // namespace sf::mcdist
