#include "blktap/file_cache.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>

#include <algorithm>
#include <chrono>

#include "blktap/files.h"

namespace sf {
namespace {

// The word: pins in the low bits, then these, and in the upper half the descriptor plus one.
constexpr uint64_t kPins = (uint64_t{1} << 24) - 1;
constexpr uint64_t kUsed = uint64_t{1} << 24;  // read since the hand came by
constexpr uint64_t kCached = uint64_t{1} << 25;
constexpr uint64_t kRemoved = uint64_t{1} << 26;
constexpr unsigned kFdShift = 32;

constexpr int fd_of(uint64_t word) { return static_cast<int>(word >> kFdShift) - 1; }
constexpr uint64_t word_of(int fd) { return static_cast<uint64_t>(fd + 1) << kFdShift; }

// One miss closes at most so many descriptors beyond its own place: it may run in a server's loop.
constexpr size_t kTrim = 8;

int open_path(const std::string& path, ReadMode mode) {
  if (mode == ReadMode::kBlock) return ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  // Only if all names on the way are in the kernel's cache (openat2(2), RESOLVE_CACHED).
  open_how how = {};
  how.flags = O_RDONLY | O_CLOEXEC;
  how.resolve = RESOLVE_CACHED;
  const auto fd =
      static_cast<int>(::syscall(SYS_openat2, AT_FDCWD, path.c_str(), &how, sizeof how));
  if (fd < 0) errno = EAGAIN;  // also what is wrong for good is found out by who may wait
  return fd;
}

size_t default_capacity() {
  rlimit limit = {};
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return 256;
  return std::clamp<rlim_t>(limit.rlim_cur / 4, 1, FileCache::kDefaultCapacity);
}

}  // namespace

int CachedFile::Pin::read(uint64_t off, size_t len, uint8_t* out, ReadMode mode) const {
  const int error = ref().read(off, len, out, mode);
  if (error != 0 && error != EAGAIN) file_->read_failed(error);
  return error;
}

void CachedFile::read_failed(int error) const { complain(file_error("read " + path_, error)); }

CachedFile::~CachedFile() {
  if (cache_ != nullptr) cache_->forget(*this, true);
}

int CachedFile::identify(int fd, Identity* out) {
  struct statx found = {};
  if (::statx(fd, "", AT_EMPTY_PATH, STATX_TYPE | STATX_INO | STATX_SIZE | STATX_BTIME, &found) !=
      0) {
    return errno;
  }
  out->device = makedev(found.stx_dev_major, found.stx_dev_minor);
  out->inode = found.stx_ino;
  out->size = found.stx_size;
  // An inode's number may be given again; not with the same time of birth.
  if ((found.stx_mask & STATX_BTIME) != 0) {
    out->born_s = found.stx_btime.tv_sec;
    out->born_ns = found.stx_btime.tv_nsec;
  }
  return 0;
}

Status CachedFile::keep(FileCache* cache, std::string path, DataFile file,
                        std::shared_ptr<FileErrors> errors) {
  const int error = identify(file.fd(), &identity_);
  if (error != 0) return file_error("stat " + path, error);
  path_ = std::move(path);
  own_ = std::move(file);
  nowait_ = own_.ref().nowait;
  errors_ = std::move(errors);
  cache_ = cache;
  word_.store(word_of(own_.fd()), std::memory_order_release);
  return Status::Ok();
}

void CachedFile::release() {
  if (!own_.valid()) return;
  own_.take().release();  // the word has it
  cache_->add(*this);
}

void CachedFile::remove() {
  word_.fetch_or(kRemoved, std::memory_order_acq_rel);
  cache_->forget(*this, false);
}

int CachedFile::pin(ReadMode mode, Pin* out) const {
  out->reset();
  const uint64_t before = word_.fetch_add(1, std::memory_order_acquire);
  if (fd_of(before) >= 0 && (before & kRemoved) == 0) {
    if ((before & kUsed) == 0) word_.fetch_or(kUsed, std::memory_order_relaxed);
  } else {
    unpin();
    if ((before & kRemoved) != 0) return ESTALE;
    const int error = cache_->pin_closed(*this, mode);
    if (error != 0) return error;
  }
  out->file_ = this;
  out->fd_ = fd_of(word_.load(std::memory_order_relaxed));
  return 0;
}

void CachedFile::unpin() const {
  const uint64_t before = word_.fetch_sub(1, std::memory_order_release);
  if ((before & kPins) != 1) return;
  if ((before & kRemoved) != 0) cache_->forget(*this, false);
  if (cache_->waiting_.load(std::memory_order_relaxed) > 0) cache_->unpinned_.notify_all();
}

int CachedFile::read(uint64_t off, size_t len, uint8_t* out, ReadMode mode) const {
  Pin pin;
  const int error = this->pin(mode, &pin);
  return error == 0 ? pin.read(off, len, out, mode) : error;
}

// Once a file: who reads it next gets the same errno, and people one message.
void CachedFile::complain(const Status& status) const {
  if (errors_ != nullptr && !complained_.exchange(true)) errors_->report(status);
}

int CachedFile::open_again(ReadMode mode, Fd* out) const {
  *out = Fd(open_path(path_, mode));
  if (!out->valid()) {
    const int error = errno;
    if (error == EAGAIN || error == EMFILE || error == ENFILE) return error;
    complain(
        error == ENOENT
            ? Status::Error("E_CORRUPT", path_ + " vanished while its disk was open; put it back")
            : file_error("open " + path_, error));
    return error == ENOENT ? EIO : error;
  }
  Identity found;
  const int error = identify(out->get(), &found);
  if (error == 0 && found == identity_) return 0;
  const bool same = found.device == identity_.device && found.inode == identity_.inode &&
                    found.born_s == identity_.born_s && found.born_ns == identity_.born_ns;
  complain(error != 0 ? file_error("stat " + path_, error)
           : same     ? Status::Error("E_CORRUPT", path_ + " changed its size from " +
                                                       std::to_string(identity_.size) + " to " +
                                                       std::to_string(found.size) +
                                                       " bytes while its disk was open; close the "
                                                           "disk and restore it from a copy")
                  : Status::Error("E_CORRUPT", path_ + " was replaced by another file while its "
                                                       "disk was open; put the first one back"));
  return EIO;
}

FileCache& FileCache::shared() {
  static auto* cache = new FileCache(default_capacity());
  return *cache;
}

void FileCache::set_capacity(size_t capacity) {
  std::vector<Fd> closing;
  std::lock_guard lock(mutex_);
  capacity_ = std::max<size_t>(1, capacity);
  while (open_ > capacity_ && evict(&closing)) {
  }
}

FileCache::Stats FileCache::stats() {
  std::lock_guard lock(mutex_);
  return {capacity_, open_, opened_, closed_};
}

// Opens a file that was found closed, and pins it.
int FileCache::pin_closed(const CachedFile& file, ReadMode mode) {
  const size_t which = reinterpret_cast<uintptr_t>(&file) / sizeof(CachedFile) % open_locks_.size();
  std::unique_lock opener(open_locks_[which], std::defer_lock);
  if (mode == ReadMode::kBlock) {
    opener.lock();
  } else if (!opener.try_lock()) {
    return EAGAIN;
  }
  std::vector<Fd> closing;  // closed after the locks are open again
  // Somebody else may have opened it meanwhile.
  const uint64_t before = file.word_.fetch_add(1, std::memory_order_acquire);
  if (fd_of(before) >= 0 && (before & kRemoved) == 0) return 0;
  file.unpin();
  if ((before & kRemoved) != 0) return ESTALE;
  int error = reserve(mode, &closing);
  if (error != 0) return error;
  Fd fd;
  error = file.open_again(mode, &fd);
  if (error == EMFILE || error == ENFILE) {
    // Others in this process have them all; one of the cache's own may do.
    {
      std::lock_guard lock(mutex_);
      evict(&closing);
    }
    closing.clear();
    error = file.open_again(mode, &fd);
  }
  std::lock_guard lock(mutex_);
  if (error != 0) {
    open_--;
    if (error == EMFILE || error == ENFILE) file.complain(file_error("open " + file.path_, error));
    return error;
  }
  opened_++;
  file.slot_ = ring_.size();
  ring_.push_back(&file);
  // Only openers add a descriptor, one at a time, to a word that has none: nothing carries over.
  file.word_.fetch_add(word_of(fd.release()) + kCached + kUsed + 1, std::memory_order_acq_rel);
  trim(&closing);
  return 0;
}

// Makes room for one more descriptor, by closing another one if the cache is full.
int FileCache::reserve(ReadMode mode, std::vector<Fd>* closing) {
  const auto until = std::chrono::steady_clock::now() + std::chrono::milliseconds(kWait_ms);
  std::unique_lock lock(mutex_);
  while (true) {
    if (open_ < capacity_ || evict(closing)) break;
    if (open_ < 2 * capacity_) break;
    if (mode == ReadMode::kNowait) return EAGAIN;
    if (std::chrono::steady_clock::now() >= until) return EMFILE;
    // Pins go without a lock, so one may be missed: looked at again soon.
    waiting_.fetch_add(1);
    unpinned_.wait_for(lock, std::chrono::milliseconds(5));
    waiting_.fetch_sub(1);
  }
  open_ += 1;
  return 0;
}

// A kept file becomes one of the cache's.
void FileCache::add(const CachedFile& file) {
  std::vector<Fd> closing;
  std::lock_guard lock(mutex_);
  open_++;
  file.slot_ = ring_.size();
  ring_.push_back(&file);
  file.word_.fetch_or(kCached, std::memory_order_acq_rel);
  trim(&closing);
}

// Closes the descriptor if nobody reads it. `last`: the file goes for ever; nobody can.
void FileCache::forget(const CachedFile& file, bool last) {
  std::vector<Fd> closing;
  std::lock_guard lock(mutex_);
  const uint64_t word = file.word_.load(std::memory_order_acquire);
  // If it fails, somebody has just pinned it and comes here when he lets go.
  if ((word & kCached) != 0 && (last || (word & kPins) == 0)) {
    take_descriptor(file, word, &closing);
  }
}

void FileCache::take_out(const CachedFile& file) {
  const size_t slot = file.slot_;
  ring_[slot] = ring_.back();
  ring_[slot]->slot_ = slot;
  ring_.pop_back();
  if (hand_ >= ring_.size()) hand_ = 0;
}

// From a cached file that has no pins in `word`; false if it has changed since.
bool FileCache::take_descriptor(const CachedFile& file, uint64_t word, std::vector<Fd>* closing) {
  if (!file.word_.compare_exchange_strong(word, word & kRemoved, std::memory_order_acq_rel)) {
    return false;
  }
  take_out(file);
  closing->emplace_back(fd_of(word));
  open_--;
  closed_++;
  return true;
}

// Takes one descriptor that nobody reads: of a removed file, or of one not read for a while.
bool FileCache::evict(std::vector<Fd>* closing) {
  for (size_t steps = 2 * ring_.size(); steps > 0; steps--) {
    const CachedFile& file = *ring_[hand_];
    const uint64_t word = file.word_.load(std::memory_order_acquire);
    if ((word & kPins) == 0) {
      if ((word & kUsed) != 0 && (word & kRemoved) == 0) {
        file.word_.fetch_and(~kUsed, std::memory_order_relaxed);
      } else if (take_descriptor(file, word, closing)) {
        return true;
      }
    }
    hand_ = hand_ + 1 < ring_.size() ? hand_ + 1 : 0;
  }
  return false;
}

void FileCache::trim(std::vector<Fd>* closing) {
  for (size_t i = 0; i < kTrim && open_ > capacity_; i++) {
    if (!evict(closing)) return;
  }
}

}  // namespace sf
