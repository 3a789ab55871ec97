#include "blktap/slice.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "blktap/crc32c.h"
#include "blktap/files.h"

namespace sf {
namespace {

constexpr size_t kRoundBlocks = 256;  // persist() copies at most 1 MiB of map between two syncs
constexpr uint64_t kPagesPerBlock = kPageBytes * kPagesPerByte;

Status write_new_map(const std::string& path, const SliceHeader& header, uint64_t bytes) {
  Fd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (!fd.valid()) return file_error("create " + path);
  if (::ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0) return file_error("size " + path);
  DataFile file(std::move(fd));
  const int error = file.write(0, &header, sizeof header);
  if (error != 0) return file_error("write " + path, error);
  if (::fdatasync(file.fd()) != 0) return file_error("sync " + path);
  return Status::Ok();
}

Status open_file(const std::string& path, int flags, uint64_t bytes, DataFile* out) {
  Fd fd(::open(path.c_str(), flags | O_CLOEXEC));
  if (!fd.valid()) {
    if (errno == ENOENT) return Status::Error("E_CORRUPT", path + " is missing");
    return file_error("open " + path);
  }
  struct stat st = {};
  if (::fstat(fd.get(), &st) != 0) return file_error("stat " + path);
  if (!S_ISREG(st.st_mode) || static_cast<uint64_t>(st.st_size) != bytes) {
    return Status::Error("E_CORRUPT", path + " has the wrong size");
  }
  *out = DataFile(std::move(fd));
  return Status::Ok();
}

Status read_header(const DataFile& file, const std::string& path, const std::string& id,
                   uint64_t size_bytes, MapKind kind, SliceHeader* out) {
  const int error = file.read(0, sizeof *out, reinterpret_cast<uint8_t*>(out), ReadMode::kBlock);
  if (error != 0) return file_error("read " + path, error);
  return check_header(*out, path, id, size_bytes, kind);
}

}  // namespace

Status Slice::Create(const std::string& directory, const std::string& id, uint64_t size_bytes,
                     SliceState state) {
  if (!is_hex_id(id)) return Status::Error("E_ARGUMENT", "bad slice id " + id);
  const std::string stem = directory + "/" + id;
  Fd data(::open((stem + ".data").c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (!data.valid()) return file_error("create " + stem + ".data");
  Status status = Status::Ok();
  if (::ftruncate(data.get(), static_cast<off_t>(size_bytes)) != 0 || ::fsync(data.get()) != 0) {
    status = file_error("size " + stem + ".data");
  }
  const uint64_t bytes = map_file_bytes(size_bytes);
  if (status.ok()) {
    status =
        write_new_map(stem + ".map", make_header(id, size_bytes, state, MapKind::kDurable), bytes);
  }
  if (status.ok()) status = sync_directory(directory);
  if (!status.ok()) {
    ::unlink((stem + ".data").c_str());
    ::unlink((stem + ".map").c_str());
  }
  return status;
}

Status Slice::RemoveSpare(const std::string& directory, const std::string& id,
                          uint64_t size_bytes) {
  std::shared_ptr<Slice> slice;
  Status status = Open(directory, id, size_bytes, &slice);
  if (!status.ok() && status.code != "E_CORRUPT") return status;
  // Half made (a kill inside Create): no map or no whole one, and so never written to.
  const bool half = !status.ok() && ::access((directory + "/" + id + ".map").c_str(), F_OK) != 0;
  if (!half && (slice == nullptr || slice->state() != SliceState::kSpare)) return Status::Ok();
  if (slice != nullptr) ::unlink(slice->live_path_.c_str());
  ::unlink((directory + "/" + id + ".data").c_str());
  ::unlink((directory + "/" + id + ".map").c_str());
  return Status::Ok();
}

Status Slice::Open(const std::string& directory, const std::string& id, uint64_t size_bytes,
                   std::shared_ptr<Slice>* out, std::shared_ptr<FileErrors> errors) {
  if (!is_hex_id(id)) return Status::Error("E_ARGUMENT", "bad slice id " + id);
  std::string boot;
  Status status = boot_id(&boot);
  if (!status.ok()) return status;
  std::shared_ptr<Slice> s(new Slice());
  s->directory_ = directory;
  s->id_ = id;
  s->size_bytes_ = size_bytes;
  s->map_bytes_ = map_file_bytes(size_bytes);
  s->live_path_ = s->path(("." + boot + ".live").c_str());
  const std::string map_path = s->path(".map");
  DataFile data;
  status = open_file(s->path(".data"), O_RDWR, size_bytes, &data);
  if (status.ok()) {
    status =
        s->data_.keep(&FileCache::shared(), s->path(".data"), std::move(data), std::move(errors));
  }
  if (status.ok()) status = open_file(map_path, O_RDWR, s->map_bytes_, &s->map_);
  if (status.ok()) {
    status = read_header(s->map_, map_path, id, size_bytes, MapKind::kDurable, &s->header_);
  }
  if (!status.ok()) return status;
  if (s->state() == SliceState::kSealed) {
    ::unlink(s->live_path_.c_str());  // left over from a kill between seal and unlink
    s->settle();
    *out = std::move(s);
    return Status::Ok();
  }
  s->dirty_.assign((s->map_bytes_ / kPageBytes + 63) / 64, 0);
  if (::access(s->live_path_.c_str(), F_OK) == 0) {
    SliceHeader live = {};
    status = open_file(s->live_path_, O_RDWR, s->map_bytes_, &s->live_);
    if (status.ok()) {
      status = read_header(s->live_, s->live_path_, id, size_bytes, MapKind::kLive, &live);
    }
    if (!status.ok()) return status;
    s->header_dirty_ = live.state != s->header_.state;
    s->header_ = live;
    // Which blocks .map lacks is not known any more: all that hold anything.
    status = s->scan_blocks(s->live_, [&](uint64_t block, const uint8_t*) {
      s->dirty_[block / 64] |= uint64_t{1} << (block % 64);
      return Status::Ok();
    });
    if (!status.ok()) return status;
  } else {
    status = s->remake_live();
    if (!status.ok()) return status;
  }
  *out = std::move(s);
  return Status::Ok();
}

// After a power cut, and for a slice just made: .live begins as a copy of .map. It gets its name
// only when it is whole.
Status Slice::remake_live() {
  const std::string fresh = path(".live-new");
  ::unlink(fresh.c_str());
  Fd fd(::open(fresh.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (!fd.valid()) return file_error("create " + fresh);
  if (::ftruncate(fd.get(), static_cast<off_t>(map_bytes_)) != 0)
    return file_error("size " + fresh);
  live_ = DataFile(std::move(fd));
  Status status = write_header(live_, fresh, MapKind::kLive);
  if (status.ok()) {
    status = scan_blocks(map_, [&](uint64_t block, const uint8_t* bytes) {
      const int error = live_.write(kMapStart + block * kPageBytes, bytes, kPageBytes);
      return error == 0 ? Status::Ok() : file_error("write " + fresh, error);
    });
  }
  if (!status.ok()) return status;
  if (::rename(fresh.c_str(), live_path_.c_str()) != 0) return file_error("rename " + fresh);
  return remove_stale_live(directory_, id_, live_path_);
}

// Calls `each` with every 4 KiB block of states that has a bit set; holes cost nothing.
Status Slice::scan_blocks(const DataFile& file,
                          const std::function<Status(uint64_t, const uint8_t*)>& each) const {
  constexpr size_t kChunk = 64 * 1024;
  auto buffer = std::make_unique<uint8_t[]>(kChunk);
  uint64_t at = kMapStart;
  while (at < map_bytes_) {
    const off_t data = ::lseek(file.fd(), static_cast<off_t>(at), SEEK_DATA);
    if (data < 0 && errno == ENXIO) break;
    if (data < 0) return file_error("seek in map of slice " + id_);
    at = static_cast<uint64_t>(data) / kPageBytes * kPageBytes;
    const size_t n = std::min<uint64_t>(kChunk, map_bytes_ - at);
    const int error = file.read(at, n, buffer.get(), ReadMode::kBlock);
    if (error != 0) return file_error("read map of slice " + id_, error);
    for (size_t i = 0; i < n; i += kPageBytes) {
      if (is_zero_block(buffer.get() + i)) continue;
      Status status = each((at + i - kMapStart) / kPageBytes, buffer.get() + i);
      if (!status.ok()) return status;
    }
    at += n;
  }
  return Status::Ok();
}

Status Slice::checksum(const DataFile& file, uint32_t* crc) const {
  *crc = 0;
  return scan_blocks(file, [&](uint64_t block, const uint8_t* bytes) {
    *crc = crc32c(crc32c(*crc, &block, sizeof block), bytes, kPageBytes);
    return Status::Ok();
  });
}

Status Slice::scan(const std::function<void(PageIndex, uint64_t, PageState)>& each) {
  const uint64_t pages = size_bytes_ / kPageBytes;
  const bool sealed = settled();
  const std::string bad = "map of slice " + path("") + " ";
  uint32_t crc = 0;
  uint64_t marked = 0;
  PageIndex run_first = 0;
  uint64_t run = 0;
  unsigned run_state = 0;
  auto end_run = [&] {
    if (run > 0) each(run_first, run, static_cast<PageState>(run_state));
    marked += run;
    run = 0;
  };
  Status status = scan_blocks(sealed ? map_ : live_, [&](uint64_t block, const uint8_t* bytes) {
    if (sealed) crc = crc32c(crc32c(crc, &block, sizeof block), bytes, kPageBytes);
    for (uint64_t i = 0; i < kPagesPerBlock; i++) {
      const unsigned state = (bytes[i / kPagesPerByte] >> (i % kPagesPerByte * 2)) & 3;
      if (state == 0) continue;
      const PageIndex page = block * kPagesPerBlock + i;
      if (state == 3 || page >= pages) {
        return Status::Error("E_CORRUPT", bad + "has an impossible state");
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
  if (sealed && crc != header_.map_crc) {
    return Status::Error("E_CORRUPT", bad + "fails its checksum");
  }
  pages_marked_ = marked;
  if (sealed) map_ = DataFile();  // not needed again; a chain may be long
  return Status::Ok();
}

int Slice::mark(PageIndex first, uint64_t count, PageState state) {
  constexpr size_t kBytes = 4096;
  const auto bits = static_cast<unsigned>(state);
  uint8_t buffer[kBytes];
  std::lock_guard lock(map_mutex_);
  while (count > 0) {
    const uint64_t byte = first / kPagesPerByte;
    const uint64_t n = std::min(count, kBytes * kPagesPerByte - first % kPagesPerByte);
    const size_t bytes = (first + n - 1) / kPagesPerByte - byte + 1;
    int error = live_.read(kMapStart + byte, bytes, buffer, ReadMode::kBlock);
    if (error != 0) return error;
    uint64_t fresh = 0;
    for (uint64_t i = 0; i < n; i++) {
      const unsigned shift = (first + i) % kPagesPerByte * 2;
      uint8_t& b = buffer[(first + i) / kPagesPerByte - byte];
      if (((b >> shift) & 3) == 0) fresh++;
      b = static_cast<uint8_t>((b & ~(3u << shift)) | (bits << shift));
    }
    error = live_.write(kMapStart + byte, buffer, bytes);
    if (error != 0) return error;
    for (uint64_t block = byte / kPageBytes; block <= (byte + bytes - 1) / kPageBytes; block++) {
      dirty_[block / 64] |= uint64_t{1} << (block % 64);
    }
    pages_marked_.fetch_add(fresh, std::memory_order_relaxed);
    first += n;
    count -= n;
  }
  return 0;
}

int Slice::punch(PageIndex first, uint64_t count) const {
  if (::fallocate(data().fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                  static_cast<off_t>(first * kPageBytes),
                  static_cast<off_t>(count * kPageBytes)) == 0) {
    return 0;
  }
  return errno == EOPNOTSUPP ? 0 : errno;  // only space is lost: the page's state says zero
}

Status Slice::write_header(const DataFile& file, const std::string& name, MapKind kind) {
  SliceHeader header = header_;
  header.kind = static_cast<uint32_t>(kind);
  seal_header(&header);
  const int error = file.write(0, &header, sizeof header);
  return error == 0 ? Status::Ok() : file_error("write header of " + name, error);
}

Status Slice::activate(const std::string& below, const std::string& below_generation) {
  std::lock_guard lock(map_mutex_);
  const SliceHeader before = header_;
  header_.state = static_cast<uint32_t>(SliceState::kOpen);
  std::memset(header_.below, 0, sizeof header_.below);
  std::memset(header_.below_generation, 0, sizeof header_.below_generation);
  std::memcpy(header_.below, below.data(), std::min(below.size(), sizeof header_.below));
  std::memcpy(header_.below_generation, below_generation.data(),
              std::min(below_generation.size(), sizeof header_.below_generation));
  Status status = write_header(live_, live_path_, MapKind::kLive);
  if (!status.ok()) {
    header_ = before;
    return status;
  }
  header_dirty_ = true;
  return Status::Ok();
}

Status Slice::seal() {
  if (settled()) return Status::Ok();
  if (!sync_failed_.ok()) return sync_failed_;
  SliceHeader sealed = {};
  {
    std::lock_guard lock(map_mutex_);
    sealed = header_;
  }
  sealed.state = static_cast<uint32_t>(SliceState::kSealed);
  sealed.kind = static_cast<uint32_t>(MapKind::kDurable);
  Status status = checksum(map_, &sealed.map_crc);
  if (!status.ok()) return status;
  seal_header(&sealed);
  const int error = map_.write(0, &sealed, sizeof sealed);
  if (error != 0) return file_error("write header of " + path(".map"), error);
  if (::fdatasync(map_.fd()) != 0) {
    sync_failed_ = file_error("sync " + path(".map"));
    return sync_failed_;
  }
  {
    std::lock_guard lock(map_mutex_);
    header_ = sealed;
    live_ = DataFile();
    map_ = DataFile();
  }
  ::unlink(live_path_.c_str());  // if a kill prevents it, Open does it
  settle();
  return Status::Ok();
}

// There may be thousands of settled slices: they keep only what reading them takes.
void Slice::settle() {
  {
    std::lock_guard lock(map_mutex_);
    dirty_ = {};
    live_path_ = {};
  }
  data_.release();
  settled_.store(true, std::memory_order_release);
}

uint64_t Slice::allocated_bytes() const {
  struct stat st = {};
  return ::stat(data_.path().c_str(), &st) == 0 ? static_cast<uint64_t>(st.st_blocks) * 512 : 0;
}

// One pass over the map. Blocks that become dirty behind the cursor belong to writes that were not
// acknowledged when the caller's flush began, or they were rewritten: the next flush has them.
Status Slice::persist() {
  if (settled()) return Status::Ok();
  if (!sync_failed_.ok()) return sync_failed_;
  const uint64_t blocks = (map_bytes_ - kMapStart) / kPageBytes;
  auto buffer = std::make_unique<uint8_t[]>(kRoundBlocks * kPageBytes);
  std::vector<uint64_t> round;
  uint64_t cursor = 0;
  do {
    round.clear();
    bool header = false;
    {
      std::lock_guard lock(map_mutex_);
      for (; cursor < blocks && round.size() < kRoundBlocks; cursor++) {
        const uint64_t bit = uint64_t{1} << (cursor % 64);
        if (dirty_[cursor / 64] == 0) {
          cursor |= 63;
          continue;
        }
        if ((dirty_[cursor / 64] & bit) == 0) continue;
        const int error = live_.read(kMapStart + cursor * kPageBytes, kPageBytes,
                                     buffer.get() + round.size() * kPageBytes, ReadMode::kBlock);
        if (error != 0) {
          for (uint64_t b : round) dirty_[b / 64] |= uint64_t{1} << (b % 64);
          return file_error("read " + live_path_, error);
        }
        dirty_[cursor / 64] &= ~bit;
        round.push_back(cursor);
      }
      header = header_dirty_ && cursor >= blocks;
    }
    auto failed = [&](const Status& status) {
      std::lock_guard lock(map_mutex_);
      for (uint64_t b : round) dirty_[b / 64] |= uint64_t{1} << (b % 64);
      return status;
    };
    if (::fdatasync(data().fd()) != 0) {
      sync_failed_ = file_error("sync " + path(".data"));
      return failed(sync_failed_);
    }
    for (size_t i = 0; i < round.size(); i++) {
      const int error =
          map_.write(kMapStart + round[i] * kPageBytes, buffer.get() + i * kPageBytes, kPageBytes);
      if (error != 0) return failed(file_error("write " + path(".map"), error));
    }
    if (header) {
      Status status = write_header(map_, path(".map"), MapKind::kDurable);
      if (!status.ok()) return failed(status);
    }
    if ((!round.empty() || header) && ::fdatasync(map_.fd()) != 0) {
      sync_failed_ = file_error("sync " + path(".map"));
      return failed(sync_failed_);
    }
    if (header) {
      std::lock_guard lock(map_mutex_);
      header_dirty_ = false;
    }
  } while (cursor < blocks);
  return Status::Ok();
}

}  // namespace sf
