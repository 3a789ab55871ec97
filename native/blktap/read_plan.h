// Where the bytes of a read lie: pieces of files that are to be read into pieces of a buffer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "blktap/read_gate.h"

namespace sf {

class DataFile;

struct ReadSegment {
  const DataFile* file = nullptr;
  uint64_t offset = 0;
  size_t bytes = 0;
  uint8_t* into = nullptr;
};

// Bytes known to be zeros are in the buffer already and in no segment.
struct ReadPlan {
  std::vector<ReadSegment> segments;
  std::vector<std::shared_ptr<const void>> keep;  // holds the files open
  std::shared_ptr<ReadGate::Section> section;     // and their pages in them; ends before `keep`
};

}  // namespace sf
