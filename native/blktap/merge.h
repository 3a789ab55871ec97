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

// Merges slices [0] .. [n-1], oldest first, each lying on the one before and the only one on it.
// All are sealed, and only the last may have a generation. One of them stays, whichever needs the
// fewest pages copied, and takes the last one's place.
class Merge final : public Step {
 public:
  static constexpr size_t kMaxRun = 128;  // slices merged at once; it has their data open

  // E_IN_USE if a view of any but the last is alive, or another merge has one of them; E_STATE if
  // one is not sealed.
  static Status Begin(const std::shared_ptr<Store>& store, std::vector<SliceRef> run,
                      uint64_t size_bytes, std::shared_ptr<Merge>* out);
  ~Merge() override;

  uint64_t total_bytes() const override { return total_bytes_; }
  Status step(uint64_t most, uint64_t* bytes, bool* done) override;
  void abort() override;
  // After the last step: the pages are durable, the next edition of the map is written.
  Status prepare();
  // After the journal names that edition.
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
  Status claim();
  void let_go();
  Status load();
  Status copy(size_t from, PageIndex first, uint64_t count);
  Status write_map(const std::string& path);
  void put_in_force(std::vector<std::shared_ptr<Slice>>* dropped);
  Status punch_zeroes();
  // Calls `each` for runs of pages from `page` on that one slice of the run holds (its position
  // plus 1), or that are zeros, until it returns false. Where it stopped.
  template <typename Each>
  PageIndex each_run(PageIndex page, const Each& each) const;

  const std::shared_ptr<Store> store_;
  const std::vector<SliceRef> run_;
  const uint64_t size_bytes_;
  std::vector<std::shared_ptr<Slice>> slices_;  // opened for the merge alone
  SliceIndex union_;                            // position in run_ plus 1
  size_t keep_ = 0;
  Fd keep_data_;  // to write to
  uint64_t total_bytes_ = 0;

  std::mutex mutex_;  // one step, or end, at a time
  PageIndex cursor_ = 0;
  bool copied_ = false;
  bool ended_ = false;
  bool claimed_ = false;
  bool prepared_ = false;  // also the store's mutex, to change it
};

}  // namespace sf
