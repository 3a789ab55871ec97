#include "fuzz/support.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>

#include "common/fd.h"

namespace sf::fuzz {

void fail(const std::string& what) {
  std::fprintf(stderr, "\nFUZZ: %s\n", what.c_str());
  std::abort();
}

const std::string& folder() {
  static const std::string path = [] {
    const char* parent = std::getenv("SNOWFLOCK_FUZZ_DIR");
    if (parent == nullptr) fail("SNOWFLOCK_FUZZ_DIR is not set: use `npm run fuzz`");
    const std::string made = std::string(parent) + "/" + std::to_string(::getpid());
    std::filesystem::remove_all(made);
    std::filesystem::create_directories(made);
    return made;
  }();
  return path;
}

void clear_folder(const std::string& path, const std::vector<std::string>& keep) {
  std::vector<std::filesystem::path> gone;
  for (const auto& entry : std::filesystem::directory_iterator(path)) {
    const std::string name = entry.path().filename();
    if (std::none_of(keep.begin(), keep.end(),
                     [&](const auto& start) { return name.rfind(start, 0) == 0; })) {
      gone.push_back(entry.path());
    }
  }
  for (const auto& each : gone) std::filesystem::remove_all(each);
}

namespace {

Fd open_file(const std::string& path, int flags) {
  Fd fd(::open(path.c_str(), flags | O_CLOEXEC, 0600));
  if (!fd.valid()) fail("cannot open " + path);
  return fd;
}

}  // namespace

void write_file(const std::string& path, uint64_t off, const void* data, size_t bytes) {
  const Fd fd = open_file(path, O_WRONLY | O_CREAT);
  const ssize_t n = ::pwrite(fd.get(), data, bytes, static_cast<off_t>(off));
  if (n != static_cast<ssize_t>(bytes)) fail("cannot write " + path);
}

void resize_file(const std::string& path, uint64_t bytes) {
  const Fd fd = open_file(path, O_WRONLY | O_CREAT);
  if (::ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0) fail("cannot size " + path);
}

std::vector<uint8_t> read_file(const std::string& path, uint64_t off, size_t bytes) {
  const Fd fd = open_file(path, O_RDONLY);
  std::vector<uint8_t> out(bytes);
  const ssize_t n = ::pread(fd.get(), out.data(), bytes, static_cast<off_t>(off));
  if (n < 0) fail("cannot read " + path);
  return out;
}

void put_instead(const std::string& path, Instead what) {
  if (what == Instead::kFile) return;
  std::filesystem::remove_all(path);
  bool done = true;
  if (what == Instead::kFolder) done = ::mkdir(path.c_str(), 0700) == 0;
  if (what == Instead::kLink) done = ::symlink("/dev/zero", path.c_str()) == 0;
  if (what == Instead::kPipe) done = ::mkfifo(path.c_str(), 0600) == 0;
  if (!done) fail("cannot make " + path);
}

}  // namespace sf::fuzz
