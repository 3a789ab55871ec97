// Looking at a slice's files from outside, for `disk check` and repair. Nothing in them is
// believed.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/status.h"

namespace sf {

struct SliceCheck {
  std::string state;          // spare, open, sealed; empty: no readable header
  uint64_t pages = 0;         // not absent
  uint64_t zero_pages = 0;    // of these, zeros
  uint64_t data_bytes = 0;    // allocated in .data
  uint64_t leaked_bytes = 0;  // data in .data under pages that are not data in the map
  // Pages that are data in the map and a hole in .data. They read as zeros, which is right for
  // pages allocated and not written, and of no matter for pages that all slices on this one cover.
  uint64_t holes = 0;
  std::vector<std::string> errors;  // sentences
};

// Reads the map that is true now (the live one of this boot, if there is one) and asks the file
// system where .data has bytes. Changes nothing. What is wrong with the files is in `errors`; the
// status is for what has nothing to do with them (E_ARGUMENT, E_REQUIREMENT).
Status check_slice(const std::string& directory, const std::string& id, uint32_t edition,
                   uint64_t size_bytes, SliceCheck* out);

// Punches what leaked_bytes counts out of a sealed slice's .data. The caller has the store's lock,
// and nobody has the slice open. E_CORRUPT and nothing changed if its map fails its checks; E_STATE
// if it is not sealed.
Status trim_slice(const std::string& directory, const std::string& id, uint32_t edition,
                  uint64_t size_bytes, uint64_t* given_back);

}  // namespace sf
