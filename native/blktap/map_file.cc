#include "blktap/map_file.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <memory>

#include "blktap/crc32c.h"
#include "blktap/files.h"

namespace sf {

std::string map_suffix(uint32_t edition) { return "." + std::to_string(edition) + ".map"; }

Status open_sized(const std::string& path, int flags, uint64_t bytes, DataFile* out) {
  Fd fd(::open(path.c_str(), flags | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW));
  if (!fd.valid()) {
    if (errno == ENOENT) return Status::Error("E_CORRUPT", path + " is missing");
    if (errno == ELOOP || errno == ENXIO || errno == EISDIR) {
      return Status::Error("E_CORRUPT", path + " is not a regular file");
    }
    return file_error("open " + path);
  }
  struct stat st = {};
  if (::fstat(fd.get(), &st) != 0) return file_error("stat " + path);
  if (!S_ISREG(st.st_mode)) return Status::Error("E_CORRUPT", path + " is not a regular file");
  if (static_cast<uint64_t>(st.st_size) != bytes) {
    return Status::Error("E_CORRUPT", path + " has the wrong size: " + std::to_string(st.st_size) +
                                          " bytes, expected " + std::to_string(bytes));
  }
  *out = DataFile(std::move(fd));
  return Status::Ok();
}

Status write_new_map(const std::string& path, const SliceHeader& header, uint64_t size_bytes) {
  Fd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (!fd.valid()) return file_error("create " + path);
  if (::ftruncate(fd.get(), static_cast<off_t>(map_file_bytes(size_bytes))) != 0) {
    return file_error("size " + path);
  }
  DataFile file(std::move(fd));
  const int error = file.write(0, &header, sizeof header);
  if (error != 0) return file_error("write " + path, error);
  if (::fdatasync(file.fd()) != 0) return file_error("sync " + path);
  return Status::Ok();
}

Status read_header(const DataFile& file, const std::string& path, const std::string& id,
                   uint64_t size_bytes, MapKind kind, SliceHeader* out) {
  const int error = file.read(0, sizeof *out, reinterpret_cast<uint8_t*>(out), ReadMode::kBlock);
  if (error != 0) return file_error("read " + path, error);
  return check_header(*out, path, id, size_bytes, kind);
}

Status size_in_header(const std::string& path, uint64_t* size_bytes) {
  Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW));
  if (!fd.valid()) {
    if (errno == ENOENT) return Status::Error("E_CORRUPT", path + " is missing");
    return file_error("open " + path);
  }
  SliceHeader header = {};
  const ssize_t n = ::pread(fd.get(), &header, sizeof header, 0);
  if (n < 0) return file_error("read " + path);
  if (header.size_bytes == 0 || header.size_bytes > kMaxDiskBytes) {
    return Status::Error("E_CORRUPT", path + " has no header that tells a disk's size");
  }
  *size_bytes = header.size_bytes;
  return Status::Ok();
}

Status scan_blocks(const DataFile& file, const std::string& path, uint64_t size_bytes,
                   const std::function<Status(uint64_t, const uint8_t*)>& each) {
  constexpr size_t kChunk = 64 * 1024;
  const uint64_t end = map_file_bytes(size_bytes);
  auto buffer = std::make_unique<uint8_t[]>(kChunk);
  uint64_t at = kMapStart;
  while (at < end) {
    const off_t data = ::lseek(file.fd(), static_cast<off_t>(at), SEEK_DATA);
    if (data < 0 && errno == ENXIO) break;
    if (data < 0) return file_error("seek in " + path);
    at = static_cast<uint64_t>(data) / kPageBytes * kPageBytes;
    if (at >= end) break;
    const size_t n = std::min<uint64_t>(kChunk, end - at);
    const int error = file.read(at, n, buffer.get(), ReadMode::kBlock);
    if (error != 0) return file_error("read " + path, error);
    for (size_t i = 0; i < n; i += kPageBytes) {
      if (is_zero_block(buffer.get() + i)) continue;
      Status status = each((at + i - kMapStart) / kPageBytes, buffer.get() + i);
      if (!status.ok()) return status;
    }
    at += n;
  }
  return Status::Ok();
}

Status each_data(const DataFile& file, const std::string& path, uint64_t from, uint64_t to,
                 const std::function<Status(uint64_t, uint64_t)>& each) {
  while (from < to) {
    const off_t data = ::lseek(file.fd(), static_cast<off_t>(from), SEEK_DATA);
    if (data < 0 && errno == ENXIO) break;
    if (data < 0) return file_error("seek in " + path);
    if (static_cast<uint64_t>(data) >= to) break;
    const off_t hole = ::lseek(file.fd(), data, SEEK_HOLE);
    if (hole < 0) return file_error("seek in " + path);
    if (hole <= data) break;  // it changes meanwhile
    const uint64_t end = std::min(to, static_cast<uint64_t>(hole));
    Status status = each(static_cast<uint64_t>(data), end);
    if (!status.ok()) return status;
    from = end;
  }
  return Status::Ok();
}

Status check_covered(const DataFile& map, const std::string& path, const DataFile& live,
                     const std::string& live_path, uint64_t size_bytes) {
  auto held = [](uint8_t states) { return (states | states >> 1) & 0x55; };
  return scan_blocks(map, path, size_bytes, [&](uint64_t block, const uint8_t* bytes) {
    uint8_t now[kPageBytes];
    const int error = live.read(kMapStart + block * kPageBytes, sizeof now, now, ReadMode::kBlock);
    if (error != 0) return file_error("read " + live_path, error);
    for (size_t i = 0; i < sizeof now; i++) {
      if ((held(bytes[i]) & ~held(now[i])) == 0) continue;
      return Status::Error("E_CORRUPT", live_path + " lacks pages that " + path + " has");
    }
    return Status::Ok();
  });
}

uint32_t add_block(uint32_t crc, uint64_t block, const uint8_t* bytes) {
  return crc32c(crc32c(crc, &block, sizeof block), bytes, kPageBytes);
}

Status map_checksum(const DataFile& file, const std::string& path, uint64_t size_bytes,
                    uint32_t* crc) {
  *crc = 0;
  return scan_blocks(file, path, size_bytes, [&](uint64_t block, const uint8_t* bytes) {
    *crc = add_block(*crc, block, bytes);
    return Status::Ok();
  });
}

Status scan_map(const DataFile& file, const std::string& path, uint64_t size_bytes,
                const SliceHeader* sealed,
                const std::function<void(PageIndex, uint64_t, PageState)>& each) {
  const uint64_t pages = pages_of(size_bytes);
  uint32_t crc = 0;
  PageIndex run_first = 0;
  uint64_t run = 0;
  unsigned run_state = 0;
  auto end_run = [&] {
    if (run > 0) each(run_first, run, static_cast<PageState>(run_state));
    run = 0;
  };
  Status status = scan_blocks(file, path, size_bytes, [&](uint64_t block, const uint8_t* bytes) {
    if (sealed != nullptr) crc = add_block(crc, block, bytes);
    for (uint64_t i = 0; i < kPagesPerBlock; i++) {
      if (bytes[i / kPagesPerByte] == 0) {
        i |= kPagesPerByte - 1;
        continue;
      }
      const unsigned state = (bytes[i / kPagesPerByte] >> (i % kPagesPerByte * 2)) & 3;
      if (state == 0) continue;
      const PageIndex page = block * kPagesPerBlock + i;
      if (state == 3 || page >= pages) {
        return Status::Error("E_CORRUPT",
                             path + " has an impossible state of page " + std::to_string(page));
      }
      if (run == 0 || state != run_state || page != run_first + run) {
        end_run();
        run_first = page;
        run_state = state;
      }
      run++;
    }
    return Status::Ok();
  });
  if (!status.ok()) return status;
  end_run();
  if (sealed != nullptr && crc != sealed->map_crc) {
    return Status::Error("E_CORRUPT", path + " fails its checksum");
  }
  return Status::Ok();
}

}  // namespace sf
