// A replica: a host's sparse copy of one generation, filled on demand.
//
// States of a page:  absent -> present   (fill)
//                    absent -> zero      (fill_zero)
// Invariants:
//  - A page never leaves `present` or `zero`, and its bytes never change: a generation is
//  immutable.
//  - `present` is set only after all 4096 bytes are in the file. On tmpfs (Medium::kMemory) the
//  page
//    also enters the page cache whole, in one step (UFFDIO_COPY): VMs that map the file see it
//    there at once, without reading the bitmap, and must never see a page half written.
//  - Each waiter is called exactly once: with success, or with the error that ended the source.
//  - After a power cut only what sync() wrote counts (Medium::kDisk): the kernel may have written a
//    bit before its page. Nothing of it is believed; what is missing is fetched again.
// `PATH.map`, mapped shared, so that a replica survives the death of the process that fills it: a
// page of header, the bitmaps of present and of zero pages as true now, and for kDisk the same two
// as true after a power cut. Bits are only ever added, so a torn write of them is true as well.
#pragma once

#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "common/fd.h"
#include "common/page.h"
#include "common/status.h"

namespace sf {

enum class Medium : uint8_t {
  kMemory,  // a file on tmpfs that VMs map privately as their RAM
  kDisk,    // a file on any file system, read with pread
};

class Replica final : public PageProvider {
 public:
  using Done = std::function<void(const Status&)>;

  // Opens PATH and PATH.map, or makes them. `generation` is bound to the map at creation; opening
  // it as another generation, size or medium is E_REPLICA_MISMATCH. Two processes must not fill one
  // replica: the map is locked (E_IN_USE).
  static Status Open(const std::string& path, const std::string& generation, uint64_t pages,
                     Medium medium, std::shared_ptr<Replica>* out);
  ~Replica() override;

  const std::string& generation() const { return generation_; }
  uint64_t pages() const override { return pages_; }
  uint64_t held() const override { return present_count() + zero_count(); }
  PageState state(PageIndex page) const;
  ReadResult read(PageIndex page, uint8_t* out) override;  // never waits for the fetcher

  // True if this call changed the page, false if it was there already. Throws nothing; a full file
  // system is an error status, and the page stays absent.
  Status fill(PageIndex page, const uint8_t* data, bool* changed = nullptr);
  // Several pages, one after the other. An error: perhaps only some of them.
  Status fill(PageIndex first, uint64_t count, const uint8_t* data);
  Status fill_zero(PageIndex page, uint64_t count = 1);

  // Every page is present or zero: no source is needed any more, now or when it is opened again.
  bool complete() const { return complete_.load(std::memory_order_acquire); }
  // Calls `done` once when it is complete; at once, on this thread, if it is already. One at a
  // time: the next call replaces it, nullptr takes it back and waits for a call under way.
  void on_complete(std::function<void()> done);

  // Its owner has ended what fills it: another process may open it. Who reads it here reads on.
  void unlock();

  // Makes what is here now durable. Blocks; nothing to do for kMemory.
  Status sync();

  // Calls `done` when the page is present or zero (at once, on this thread, if it is already), or
  // with the error after fail(). `done` may run on any thread and must not block.
  void want(PageIndex page, Done done);

  // Waits for a page, as long as want() would. The thread does the fetcher's receiving meanwhile if
  // it can: one thread less has to be woken. Not to be called from a `done`.
  Status fetch(PageIndex page);

  // want() of each of `pages`, `done` for each; then the thread is lent likewise, for as long as
  // `lending` says: that is also for pages it asked for before. `done` has to count `waits` down.
  // False: it was not lent, or is needed no longer; the pages come all the same.
  using PageDone = std::function<void(PageIndex, const Status&)>;
  bool fetch(std::span<const PageIndex> pages, const PageDone& done, const Lending& lending);

  // Asks for a page nobody waits for yet.
  void prefetch(PageIndex page);
  // Asks for the absent ones of a run, which nobody waits for yet, and counts them in `*asked`.
  // `done` is called for each, once, as that of want(). Error: the source is gone, nothing is
  // asked.
  Status prefetch(PageIndex first, uint64_t count, const PageDone& done, uint64_t* asked);

  // All that its users need, as fast as it comes, see PageFetcher. False: not now, or not so.
  bool subscribe(bool on);
  bool subscribed() const;

  // The absent ones of the 64 pages from `first` (a multiple of 64): bit i is first + i.
  uint64_t absent_mask(PageIndex first) const;
  // Those of 64 pages that one of its users may still read; all if it has no users.
  uint64_t needed_mask(PageIndex first) const;
  // All absent pages, or those of them that are needed, as runs in order, no two of which touch.
  // False: there are more than `max_runs`; `*out` then has the first ones.
  struct Run {
    PageIndex first;
    uint64_t count;
  };
  bool absent_runs(bool needed_only, size_t max_runs, std::vector<Run>* out) const;
  void add_user(std::weak_ptr<const PageUser> user);
  // True: pages may be read by somebody who is no user (yet), so all are needed.
  void need_all(bool all);
  // Changes with each user added: a page not needed before may be needed now.
  uint64_t users_version() const { return users_version_.load(std::memory_order_acquire); }

  // The fetcher must not call back into the replica from inside want(). It must outlive its time
  // as the fetcher: set nullptr (which waits for calls under way, so threads lent to it have to
  // return) before it goes. Waiters stay, and are asked of the next fetcher.
  void set_fetcher(PageFetcher* fetcher);

  // The source is gone for good: absent pages, waited for or wanted later, end with `status`.
  void fail(const Status& status);

  // This page cannot be had now: its waiters end with `status`; wanted later it is asked for again.
  void fail_page(PageIndex page, const Status& status);

  uint64_t present_count() const { return present_.load(std::memory_order_relaxed); }
  uint64_t zero_count() const { return zero_.load(std::memory_order_relaxed); }
  uint64_t waiting_count() const;  // pages somebody waits for; prefetched ones do not count

  // A new read-only descriptor of the data file, to be handed to a VM. Owned by the caller.
  Status open_readonly(Fd* out) const;
  const std::string& path() const { return path_; }

 private:
  Replica() = default;
  bool test(const std::atomic<uint64_t>* words, PageIndex page) const;
  bool set(std::atomic<uint64_t>* words, PageIndex page);
  Status write_page(PageIndex page, const uint8_t* data);
  bool write_run(PageIndex first, uint64_t count, const uint8_t* data);
  void wake(PageIndex first, uint64_t count = 1);
  void end_waiters(PageIndex page, const Status& status);
  // Adds a waiter if the page is absent; otherwise `done` stays, and `*status` is what to tell it.
  // True: it is to be asked for.
  bool enlist(PageIndex page, Done* done, Status* status);
  bool lend(std::span<const PageIndex> ask, const Lending& lending);
  bool count_bits();  // false: there are bits beyond the last page
  void check_complete();
  bool all_known() const;
  // Of replica_durable.cc: kDisk's part of Open.
  Status check_boot();

  std::string path_;
  std::string generation_;
  uint64_t pages_ = 0;
  Medium medium_ = Medium::kDisk;
  Fd data_;
  Fd map_;
  Fd uffd_;  // kMemory only: registered over data_map_ so that UFFDIO_COPY may fill it
  uint8_t* data_map_ = nullptr;
  uint8_t* map_base_ = nullptr;
  size_t map_bytes_ = 0;
  std::atomic<uint64_t>* present_words_ = nullptr;
  std::atomic<uint64_t>* zero_words_ = nullptr;
  std::atomic<uint64_t> present_{0};
  std::atomic<uint64_t> zero_{0};

  std::atomic<bool> complete_{false};
  std::mutex complete_mutex_;
  std::function<void()> on_complete_;

  std::mutex sync_mutex_;  // one sync() at a time
  uint64_t synced_ = 0;    // pages known at the last one

  mutable std::mutex users_mutex_;
  std::vector<std::weak_ptr<const PageUser>> users_;
  std::atomic<uint64_t> users_version_{0};
  std::atomic<bool> need_all_{false};

  struct Waiters {
    bool urgent = false;
    std::vector<Done> done;
  };
  mutable std::mutex mutex_;  // guards all up to failed_
  std::unordered_map<PageIndex, Waiters> waiters_;
  uint64_t urgent_ = 0;  // of waiters_
  Status failed_;
  mutable std::mutex
      fetcher_mutex_;  // held while the fetcher is called; taken before mutex_, never after
  PageFetcher* fetcher_ = nullptr;
  unsigned lent_ = 0;  // threads inside fetcher_->fetch(), without the lock
  std::condition_variable returned_;
};

}  // namespace sf
