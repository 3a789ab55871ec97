// Invariants: a page is punched only if every slice that lies on this one has it, durably, so that
// no index leads here for it, after a power cut neither; and no read that looked it up before is
// still under way. No new slice is put on this one: it has no generation.
#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>

#include "blktap/files.h"
#include "blktap/map_file.h"
#include "blktap/merge.h"

namespace sf {

Status Punch::Begin(const std::shared_ptr<Store>& store, const SliceRef& slice,
                    const std::vector<SliceRef>& children, uint64_t size_bytes,
                    std::shared_ptr<Punch>* out) {
  if (children.empty() || size_bytes == 0 || size_bytes > kMaxDiskBytes) {
    return Status::Error("E_ARGUMENT", "slice " + slice.id + ": nothing lies on it, or no size");
  }
  const std::string stem = store->directory() + "/";
  std::shared_ptr<Punch> punch(new Punch(stem + slice.id + ".data", size_bytes));
  // Slices it is not told of would lose pages.
  Status status = store->check_children(slice.id, children);
  if (status.ok()) status = punch->claim_.take(store, {slice}, 1);
  std::shared_ptr<Slice> opened;
  if (status.ok()) {
    status = Slice::OpenSealed(store->directory(), slice.id, slice.map, size_bytes,
                               store->file_errors(), &opened);
  }
  if (status.ok()) {
    status = opened->scan([&](PageIndex first, uint64_t count, PageState state) {
      if (state == PageState::kPresent) punch->covered_.set(first, count, 1);
    });
  }
  for (const auto& child : children) {
    if (!status.ok()) break;
    status = punch->keep_covered(stem + child.id + map_suffix(child.map), child);
  }
  if (status.ok()) {
    status = open_sized(punch->path_, O_RDWR, pages_of(size_bytes) * kPageBytes, &punch->data_);
  }
  if (!status.ok()) return status;
  each_run(punch->covered_, 0, [&](PageIndex first, uint64_t count, SliceIndex::Entry) {
    status = each_data(punch->data_, punch->path_, first * kPageBytes, (first + count) * kPageBytes,
                       [&](uint64_t from, uint64_t to) {
                         punch->total_bytes_ += to - from;
                         return Status::Ok();
                       });
    return status.ok();
  });
  // A reader may have looked a page up before its child had it.
  if (status.ok() && !store->table()->readers().synchronize(std::chrono::seconds(30))) {
    status = Status::Error("E_IN_USE", "reads of the store do not end: its device may be stuck");
  }
  if (status.ok()) *out = std::move(punch);
  return status;
}

Status Punch::keep_covered(const std::string& map_path, const SliceRef& child) {
  DataFile map;
  SliceHeader header = {};
  Status status = open_sized(map_path, O_RDONLY, map_file_bytes(size_bytes_), &map);
  if (status.ok()) {
    status = read_header(map, map_path, child.id, size_bytes_, MapKind::kDurable, &header);
  }
  if (!status.ok()) return status;
  const bool sealed = header.state == static_cast<uint32_t>(SliceState::kSealed);
  SliceIndex has(covered_.pages());
  status = scan_map(map, map_path, size_bytes_, sealed ? &header : nullptr,
                    [&](PageIndex first, uint64_t count, PageState) { has.set(first, count, 1); });
  if (!status.ok()) return status;
  // Of a top: what was just read may be in the page cache only.
  if (!sealed && ::fdatasync(map.fd()) != 0) return file_error("sync " + map_path);
  const SliceIndex before = covered_;
  SliceIndex::Entry here[SliceIndex::kLeafPages];
  each_run(before, 0, [&](PageIndex first, uint64_t count, SliceIndex::Entry) {
    has.get(first, count, here);
    for (uint64_t i = 0; i < count; i++) {
      if (here[i] == SliceIndex::kBase) covered_.set(first + i, 1, SliceIndex::kBase);
    }
    return true;
  });
  return Status::Ok();
}

Status Punch::step(uint64_t most, uint64_t* bytes, bool* done) {
  *bytes = 0;
  *done = false;
  std::lock_guard lock(mutex_);
  if (ended_) return Status::Error("E_STATE", "the punch has ended");
  Status status = Status::Ok();
  cursor_ = each_run(covered_, cursor_, [&](PageIndex first, uint64_t count, SliceIndex::Entry) {
    status =
        each_data(data_, path_, first * kPageBytes, (first + count) * kPageBytes,
                  [&](uint64_t from, uint64_t to) {
                    if (::fallocate(data_.fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                                    static_cast<off_t>(from), static_cast<off_t>(to - from)) != 0) {
                      return file_error("punch a hole into " + path_);
                    }
                    *bytes += to - from;
                    return Status::Ok();
                  });
    return status.ok() && *bytes < most;
  });
  if (!status.ok()) {
    cursor_ = 0;  // from the start: what is a hole already costs little
    return status;
  }
  if (cursor_ < covered_.pages()) return Status::Ok();
  *done = true;
  ended_ = true;
  claim_.release();
  return Status::Ok();
}

void Punch::abort() {
  std::lock_guard lock(mutex_);
  ended_ = true;
  claim_.release();
}

}  // namespace sf
