// What the fuzz targets share: a folder of their own, and how a broken invariant ends a run.
#pragma once

#include <fuzzer/FuzzedDataProvider.h>

#include <cstdint>
#include <string>
#include <vector>

#include "common/status.h"

namespace sf::fuzz {

// Reports `what` and aborts: libFuzzer then keeps the input and says where.
[[noreturn]] void fail(const std::string& what);
inline void expect(bool holds, const char* what) {
  if (!holds) fail(what);
}
inline void expect_ok(const Status& status, const char* what) {
  if (!status.ok()) fail(std::string(what) + ": " + status.code + " " + status.message);
}

// This process's folder, empty when first asked for. It lies in SNOWFLOCK_FUZZ_DIR, on tmpfs, which
// whoever started this process removes.
const std::string& folder();
// Removes everything in a folder whose name does not begin with one of `keep`.
void clear_folder(const std::string& path, const std::vector<std::string>& keep);

void write_file(const std::string& path, uint64_t off, const void* data, size_t bytes);
void resize_file(const std::string& path, uint64_t bytes);  // makes it
std::vector<uint8_t> read_file(const std::string& path, uint64_t off, size_t bytes);

// In place of the file at `path`: something else, or nothing.
enum class Instead : uint8_t { kFile, kNothing, kFolder, kLink, kPipe };
void put_instead(const std::string& path, Instead what);

}  // namespace sf::fuzz
