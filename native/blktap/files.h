// Small file chores of slices.
#pragma once

#include <cerrno>
#include <map>
#include <string>
#include <vector>

#include "common/status.h"

namespace sf {

// E_NO_SPACE for ENOSPC and EDQUOT, E_EXISTS for EEXIST, else E_IO.
Status file_error(const std::string& what, int error = errno);
Status sync_directory(const std::string& path);
// This boot of the kernel, 32 hex digits.
Status boot_id(std::string* out);
// Removes SLICE.*.live other than `keep`: maps of an earlier boot, never true again.
Status remove_stale_live(const std::string& directory, const std::string& slice,
                         const std::string& keep);
// Adds the names of the files of each slice in `out` but for .data: maps of all editions, live
// maps, unfinished ones. One look through the folder, however many they are.
Status files_of_slices(const std::string& directory,
                       std::map<std::string, std::vector<std::string>>* out);
bool is_zero_block(const void* block);  // 4096 bytes

}  // namespace sf
