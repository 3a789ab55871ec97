#include "blktap/disk.h"

#include <errno.h>
#include <time.h>

#include <algorithm>
#include <cstring>
#include <shared_mutex>

#include "blktap/files.h"
#include "blktap/switch_base.h"

namespace sf {
namespace {

uint64_t now_ns() {
  timespec ts = {};
  ::clock_gettime(CLOCK_MONOTONIC, &ts);
  return static_cast<uint64_t>(ts.tv_sec) * 1000000000u + static_cast<uint64_t>(ts.tv_nsec);
}

}  // namespace

Disk::Disk(NodePtr top, std::shared_ptr<SwitchBase> base)
    : store_(top->store),
      base_(std::move(base)),
      chain_{top->size_bytes, base_, store_->table()},
      node_(std::move(top)),
      index_(pages_of(chain_.size)) {}

Disk::~Disk() {
  user_->leave();
  store_->release_top(node_);
}

std::string Disk::name() const { return "disk on slice " + node_->id; }

Status Disk::Open(NodePtr top, const std::string& spare, const Store::OpenBase& open_base,
                  std::shared_ptr<Disk>* out) {
  const auto store = top->store;
  std::lock_guard build(store->build_mutex);
  Status status = store->open_base_of(top, open_base);
  if (!status.ok()) {
    store->release_top(top);
    return status;
  }
  auto base = std::make_shared<SwitchBase>(top->base);
  std::shared_ptr<Disk> disk(new Disk(std::move(top), std::move(base)));
  status = disk->load(spare);
  if (status.ok()) status = disk->find_root();
  if (!status.ok()) return status;
  disk->base_->add_user(disk->user_);
  *out = std::move(disk);
  return status;
}

Status Disk::load(const std::string& spare) {
  if (node_->parent != nullptr) {
    Status status = store_->build(node_->parent, &below_);
    if (!status.ok()) return status;
    index_ = *below_;
  }
  std::shared_ptr<Slice> slice;
  Status status = Slice::Open(store_->directory(), node_->id, node_->map, chain_.size,
                              store_->file_errors(), &slice);
  if (status.ok() && slice->state() == SliceState::kSpare) {
    status =
        Status::Error("E_CORRUPT", "slice " + node_->id + " is a spare, not the top of a disk");
  }
  if (status.ok()) status = store_->give_slice(node_, slice);
  if (status.ok()) status = load_top(slice);
  if (!status.ok()) return status;
  if (!spare.empty()) {
    std::shared_ptr<Slice> other;
    status = Slice::Open(store_->directory(), spare, 0, chain_.size, store_->file_errors(), &other);
    if (!status.ok()) return status;
    if (other->state() != SliceState::kSpare) {
      status = recover_spare(other);
    } else {
      status = store_->adopt(other, &spare_);
      spare_slice_ = std::move(other);
    }
    if (!status.ok()) return status;
  }
  if (top_->state() != SliceState::kOpen) {
    return Status::Error("E_CORRUPT",
                         "slice " + top_->id() + " is sealed, and nothing is on top of it");
  }
  return Status::Ok();
}

// With build_mutex held. Only a base that fills wants to know.
Status Disk::find_root() {
  NodePtr root = node_;
  {
    std::lock_guard lock(store_->mutex);
    while (root->parent != nullptr) root = root->parent;
  }
  if (root == node_ || !chain_.base->fills()) return Status::Ok();
  return store_->build(root, &root_);
}

Status Disk::load_top(const std::shared_ptr<Slice>& slice) {
  top_ = slice;
  top_number_ = node_->numbers.front();
  return slice->scan([&](PageIndex first, uint64_t count, PageState state) {
    index_.set(first, count, state == PageState::kZero ? SliceIndex::kZero : top_number_);
  });
}

Status Disk::recover_spare(const std::shared_ptr<Slice>& slice) {
  const std::string generation = slice->below_generation();
  if (slice->state() != SliceState::kOpen || slice->below() != top_->id() || generation.empty()) {
    return Status::Error("E_CORRUPT",
                         "spare slice " + slice->id() + " does not fit on slice " + top_->id());
  }
  NodePtr node;
  Status status = store_->adopt(slice, &node);
  if (!status.ok()) return status;
  // Not sealed: it died before that. Its map is whole, in .live or, after a power cut, in .map.
  if (!top_->settled()) unsettled_.push_back(top_);
  below_ = std::make_shared<const SliceIndex>(index_);
  store_->put_on(node, node_, below_);
  node_ = std::move(node);
  recovered_ = last_generation_ = generation;
  return load_top(slice);
}

Status Disk::fork(const std::string& generation, bool wait, bool* busy, ForkResult* result) {
  *busy = false;
  const uint64_t start = now_ns();
  if (!is_hex_id(generation)) {
    return Status::Error("E_ARGUMENT", "generation " + generation + " is not 32 hex digits");
  }
  ImagePtr unneeded;  // let go after the gate is open again: that can take a while
  std::unique_lock gate(gate_, std::defer_lock);
  if (wait) {
    gate.lock();
  } else if (!gate.try_lock()) {
    *busy = true;
    return Status::Ok();
  }
  if (closed_) return Status::Error("E_CLOSED", name() + " is closed");
  if (spare_ == nullptr) return Status::Error("E_STATE", name() + " has no spare slice");
  if (generation == last_generation_) {
    return Status::Error("E_EXISTS", name() + " lies on generation " + generation + " already");
  }
  Status status = spare_slice_->activate(top_->id(), generation);
  if (!status.ok()) return status;
  unneeded = std::move(below_);
  below_ = std::make_shared<const SliceIndex>(index_);
  if (chain_.base->fills() && node_->parent == nullptr) root_ = below_;
  store_->put_on(spare_, node_, below_);
  unsettled_.push_back(top_);
  result->slice = top_->id();
  node_ = std::move(spare_);
  top_ = std::move(spare_slice_);
  top_number_ = node_->numbers.front();
  last_generation_ = generation;
  gate.unlock();
  result->duration_ns = now_ns() - start;
  return Status::Ok();
}

Status Disk::attach_spare(const std::string& id) {
  std::shared_ptr<Slice> slice;
  NodePtr node;
  Status status =
      Slice::OpenNewSpare(store_->directory(), id, chain_.size, store_->file_errors(), &slice);
  if (status.ok()) status = store_->adopt(slice, &node);
  if (!status.ok()) return status;
  std::unique_lock gate(gate_);
  if (closed_) return Status::Error("E_CLOSED", name() + " is closed");
  spare_.swap(node);
  spare_slice_.swap(slice);
  gate.unlock();
  return Status::Ok();
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
  user_->leave();
  const Status status = settle();
  ImagePtr unneeded;
  NodePtr spare;
  std::unique_lock gate(gate_);
  unneeded = std::move(below_);
  spare = std::move(spare_);
  gate.unlock();
  store_->release_top(node_);
  return status;
}

Status Disk::last_error() {
  std::lock_guard lock(error_mutex_);
  // Slices are read by many disks: what is wrong with one is told by those that met an error.
  const bool met = stats_.io_errors.load(std::memory_order_relaxed) > 0 ||
                   stats_.no_space_errors.load(std::memory_order_relaxed) > 0;
  if (!last_error_.ok() || !met) return last_error_;
  return store_->file_errors()->last();
}

Disk::Info Disk::info() {
  std::shared_lock gate(gate_);
  Info info;
  info.top = top_->id();
  info.spare = spare_ != nullptr;
  info.index_bytes = index_.bytes();
  std::shared_lock shape(store_->table()->shape());
  info.depth = store_->table()->height(top_number_);
  return info;
}

void Disk::want(PageIndex page, std::function<void(const Status&)> done) {
  stats_.fetched.fetch_add(1, std::memory_order_relaxed);
  chain_.base->want(page, std::move(done));
}

void Disk::missing(uint64_t off, uint64_t len, Access access, std::vector<PageIndex>* out) const {
  ReadGate::Section section(chain_.slices->readers());
  if (!chain_.base->fills()) return;
  std::shared_lock lock(index_lock_);
  chain_missing(chain_, index_, off, len, access, out);
}

Device::Extent Disk::extent(uint64_t off, uint64_t limit) const {
  std::shared_lock gate(gate_);  // guards top_number_
  ReadGate::Section section(chain_.slices->readers());
  std::shared_lock lock(index_lock_);
  std::shared_lock shape(chain_.slices->shape());
  return chain_extent(chain_, index_, chain_.slices->height(top_number_), off, limit);
}

void Disk::cache(uint64_t off, uint64_t len) {
  ReadGate::Section section(chain_.slices->readers());
  std::shared_lock lock(index_lock_);
  chain_cache(chain_, index_, off, len);
}

uint64_t Disk::needs(PageIndex first) const {
  std::shared_lock gate(gate_);
  {
    ReadGate::Section section(chain_.slices->readers());
    if (!chain_.base->fills()) return 0;
  }
  if (root_ != nullptr) return base_mask(*root_, first);
  std::shared_lock lock(index_lock_);
  return base_mask(index_, first);
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
