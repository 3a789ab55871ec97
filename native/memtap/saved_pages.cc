#include "memtap/saved_pages.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include <bit>
#include <cstring>

namespace sf {
namespace {

constexpr char kMagic[8] = {'S', 'F', 'S', 'A', 'V', 'E', '0', '1'};
constexpr size_t kNameBytes = 72;

size_t bitmap_bytes(uint64_t pages) {
  const size_t bytes = (pages + 63) / 64 * 8;
  return (bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
}

bool all_zero(const uint8_t* data) {
  return data[0] == 0 && std::memcmp(data, data + 1, kPageBytes - 1) == 0;
}

Status io_error(const std::string& what, int error) {
  const bool full = error == ENOSPC || error == EDQUOT;
  return Status::Errno(full ? "E_NO_SPACE" : "E_IO", what, error);
}

void set_name(char (&out)[kNameBytes], const std::string& name) {
  std::memset(out, 0, sizeof out);
  std::memcpy(out, name.data(), std::min(name.size(), sizeof out - 1));
}

}  // namespace

struct SavedPages::Header {
  char magic[8];
  uint64_t pages;
  std::atomic<uint32_t> state;
  std::atomic<uint32_t> newer_slot;
  char vm[kNameBytes];
  char generation[kNameBytes];
  char newer[2][kNameBytes];
};

Status SavedPages::open_files(const std::string& directory, const std::string& generation,
                              uint64_t pages, int flags) {
  static_assert(sizeof(Header) <= kPageBytes);
  directory_ = directory;
  generation_ = generation;
  pages_ = pages;
  map_bytes_ = kPageBytes + 2 * bitmap_bytes(pages);
  const std::string path = directory + "/saved";
  map_ = Fd(::open((path + ".map").c_str(), O_RDWR | O_CLOEXEC | flags, 0600));
  if (!map_.valid()) {
    if (errno == ENOENT) return Status::Error("E_NOT_FOUND", "no generation in " + directory);
    if (errno == EEXIST) return Status::Error("E_EXISTS", "a generation exists in " + directory);
    return io_error("open " + path + ".map", errno);
  }
  data_ = Fd(::open(path.c_str(), O_RDWR | O_CLOEXEC | (flags & ~O_EXCL), 0600));
  if (!data_.valid()) return io_error("open " + path, errno);
  if (::flock(map_.get(), LOCK_EX | LOCK_NB) != 0) {
    return Status::Error("E_IN_USE", "generation in " + directory + " is in use");
  }
  if ((flags & O_CREAT) != 0) {
    const int error = ::posix_fallocate(map_.get(), 0, static_cast<off_t>(map_bytes_));
    if (error != 0) return io_error("allocate " + path + ".map", error);
    if (::ftruncate(data_.get(), static_cast<off_t>(pages * kPageBytes)) != 0) {
      return io_error("size " + path, errno);
    }
  }
  struct stat map_stat = {};
  struct stat data_stat = {};
  if (::fstat(map_.get(), &map_stat) != 0 || ::fstat(data_.get(), &data_stat) != 0) {
    return io_error("stat " + path, errno);
  }
  if (static_cast<uint64_t>(map_stat.st_size) != map_bytes_ ||
      static_cast<uint64_t>(data_stat.st_size) != pages * kPageBytes) {
    return Status::Error("E_REPLICA_MISMATCH", "generation in " + directory + " has another size");
  }
  void* map = ::mmap(nullptr, map_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, map_.get(), 0);
  if (map == MAP_FAILED) return io_error("map " + path + ".map", errno);
  header_ = static_cast<Header*>(map);
  auto* base = static_cast<uint8_t*>(map) + kPageBytes;
  saved_words_ = reinterpret_cast<std::atomic<uint64_t>*>(base);
  zero_words_ = reinterpret_cast<std::atomic<uint64_t>*>(base + bitmap_bytes(pages));
  return Status::Ok();
}

Status SavedPages::Create(const std::string& directory, const std::string& vm,
                          const std::string& generation, uint64_t pages,
                          std::shared_ptr<SavedPages>* out) {
  if (::mkdir(directory.c_str(), 0700) != 0 && errno != EEXIST) {
    return io_error("make " + directory, errno);
  }
  std::shared_ptr<SavedPages> s(new SavedPages());
  Status status = s->open_files(directory, generation, pages, O_CREAT | O_EXCL);
  if (!status.ok()) {
    if (status.code != "E_EXISTS") s->remove_files();
    return status;
  }
  s->header_->pages = pages;
  set_name(s->header_->vm, vm);
  set_name(s->header_->generation, generation);
  s->set_state(State::kProtecting);
  std::memcpy(s->header_->magic, kMagic, sizeof kMagic);  // last: marks the header as whole
  *out = std::move(s);
  return Status::Ok();
}

Status SavedPages::Open(const std::string& directory, const std::string& vm,
                        const std::string& generation, uint64_t pages,
                        std::shared_ptr<SavedPages>* out) {
  std::shared_ptr<SavedPages> s(new SavedPages());
  Status status = s->open_files(directory, generation, pages, 0);
  if (!status.ok()) return status;
  const Header& h = *s->header_;
  if (std::memcmp(h.magic, kMagic, sizeof kMagic) != 0) {
    return Status::Error("E_CORRUPT", "generation in " + directory + " has no valid header");
  }
  if (h.pages != pages || vm != std::string(h.vm, ::strnlen(h.vm, kNameBytes)) ||
      generation != std::string(h.generation, ::strnlen(h.generation, kNameBytes))) {
    return Status::Error("E_REPLICA_MISMATCH", directory + " holds another generation");
  }
  uint64_t count = 0;
  for (uint64_t i = 0; i < (pages + 63) / 64; i++) {
    count += static_cast<uint64_t>(std::popcount(s->word(i)));
  }
  s->count_ = count;
  *out = std::move(s);
  return Status::Ok();
}

SavedPages::~SavedPages() {
  if (header_ != nullptr) ::munmap(header_, map_bytes_);
}

SavedPages::State SavedPages::state() const {
  return static_cast<State>(header_->state.load(std::memory_order_acquire));
}

void SavedPages::set_state(State state) {
  header_->state.store(static_cast<uint32_t>(state), std::memory_order_release);
}

std::string SavedPages::newer() const {
  const char* name = header_->newer[header_->newer_slot.load(std::memory_order_acquire) & 1];
  return std::string(name, ::strnlen(name, kNameBytes));
}

void SavedPages::set_newer(const std::string& generation) {
  const uint32_t slot = (header_->newer_slot.load(std::memory_order_acquire) & 1) ^ 1;
  set_name(header_->newer[slot], generation);
  header_->newer_slot.store(slot, std::memory_order_release);
}

uint64_t SavedPages::word(uint64_t index) const {
  return saved_words_[index].load(std::memory_order_acquire);
}

Status SavedPages::save(PageIndex page, const uint8_t* data) {
  const uint64_t bit = uint64_t{1} << (page % 64);
  if (all_zero(data)) {
    zero_words_[page / 64].fetch_or(bit, std::memory_order_release);
  } else {
    // The zero bit may be left over from a process killed right after it set it.
    zero_words_[page / 64].fetch_and(~bit, std::memory_order_release);
    size_t done = 0;
    while (done < kPageBytes) {
      const ssize_t n = ::pwrite(data_.get(), data + done, kPageBytes - done,
                                 static_cast<off_t>(page * kPageBytes + done));
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) return io_error("save a page in " + directory_, n == 0 ? EIO : errno);
      done += static_cast<size_t>(n);
    }
  }
  if ((saved_words_[page / 64].fetch_or(bit, std::memory_order_acq_rel) & bit) == 0) {
    count_.fetch_add(1, std::memory_order_relaxed);
  }
  return Status::Ok();
}

ReadResult SavedPages::read(PageIndex page, uint8_t* out) const {
  if (test(zero_words_, page)) return ReadResult::kZero;
  size_t done = 0;
  while (done < kPageBytes) {
    const ssize_t n = ::pread(data_.get(), out + done, kPageBytes - done,
                              static_cast<off_t>(page * kPageBytes + done));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return ReadResult::kError;
    done += static_cast<size_t>(n);
  }
  return ReadResult::kData;
}

void SavedPages::remove_files() {
  ::unlink((directory_ + "/saved").c_str());
  ::unlink((directory_ + "/saved.map").c_str());
  ::rmdir(directory_.c_str());
}

}  // namespace sf
