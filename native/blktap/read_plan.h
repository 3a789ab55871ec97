// Where the bytes of a read lie: pieces of files that are to be read into pieces of a buffer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "blktap/file_cache.h"
#include "blktap/read_gate.h"

namespace sf {

struct ReadSegment {
  FileRef file;  // held open by the plan
  uint64_t offset = 0;
  size_t bytes = 0;
  uint8_t* into = nullptr;
  const ReadOwner* owner = nullptr;  // kept by the plan as well; may be null
};

// Bytes known to be zeros are in the buffer already and in no segment.
struct ReadPlan {
  // Of different files: what one request may take of the file cache while it waits for a device.
  static constexpr size_t kMaxPins = 32;

  std::vector<ReadSegment> segments;
  std::vector<std::shared_ptr<const void>> keep;  // holds a base's file open
  std::shared_ptr<ReadGate::Section> section;  // the pages stay in their files; ends before `keep`
  std::vector<CachedFile::Pin> pins;           // holds slices' files open; end before `section`
};

}  // namespace sf
