// The header of a replica's map file; replica.h says what follows it.
#pragma once

#include <cstdint>

#include "common/page.h"

namespace sf {

inline constexpr char kReplicaMagic[8] = {'S', 'F', 'R', 'E', 'P', 'L', '0', '2'};

struct MapHeader {
  char magic[8];
  uint64_t pages;
  uint32_t medium;
  uint32_t reserved;
  char generation[64];
  char boot[40];  // kDisk: the boot of the kernel under which the first two bitmaps are true
};
static_assert(sizeof(MapHeader) <= kPageBytes);

}  // namespace sf
