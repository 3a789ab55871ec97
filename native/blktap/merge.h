// Clean-up of slices that no generation names: merging a run of them into one, punching out pages
// that nobody reads. See merge.cc for why readers may go on all the time.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "blktap/slice_index.h"
#include "blktap/store.h"

namespace sf {

// Work done in steps, each on a thread of the pool; one at a time.
class Step {
 public:
  virtual ~Step() = default;
  virtual uint64_t total_bytes() const = 0;
  // Does about `most` bytes of work. After an error it may be called again, or abort().
  virtual Status step(uint64_t most, uint64_t* bytes, bool* done) = 0;
  // Gives back what the steps took, where that is safe. Nothing after it does anything.
  virtual void abort() = 0;
};

// Slices that one clean-up has to itself. No view is opened of the `vanishing` ones meanwhile.
class Claim {
 public:
  ~Claim() { release(); }
  // E_IN_USE if another clean-up has one of them, if a vanishing one is read or is a disk's top;
  // E_STATE if one is not sealed; E_CLOSED. Returns when the last read of a vanishing one is over.
  Status take(const std::shared_ptr<Store>& store, const std::vector<SliceRef>& slices,
              size_t vanishing);
  void release();

 private:
  std::shared_ptr<Store> store_;
  std::vector<SliceRef> slices_;
};

// Merges slices [0] .. [n-1], oldest first, each lying on the one before and the only one on it.
// All are sealed, and only the last may have a generation. One of them stays, whichever needs the
// fewest pages copied, and takes the last one's place.
class Merge final : public Step {
 public:
  static Status Begin(const std::shared_ptr<Store>& store, std::vector<SliceRef> run,
                      uint64_t size_bytes, std::shared_ptr<Merge>* out);
  ~Merge() override { abort(); }

  uint64_t total_bytes() const override { return total_bytes_; }
  Status step(uint64_t most, uint64_t* bytes, bool* done) override;
  void abort() override;
  // After the last step: the pages are durable, the next edition of the map is written. E_STATE.
  Status prepare();
  // Ends it without a trace or an undoing: nobody knows whether the journal names that edition.
  void leave();
  // After the journal names that edition. If removing files fails, all else is done.
  Status apply();

  const SliceRef& last() const { return run_.back(); }
  const SliceRef& keep() const { return run_[keep_]; }
  uint32_t new_map() const { return run_[keep_].map + 1; }
  const std::vector<SliceRef>& run() const { return run_; }
  // With the store's mutex held: that this is what the journal may name already.
  bool prepared_as(const SliceRef& ref) const {
    return prepared_ && ref.id == run_[keep_].id && ref.map == new_map();
  }

 private:
  Merge(std::shared_ptr<Store> store, std::vector<SliceRef> run, uint64_t size_bytes);
  Status load();
  Status copy(size_t from, PageIndex first, uint64_t count);
  Status write_map(const std::string& path);
  Status put_in_force(std::vector<std::shared_ptr<Slice>>* dropped);
  Status remove_files();
  void end(bool undo);
  void give_back();
  std::string path_of(const SliceRef& slice, const std::string& suffix) const;

  const std::shared_ptr<Store> store_;
  const std::vector<SliceRef> run_;
  const uint64_t size_bytes_;
  Claim claim_;
  SliceIndex union_;  // which slice has a page: its position in run_ plus 1
  size_t keep_ = 0;
  DataFile keep_data_;                          // to write to: a descriptor of its own
  std::vector<std::shared_ptr<Slice>> slices_;  // of run_; pinned while pages are copied from them
  uint64_t total_bytes_ = 0;

  std::mutex mutex_;  // one step, or end, at a time
  PageIndex cursor_ = 0;
  bool copied_ = false;
  bool ended_ = false;
  Status sync_failed_;
  bool prepared_ = false;  // also the store's mutex, to change it
};

// Punches pages of `slice`, which has no generation, that every one of `children` covers. Its map
// stays as it is: nobody asks it for these pages. What a child covers is taken from its durable
// map, so that a power cut cannot take the page back from the child.
class Punch final : public Step {
 public:
  static Status Begin(const std::shared_ptr<Store>& store, const SliceRef& slice,
                      const std::vector<SliceRef>& children, uint64_t size_bytes,
                      std::shared_ptr<Punch>* out);
  uint64_t total_bytes() const override { return total_bytes_; }
  Status step(uint64_t most, uint64_t* bytes, bool* done) override;
  void abort() override;

 private:
  Punch(std::string path, uint64_t size_bytes)
      : path_(std::move(path)), size_bytes_(size_bytes), covered_(pages_of(size_bytes)) {}
  Status keep_covered(const std::string& map_path, const SliceRef& child);

  const std::string path_;
  const uint64_t size_bytes_;
  Claim claim_;
  DataFile data_;
  SliceIndex covered_;  // 1: to be punched
  uint64_t total_bytes_ = 0;
  std::mutex mutex_;
  PageIndex cursor_ = 0;
  bool ended_ = false;
};

// Calls `each(first, count, entry)` for runs of pages from `page` on whose entry is not kBase, none
// longer than a leaf, until it returns false; returns the page after the last run it was called
// with, or the number of pages.
template <typename Each>
PageIndex each_run(const SliceIndex& index, PageIndex page, const Each& each) {
  SliceIndex::Entry entries[SliceIndex::kLeafPages];
  while (page < index.pages()) {
    const uint64_t empty = index.base_run(page);
    if (empty > 0) {
      page += empty;
      continue;
    }
    const uint64_t n =
        std::min(SliceIndex::kLeafPages - page % SliceIndex::kLeafPages, index.pages() - page);
    index.get(page, n, entries);
    for (uint64_t i = 0, end = 0; i < n; i = end) {
      end = i + 1;
      while (end < n && entries[end] == entries[i]) end++;
      if (entries[i] == SliceIndex::kBase) continue;
      if (!each(page + i, end - i, entries[i])) return page + end;
    }
    page += n;
  }
  return index.pages();
}

}  // namespace sf
