// The bytes of a slice's map files; docs/disk-format.md is the description for people.
#pragma once

#include <cstdint>
#include <string>

#include "common/page.h"
#include "common/status.h"

namespace sf {

constexpr char kSliceMagic[8] = {'S', 'F', 'S', 'L', 'I', 'C', 'E', '2'};
constexpr uint32_t kSliceVersion = 2;
constexpr size_t kSliceIdChars = 32;
constexpr uint64_t kMapStart = kPageBytes;             // states begin here, after the header's page
constexpr uint64_t kPagesPerByte = 4;                  // two bits a page, lowest bits first
constexpr uint64_t kMaxDiskBytes = uint64_t{1} << 46;  // 64 TiB

enum class SliceState : uint32_t { kSpare = 0, kOpen = 1, kSealed = 2 };
enum class MapKind : uint32_t { kDurable = 0, kLive = 1 };

// Little-endian, at offset 0 of .map and .live files. The store's journal says what lies below
// what; the two fields on that serve to find a fork that it does not tell of yet. The header fits
// one 512-byte sector, the unit that a device writes whole or not at all, so a header is old or new
// after a power cut.
struct SliceHeader {
  char magic[8];
  uint32_t version;
  uint32_t page_bytes;
  uint64_t size_bytes;        // of the disk
  char slice[32];             // this slice's id, no terminator
  char below[32];             // a spare that became a top: the slice it was put on; else NULs
  char below_generation[64];  // and the generation that slice became then; NUL-padded
  uint32_t state;             // SliceState
  uint32_t kind;              // MapKind
  uint32_t map_crc;           // sealed: CRC-32C of the map (non-zero blocks, each after its number)
  uint32_t header_crc;        // CRC-32C of all fields before this one
};
static_assert(sizeof(SliceHeader) == 168 && sizeof(SliceHeader) <= 512);

// Disks have any number of bytes; their files have whole pages.
inline uint64_t pages_of(uint64_t size_bytes) { return (size_bytes + kPageBytes - 1) / kPageBytes; }

inline uint64_t map_file_bytes(uint64_t size_bytes) {
  const uint64_t bytes = (pages_of(size_bytes) + kPagesPerByte - 1) / kPagesPerByte;
  return kMapStart + (bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
}

SliceHeader make_header(const std::string& slice, uint64_t size_bytes, SliceState state,
                        MapKind kind);
void seal_header(SliceHeader* header);  // sets header_crc
Status check_header(const SliceHeader& header, const std::string& path, const std::string& slice,
                    uint64_t size_bytes, MapKind kind);
std::string header_text(const char* field, size_t bytes);

// True for 32 lower-case hex digits: slice and generation ids, safe in file names.
bool is_hex_id(const std::string& id);

}  // namespace sf
