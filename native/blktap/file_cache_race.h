// Checks FileCache under load: threads read and hold files while others are released and removed.
// Free of JavaScript, so that it can be built with a sanitizer.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "blktap/file_cache.h"

namespace sf {

struct FileCacheRace {
  uint64_t reads = 0;
  uint64_t wrong = 0;   // bytes of another file, or an error there was no cause for
  uint64_t stale = 0;   // ESTALE, of a removed file
  uint64_t again = 0;   // EAGAIN, of a read that must not wait
  uint64_t most = 0;    // descriptors of the cache open at once, as far as seen
  uint64_t pinned = 0;  // that could be held at once
  int full = 0;         // errno of a pin when all are held
  int let_go = 0;       // errno of one when another is let go meanwhile
};

// In `directory`, which is empty, with `files` files (at least 4 * capacity) and three readers.
inline Status race_file_cache(const std::string& directory, size_t files, size_t capacity,
                              unsigned reads, uint32_t seed, FileCacheRace* out) {
  constexpr size_t kBytes = 4096;
  constexpr size_t kEvery = 10;  // files with a number so divided are removed
  FileCache cache(capacity);
  auto errors = std::make_shared<FileErrors>();
  std::vector<std::unique_ptr<CachedFile>> all;
  uint8_t page[kBytes];
  const auto byte = [](size_t i) { return static_cast<uint8_t>(1 + i % 251); };
  for (size_t i = 0; i < files; i++) {
    const std::string path = directory + "/" + std::to_string(i);
    Fd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
    std::fill_n(page, kBytes, byte(i));
    if (!fd.valid() || ::pwrite(fd.get(), page, kBytes, 0) != static_cast<ssize_t>(kBytes)) {
      return Status::Errno("E_IO", "write " + path);
    }
    all.push_back(std::make_unique<CachedFile>());
    Status status = all[i]->keep(&cache, path, DataFile(std::move(fd)), errors);
    if (!status.ok()) return status;
    if (i % 8 != 0) all[i]->release();
  }
  std::atomic<uint64_t> wrong{0}, stale{0}, again{0}, most{0};
  const auto judge = [&](size_t i, int error, ReadMode mode) {
    if (error == ESTALE && i % kEvery == 0) {
      stale++;
    } else if (error == EAGAIN && mode == ReadMode::kNowait) {
      again++;
    } else if (error != 0) {
      wrong++;
    }
  };
  std::vector<std::thread> threads;
  for (unsigned reader = 0; reader < 3; reader++) {
    threads.emplace_back([&, reader] {
      std::mt19937 random(seed + reader);
      uint8_t read[kBytes];
      for (unsigned n = 0; n < reads; n++) {
        const size_t i = random() % files;
        const ReadMode mode = random() % 2 == 0 ? ReadMode::kBlock : ReadMode::kNowait;
        const int error = all[i]->read(0, kBytes, read, mode);
        judge(i, error, mode);
        if (error == 0 && (read[0] != byte(i) || read[kBytes - 1] != byte(i))) wrong++;
        if (n % 16 == 0) most = std::max<uint64_t>(most, cache.stats().open);
      }
    });
  }
  threads.emplace_back([&] {  // holds some for long, as asynchronous reads do
    std::mt19937 random(seed + 100);
    for (unsigned n = 0; n < reads / 20; n++) {
      std::vector<CachedFile::Pin> pins(capacity / 2);
      for (auto& pin : pins) {
        const size_t i = random() % files;
        judge(i, all[i]->pin(ReadMode::kNowait, &pin), ReadMode::kNowait);
      }
    }
  });
  for (size_t i = 0; i < files; i += 8) all[i]->release();
  for (size_t i = 0; i < files; i += kEvery) all[i]->remove();
  for (auto& thread : threads) thread.join();
  threads.clear();

  std::vector<CachedFile::Pin> pins;
  for (size_t i = 0; i < files - 1; i++) {
    CachedFile::Pin pin;
    const int error = all[i]->pin(ReadMode::kNowait, &pin);
    if (error == 0) pins.push_back(std::move(pin));
  }
  *out = {uint64_t{3} * reads, 0, stale, again, most, pins.size(), 0, 0};
  {
    CachedFile::Pin pin;
    out->full = all[files - 1]->pin(ReadMode::kBlock, &pin);
  }
  std::thread other([&] { pins.pop_back(); });
  CachedFile::Pin last;
  out->let_go = all[files - 1]->pin(ReadMode::kBlock, &last);
  other.join();
  last.reset();
  pins.clear();
  for (size_t i = 0; i < files; i++) {
    judge(i, all[i]->read(0, kBytes, page, ReadMode::kBlock), ReadMode::kBlock);
    if (i % kEvery != 0 && page[7] != byte(i)) wrong++;
  }
  all.clear();
  if (cache.stats().open != 0) wrong++;
  out->wrong = wrong;
  return Status::Ok();
}

}  // namespace sf
