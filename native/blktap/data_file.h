// Reads and writes of a file at an offset, whole or with an errno; and reads that must not sleep.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <utility>

#include "common/fd.h"
#include "common/status.h"

namespace sf {

enum class ReadMode : uint8_t {
  kBlock,   // may wait for the device
  kNowait,  // EAGAIN unless the bytes are in the page cache
};

// What a file can do for a read that must not sleep.
enum class Nowait : uint8_t { kRefused, kFlag, kMemory };

// The last thing that went wrong with the files of one store, for people.
class FileErrors {
 public:
  void report(Status status) {
    std::lock_guard lock(mutex_);
    last_ = std::move(status);
  }
  Status last() {
    std::lock_guard lock(mutex_);
    return last_;
  }

 private:
  std::mutex mutex_;
  Status last_;
};

// Whose file is read by somebody else (a ring, by a plan), who tells it what went wrong.
class ReadOwner {
 public:
  virtual void read_failed(int error) const = 0;

 protected:
  ~ReadOwner() = default;
};

// A file that somebody else keeps open, for reading.
struct FileRef {
  int fd = -1;
  Nowait nowait = Nowait::kRefused;

  bool in_memory() const { return nowait == Nowait::kMemory; }  // a read never waits for a device
  // 0 or an errno. A file that ends before `len` bytes is EIO, never zeros.
  int read(uint64_t off, size_t len, uint8_t* out, ReadMode mode) const;
  void read_ahead(uint64_t off, uint64_t len) const;  // a hint; does not wait
};

class DataFile {
 public:
  DataFile() = default;
  explicit DataFile(Fd fd);

  int fd() const { return fd_.get(); }
  bool valid() const { return fd_.valid(); }
  FileRef ref() const { return {fd_.get(), nowait_}; }
  Fd take() { return std::move(fd_); }
  int read(uint64_t off, size_t len, uint8_t* out, ReadMode mode) const {
    return ref().read(off, len, out, mode);
  }
  void read_ahead(uint64_t off, uint64_t len) const { ref().read_ahead(off, len); }
  int write(uint64_t off, const void* data, size_t len) const;
  int writev(uint64_t off, iovec* parts, int count) const;  // alters `parts`

 private:
  Fd fd_;
  Nowait nowait_ = Nowait::kRefused;
};

}  // namespace sf
