#include "blktap/disk_pull.h"

#include <errno.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <shared_mutex>

#include "blktap/files.h"
#include "blktap/switch_base.h"

namespace sf {
namespace {

constexpr size_t kMaxWanted = 256;
constexpr auto kWait = std::chrono::milliseconds(200);
constexpr auto kReadersLimit = std::chrono::seconds(30);

NodePtr top_of(RwLock& gate, const NodePtr& node) {
  std::shared_lock lock(gate);
  return node;
}

}  // namespace

Pull::Pull(std::shared_ptr<Disk> disk)
    : disk_(std::move(disk)), top_(top_of(disk_->gate_, disk_->node_)) {
  std::shared_lock lock(disk_->index_lock_);
  const SliceIndex index = disk_->index_;
  const auto own = disk_->top_number_;
  lock.unlock();
  // An estimate: the base is not looked at page by page.
  uint64_t in_slices = 0;
  each_run(index, 0, [&](PageIndex, uint64_t count, SliceIndex::Entry entry) {
    if (entry != own && entry != SliceIndex::kZero) total_bytes_ += count * kPageBytes;
    in_slices += count;
    return true;
  });
  ReadGate::Section section(disk_->chain_.slices->readers());
  if (!disk_->chain_.base->all_zero()) {
    total_bytes_ += (index.pages() - in_slices) * kPageBytes;
  }
}

bool Pull::forked() const {
  std::shared_lock gate(disk_->gate_);
  return disk_->node_ != top_;
}

bool Pull::needed(const Stretch& stretch, PageIndex page) const {
  const auto entry = stretch.entry(page);
  if (entry == SliceIndex::kZero || entry == disk_->top_number_) return false;
  if (entry != SliceIndex::kBase) return true;
  bool zero = false;
  disk_->chain_.base->extent(page * kPageBytes, kPageBytes, &zero);
  return !zero;
}

Status Pull::step(uint64_t most, uint64_t* bytes, bool* done) {
  *bytes = 0;
  *done = false;
  std::lock_guard lock(mutex_);
  if (ended_) return Status::Error("E_STATE", "the pull has ended");
  const PageIndex pages = pages_of(disk_->size());
  // A share of the bytes also for looking: a step over an empty disk ends, too.
  uint64_t looked = 0;
  while (cursor_ < pages && *bytes < most && looked < 64 * most) {
    if (forked()) {
      *done = true;
      return Status::Ok();
    }
    // Nothing over nothing is passed by at once.
    const uint64_t untouched = disk_->untouched_run(cursor_);
    if (untouched > 0) {
      cursor_ += std::min(untouched, pages - cursor_);
      continue;
    }
    Stretch stretch;
    stretch.cover(cursor_ * kPageBytes, (pages - cursor_) * kPageBytes);
    bool absent = false;
    Status status = pull_stretch(&stretch, bytes, &absent);
    if (!status.ok()) return status;
    if (absent) return wait_for(stretch);
    looked += stretch.count * kPageBytes;
    cursor_ += stretch.count;
  }
  copied_ = cursor_ >= pages;
  *done = copied_;
  return Status::Ok();
}

Status Pull::pull_stretch(Stretch* stretch, uint64_t* bytes, bool* absent) {
  Disk& disk = *disk_;
  std::shared_lock gate(disk.gate_);
  if (disk.closed_) return Status::Error("E_CLOSED", "the disk is closed");
  if (disk.node_ != top_) return Status::Ok();  // step() sees it next time
  std::lock_guard page_lock(disk.page_lock(stretch->first));
  ReadGate::Section section(disk.chain_.slices->readers());
  disk.lookup(stretch);
  const PageIndex end = stretch->first + stretch->count;
  for (PageIndex page = stretch->first; page < end;) {
    if (!needed(*stretch, page)) {
      page++;
      continue;
    }
    if (stretch->entry(page) == SliceIndex::kBase && disk.chain_.base->absent(page)) {
      *absent = true;
      return Status::Ok();
    }
    PageIndex next = page + 1;
    while (next < end && needed(*stretch, next) &&
           !(stretch->entry(next) == SliceIndex::kBase && disk.chain_.base->absent(next))) {
      next++;
    }
    const int error = copy_run(*stretch, page, next - page);
    if (error != 0) {
      disk.count_error(error);
      return file_error("copy pages into slice " + disk.top_->id(), error);
    }
    *bytes += (next - page) * kPageBytes;
    page = next;
  }
  return Status::Ok();
}

// As Disk::write_stretch() of whole pages: bytes, then states, then the index.
int Pull::copy_run(const Stretch& stretch, PageIndex first, uint64_t count) {
  Disk& disk = *disk_;
  std::vector<uint8_t> buffer(count * kPageBytes);
  bool zero = true;
  const uint64_t off = first * kPageBytes;
  const uint64_t inside = std::min<uint64_t>(buffer.size(), disk.size() - off);
  int error =
      read_stretch(disk.chain_, stretch, off, inside, buffer.data(), ReadMode::kBlock, &zero);
  for (PageIndex at = 0; at < count && error == 0;) {
    auto is_zero = [&](PageIndex page) { return is_zero_page(&buffer[page * kPageBytes]); };
    const bool zeros = is_zero(at);
    PageIndex next = at + 1;
    while (next < count && is_zero(next) == zeros) next++;
    if (!zeros) {
      error = disk.top_->data().write((first + at) * kPageBytes, &buffer[at * kPageBytes],
                                      (next - at) * kPageBytes);
    }
    if (error == 0) {
      error = disk.mark(first + at, next - at, zeros ? PageState::kZero : PageState::kPresent);
    }
    if (error != 0 && !zeros) disk.top_->punch(first + at, next - at);
    at = next;
  }
  return error;
}

Status Pull::wait_for(const Stretch& stretch) {
  // The stretch and what comes after it, as far as it is absent too.
  std::vector<PageIndex> missing;
  const uint64_t from = stretch.first * kPageBytes;
  const uint64_t len = std::min<uint64_t>(kMaxWanted * kPageBytes, disk_->size() - from);
  disk_->missing(from, len, Device::Access::kRead, &missing);
  std::vector<PageIndex> ask;
  std::unique_lock lock(arrivals_->mutex);
  for (PageIndex page : missing) {
    if (arrivals_->wanted.size() >= kMaxWanted) break;
    if (arrivals_->wanted.insert(page).second) ask.push_back(page);
  }
  lock.unlock();
  for (PageIndex page : ask) {
    disk_->want(page, [page, arrivals = arrivals_](const Status& status) {
      std::lock_guard lock(arrivals->mutex);
      arrivals->wanted.erase(page);
      if (!status.ok()) arrivals->failed = status;
      arrivals->changed.notify_all();
    });
  }
  lock.lock();
  const size_t before = arrivals_->wanted.size();
  if (before > 0 && arrivals_->failed.ok()) {
    arrivals_->changed.wait_for(
        lock, kWait, [&] { return arrivals_->wanted.empty() || !arrivals_->failed.ok(); });
  }
  return std::exchange(arrivals_->failed, Status::Ok());
}

void Pull::end() {
  ended_ = true;
  top_.reset();
  disk_.reset();
}

void Pull::abort() {
  std::lock_guard lock(mutex_);
  end();  // what was copied is the disk's own now, and stays
}

Status Pull::detach(bool* forked) {
  *forked = false;
  std::lock_guard lock(mutex_);
  if (ended_) return Status::Error("E_STATE", "the pull has ended");
  if (this->forked()) {
    *forked = true;
    end();
    return Status::Ok();
  }
  if (!copied_) return Status::Error("E_STATE", "a disk is cut loose after the pull's last step");
  Status status = disk_->settle();
  if (!status.ok()) return status;
  Disk& disk = *disk_;
  const auto store = disk.store_;
  ImagePtr image;
  ImagePtr root;
  NodePtr below;
  std::shared_ptr<Base> base;  // all let go when no read is about to use them
  {
    std::lock_guard build(store->build_mutex);
    std::unique_lock gate(disk.gate_);
    if (disk.closed_) return Status::Error("E_CLOSED", "the disk is closed");
    *forked = disk.node_ != top_;
    if (!*forked) {
      image = std::move(disk.below_);
      root = std::move(disk.root_);
      base = disk.base_->clear();
      disk.last_generation_.clear();
      below = store->cut_loose(top_);
    }
  }
  end();
  if (*forked) return Status::Ok();
  if (!store->table()->readers().synchronize(kReadersLimit)) {
    store->keep_for_readers(std::move(below), std::move(base));
  }
  return Status::Ok();
}

}  // namespace sf
