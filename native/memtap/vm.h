// One VM's memory under memtap: the pager that answers its faults, its forks, and the chain of its
// open generations.
//
// The chain. Every fork adds a generation; the old bytes of a page are saved once, into the newest
// generation, and serve all older ones too. So page p of generation G is:
//     the copy of the first of G, next newer, ..., newest that saved p; if none did: the live page.
//
// Invariants, all under `mutex_` unless noted:
//  I1 If some active generation (open, not failed, not closing) finds p saved nowhere from itself
//  on,
//     then p is write-protected. A write to it faults, and the pager copies it first.
//  I2 A page is saved (bytes, then bit) before its protection is lifted. So a reader that copies
//  the
//     live page and *afterwards* finds no saved copy in the chain as it is *then* has read the old
//     bytes; if it finds one, it takes that. Readers take no lock.
//  I3 A generation leaves the chain only after every page it saved and the next older active one
//     lacks has been copied there. Saved bytes never change, so readers holding it stay right.
//  I4 A generation is marked failed before a page it needs is given up. Readers look at the mark
//     after they have read.
//  I5 Protection without need (an aborted fork, a killed data plane) only costs a fault: the pager
//     lifts it page by page.
// Fork: forkBegin protects all RAM while the VM runs; a write faults, is noted in `dirty`, and goes
// on. forkCommit, with the VM paused, protects the dirty pages again and puts the generation into
// the chain; that is the generation's instant. `dirty` is set before the page's protection is
// lifted, both under the lock, so commit misses none.
//
// The data plane may die at any instant (saved_pages.h says why no byte is lost) and a new one
// adopts the generations. Each generation's file names the next newer one; adopting a chain with a
// missing link fails the generations that would need it, rather than read live bytes in its place.
//
// One thread per VM: a VM process that misbehaves, or whose generation's file system is full, holds
// up no other VM. While pages are fetched that the VM waits for, the thread is lent to the
// replica's fetcher (pagestore/replica.h) and receives them itself; it still answers other faults
// at once. Left out on purpose: pages pinned for DMA escape write protection.
#pragma once

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <unordered_set>
#include <vector>

#include "memtap/guest_memory.h"
#include "memtap/saved_pages.h"
#include "pagestore/replica.h"

namespace sf {

struct VmEvent {
  enum class Kind : uint8_t { kAttached, kDetached, kLost, kGenerationFailed };
  Kind kind;
  std::string vm;
  std::string generation;  // kGenerationFailed
  Status status;           // kLost, kGenerationFailed
  pid_t pid = -1;          // kAttached, kDetached
};
using EventSink = std::function<void(const VmEvent&)>;

struct VmOptions {
  std::string id;
  std::string token;
  uint64_t pages = 0;
  std::shared_ptr<Replica> replica;  // null: the VM booted here
  bool populate = false;         // protect unpopulated memory by populating it (before Linux 6.4)
  uint32_t save_wait_ms = 1000;  // how long the guest waits for space before a generation fails
};

struct VmStats {
  std::atomic<uint64_t> missing_faults{0}, wp_faults{0}, pages_fetched{0}, zero_pages{0},
      saved_pages{0}, spurious_faults{0}, dirtied_pages{0}, moved_pages{0}, live_reads{0};
};

struct CommitResult {
  uint64_t dirty_pages = 0;
  std::vector<uint32_t> zero_runs;  // first, count, first, count, ...
  uint64_t duration_us = 0;
};

class Vm : public std::enable_shared_from_this<Vm> {
 public:
  Vm(VmOptions options, EventSink sink);
  ~Vm();

  const VmOptions& options() const { return options_; }
  const VmStats& stats() const { return stats_; }
  uint64_t open_generations() const;
  // The process attached, or -1.
  pid_t pid() const;

  // E_STATE: this attachment does not fit (see server.h for the handshake). `connection` stays open
  // while this process serves the VM.
  Status may_attach(bool resume, bool clone) const;
  Status attach(GuestProcess process, const Kernel& kernel, Fd uffd, uint64_t base, Fd connection,
                bool resume);

  // Long calls; none may run on the JavaScript thread but adopt().
  Status fork_begin(const std::string& generation, const std::string& directory);
  Status fork_commit(const std::string& generation, CommitResult* out);
  Status fork_abort(const std::string& generation);
  Status drop(const std::string& generation);
  Status adopt(const std::string& generation, const std::string& directory);

  // The generation's pages; E_NOT_FOUND. Reads give kError once it is dropped, failed or its VM
  // gone.
  Status provider(const std::string& generation, std::shared_ptr<PageProvider>* out);

  // Ends the pager. `gone`: the VM is no more, its generations cannot be read and their files go.
  // Otherwise all stays as it is for the next data plane.
  void stop(bool gone);

 private:
  struct Generation {
    enum class State : uint8_t { kActive, kClosing, kFailed, kDropped };
    explicit Generation(std::shared_ptr<SavedPages> pages) : saved(std::move(pages)) {}
    std::shared_ptr<SavedPages> saved;
    std::atomic<State> state{State::kActive};
  };
  using Chain = std::vector<std::shared_ptr<Generation>>;  // oldest first

  struct Fork {
    std::shared_ptr<SavedPages> saved;
    std::vector<uint64_t> dirty;  // under mutex_
    std::vector<uint64_t> zero;   // written by the thread in fork_begin() only
    bool ready = false;
  };

  class View;

  // vm.cc: attachment and faults
  void run_pager();
  void handle_faults(std::vector<PageIndex>* absent);
  void on_missing(PageIndex page, std::vector<PageIndex>* absent);
  bool fetch(std::span<const PageIndex> pages, std::span<pollfd> watched);
  void resolve_missing(PageIndex page);
  void on_write(PageIndex page);
  void emit(VmEvent::Kind kind, const Status& status = {}, const std::string& generation = {},
            pid_t pid = -1);
  bool wait_for_space(uint32_t* waited_ms);

  // vm_chain.cc: under mutex_
  static bool saved_from(const Chain& chain, size_t from, size_t to, PageIndex page);
  static size_t newest_active(const Chain& chain, size_t before);
  void fail_needing(PageIndex page, size_t before, const Status& status);
  void fail_generation(Generation& generation, const Status& status);
  void fail_older_than(size_t end, const Status& status);
  Status move_pages(const std::shared_ptr<Generation>& from, uint64_t word_index, bool last_try);
  void unlink_from_chain(const std::shared_ptr<Generation>& generation);
  // vm_chain.cc: without it
  void lift_protection();
  ReadResult read(const Generation& generation, PageIndex page, uint8_t* out);
  ReadResult read_live(PageIndex page, uint8_t* out);
  void ask_replica(PageIndex page);

  // vm_fork.cc
  Status protect_chunk(Fork& fork, PageIndex first, uint64_t count);
  Status protect_dirty(const Fork& fork, uint64_t* pages);

  static constexpr size_t kNone = SIZE_MAX;

  const VmOptions options_;
  const EventSink sink_;
  VmStats stats_;
  Fd wakeup_;  // eventfd: ends the pager's wait

  mutable std::mutex mutex_;
  std::shared_ptr<Fork> fork_;
  bool attached_once_ = false;

  // Replaced whole, under mutex_; read without it.
  std::atomic<std::shared_ptr<const Chain>> chain_;
  std::atomic<std::shared_ptr<GuestMemory>> memory_;
  std::atomic<bool> ended_{false};    // the process is gone
  std::atomic<bool> stopped_{false};  // stop() was called
  // stop(false) was called; outlives this object, for those who still hold a provider.
  const std::shared_ptr<std::atomic<bool>> closed_ = std::make_shared<std::atomic<bool>>(false);
  std::atomic<bool> lost_{false};  // reported once
  // Pages the pager asked for that are not there yet; outlives this object, as their answers do.
  const std::shared_ptr<std::atomic<uint32_t>> waits_ = std::make_shared<std::atomic<uint32_t>>(0);
  Fd connection_;  // the pager's, once attached

  std::mutex asked_mutex_;
  std::unordered_set<PageIndex> asked_;  // absent pages that readers asked the replica for
};

}  // namespace sf
