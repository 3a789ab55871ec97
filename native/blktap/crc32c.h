// CRC-32C (Castagnoli, reflected polynomial 0x82f63b78; RFC 3720 section 12.1), by table: it covers
// metadata only, never pages.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace sf {

constexpr std::array<uint32_t, 256> make_crc32c_table() {
  std::array<uint32_t, 256> table = {};
  for (uint32_t i = 0; i < 256; i++) {
    uint32_t value = i;
    for (int bit = 0; bit < 8; bit++) value = (value >> 1) ^ ((value & 1) ? 0x82f63b78u : 0);
    table[i] = value;
  }
  return table;
}

// Pass the result of one call as `crc` of the next to go on; start with 0.
inline uint32_t crc32c(uint32_t crc, const void* data, size_t bytes) {
  static constexpr std::array<uint32_t, 256> kTable = make_crc32c_table();
  const auto* p = static_cast<const uint8_t*>(data);
  crc = ~crc;
  while (bytes-- > 0) crc = (crc >> 8) ^ kTable[(crc ^ *p++) & 0xff];
  return ~crc;
}

}  // namespace sf
