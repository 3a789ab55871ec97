#include "blktap/slice.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "blktap/files.h"
#include "blktap/map_file.h"

namespace sf {
namespace {

constexpr size_t kRoundBlocks = 256;  // persist() copies at most 1 MiB of map between two syncs

}  // namespace

Status Slice::Open(const std::string& directory, const std::string& id, uint32_t edition,
                   uint64_t size_bytes, std::shared_ptr<FileErrors> errors,
                   std::shared_ptr<Slice>* out) {
  return OpenAny(directory, id, edition, size_bytes, Expected::kAny, std::move(errors), out);
}

Status Slice::OpenSealed(const std::string& directory, const std::string& id, uint32_t edition,
                         uint64_t size_bytes, std::shared_ptr<FileErrors> errors,
                         std::shared_ptr<Slice>* out) {
  return OpenAny(directory, id, edition, size_bytes, Expected::kSealed, std::move(errors), out);
}

Status Slice::OpenNewSpare(const std::string& directory, const std::string& id, uint64_t size_bytes,
                           std::shared_ptr<FileErrors> errors, std::shared_ptr<Slice>* out) {
  return OpenAny(directory, id, 0, size_bytes, Expected::kNewSpare, std::move(errors), out);
}

Status Slice::OpenAny(const std::string& directory, const std::string& id, uint32_t edition,
                      uint64_t size_bytes, Expected expected, std::shared_ptr<FileErrors> errors,
                      std::shared_ptr<Slice>* out) {
  if (!is_hex_id(id)) return Status::Error("E_ARGUMENT", "bad slice id " + id);
  std::string boot;
  Status status = boot_id(&boot);
  if (!status.ok()) return status;
  std::shared_ptr<Slice> s(new Slice());
  s->directory_ = directory;
  s->id_ = id;
  s->edition_ = edition;
  s->size_bytes_ = size_bytes;
  s->map_bytes_ = map_file_bytes(size_bytes);
  const bool sealed_only = expected == Expected::kSealed;
  s->live_path_ = s->path("." + boot + ".live");
  const std::string map_path = s->map_path();
  status = open_sized(map_path, sealed_only ? O_RDONLY : O_RDWR, s->map_bytes_, &s->map_);
  if (status.ok()) {
    status = read_header(s->map_, map_path, id, size_bytes, MapKind::kDurable, &s->header_);
  }
  if (!status.ok()) return status;
  const bool sealed = s->state() == SliceState::kSealed;
  if (sealed_only && !sealed) {
    return Status::Error("E_STATE", "slice " + id + " of " + directory + " is not sealed");
  }
  const std::string data_path = s->path(".data");
  DataFile data;
  status =
      open_sized(data_path, sealed ? O_RDONLY : O_RDWR, pages_of(size_bytes) * kPageBytes, &data);
  if (status.ok()) {
    status = s->data_.keep(&FileCache::shared(), data_path, std::move(data), std::move(errors));
  }
  if (!status.ok()) return status;
  if (sealed) {
    if (!sealed_only) status = s->finish_seal();
    s->map_ = DataFile();
    s->settle();
  } else {
    status = s->open_live(expected);
  }
  if (!status.ok()) return status;
  if (expected == Expected::kNewSpare && s->state() != SliceState::kSpare) {
    return Status::Error("E_STATE", "slice " + id + " is not a spare");
  }
  *out = std::move(s);
  return Status::Ok();
}

Status Slice::open_live(Expected expected) {
  dirty_.assign((map_bytes_ / kPageBytes + 63) / 64, 0);
  if (::access(live_path_.c_str(), F_OK) != 0) return remake_live(expected);
  SliceHeader live = {};
  Status status = open_sized(live_path_, O_RDWR, map_bytes_, &live_);
  if (status.ok()) {
    status = read_header(live_, live_path_, id_, size_bytes_, MapKind::kLive, &live);
  }
  if (!status.ok()) return status;
  if (live.state == static_cast<uint32_t>(SliceState::kSealed)) {
    return Status::Error("E_CORRUPT", live_path_ + " says sealed, which no live map does");
  }
  status = check_covered(map_, map_path(), live_, live_path_, size_bytes_);
  if (!status.ok()) return status;
  header_dirty_ = true;  // .map may say the same, and say it in the page cache alone
  header_ = live;
  // Which blocks .map lacks is not known any more: all that hold anything.
  return scan_blocks(live_, live_path_, size_bytes_, [&](uint64_t block, const uint8_t*) {
    dirty_[block / 64] |= uint64_t{1} << (block % 64);
    return Status::Ok();
  });
}

// A kill between the sealed header and the end of its sync leaves it in the page cache alone, and
// .live, which goes last. Written again, since a sync that failed has made the old page look clean.
Status Slice::finish_seal() {
  if (::access(live_path_.c_str(), F_OK) != 0) return Status::Ok();
  const int error = map_.write(0, &header_, sizeof header_);
  if (error != 0) return file_error("write header of " + map_path(), error);
  if (::fdatasync(map_.fd()) != 0) return file_error("sync " + map_path());
  ::unlink(live_path_.c_str());
  return Status::Ok();
}

// After a power cut, and for a slice just made: .live begins as a copy of .map. It gets its name
// only when it is whole.
Status Slice::remake_live(Expected expected) {
  const std::string fresh = path(".live-new");
  ::unlink(fresh.c_str());
  Fd fd(::open(fresh.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (!fd.valid()) return file_error("create " + fresh);
  if (::ftruncate(fd.get(), static_cast<off_t>(map_bytes_)) != 0)
    return file_error("size " + fresh);
  live_ = DataFile(std::move(fd));
  Status status = write_header(live_, fresh, MapKind::kLive);
  if (status.ok()) {
    status = scan_blocks(map_, map_path(), size_bytes_, [&](uint64_t block, const uint8_t* bytes) {
      const int error = live_.write(kMapStart + block * kPageBytes, bytes, kPageBytes);
      return error == 0 ? Status::Ok() : file_error("write " + fresh, error);
    });
  }
  if (!status.ok()) return status;
  if (::rename(fresh.c_str(), live_path_.c_str()) != 0) return file_error("rename " + fresh);
  if (expected == Expected::kNewSpare) return Status::Ok();
  return remove_stale_live(directory_, id_, live_path_);
}

Status Slice::scan(const Run& each) const {
  for (int attempt = 0; attempt < 3; attempt++) {
    const bool sealed = settled();
    const std::string name = sealed ? map_path() : live_path_;
    DataFile file;
    Status status = open_sized(name, O_RDONLY, map_bytes_, &file);
    if (!status.ok() && !sealed && settled()) continue;  // sealed this moment: .live is gone
    if (!status.ok()) return status;
    SliceHeader header = {};
    status = read_header(file, name, id_, size_bytes_, sealed ? MapKind::kDurable : MapKind::kLive,
                         &header);
    if (!status.ok()) return status;
    const bool says_sealed = header.state == static_cast<uint32_t>(SliceState::kSealed);
    if (says_sealed != sealed) {
      return Status::Error("E_CORRUPT", name + " is in another state than when it was opened");
    }
    return scan_map(file, name, size_bytes_, sealed ? &header : nullptr, each);
  }
  return Status::Error("E_IO", "slice " + path("") + " changes its state again and again");
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
    for (uint64_t i = 0; i < n; i++) {
      const unsigned shift = (first + i) % kPagesPerByte * 2;
      uint8_t& b = buffer[(first + i) / kPagesPerByte - byte];
      b = static_cast<uint8_t>((b & ~(3u << shift)) | (bits << shift));
    }
    error = live_.write(kMapStart + byte, buffer, bytes);
    if (error != 0) return error;
    for (uint64_t block = byte / kPageBytes; block <= (byte + bytes - 1) / kPageBytes; block++) {
      dirty_[block / 64] |= uint64_t{1} << (block % 64);
    }
    first += n;
    count -= n;
  }
  return 0;
}

void Slice::mark_present(std::span<Mark> marks) {
  for (auto& mark : marks) mark.error = -1;
  std::lock_guard lock(map_mutex_);
  for (size_t i = 0; i < marks.size(); i++) {
    if (marks[i].error >= 0) continue;
    const uint64_t block = marks[i].first / kPagesPerBlock;
    const int error = mark_block(block, marks.subspan(i));
    for (auto& mark : marks.subspan(i)) {
      if (mark.first / kPagesPerBlock == block) mark.error = error;
    }
  }
}

// Those of `marks` that lie in `block`. With map_mutex_. One write() within a page of the page
// cache: all of it or nothing.
int Slice::mark_block(uint64_t block, std::span<Mark> marks) {
  uint8_t buffer[kPageBytes];
  const PageIndex base = block * kPagesPerBlock;
  size_t from = kPageBytes;
  size_t to = 0;
  for (const auto& mark : marks) {
    if (mark.first / kPagesPerBlock != block) continue;
    from = std::min<size_t>(from, (mark.first - base) / kPagesPerByte);
    to = std::max<size_t>(to, (mark.first - base + mark.count - 1) / kPagesPerByte + 1);
  }
  const uint64_t at = kMapStart + block * kPageBytes + from;
  int error = live_.read(at, to - from, buffer + from, ReadMode::kBlock);
  if (error != 0) return error;
  for (const auto& mark : marks) {
    if (mark.first / kPagesPerBlock != block) continue;
    for (PageIndex page = mark.first - base; page < mark.first - base + mark.count; page++) {
      const unsigned shift = page % kPagesPerByte * 2;
      uint8_t& b = buffer[page / kPagesPerByte];
      b = static_cast<uint8_t>((b & ~(3u << shift)) |
                               (static_cast<unsigned>(PageState::kPresent) << shift));
    }
  }
  error = live_.write(at, buffer + from, to - from);
  if (error != 0) return error;
  dirty_[block / 64] |= uint64_t{1} << (block % 64);
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

int Slice::allocate_zeroes(PageIndex first, uint64_t count) const {
  constexpr int kKeepSize = FALLOC_FL_KEEP_SIZE;
  const auto off = static_cast<off_t>(first * kPageBytes);
  const auto len = static_cast<off_t>(count * kPageBytes);
  if (::fallocate(data().fd(), FALLOC_FL_ZERO_RANGE | kKeepSize, off, len) != 0) {
    if (errno != EOPNOTSUPP) return errno;
    // tmpfs, for one: zeros that are written have their space too.
    static constexpr uint8_t kZeroes[16 * kPageBytes] = {};
    for (uint64_t done = 0; done < count * kPageBytes;) {
      const size_t n = std::min<uint64_t>(sizeof kZeroes, count * kPageBytes - done);
      const int error = data().write(first * kPageBytes + done, kZeroes, n);
      if (error != 0) return error;
      done += n;
    }
  }
  const uint64_t bits = first / kPagesPerByte;
  const uint64_t bytes = (first + count - 1) / kPagesPerByte - bits + 1;
  if (::fallocate(map_.fd(), kKeepSize, static_cast<off_t>(kMapStart + bits),
                  static_cast<off_t>(bytes)) != 0 &&
      errno != EOPNOTSUPP) {
    return errno;
  }
  return 0;
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
  Status status = map_checksum(map_, map_path(), size_bytes_, &sealed.map_crc);
  if (!status.ok()) return status;
  seal_header(&sealed);
  const int error = map_.write(0, &sealed, sizeof sealed);
  if (error != 0) return file_error("write header of " + map_path(), error);
  if (::fdatasync(map_.fd()) != 0) {
    sync_failed_ = file_error("sync " + map_path());
    return sync_failed_;
  }
  {
    std::lock_guard lock(map_mutex_);
    header_ = sealed;
    live_ = DataFile();
    map_ = DataFile();
    std::vector<uint64_t>().swap(dirty_);
  }
  ::unlink(live_path_.c_str());  // if a kill prevents it, Open does it
  settle();
  return Status::Ok();
}

// There may be thousands of settled slices: they keep only what reading them takes.
void Slice::settle() {
  data_.release();
  settled_.store(true, std::memory_order_release);
}

Status Slice::allocated_bytes(uint64_t* out) const {
  struct stat st = {};
  if (::stat(data_.path().c_str(), &st) != 0) return file_error("stat " + data_.path());
  *out = static_cast<uint64_t>(st.st_blocks) * 512;
  return Status::Ok();
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
      if (error != 0) return failed(file_error("write " + map_path(), error));
    }
    if (header) {
      Status status = write_header(map_, map_path(), MapKind::kDurable);
      if (!status.ok()) return failed(status);
    }
    if ((!round.empty() || header) && ::fdatasync(map_.fd()) != 0) {
      sync_failed_ = file_error("sync " + map_path());
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
