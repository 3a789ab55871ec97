#include "pagestore/replica.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/file.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "pagestore/replica_map.h"

namespace sf {
namespace {

constexpr uint64_t kWordPages = 64;

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
  r->map_bytes_ = kPageBytes + (medium == Medium::kDisk ? 4 : 2) * bits;
  struct stat st = {};
  if (::fstat(r->map_.get(), &st) != 0) return Status::Errno("E_IO", "stat " + map_path);
  bool fresh = st.st_size == 0;
  if (fresh) {
    if (::ftruncate(r->map_.get(), static_cast<off_t>(r->map_bytes_)) != 0) {
      return Status::Errno("E_IO", "size " + map_path);
    }
  } else if (static_cast<size_t>(st.st_size) != r->map_bytes_) {
    return Status::Error("E_REPLICA_MISMATCH", "replica " + path + " has another size");
  }
  void* map = ::mmap(nullptr, r->map_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, r->map_.get(), 0);
  if (map == MAP_FAILED) return Status::Errno("E_IO", "map " + map_path);
  r->map_base_ = static_cast<uint8_t*>(map);
  auto* header = static_cast<MapHeader*>(map);
  // A power cut can leave a file made just before it without its contents. Nothing was synced then.
  constexpr MapHeader kNone = {};
  if (std::memcmp(header, &kNone, sizeof kNone) == 0) {
    std::memset(r->map_base_, 0, r->map_bytes_);
    fresh = true;
  }
  if (fresh) {
    header->pages = pages;
    header->medium = static_cast<uint32_t>(medium);
    std::memcpy(header->generation, generation.c_str(), generation.size() + 1);
    std::memcpy(header->magic, kReplicaMagic,
                sizeof kReplicaMagic);  // last: marks the header as whole
  } else if (std::memcmp(header->magic, kReplicaMagic, sizeof kReplicaMagic) != 0 ||
             header->pages != pages || header->medium != static_cast<uint32_t>(medium) ||
             std::strncmp(header->generation, generation.c_str(), sizeof header->generation) != 0) {
    return Status::Error("E_REPLICA_MISMATCH", "replica " + path + " is of another generation");
  }
  if (::fstat(r->data_.get(), &st) != 0) return Status::Errno("E_IO", "stat " + path);
  const auto bytes = static_cast<off_t>(pages * kPageBytes);
  if (st.st_size > bytes) {
    return Status::Error("E_REPLICA_MISMATCH", "replica " + path + " has another size");
  }
  const bool cut = st.st_size < bytes;
  r->present_words_ = reinterpret_cast<std::atomic<uint64_t>*>(r->map_base_ + kPageBytes);
  r->zero_words_ = reinterpret_cast<std::atomic<uint64_t>*>(r->map_base_ + kPageBytes + bits);
  if (medium == Medium::kDisk) {
    const Status status = r->check_boot();
    if (!status.ok()) return status;
  }
  if (!r->count_bits()) {
    return Status::Error("E_CORRUPT", map_path + " speaks of pages beyond the end");
  }
  // Not made longer: pages that were there would become zeros. A VM that maps it would die.
  if (cut && r->present_ > 0) {
    return Status::Error("E_CORRUPT", "replica " + path + " is shorter than its map says");
  }
  if (cut && ::ftruncate(r->data_.get(), bytes) != 0) return Status::Errno("E_IO", "size " + path);
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

void Replica::unlock() { ::flock(map_.get(), LOCK_UN); }

bool Replica::count_bits() {
  for (size_t i = 0; i < (pages_ + kWordPages - 1) / kWordPages; i++) {
    const uint64_t present = present_words_[i].load();
    const uint64_t zero = zero_words_[i].load();
    const uint64_t left = pages_ - i * kWordPages;
    if (left < kWordPages && ((present | zero) >> left) != 0) return false;
    present_ += static_cast<uint64_t>(std::popcount(present));
    zero_ += static_cast<uint64_t>(std::popcount(zero & ~present));  // as state() has it
  }
  complete_ = all_known();
  return true;
}

// A page can be both if it was filled while it was told to be zero, hence not by the counts alone.
bool Replica::all_known() const {
  if (present_ + zero_ < pages_) return false;
  for (PageIndex first = 0; first < pages_; first += kWordPages) {
    if (absent_mask(first) != 0) return false;
  }
  return true;
}

void Replica::check_complete() {
  if (present_ + zero_ < pages_ || complete() || !all_known()) return;
  std::lock_guard lock(complete_mutex_);
  if (complete_.exchange(true) || on_complete_ == nullptr) return;
  std::exchange(on_complete_, nullptr)();
}

void Replica::on_complete(std::function<void()> done) {
  std::lock_guard lock(complete_mutex_);
  on_complete_ = std::move(done);
  if (complete() && on_complete_ != nullptr) std::exchange(on_complete_, nullptr)();
}

uint64_t Replica::absent_mask(PageIndex first) const {
  if (first >= pages_) return 0;
  const size_t word = first / kWordPages;
  const uint64_t known = present_words_[word].load(std::memory_order_acquire) |
                         zero_words_[word].load(std::memory_order_acquire);
  const uint64_t left = pages_ - first;
  return ~known & (left >= kWordPages ? ~uint64_t{0} : (uint64_t{1} << left) - 1);
}

bool Replica::absent_runs(bool needed_only, size_t max_runs, std::vector<Run>* out) const {
  out->clear();
  if (complete()) return true;
  for (PageIndex first = 0; first < pages_; first += kWordPages) {
    uint64_t mask = absent_mask(first);
    if (mask != 0 && needed_only) mask &= needed_mask(first);
    while (mask != 0) {
      const auto start = static_cast<unsigned>(std::countr_zero(mask));
      const auto length = static_cast<unsigned>(std::countr_one(mask >> start));
      mask &= length + start == kWordPages ? 0 : ~uint64_t{0} << (start + length);
      const PageIndex page = first + start;
      if (!out->empty() && out->back().first + out->back().count == page) {
        out->back().count += length;
        continue;
      }
      if (out->size() == max_runs) return false;
      out->push_back({page, length});
    }
  }
  return true;
}

void Replica::add_user(std::weak_ptr<const PageUser> user) {
  std::lock_guard lock(users_mutex_);
  std::erase_if(users_, [](const auto& other) { return other.expired(); });
  users_.push_back(std::move(user));
  users_version_.fetch_add(1, std::memory_order_acq_rel);
}

void Replica::need_all(bool all) {
  if (need_all_.exchange(all) == all || !all) return;
  users_version_.fetch_add(1, std::memory_order_acq_rel);
}

uint64_t Replica::needed_mask(PageIndex first) const {
  if (need_all_) return ~uint64_t{0};
  std::vector<std::shared_ptr<const PageUser>> users;
  {
    std::lock_guard lock(users_mutex_);
    for (const auto& user : users_) {
      if (auto here = user.lock()) users.push_back(std::move(here));
    }
  }
  if (users.empty()) return ~uint64_t{0};
  uint64_t mask = 0;
  for (const auto& user : users) {
    mask |= user->needs(first);
    if (mask == ~uint64_t{0}) break;
  }
  return mask;
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
  check_complete();
  return Status::Ok();
}

// All or, perhaps, only some of them: false.
bool Replica::write_run(PageIndex first, uint64_t count, const uint8_t* data) {
  const size_t bytes = count * kPageBytes;
  if (medium_ == Medium::kMemory) {
    uffdio_copy copy = {};
    copy.dst = reinterpret_cast<uint64_t>(data_map_ + first * kPageBytes);
    copy.src = reinterpret_cast<uint64_t>(data);
    copy.len = bytes;
    return ::ioctl(uffd_.get(), UFFDIO_COPY, &copy) == 0;
  }
  const auto at = static_cast<off_t>(first * kPageBytes);
  return ::pwrite(data_.get(), data, bytes, at) == static_cast<ssize_t>(bytes);
}

Status Replica::fill(PageIndex first, uint64_t count, const uint8_t* data) {
  if (first >= pages_ || count > pages_ - first) {
    return Status::Error("E_ARGUMENT", "page beyond the end of " + path_);
  }
  bool absent = true;
  for (PageIndex page = first; page < first + count; page++) {
    absent = absent && state(page) == PageState::kAbsent;
  }
  if (!absent || !write_run(first, count, data)) {
    for (uint64_t i = 0; i < count; i++) {
      Status status = fill(first + i, data + i * kPageBytes);
      if (!status.ok()) return status;
    }
    return Status::Ok();
  }
  uint64_t fresh = 0;
  for (PageIndex page = first; page < first + count; page++) {
    fresh += set(present_words_, page) ? 1 : 0;
  }
  present_.fetch_add(fresh, std::memory_order_relaxed);
  wake(first, count);
  check_complete();
  return Status::Ok();
}

Status Replica::fill_zero(PageIndex page, uint64_t count) {
  if (page >= pages_ || count > pages_ - page) {
    return Status::Error("E_ARGUMENT", "page beyond the end of " + path_);
  }
  uint64_t fresh = 0;
  for (PageIndex at = page; at < page + count;) {
    const uint64_t bits = std::min<uint64_t>(page + count - at, kWordPages - at % kWordPages);
    const uint64_t mask = (bits == kWordPages ? ~uint64_t{0} : (uint64_t{1} << bits) - 1)
                          << (at % kWordPages);
    std::atomic<uint64_t>& word = zero_words_[at / kWordPages];
    const uint64_t absent = mask & ~present_words_[at / kWordPages].load(std::memory_order_acquire);
    if ((absent & ~word.load(std::memory_order_acquire)) != 0) {
      const uint64_t before = word.fetch_or(absent, std::memory_order_acq_rel);
      fresh += static_cast<uint64_t>(std::popcount(absent & ~before));
    }
    at += bits;
  }
  if (fresh == 0) return Status::Ok();
  zero_.fetch_add(fresh, std::memory_order_relaxed);
  wake(page, count);
  check_complete();
  return Status::Ok();
}

void Replica::wake(PageIndex first, uint64_t count) {
  if (count > 1) {
    // Whoever comes later sees the page: see enlist().
    std::lock_guard lock(mutex_);
    if (waiters_.empty()) return;
  }
  for (PageIndex page = first; page < first + count; page++) end_waiters(page, Status::Ok());
}

void Replica::fail_page(PageIndex page, const Status& status) { end_waiters(page, status); }

void Replica::end_waiters(PageIndex page, const Status& status) {
  std::vector<Done> waiters;
  {
    std::lock_guard lock(mutex_);
    auto found = waiters_.find(page);
    if (found == waiters_.end()) return;
    if (found->second.urgent) urgent_--;
    waiters = std::move(found->second.done);
    waiters_.erase(found);
  }
  for (auto& done : waiters) done(status);
}

bool Replica::enlist(PageIndex page, Done* done, Status* status) {
  if (page >= pages_) {
    *status = Status::Error("E_ARGUMENT", "page beyond the end of " + path_);
    return false;
  }
  std::lock_guard lock(mutex_);
  // Tested under the lock: wake() takes it after the bit is set, so no waiter is left behind.
  if (state(page) != PageState::kAbsent) return false;
  if (!failed_.ok()) {
    *status = failed_;
    return false;
  }
  auto& waiters = waiters_[page];
  waiters.done.push_back(std::exchange(*done, nullptr));
  // One that is prefetched is asked for again: now somebody waits.
  if (std::exchange(waiters.urgent, true)) return false;
  urgent_++;
  return true;
}

void Replica::want(PageIndex page, Done done) {
  Status status;
  const bool ask = enlist(page, &done, &status);
  if (done) return done(status);
  if (!ask) return;
  std::lock_guard lock(fetcher_mutex_);
  if (fetcher_ != nullptr) fetcher_->want(page, Urgency::kFault);
}

Status Replica::fetch(PageIndex page) {
  struct Wait {
    std::atomic<uint32_t> waits{1};
    std::mutex mutex;
    std::condition_variable changed;
    Status status;
  };
  auto wait = std::make_shared<Wait>();
  Done done = [wait](const Status& status) {
    std::lock_guard lock(wait->mutex);
    wait->status = status;
    wait->waits.store(0);
    wait->changed.notify_one();
  };
  Status status;
  const bool ask = enlist(page, &done, &status);
  if (done) return status;
  lend({&page, ask ? size_t{1} : 0}, {wait->waits});
  std::unique_lock lock(wait->mutex);
  wait->changed.wait(lock, [&] { return wait->waits.load() == 0; });
  return wait->status;
}

bool Replica::fetch(std::span<const PageIndex> pages, const PageDone& done,
                    const Lending& lending) {
  std::vector<PageIndex> ask;
  for (PageIndex page : pages) {
    Done each = [page, done](const Status& status) { done(page, status); };
    Status status;
    if (enlist(page, &each, &status)) ask.push_back(page);
    if (each) each(status);
  }
  return lend(ask, lending);
}

bool Replica::lend(std::span<const PageIndex> ask, const Lending& lending) {
  PageFetcher* fetcher;
  {
    std::lock_guard lock(fetcher_mutex_);
    fetcher = fetcher_;
    if (fetcher != nullptr) lent_++;
  }
  if (fetcher == nullptr) return lending.waits.load() == 0;
  const bool lent = fetcher->fetch(ask, lending);
  std::lock_guard lock(fetcher_mutex_);
  if (--lent_ == 0) returned_.notify_all();
  return lent;
}

void Replica::prefetch(PageIndex page) {
  if (state(page) != PageState::kAbsent || page >= pages_) return;
  std::lock_guard lock(fetcher_mutex_);
  if (fetcher_ != nullptr) fetcher_->want(page, Urgency::kPrefetch);
}

Status Replica::prefetch(PageIndex first, uint64_t count, const PageDone& done, uint64_t* asked) {
  *asked = 0;
  if (first > pages_ || count > pages_ - first) {
    return Status::Error("E_ARGUMENT", "page beyond the end of " + path_);
  }
  std::vector<std::pair<PageIndex, uint64_t>> runs;
  {
    std::lock_guard lock(mutex_);
    if (!failed_.ok()) return failed_;
    for (PageIndex page = first; page < first + count; page++) {
      if (state(page) != PageState::kAbsent) continue;
      auto& waiters = waiters_[page];
      const bool new_here = waiters.done.empty();
      waiters.done.push_back([page, done](const Status& status) { done(page, status); });
      ++*asked;
      if (!new_here) continue;
      if (!runs.empty() && runs.back().first + runs.back().second == page) {
        runs.back().second++;
      } else {
        runs.emplace_back(page, 1);
      }
    }
  }
  std::lock_guard lock(fetcher_mutex_);
  if (fetcher_ == nullptr) return Status::Ok();
  for (const auto& [page, pages] : runs) {
    if (fetcher_->prefetch(page, pages)) continue;
    for (uint64_t i = 0; i < pages; i++) fetcher_->want(page + i, Urgency::kPrefetch);
  }
  return Status::Ok();
}

bool Replica::subscribe(bool on) {
  std::lock_guard lock(fetcher_mutex_);
  return fetcher_ != nullptr && fetcher_->subscribe(on);
}

bool Replica::subscribed() const {
  std::lock_guard lock(fetcher_mutex_);
  return fetcher_ != nullptr && fetcher_->subscribed();
}

void Replica::set_fetcher(PageFetcher* fetcher) {
  std::unique_lock lock(fetcher_mutex_);
  const bool other = std::exchange(fetcher_, fetcher) != fetcher;
  if (other) returned_.wait(lock, [this] { return lent_ == 0; });
  if (fetcher == nullptr) return;
  std::vector<std::pair<PageIndex, Urgency>> pages;
  {
    std::lock_guard inner(mutex_);
    failed_ = Status::Ok();
    for (auto& entry : waiters_) {
      pages.emplace_back(entry.first, entry.second.urgent ? Urgency::kFault : Urgency::kPrefetch);
    }
  }
  for (const auto& [page, urgency] : pages) fetcher->want(page, urgency);
}

void Replica::fail(const Status& status) {
  std::unordered_map<PageIndex, Waiters> waiters;
  {
    std::lock_guard lock(mutex_);
    failed_ = status;
    waiters.swap(waiters_);
    urgent_ = 0;
  }
  for (auto& entry : waiters) {
    for (auto& done : entry.second.done) done(status);
  }
}

uint64_t Replica::waiting_count() const {
  std::lock_guard lock(mutex_);
  return urgent_;
}

Status Replica::open_readonly(Fd* out) const {
  Fd fd(::open(path_.c_str(), O_RDONLY | O_CLOEXEC));
  if (!fd.valid()) return Status::Errno("E_IO", "open " + path_);
  *out = std::move(fd);
  return Status::Ok();
}

}  // namespace sf
