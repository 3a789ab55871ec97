// Reading and making a slice's map files, for whoever opens, checks or merges slices. Nothing in a
// file is believed: sizes, states and checksums are looked at, and memory does not grow with them.
#pragma once

#include <functional>
#include <string>

#include "blktap/data_file.h"
#include "blktap/slice_format.h"
#include "common/status.h"

namespace sf {

constexpr uint64_t kPagesPerBlock = kPageBytes * kPagesPerByte;  // states in 4096 bytes of map

std::string map_suffix(uint32_t edition);  // ".N.map"

// E_CORRUPT if it is missing, no file, or not `bytes` long.
Status open_sized(const std::string& path, int flags, uint64_t bytes, DataFile* out);
// A new file with a header and no states, durable but for its name in the folder.
Status write_new_map(const std::string& path, const SliceHeader& header, uint64_t size_bytes);
Status read_header(const DataFile& file, const std::string& path, const std::string& id,
                   uint64_t size_bytes, MapKind kind, SliceHeader* out);

// The disk's size that a map's header tells, for whoever does not know it; nothing else is checked.
Status size_in_header(const std::string& path, uint64_t* size_bytes);

// Calls `each` with the number and the 4096 bytes of every block that is not all zeros, in order;
// holes cost nothing.
Status scan_blocks(const DataFile& file, const std::string& path, uint64_t size_bytes,
                   const std::function<Status(uint64_t, const uint8_t*)>& each);
// Calls `each` for the areas of a file in [from, to), in bytes, that are no holes.
Status each_data(const DataFile& file, const std::string& path, uint64_t from, uint64_t to,
                 const std::function<Status(uint64_t, uint64_t)>& each);
// E_CORRUPT if a page is absent in the live map that the durable map has: pages never become absent
// again, so the two do not belong together.
Status check_covered(const DataFile& map, const std::string& path, const DataFile& live,
                     const std::string& live_path, uint64_t size_bytes);
// The checksum of a sealed header: goes over each block that is not all zeros, after its number.
uint32_t add_block(uint32_t crc, uint64_t block, const uint8_t* bytes);
Status map_checksum(const DataFile& file, const std::string& path, uint64_t size_bytes,
                    uint32_t* crc);

// Calls `each` for every run of pages in one state that is not absent, in order. E_CORRUPT for
// states that cannot be, and if `sealed` is given and its checksum is another: the runs that were
// reported until then mean nothing.
Status scan_map(const DataFile& file, const std::string& path, uint64_t size_bytes,
                const SliceHeader* sealed,
                const std::function<void(PageIndex, uint64_t, PageState)>& each);

}  // namespace sf
