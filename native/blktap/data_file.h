// Reads and writes of a file at an offset, whole or with an errno; and reads that must not sleep.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "common/fd.h"

namespace sf {

enum class ReadMode : uint8_t {
  kBlock,   // may wait for the device
  kNowait,  // EAGAIN unless the bytes are in the page cache
};

class DataFile {
 public:
  DataFile() = default;
  explicit DataFile(Fd fd);

  int fd() const { return fd_.get(); }
  bool valid() const { return fd_.valid(); }
  bool in_memory() const { return nowait_ == Nowait::kMemory; }  // a read never waits for a device
  // 0 or an errno. A file that ends before `len` bytes is EIO, never zeros.
  int read(uint64_t off, size_t len, uint8_t* out, ReadMode mode) const;
  void read_ahead(uint64_t off, uint64_t len) const;  // a hint; does not wait
  int write(uint64_t off, const void* data, size_t len) const;
  int writev(uint64_t off, iovec* parts, int count) const;  // alters `parts`

 private:
  enum class Nowait : uint8_t { kRefused, kFlag, kMemory };
  Fd fd_;
  Nowait nowait_ = Nowait::kRefused;
};

}  // namespace sf
