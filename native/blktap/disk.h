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
// disk.json (src/cow-disk) follows later; Open finds an active spare by itself.
//
// Locks, in this order:
//   flush_mutex_        one persist/settle at a time
//   gate_               shared: a write of one stretch; exclusive: fork. Guards top_, spare_
//   page_locks_         one of 256 by stretch: two writes of one stretch
//   index_lock_         shared: a look-up; exclusive: a change
// Left out: merging.
#pragma once

#include <atomic>
#include <map>
#include <mutex>
#include <string>

#include "blktap/chain.h"
#include "blktap/rwlock.h"

namespace sf {

struct DiskStats {
  std::atomic<uint64_t> reads{0}, writes{0}, zeroes{0}, flushes{0};
  std::atomic<uint64_t> bytes_read{0}, bytes_written{0}, bytes_zeroed{0};
  std::atomic<uint64_t> fetched{0};  // pages waited for
  std::atomic<uint64_t> io_errors{0}, no_space_errors{0};
};

class Disk final : public Device {
 public:
  struct SliceSpec {
    std::string id;
    std::string generation;  // what it became when it was sealed; empty: the top
    bool keep = true;        // the generation is still wanted: hold a view of it
  };
  struct Spec {
    std::string directory;
    uint64_t size_bytes = 0;
    std::vector<SliceSpec> slices;  // oldest first, the last one is the top
    std::string spare;              // may be empty
    std::shared_ptr<Base> base;
  };
  struct ForkResult {
    std::string slice;  // the slice that was sealed
    uint64_t duration_ns = 0;
  };

  // E_IN_USE if another process has it open, E_CORRUPT, E_IO. If the spare turns out to be the top
  // (the process died before disk.json said so), recovered() names the generation it was forked as.
  static Status Open(Spec spec, std::shared_ptr<Disk>* out);

  const std::string& recovered() const { return recovered_; }
  bool has_spare();

  // With `wait` false: *busy becomes true, and nothing happens, if a write is under way just now.
  Status fork(const std::string& generation, bool wait, bool* busy, ForkResult* result);
  Status settle();
  Status attach_spare(const std::string& id);
  std::shared_ptr<View> view(const std::string& generation);
  void drop_view(const std::string& generation);
  Status close();  // flushes; to be called after its servers have stopped

  struct SliceInfo {
    std::string id;
    const char* state;
    uint64_t pages;
    uint64_t allocated_bytes;
  };
  std::vector<SliceInfo> slices();
  size_t index_bytes() const { return index_.bytes(); }
  DiskStats& stats() { return stats_; }
  Status last_error();  // of a flush, else of a slice's file

  uint64_t size() const override { return chain_.size; }
  bool writable() const override { return true; }
  int read(uint64_t off, size_t len, uint8_t* out, ReadMode mode, bool* zero) override;
  int write(uint64_t off, size_t len, const uint8_t* data, ReadMode mode) override;
  int zero(uint64_t off, uint64_t len, bool edges) override;
  int flush() override;
  void missing(uint64_t off, uint64_t len, Access access,
               std::vector<PageIndex>* out) const override;
  void want(PageIndex page, std::function<void(const Status&)> done) override;
  uint64_t extent(uint64_t off, uint64_t limit, bool* hole) const override;

 private:
  explicit Disk(uint64_t pages) : index_(pages) {}
  Status load(const Spec& spec);
  Status load_slice(const std::shared_ptr<Slice>& slice);
  Status recover_spare();
  void lookup(Stretch* stretch) const;
  // Both with gate_ shared and the stretch's page lock held.
  int write_stretch(const Stretch& stretch, uint64_t off, size_t len, const uint8_t* data,
                    ReadMode mode);
  void give_back(const Stretch& stretch);
  int zero_stretch(const Stretch& stretch, uint64_t off, uint64_t len, bool edges);
  int mark(PageIndex first, uint64_t count, PageState state);
  int count_error(int error);

  Chain chain_;
  std::string directory_;
  Fd lock_;
  std::string recovered_;
  DiskStats stats_;

  std::mutex flush_mutex_;
  std::vector<std::shared_ptr<Slice>> unsettled_;  // sealed, oldest first; gate_ exclusive to add

  std::mutex error_mutex_;
  Status last_error_;  // of the last flush that failed
  std::shared_ptr<FileErrors> file_errors_ = std::make_shared<FileErrors>();

  mutable RwLock gate_;
  std::shared_ptr<Slice> top_;
  SliceIndex::Entry top_number_ = 0;
  std::shared_ptr<Slice> spare_;
  std::map<std::string, std::shared_ptr<View>> views_;  // gate_
  bool closed_ = false;                                 // gate_

  std::array<std::mutex, 256> page_locks_;
  mutable RwLock index_lock_;
  SliceIndex index_;
};

}  // namespace sf
