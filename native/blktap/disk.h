// A disk: a chain of slices over a base, written at its top, forked in constant time.
//
// States: open -> closed. Of its slices exactly one, the top, is written; a spare waits beside it.
//
// fork(), with the VM paused: shut the gate (all writes under way are finished, none is new), name
// the spare the new top in its live header (one write into the page cache, which outlives this
// process), keep a copy of the index as the generation's view (one pointer), open the gate. No
// sync, nothing that grows with depth or size.
//
// Durability of a fork: settle() afterwards, or the guest's next flush, whichever comes first,
// makes durable (1) the pages of the slice below the top, (2) the header that makes the spare the
// top, (3) the header that seals the slice below. A power cut before (2): the fork did not happen,
// and nothing that was flushed is lost. After (2): the generation exists, with all its pages. Never
// (3) before (2): a sealed slice with nothing on top would have no place for the guest's writes.
// The store's journal follows later; Open finds an active spare by itself.
//
// Several disks of a store fork, flush and write independently: all locks but the store's, which is
// held for moments, are the disk's own.
//
// Locks, in this order:
//   store.build_mutex   open, detach
//   flush_mutex_        one persist/settle at a time
//   gate_               shared: a write of one stretch; exclusive: fork, detach (guards top_)
//   page_locks_         one of 256 by stretch: two writes of one stretch; several in rising order
//   index_lock_         shared: a look-up; exclusive: a change
//   store.mutex
// A read takes none but index_lock_; it is in a section of the table's read gate (read_gate.h).
//
// The last page of a disk whose size is no multiple of 4096 is zeros beyond the disk's end, in
// every slice: what fills it up is made here, never taken from below.
#pragma once

#include <atomic>
#include <mutex>
#include <shared_mutex>
#include <string>

#include "blktap/rwlock.h"
#include "blktap/store.h"

namespace sf {

class SwitchBase;

struct DiskStats {
  std::atomic<uint64_t> reads{0}, writes{0}, zeroes{0}, flushes{0};
  std::atomic<uint64_t> bytes_read{0}, bytes_written{0}, bytes_zeroed{0};
  std::atomic<uint64_t> fetched{0};  // pages waited for
  std::atomic<uint64_t> io_errors{0}, no_space_errors{0};
};

class Disk final : public Device {
 public:
  struct ForkResult {
    std::string slice;  // the slice that was sealed
    uint64_t duration_ns = 0;
  };

  // `top` is from store.resolve(); `spare` may be empty. If the spare turns out to be the top (the
  // process died before the journal said so), recovered() names the generation it was forked as.
  // E_CORRUPT, E_IO, E_CAPACITY.
  static Status Open(NodePtr top, const std::string& spare, const Store::OpenBase& open_base,
                     std::shared_ptr<Disk>* out);
  ~Disk() override;

  const std::string& recovered() const { return recovered_; }

  // With `wait` false: *busy becomes true, and nothing happens, if a write is under way just now.
  Status fork(const std::string& generation, bool wait, bool* busy, ForkResult* result);
  Status settle();
  Status attach_spare(const std::string& id);
  Status close();  // flushes; to be called after its servers have stopped

  struct Info {
    std::string top;
    uint32_t depth = 0;
    size_t index_bytes = 0;  // with all images that share nodes with it
    bool spare = false;
  };
  Info info();
  DiskStats& stats() { return stats_; }
  Status last_error();  // of its last failed flush, else of a file

  uint64_t size() const override { return chain_.size; }
  bool writable() const override { return true; }
  int read(uint64_t off, size_t len, uint8_t* out, ReadMode mode, bool* zero) override;
  int plan_read(uint64_t off, size_t len, uint8_t* out, ReadPlan* plan) override;
  int carried_out(int error) override { return count_error(error); }
  int write(uint64_t off, size_t len, const uint8_t* data, ReadMode mode) override;
  void write_many(std::span<Write> writes) override;
  int zero(uint64_t off, uint64_t len, Zero mode, bool fast) override;
  int flush() override;
  void missing(uint64_t off, uint64_t len, Access access,
               std::vector<PageIndex>* out) const override;
  void want(PageIndex page, std::function<void(const Status&)> done) override;
  Extent extent(uint64_t off, uint64_t limit) const override;
  void cache(uint64_t off, uint64_t len) override;

 private:
  friend class Pull;
  // What the disk is for a replica below it. Apart from it, so that a prefetch that just asks does
  // not keep a closed disk alive.
  class User final : public PageUser {
   public:
    explicit User(const Disk* disk) : disk_(disk) {}
    uint64_t needs(PageIndex first) const override {
      std::shared_lock lock(lock_);
      return disk_ == nullptr ? 0 : disk_->needs(first);
    }
    void leave() {
      std::unique_lock lock(lock_);
      disk_ = nullptr;
    }

   private:
    mutable RwLock lock_;  // before the disk's gate_
    const Disk* disk_;
  };
  // Which of 64 pages of the base may be read, here or in a generation below: the oldest of them
  // needs most.
  uint64_t needs(PageIndex first) const;
  Disk(NodePtr top, std::shared_ptr<SwitchBase> base);
  Status load(const std::string& spare);
  Status load_top(const std::shared_ptr<Slice>& slice);
  Status find_root();
  Status recover_spare(const std::shared_ptr<Slice>& slice);
  void lookup(Stretch* stretch) const;
  uint64_t untouched_run(PageIndex page) const;
  // All with gate_ shared and the stretch's page lock held.
  int write_stretch(const Stretch& stretch, uint64_t off, size_t len, const uint8_t* data,
                    ReadMode mode);
  struct Written {
    bool touched = false;  // the file, so that a failure leaves something to give back
    bool fresh = false;    // pages that are to be marked
  };
  int write_data(const Stretch& stretch, uint64_t off, size_t len, const uint8_t* data,
                 ReadMode mode, Written* written);
  void write_together(std::span<Write* const> writes);
  int fill_tail(const Stretch& stretch, uint64_t off, size_t len, uint8_t* out);
  void give_back(const Stretch& stretch);
  int zero_stretch(const Stretch& stretch, uint64_t off, uint64_t len, Zero mode);
  int zero_edges(const Stretch& stretch, uint64_t off, uint64_t len, bool allocate);
  int zero_pages(const Stretch& stretch, PageIndex first, PageIndex end);
  int allocate_pages(const Stretch& stretch, PageIndex first, PageIndex end);
  PageIndex end_of_whole(uint64_t end) const;
  bool known_zero(PageIndex page, SliceIndex::Entry entry) const;
  bool zero_is_fast(uint64_t off, uint64_t len, Zero mode) const;
  int mark(PageIndex first, uint64_t count, PageState state);
  void write_failed(int error);
  size_t page_lock_number(PageIndex first) const {
    return first / SliceIndex::kLeafPages % page_locks_.size();
  }
  std::mutex& page_lock(PageIndex first) { return page_locks_[page_lock_number(first)]; }
  int count_error(int error);
  std::string name() const;

  const std::shared_ptr<Store> store_;
  const std::shared_ptr<SwitchBase> base_;  // chain_'s
  const std::shared_ptr<User> user_ = std::make_shared<User>(this);
  Chain chain_;
  std::string recovered_;
  DiskStats stats_;

  std::mutex flush_mutex_;
  std::vector<std::shared_ptr<Slice>> unsettled_;  // sealed, oldest first; gate_ exclusive to add

  std::mutex error_mutex_;
  Status last_error_;  // of the last flush that failed

  mutable RwLock gate_;
  NodePtr node_;                // of the top
  std::shared_ptr<Slice> top_;  // node_'s
  SliceTable::Number top_number_ = 0;
  NodePtr spare_;
  std::shared_ptr<Slice> spare_slice_;
  ImagePtr below_;  // of the node below the top; until the next fork
  // Of the oldest slice, if that is not the top and the base fills: whatever its pages are, nobody
  // above reads those of the base. It may lag behind merges, and then tells of fewer.
  ImagePtr root_;
  std::string last_generation_;
  bool closed_ = false;

  std::array<std::mutex, 256> page_locks_;
  mutable RwLock index_lock_;
  SliceIndex index_;
};

}  // namespace sf
