#include "blktap/data_file.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/magic.h>
#include <sys/vfs.h>
#include <unistd.h>

namespace sf {

DataFile::DataFile(Fd fd) : fd_(std::move(fd)) {
  struct statfs fs = {};
  if (::fstatfs(fd_.get(), &fs) != 0) return;
  if (fs.f_type == TMPFS_MAGIC || fs.f_type == RAMFS_MAGIC) {
    nowait_ = Nowait::kMemory;  // a plain read is as quick as it gets
    return;
  }
  uint8_t byte = 0;
  iovec part = {&byte, 1};
  // File systems without support answer EOPNOTSUPP; the question is free.
  const ssize_t n = ::preadv2(fd_.get(), &part, 1, 0, RWF_NOWAIT);
  if (n >= 0 || errno == EAGAIN) nowait_ = Nowait::kFlag;
}

int FileRef::read(uint64_t off, size_t len, uint8_t* out, ReadMode mode) const {
  int flags = 0;
  if (mode == ReadMode::kNowait) {
    if (nowait == Nowait::kRefused) return EAGAIN;
    if (nowait == Nowait::kFlag) flags = RWF_NOWAIT;
  }
  size_t done = 0;
  while (done < len) {
    iovec part = {out + done, len - done};
    const ssize_t n = flags == 0
                          ? ::pread(fd, out + done, len - done, static_cast<off_t>(off + done))
                          : ::preadv2(fd, &part, 1, static_cast<off_t>(off + done), flags);
    if (n < 0) {
      if (errno == EINTR) continue;
      return errno;
    }
    if (n == 0) return flags == 0 ? EIO : EAGAIN;
    done += static_cast<size_t>(n);
  }
  return 0;
}

void FileRef::read_ahead(uint64_t off, uint64_t len) const {
  ::posix_fadvise(fd, static_cast<off_t>(off), static_cast<off_t>(len), POSIX_FADV_WILLNEED);
}

int DataFile::write(uint64_t off, const void* data, size_t len) const {
  iovec part = {const_cast<void*>(data), len};
  return writev(off, &part, 1);
}

int DataFile::writev(uint64_t off, iovec* parts, int count) const {
  while (count > 0) {
    if (parts->iov_len == 0) {
      parts++;
      count--;
      continue;
    }
    const ssize_t n = ::pwritev(fd_.get(), parts, count, static_cast<off_t>(off));
    if (n < 0) {
      if (errno == EINTR) continue;
      return errno;
    }
    if (n == 0) return ENOSPC;
    off += static_cast<uint64_t>(n);
    auto left = static_cast<size_t>(n);
    while (count > 0 && left >= parts->iov_len) {
      left -= parts->iov_len;
      parts++;
      count--;
    }
    if (count > 0) {
      parts->iov_base = static_cast<uint8_t*>(parts->iov_base) + left;
      parts->iov_len -= left;
    }
  }
  return 0;
}

}  // namespace sf
