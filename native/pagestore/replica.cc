#include "pagestore/replica.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include <bit>
#include <cstring>

namespace sf {
namespace {

constexpr char kMagic[8] = {'S', 'F', 'R', 'E', 'P', 'L', '0', '1'};

struct MapHeader {
  char magic[8];
  uint64_t pages;
  uint32_t medium;
  uint32_t reserved;
  char generation[64];
};
static_assert(sizeof(MapHeader) <= kPageBytes);

size_t bitmap_bytes(uint64_t pages) {
  size_t words = (pages + 63) / 64;
  return (words * 8 + kPageBytes - 1) / kPageBytes * kPageBytes;
}

// Registers the shared mapping with a userfaultfd of our own: UFFDIO_COPY then inserts a page into
// the page cache whole. A plain pwrite() to tmpfs could show a zero page for an instant if its
// source page were migrated in the middle of the copy.
Status register_fill(uint8_t* base, size_t bytes, Fd* out) {
  Fd fd(static_cast<int>(::syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK)));
  if (!fd.valid()) return Status::Errno("E_USERFAULTFD", "userfaultfd(2)");
  uffdio_api api = {};
  api.api = UFFD_API;
  api.features = UFFD_FEATURE_MISSING_SHMEM;
  if (::ioctl(fd.get(), UFFDIO_API, &api) != 0) return Status::Errno("E_USERFAULTFD", "UFFDIO_API");
  uffdio_register reg = {};
  reg.range.start = reinterpret_cast<uint64_t>(base);
  reg.range.len = bytes;
  reg.mode = UFFDIO_REGISTER_MODE_MISSING;
  if (::ioctl(fd.get(), UFFDIO_REGISTER, &reg) != 0) {
    return Status::Errno("E_USERFAULTFD", "UFFDIO_REGISTER of a replica (is it on tmpfs?)");
  }
  *out = std::move(fd);
  return Status::Ok();
}

}  // namespace

Status Replica::Open(const std::string& path, const std::string& generation, uint64_t pages,
                     Medium medium, std::shared_ptr<Replica>* out) {
  if (pages == 0 || pages > (uint64_t{1} << 36)) {
    return Status::Error("E_ARGUMENT", "replica " + path + ": bad number of pages");
  }
  if (generation.empty() || generation.size() >= sizeof(MapHeader::generation)) {
    return Status::Error("E_ARGUMENT", "replica " + path + ": bad generation id");
  }
  std::shared_ptr<Replica> r(new Replica());
  r->path_ = path;
  r->generation_ = generation;
  r->pages_ = pages;
  r->medium_ = medium;

  const std::string map_path = path + ".map";
  r->map_ = Fd(::open(map_path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (!r->map_.valid()) return Status::Errno("E_IO", "open " + map_path);
  if (::flock(r->map_.get(), LOCK_EX | LOCK_NB) != 0) {
    return Status::Error("E_IN_USE", "replica " + path + " is in use by another process");
  }
  r->data_ = Fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (!r->data_.valid()) return Status::Errno("E_IO", "open " + path);

  const size_t bits = bitmap_bytes(pages);
  r->map_bytes_ = kPageBytes + 2 * bits;
  struct stat st = {};
  if (::fstat(r->map_.get(), &st) != 0) return Status::Errno("E_IO", "stat " + map_path);
  const bool fresh = st.st_size == 0;
  struct stat data = {};
  if (::fstat(r->data_.get(), &data) != 0) return Status::Errno("E_IO", "stat " + path);
  if (fresh) {
    if (::ftruncate(r->map_.get(), static_cast<off_t>(r->map_bytes_)) != 0 ||
        ::ftruncate(r->data_.get(), static_cast<off_t>(pages * kPageBytes)) != 0) {
      return Status::Errno("E_IO", "size " + path);
    }
  } else if (static_cast<size_t>(st.st_size) != r->map_bytes_ ||
             static_cast<uint64_t>(data.st_size) != pages * kPageBytes) {
    // A VM that maps data cut short would die of SIGBUS.
    return Status::Error("E_REPLICA_MISMATCH", "replica " + path + " has another size");
  }
  void* map = ::mmap(nullptr, r->map_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, r->map_.get(), 0);
  if (map == MAP_FAILED) return Status::Errno("E_IO", "map " + map_path);
  r->map_base_ = static_cast<uint8_t*>(map);
  auto* header = static_cast<MapHeader*>(map);
  if (fresh) {
    header->pages = pages;
    header->medium = static_cast<uint32_t>(medium);
    std::memcpy(header->generation, generation.c_str(), generation.size() + 1);
    std::memcpy(header->magic, kMagic, sizeof kMagic);  // last: marks the header as whole
  } else if (std::memcmp(header->magic, kMagic, sizeof kMagic) != 0 || header->pages != pages ||
             header->medium != static_cast<uint32_t>(medium) ||
             std::strncmp(header->generation, generation.c_str(), sizeof header->generation) != 0) {
    return Status::Error("E_REPLICA_MISMATCH", "replica " + path + " is of another generation");
  }
  r->present_words_ = reinterpret_cast<std::atomic<uint64_t>*>(r->map_base_ + kPageBytes);
  r->zero_words_ = reinterpret_cast<std::atomic<uint64_t>*>(r->map_base_ + kPageBytes + bits);
  for (size_t i = 0; i < (pages + 63) / 64; i++) {
    const uint64_t present = r->present_words_[i].load();
    const uint64_t zero = r->zero_words_[i].load();
    const uint64_t left = pages - i * 64;
    if (left < 64 && ((present | zero) >> left) != 0) {
      return Status::Error("E_CORRUPT", map_path + " speaks of pages beyond the end");
    }
    r->present_ += static_cast<uint64_t>(std::popcount(present));
    r->zero_ += static_cast<uint64_t>(std::popcount(zero & ~present));  // as state() has it
  }
  if (medium == Medium::kMemory) {
    void* data = ::mmap(nullptr, pages * kPageBytes, PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_NORESERVE, r->data_.get(), 0);
    if (data == MAP_FAILED) return Status::Errno("E_IO", "map " + path);
    r->data_map_ = static_cast<uint8_t*>(data);
    Status status = register_fill(r->data_map_, pages * kPageBytes, &r->uffd_);
    if (!status.ok()) return status;
  }
  *out = std::move(r);
  return Status::Ok();
}

Replica::~Replica() {
  fail(Status::Error("E_CLOSED", "replica " + path_ + " was closed"));
  if (data_map_ != nullptr) ::munmap(data_map_, pages_ * kPageBytes);
  if (map_base_ != nullptr) ::munmap(map_base_, map_bytes_);
}

bool Replica::test(const std::atomic<uint64_t>* words, PageIndex page) const {
  return (words[page / 64].load(std::memory_order_acquire) >> (page % 64)) & 1;
}

bool Replica::set(std::atomic<uint64_t>* words, PageIndex page) {
  const uint64_t bit = uint64_t{1} << (page % 64);
  return (words[page / 64].fetch_or(bit, std::memory_order_acq_rel) & bit) == 0;
}

PageState Replica::state(PageIndex page) const {
  if (page >= pages_) return PageState::kAbsent;
  if (test(present_words_, page)) return PageState::kPresent;
  if (test(zero_words_, page)) return PageState::kZero;
  return PageState::kAbsent;
}

ReadResult Replica::read(PageIndex page, uint8_t* out) {
  switch (state(page)) {
    case PageState::kAbsent:
      return ReadResult::kAbsent;
    case PageState::kZero:
      return ReadResult::kZero;
    case PageState::kPresent:
      break;
  }
  size_t done = 0;
  while (done < kPageBytes) {
    ssize_t n = ::pread(data_.get(), out + done, kPageBytes - done,
                        static_cast<off_t>(page * kPageBytes + done));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return ReadResult::kError;  // a short file is an error, never zeros
    done += static_cast<size_t>(n);
  }
  return ReadResult::kData;
}

Status Replica::write_page(PageIndex page, const uint8_t* data) {
  if (medium_ == Medium::kMemory) {
    for (;;) {
      uffdio_copy copy = {};
      copy.dst = reinterpret_cast<uint64_t>(data_map_ + page * kPageBytes);
      copy.src = reinterpret_cast<uint64_t>(data);
      copy.len = kPageBytes;
      if (::ioctl(uffd_.get(), UFFDIO_COPY, &copy) == 0) return Status::Ok();
      if (errno == EEXIST) return Status::Ok();  // filled before; immutable, so the same bytes
      if (errno != EAGAIN) return Status::Errno("E_IO", "fill page of " + path_);
    }
  }
  size_t done = 0;
  while (done < kPageBytes) {
    ssize_t n = ::pwrite(data_.get(), data + done, kPageBytes - done,
                         static_cast<off_t>(page * kPageBytes + done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return Status::Errno("E_IO", "fill page of " + path_);
    done += static_cast<size_t>(n);
  }
  return Status::Ok();
}

Status Replica::fill(PageIndex page, const uint8_t* data, bool* changed) {
  if (changed != nullptr) *changed = false;
  if (page >= pages_) return Status::Error("E_ARGUMENT", "page beyond the end of " + path_);
  if (state(page) != PageState::kAbsent) return Status::Ok();
  Status status = write_page(page, data);
  if (!status.ok()) return status;
  if (set(present_words_, page)) {
    present_.fetch_add(1, std::memory_order_relaxed);
    if (changed != nullptr) *changed = true;
  }
  wake(page);
  return Status::Ok();
}

Status Replica::fill_zero(PageIndex page, uint64_t count) {
  if (page >= pages_ || count > pages_ - page) {
    return Status::Error("E_ARGUMENT", "page beyond the end of " + path_);
  }
  for (; count > 0; page++, count--) {
    if (state(page) != PageState::kAbsent) continue;
    if (set(zero_words_, page)) zero_.fetch_add(1, std::memory_order_relaxed);
    wake(page);
  }
  return Status::Ok();
}

void Replica::wake(PageIndex page) { end_waiters(page, Status::Ok()); }

void Replica::fail_page(PageIndex page, const Status& status) { end_waiters(page, status); }

void Replica::end_waiters(PageIndex page, const Status& status) {
  std::vector<Done> waiters;
  {
    std::lock_guard lock(mutex_);
    auto found = waiters_.find(page);
    if (found == waiters_.end()) return;
    waiters = std::move(found->second);
    waiters_.erase(found);
  }
  for (auto& done : waiters) done(status);
}

void Replica::want(PageIndex page, Done done) {
  if (page >= pages_) {
    done(Status::Error("E_ARGUMENT", "page beyond the end of " + path_));
    return;
  }
  bool ask = false;
  Status failed;
  {
    std::lock_guard lock(mutex_);
    // Tested under the lock: wake() takes it after the bit is set, so no waiter is left behind.
    if (state(page) == PageState::kAbsent) {
      if (failed_.ok()) {
        auto& waiters = waiters_[page];
        ask = waiters.empty();
        waiters.push_back(std::move(done));
      } else {
        failed = failed_;
      }
    }
  }
  if (done) {
    done(failed);
    return;
  }
  if (ask) {
    std::lock_guard lock(fetcher_mutex_);
    if (fetcher_ != nullptr) fetcher_->want(page, Urgency::kFault);
  }
}

void Replica::prefetch(PageIndex page) {
  if (state(page) != PageState::kAbsent || page >= pages_) return;
  std::lock_guard lock(fetcher_mutex_);
  if (fetcher_ != nullptr) fetcher_->want(page, Urgency::kPrefetch);
}

void Replica::set_fetcher(PageFetcher* fetcher) {
  std::lock_guard lock(fetcher_mutex_);
  fetcher_ = fetcher;
  if (fetcher == nullptr) return;
  std::vector<PageIndex> pages;
  {
    std::lock_guard inner(mutex_);
    failed_ = Status::Ok();
    for (auto& entry : waiters_) pages.push_back(entry.first);
  }
  for (PageIndex page : pages) fetcher->want(page, Urgency::kFault);
}

void Replica::fail(const Status& status) {
  std::unordered_map<PageIndex, std::vector<Done>> waiters;
  {
    std::lock_guard lock(mutex_);
    failed_ = status;
    waiters.swap(waiters_);
  }
  for (auto& entry : waiters) {
    for (auto& done : entry.second) done(status);
  }
}

uint64_t Replica::waiting_count() const {
  std::lock_guard lock(mutex_);
  return waiters_.size();
}

Status Replica::open_readonly(Fd* out) const {
  Fd fd(::open(path_.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd.valid()) return Status::Errno("E_IO", "open " + path_);
  *out = std::move(fd);
  return Status::Ok();
}

}  // namespace sf
