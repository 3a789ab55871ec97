// States of a merge: claimed -> copying (step) -> copied -> prepared -> applied
//                    any but the last -> aborted
//
// Readers of all generations and disks go on all the time, and writers too. Why no byte they read
// changes. Let L be the run's lower slices (no generation, no reader of their own; Claim sees to
// it), U its last, K the one that stays.
//  1. All readers read through an index made up to U or a slice above it. In such an index a page's
//     entry is the newest slice of the run that has it, if any. So where a slice S != K has the
//     newest copy of page p, nobody reads p in K's file: K has an older copy of p, or none. Copying
//     S's bytes there changes nothing anybody reads.
//  2. A reader may have looked p up long ago, when U was still a disk's top without p, and be about
//     to read p in L. Claim waits until all reads that were under way are over (read_gate.h); ones
//     that begin later look p up again, and U is sealed.
//  3. apply() points the numbers of all slices of the run to K's file. Before that a reader finds p
//     in S's file, after it in K's: the same bytes. S is retired, and its file removed, after the
//     reads under way are over. So nobody pins a retired slice or opens a removed file again.
//  4. An index made meanwhile from the old maps has the old numbers, and both meanings are right.
//     The node of U takes K's name and map, so one made later reads K's new map.
//  5. Slices that others still hold open (a pinned descriptor) lose their name, not their bytes.
// Power cut, or a kill: before the journal names the new map, the old maps and slices are whole, as
// K's new bytes lie where the old maps have nobody look. After it, K's bytes were synced before.
// A copy that K does not need (zeros in the union) is punched out only after apply().
//
// Left out: merging into a disk's top, which changes; sharing bytes where the file system could
// (copy_file_range does by itself on XFS and Btrfs).
#include "blktap/merge.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>

#include "blktap/files.h"
#include "blktap/map_file.h"
#include "blktap/view.h"

namespace sf {
namespace {

constexpr auto kReadersLimit = std::chrono::seconds(30);

int punch(const DataFile& file, PageIndex first, uint64_t count) {
  const int done =
      ::fallocate(file.fd(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                  static_cast<off_t>(first * kPageBytes), static_cast<off_t>(count * kPageBytes));
  return done == 0 || errno == EOPNOTSUPP ? 0 : errno;
}

int copy_plainly(FileRef from, const DataFile& to, uint64_t off, uint64_t len) {
  std::vector<uint8_t> buffer(64 * 1024);
  while (len > 0) {
    const size_t n = std::min<uint64_t>(len, buffer.size());
    int error = from.read(off, n, buffer.data(), ReadMode::kBlock);
    if (error == 0) error = to.write(off, buffer.data(), n);
    if (error != 0) return error;
    off += n;
    len -= n;
  }
  return 0;
}

int copy_range(FileRef from, const DataFile& to, uint64_t off, uint64_t len) {
  while (len > 0) {
    auto in = static_cast<loff_t>(off);
    auto out = in;
    const ssize_t n = ::copy_file_range(from.fd, &in, to.fd(), &out, len, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && (errno == EXDEV || errno == EINVAL || errno == EOPNOTSUPP || errno == ENOSYS)) {
      return copy_plainly(from, to, off, len);
    }
    if (n < 0) return errno;
    if (n == 0) return copy_plainly(from, to, off, len);  // EIO if the file ends here
    off += static_cast<uint64_t>(n);
    len -= static_cast<uint64_t>(n);
  }
  return 0;
}

}  // namespace

Merge::Merge(std::shared_ptr<Store> store, std::vector<SliceRef> run, uint64_t size_bytes)
    : store_(std::move(store)),
      run_(std::move(run)),
      size_bytes_(size_bytes),
      union_(pages_of(size_bytes)) {}

std::string Merge::path_of(const SliceRef& slice, const std::string& suffix) const {
  return store_->directory() + "/" + slice.id + suffix;
}

Status Merge::Begin(const std::shared_ptr<Store>& store, std::vector<SliceRef> run,
                    uint64_t size_bytes, std::shared_ptr<Merge>* out) {
  if (run.size() < 2 || run.size() > SliceIndex::kMaxSlice || size_bytes == 0 ||
      size_bytes > kMaxDiskBytes) {
    return Status::Error("E_ARGUMENT", "a merge needs two slices or more, and their size");
  }
  std::shared_ptr<Merge> merge(new Merge(store, std::move(run), size_bytes));
  Status status = merge->claim_.take(store, merge->run_, merge->run_.size() - 1);
  if (status.ok()) {
    {
      std::lock_guard lock(store->mutex);
      store->merges_.push_back(merge.get());
    }
    status = merge->load();
  }
  if (!status.ok()) {
    merge->abort();
    return status;
  }
  *out = std::move(merge);
  return Status::Ok();
}

Status Merge::load() {
  for (size_t i = 0; i < run_.size(); i++) {
    std::shared_ptr<Slice> slice;
    Status status = Slice::OpenSealed(store_->directory(), run_[i].id, run_[i].map, size_bytes_,
                                      store_->file_errors(), &slice);
    if (!status.ok()) return status;
    const auto number = static_cast<SliceIndex::Entry>(i + 1);
    status = slice->scan([&](PageIndex first, uint64_t count, PageState state) {
      union_.set(first, count, state == PageState::kZero ? SliceIndex::kZero : number);
    });
    if (!status.ok()) return status;
    slices_.push_back(std::move(slice));
  }
  std::vector<uint64_t> pages(run_.size(), 0);
  uint64_t all = 0;
  each_run(union_, 0, [&](PageIndex, uint64_t count, SliceIndex::Entry entry) {
    if (entry == SliceIndex::kZero) return true;
    pages[entry - 1] += count;
    all += count;
    return true;
  });
  keep_ = static_cast<size_t>(std::max_element(pages.begin(), pages.end()) - pages.begin());
  total_bytes_ = (all - pages[keep_]) * kPageBytes;
  return open_sized(path_of(keep(), ".data"), O_RDWR, pages_of(size_bytes_) * kPageBytes,
                    &keep_data_);
}

Status Merge::copy(size_t from, PageIndex first, uint64_t count) {
  CachedFile::Pin pin;
  int error = slices_[from]->pages().pin(ReadMode::kBlock, &pin);
  if (error == 0) {
    error = copy_range(pin.ref(), keep_data_, first * kPageBytes, count * kPageBytes);
  }
  if (error == 0) return Status::Ok();
  return file_error("copy pages from slice " + run_[from].id + " to slice " + keep().id, error);
}

Status Merge::step(uint64_t most, uint64_t* bytes, bool* done) {
  *bytes = 0;
  *done = false;
  std::lock_guard lock(mutex_);
  if (ended_) return Status::Error("E_STATE", "the merge has ended");
  Status status = Status::Ok();
  bool more = false;
  each_run(union_, cursor_, [&](PageIndex first, uint64_t count, SliceIndex::Entry entry) {
    cursor_ = first;
    more = *bytes >= most;
    if (more || entry == SliceIndex::kZero || entry == keep_ + 1) return !more;
    status = copy(entry - 1, first, count);
    if (status.ok()) *bytes += count * kPageBytes;
    return status.ok();
  });
  if (!status.ok()) return status;
  copied_ = !more;
  *done = copied_;
  return Status::Ok();
}

Status Merge::write_map(const std::string& path) {
  ::unlink(path.c_str());  // of an attempt that a kill ended; the journal never named it
  Fd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (!fd.valid()) return file_error("create " + path);
  if (::ftruncate(fd.get(), static_cast<off_t>(map_file_bytes(size_bytes_))) != 0) {
    return file_error("size " + path);
  }
  const DataFile file(std::move(fd));
  SliceHeader header = make_header(keep().id, size_bytes_, SliceState::kSealed, MapKind::kDurable);
  std::vector<uint8_t> states(kPageBytes, 0);
  uint64_t block = 0;
  bool any = false;
  int error = 0;
  auto end_block = [&] {
    if (!any) return;
    header.map_crc = add_block(header.map_crc, block, states.data());
    error = file.write(kMapStart + block * kPageBytes, states.data(), kPageBytes);
    std::fill(states.begin(), states.end(), 0);
    any = false;
  };
  each_run(union_, 0, [&](PageIndex first, uint64_t count, SliceIndex::Entry entry) {
    if (first / kPagesPerBlock != block) {  // a leaf, and so a run, lies in one block
      end_block();
      block = first / kPagesPerBlock;
    }
    const unsigned state = entry == SliceIndex::kZero ? 2 : 1;
    for (uint64_t i = first % kPagesPerBlock; count > 0; i++, count--) {
      states[i / kPagesPerByte] |= static_cast<uint8_t>(state << (i % kPagesPerByte * 2));
    }
    any = true;
    return error == 0;
  });
  if (error == 0) end_block();
  seal_header(&header);
  if (error == 0) error = file.write(0, &header, sizeof header);
  if (error != 0) return file_error("write " + path, error);
  if (::fsync(file.fd()) != 0) return file_error("sync " + path);
  return Status::Ok();
}

Status Merge::prepare() {
  std::lock_guard lock(mutex_);
  if (ended_ || !copied_) {
    return Status::Error("E_STATE", "a merge is prepared after its last step");
  }
  if (prepared_) return Status::Ok();
  if (sync_failed_.ok() && ::fdatasync(keep_data_.fd()) != 0) {
    sync_failed_ = file_error("sync " + path_of(keep(), ".data"));
  }
  if (!sync_failed_.ok()) return sync_failed_;  // the kernel may have forgotten what it lost
  const std::string path = path_of(keep(), map_suffix(new_map()));
  Status status = write_map(path);
  if (status.ok()) status = sync_directory(store_->directory());
  if (!status.ok()) {
    ::unlink(path.c_str());
    return status;
  }
  std::lock_guard store_lock(store_->mutex);
  prepared_ = true;
  return Status::Ok();
}

// In memory: U's node becomes the place of all, in K's file. With build_mutex held.
Status Merge::put_in_force(std::vector<std::shared_ptr<Slice>>* dropped) {
  std::vector<NodePtr> nodes(run_.size());  // let go after the lock
  {
    std::lock_guard lock(store_->mutex);
    for (size_t i = 0; i < run_.size(); i++) nodes[i] = store_->find(run_[i].id);
  }
  const NodePtr& last = nodes.back();
  std::shared_ptr<Slice> kept = last == nullptr ? nullptr : nodes[keep_]->slice;
  bool numbered = false;
  for (const auto& node : nodes) {
    if (last != nullptr && node == nullptr) {
      return Status::Error("E_INTERNAL", "slice " + last->id + " is in use, one below it not");
    }
    numbered = numbered || (node != nullptr && !node->numbers.empty());
  }
  if (kept == nullptr && numbered) kept = slices_[keep_];
  NodePtr below;  // a chain that ends here
  std::lock_guard lock(store_->mutex);
  std::erase(store_->merges_, this);
  store_->vanishing_.erase(keep().id);  // under its new edition it may be read from here on
  if (last == nullptr) return Status::Ok();
  std::vector<SliceTable::Number> numbers;
  for (const auto& node : nodes) {
    numbers.insert(numbers.end(), node->numbers.begin(), node->numbers.end());
    node->numbers.clear();
    node->kept.reset();
    if (node->slice != nullptr && node->slice != kept) dropped->push_back(std::move(node->slice));
    node->slice.reset();
    store_->nodes_.erase(node->id);
    node->merged_away = node != last;
  }
  if (kept != nullptr) kept->set_edition(new_map());
  for (auto number : numbers) store_->table_->point(number, kept.get());
  last->numbers = std::move(numbers);
  last->slice = std::move(kept);
  last->id = keep().id;
  last->map = new_map();
  below = std::move(last->parent);
  last->parent = std::move(nodes.front()->parent);
  store_->nodes_[last->id] = {last.get(), last};
  if (auto image = last->image.lock(); image != nullptr && (last->shared || last->children >= 2)) {
    last->kept = std::move(image);
  }
  store_->set_heights();
  return Status::Ok();
}

Status Merge::remove_files() {
  Status result = Status::Ok();
  std::string boot;
  Status known = boot_id(&boot);
  auto remove = [&](const std::string& path) {
    if (::unlink(path.c_str()) != 0 && errno != ENOENT && result.ok()) {
      result = file_error("remove " + path);
    }
  };
  remove(path_of(keep(), map_suffix(keep().map)));
  for (size_t i = 0; i < run_.size(); i++) {
    if (i == keep_) continue;
    if (known.ok()) remove(path_of(run_[i], "." + boot + ".live"));
    remove(path_of(run_[i], map_suffix(run_[i].map)));
    remove(path_of(run_[i], ".data"));
  }
  if (result.ok()) result = sync_directory(store_->directory());
  return result;
}

Status Merge::apply() {
  std::lock_guard lock(mutex_);
  if (ended_ || !prepared_) {
    return Status::Error("E_STATE", "a merge is put in force after it was prepared, once");
  }
  std::vector<std::shared_ptr<Slice>> dropped;
  {
    std::lock_guard build(store_->build_mutex);
    Status status = put_in_force(&dropped);
    if (!status.ok()) return status;  // nothing happened: try again
  }
  ended_ = true;
  claim_.release();
  if (!store_->table()->readers().synchronize(kReadersLimit)) {
    // Somebody may be about to open one of them again: all of it stays.
    store_->bury(std::move(dropped));
    keep_data_ = DataFile();
    slices_.clear();
    return Status::Error("E_IO", "slice " + keep().id + " took the place of others, whose files " +
                                     "stay for now: reads of the store do not end");
  }
  for (const auto& slice : dropped) slice->retire();  // nobody is left to see it
  dropped.clear();
  int error = 0;
  each_run(union_, 0, [&](PageIndex first, uint64_t count, SliceIndex::Entry entry) {
    if (entry == SliceIndex::kZero) error = punch(keep_data_, first, count);
    return error == 0;
  });
  keep_data_ = DataFile();
  slices_.clear();
  Status status = remove_files();
  if (status.ok() && error != 0) status = file_error("punch zeros of slice " + keep().id, error);
  return status;
}

void Merge::abort() { end(true); }

void Merge::leave() { end(false); }

void Merge::end(bool undo) {
  std::lock_guard lock(mutex_);
  if (ended_) return;
  ended_ = true;
  {
    std::lock_guard store_lock(store_->mutex);
    std::erase(store_->merges_, this);
    if (prepared_ && undo) ::unlink(path_of(keep(), map_suffix(new_map())).c_str());
    prepared_ = false;
  }
  if (undo && keep_data_.valid()) give_back();
  keep_data_ = DataFile();
  slices_.clear();
  claim_.release();
}

// Copies at pages where K has nothing of its own. Where it has an older one, that was written over,
// which nobody sees; a hole there would look like damage.
void Merge::give_back() {
  SliceIndex own(pages_of(size_bytes_));
  Status status = slices_[keep_]->scan([&](PageIndex first, uint64_t count, PageState state) {
    if (state == PageState::kPresent) own.set(first, count, 1);
  });
  if (!status.ok()) return;  // a leak, which a check finds
  SliceIndex::Entry mine[SliceIndex::kLeafPages];
  each_run(union_, 0, [&](PageIndex first, uint64_t count, SliceIndex::Entry entry) {
    if (first > cursor_) return false;
    if (entry == SliceIndex::kZero || entry == keep_ + 1) return true;
    own.get(first, count, mine);
    for (uint64_t i = 0, end = 0; i < count; i = end) {
      end = i + 1;
      while (end < count && mine[end] == mine[i]) end++;
      if (mine[i] == SliceIndex::kBase) punch(keep_data_, first + i, end - i);
    }
    return true;
  });
}

}  // namespace sf
