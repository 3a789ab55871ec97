#include "blktap/slice_format.h"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstring>

#include "blktap/crc32c.h"

namespace sf {

static_assert(std::endian::native == std::endian::little, "headers are written as they lie");

SliceHeader make_header(const std::string& slice, uint64_t size_bytes, SliceState state,
                        MapKind kind) {
  SliceHeader header = {};
  std::memcpy(header.magic, kSliceMagic, sizeof kSliceMagic);
  header.version = kSliceVersion;
  header.page_bytes = kPageBytes;
  header.size_bytes = size_bytes;
  std::memcpy(header.slice, slice.data(), std::min(slice.size(), sizeof header.slice));
  header.state = static_cast<uint32_t>(state);
  header.kind = static_cast<uint32_t>(kind);
  seal_header(&header);
  return header;
}

void seal_header(SliceHeader* header) {
  header->header_crc = crc32c(0, header, offsetof(SliceHeader, header_crc));
}

Status check_header(const SliceHeader& header, const std::string& path, const std::string& slice,
                    uint64_t size_bytes, MapKind kind) {
  const char* wrong = nullptr;
  if (std::memcmp(header.magic, kSliceMagic, sizeof kSliceMagic) != 0) {
    wrong = "has no slice header";
  } else if (header.header_crc != crc32c(0, &header, offsetof(SliceHeader, header_crc))) {
    wrong = "has a header whose checksum is wrong";
  } else if (header.version != kSliceVersion) {
    wrong = "has a format version this program does not know";
  } else if (header.page_bytes != kPageBytes || header.size_bytes != size_bytes) {
    wrong = "is for a disk of another size";
  } else if (header_text(header.slice, sizeof header.slice) != slice) {
    wrong = "belongs to another slice";
  } else if (header.state > static_cast<uint32_t>(SliceState::kSealed) ||
             header.kind != static_cast<uint32_t>(kind)) {
    wrong = "has an impossible state";
  }
  if (wrong == nullptr) return Status::Ok();
  return Status::Error("E_CORRUPT", path + " " + wrong);
}

std::string header_text(const char* field, size_t bytes) {
  return std::string(field, ::strnlen(field, bytes));
}

bool is_hex_id(const std::string& id) {
  return id.size() == kSliceIdChars && std::all_of(id.begin(), id.end(), [](char c) {
           return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
         });
}

}  // namespace sf
