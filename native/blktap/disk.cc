#include "blktap/disk.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>

#include <algorithm>
#include <cstring>
#include <shared_mutex>

#include "blktap/files.h"

namespace sf {
namespace {

uint64_t now_ns() {
  timespec ts = {};
  ::clock_gettime(CLOCK_MONOTONIC, &ts);
  return static_cast<uint64_t>(ts.tv_sec) * 1000000000u + static_cast<uint64_t>(ts.tv_nsec);
}

const char* state_name(const Slice& slice, bool top) {
  if (top) return "open";
  return slice.settled() ? "sealed" : "settling";
}

}  // namespace

Status Disk::Open(Spec spec, std::shared_ptr<Disk>* out) {
  if (spec.size_bytes == 0 || spec.size_bytes % kPageBytes != 0 ||
      spec.size_bytes > kMaxDiskBytes || spec.slices.empty() || spec.base == nullptr) {
    return Status::Error("E_ARGUMENT", "disk " + spec.directory + ": bad size or chain");
  }
  std::shared_ptr<Disk> disk(new Disk(spec.size_bytes / kPageBytes));
  disk->directory_ = spec.directory;
  disk->chain_.size = spec.size_bytes;
  disk->chain_.base = spec.base;
  const std::string lock_path = spec.directory + "/disk.lock";
  disk->lock_ = Fd(::open(lock_path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  if (!disk->lock_.valid()) return file_error("open " + lock_path);
  if (::flock(disk->lock_.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno != EWOULDBLOCK) return file_error("lock " + lock_path);
    return Status::Error("E_IN_USE", "disk " + spec.directory + " is open already");
  }
  Status status = disk->load(spec);
  if (!status.ok()) return status;
  *out = std::move(disk);
  return Status::Ok();
}

Status Disk::load(const Spec& spec) {
  auto corrupt = [&](const Slice& slice, const char* what) {
    return Status::Error("E_CORRUPT", "slice " + slice.id() + " of " + directory_ + " " + what);
  };
  for (size_t i = 0; i < spec.slices.size(); i++) {
    const bool top = i + 1 == spec.slices.size();
    std::shared_ptr<Slice> slice;
    Status status = Slice::Open(directory_, spec.slices[i].id, chain_.size, &slice, file_errors_);
    if (!status.ok()) return status;
    // disk.json names a slice as sealed only after it was settled.
    if (top ? slice->state() == SliceState::kSpare : !slice->settled()) {
      return corrupt(*slice, "is in a state that does not fit its place in the chain");
    }
    if (i > 0 && (slice->below() != spec.slices[i - 1].id ||
                  slice->below_generation() != spec.slices[i - 1].generation)) {
      return corrupt(*slice, "was not made on the slice below it");
    }
    status = load_slice(slice);
    if (!status.ok()) return status;
    if (!top && spec.slices[i].keep) {
      views_[spec.slices[i].generation] = std::make_shared<View>(chain_, index_);
    }
  }
  if (!spec.spare.empty()) {
    Status status = Slice::Open(directory_, spec.spare, chain_.size, &spare_, file_errors_);
    if (status.ok() && spare_->state() != SliceState::kSpare) status = recover_spare();
    if (!status.ok()) return status;
  }
  if (top_->state() != SliceState::kOpen) {
    return corrupt(*top_, "is sealed, and nothing is on top of it");
  }
  return Status::Ok();
}

Status Disk::load_slice(const std::shared_ptr<Slice>& slice) {
  const SliceIndex::Entry number = chain_.slices->add(slice);
  if (number == 0) return Status::Error("E_CAPACITY", "disk " + directory_ + ": chain too long");
  top_ = slice;
  top_number_ = number;
  return slice->scan([&](PageIndex first, uint64_t count, PageState state) {
    index_.set(first, count, state == PageState::kZero ? SliceIndex::kZero : number);
  });
}

Status Disk::recover_spare() {
  std::shared_ptr<Slice> slice = std::move(spare_);
  const std::string generation = slice->below_generation();
  if (slice->state() != SliceState::kOpen || slice->below() != top_->id() || generation.empty() ||
      views_.contains(generation)) {
    return Status::Error("E_CORRUPT", "spare slice " + slice->id() + " of " + directory_ +
                                          " does not fit on the chain");
  }
  // Not sealed: it died before that. Its map is whole, in .live or, after a power cut, in .map.
  if (!top_->settled()) unsettled_.push_back(top_);
  views_[generation] = std::make_shared<View>(chain_, index_);
  recovered_ = generation;
  return load_slice(slice);
}

bool Disk::has_spare() {
  std::shared_lock gate(gate_);
  return spare_ != nullptr;
}

Status Disk::fork(const std::string& generation, bool wait, bool* busy, ForkResult* result) {
  *busy = false;
  const uint64_t start = now_ns();
  std::unique_lock gate(gate_, std::defer_lock);
  if (wait) {
    gate.lock();
  } else if (!gate.try_lock()) {
    *busy = true;
    return Status::Ok();
  }
  if (closed_) return Status::Error("E_CLOSED", "disk " + directory_ + " is closed");
  if (spare_ == nullptr) {
    return Status::Error("E_STATE", "disk " + directory_ + " has no spare slice");
  }
  if (views_.contains(generation)) {
    return Status::Error("E_EXISTS", "disk " + directory_ + " has generation " + generation);
  }
  if (chain_.slices->size() >= SliceTable::kCapacity) {
    return Status::Error("E_CAPACITY", "disk " + directory_ + ": chain too long");
  }
  Status status = spare_->activate(top_->id(), generation);
  if (!status.ok()) return status;
  views_[generation] = std::make_shared<View>(chain_, index_);
  unsettled_.push_back(top_);
  result->slice = top_->id();
  top_ = std::move(spare_);
  top_number_ = chain_.slices->add(top_);
  result->duration_ns = now_ns() - start;
  return Status::Ok();
}

Status Disk::attach_spare(const std::string& id) {
  std::shared_ptr<Slice> slice;
  Status status = Slice::Open(directory_, id, chain_.size, &slice, file_errors_);
  if (!status.ok()) return status;
  if (slice->state() != SliceState::kSpare) {
    return Status::Error("E_STATE", "slice " + id + " is not a spare");
  }
  std::unique_lock gate(gate_);
  if (closed_) return Status::Error("E_CLOSED", "disk " + directory_ + " is closed");
  spare_ = std::move(slice);
  return Status::Ok();
}

std::shared_ptr<View> Disk::view(const std::string& generation) {
  std::shared_lock gate(gate_);
  auto found = views_.find(generation);
  return found == views_.end() ? nullptr : found->second;
}

void Disk::drop_view(const std::string& generation) {
  std::shared_ptr<View> dropped;  // its nodes are freed after the gate is open again
  std::unique_lock gate(gate_);
  auto found = views_.find(generation);
  if (found == views_.end()) return;
  dropped = std::move(found->second);
  views_.erase(found);
  gate.unlock();
}

Status Disk::settle() {
  std::lock_guard lock(flush_mutex_);
  std::vector<std::shared_ptr<Slice>> below;
  std::shared_ptr<Slice> top;
  {
    std::shared_lock gate(gate_);
    below = unsettled_;
    top = top_;
  }
  Status status = Status::Ok();
  for (const auto& slice : below) {
    if (status.ok()) status = slice->persist();
  }
  if (status.ok()) status = top->persist();
  for (const auto& slice : below) {
    if (status.ok()) status = slice->seal();
  }
  if (!status.ok()) {
    std::lock_guard error(error_mutex_);
    last_error_ = status;
    return status;
  }
  if (below.empty()) return Status::Ok();
  std::unique_lock gate(gate_);
  std::erase_if(unsettled_, [](const auto& slice) { return slice->settled(); });
  return Status::Ok();
}

int Disk::flush() {
  stats_.flushes.fetch_add(1, std::memory_order_relaxed);
  const Status status = settle();
  if (status.ok()) return 0;
  return count_error(status.code == "E_NO_SPACE" ? ENOSPC : EIO);
}

Status Disk::close() {
  {
    std::unique_lock gate(gate_);
    if (closed_) return Status::Ok();
    closed_ = true;
  }
  const Status status = settle();
  std::unique_lock gate(gate_);
  views_.clear();
  lock_.reset();
  return status;
}

Status Disk::last_error() {
  std::lock_guard lock(error_mutex_);
  return last_error_.ok() ? file_errors_->last() : last_error_;
}

std::vector<Disk::SliceInfo> Disk::slices() {
  std::vector<SliceInfo> out;
  std::shared_lock gate(gate_);
  for (const auto& slice : chain_.slices->all()) {
    out.push_back({slice->id(), state_name(*slice, slice == top_), slice->pages_marked(),
                   slice->allocated_bytes()});
  }
  return out;
}

void Disk::want(PageIndex page, std::function<void(const Status&)> done) {
  stats_.fetched.fetch_add(1, std::memory_order_relaxed);
  chain_.base->want(page, std::move(done));
}

void Disk::missing(uint64_t off, uint64_t len, Access access, std::vector<PageIndex>* out) const {
  if (!chain_.base->fills()) return;
  std::shared_lock lock(index_lock_);
  chain_missing(chain_, index_, off, len, access, out);
}

uint64_t Disk::extent(uint64_t off, uint64_t limit, bool* hole) const {
  std::shared_lock lock(index_lock_);
  return chain_extent(chain_, index_, off, limit, hole);
}

int Disk::count_error(int error) {
  if (error == ENOSPC || error == EDQUOT) {
    stats_.no_space_errors.fetch_add(1, std::memory_order_relaxed);
    return ENOSPC;
  }
  if (error != 0 && error != EAGAIN && error != ENODATA) {
    stats_.io_errors.fetch_add(1, std::memory_order_relaxed);
  }
  return error;
}

}  // namespace sf
