// A VM's forks: protect while it runs, commit while it is paused, adopt after a restart.
#include <sys/resource.h>

#include <bit>
#include <chrono>

#include "memtap/vm.h"

namespace sf {
namespace {

// One protecting ioctl. Faults of the VM wait while the kernel walks it: a few hundred
// microseconds.
constexpr uint64_t kChunkPages = 8 * 1024 * 1024 / kPageBytes;
// Two dirty runs this close are protected by one ioctl: the clean pages between them are protected
// already, and walking them is cheaper than another call.
constexpr uint64_t kMergePages = 64;

bool test_bit(const std::vector<uint64_t>& words, PageIndex page) {
  return ((words[page / 64] >> (page % 64)) & 1) != 0;
}

}  // namespace

Status Vm::fork_begin(const std::string& name, const std::string& directory) {
  auto fork = std::make_shared<Fork>();
  {
    std::lock_guard lock(mutex_);
    const std::string who = "VM " + options_.id;
    if (memory_.load() == nullptr || stopped_.load()) {
      return Status::Error("E_STATE", who + " is not attached");
    }
    if (fork_ != nullptr) return Status::Error("E_STATE", who + " is being forked");
    for (auto& g : *chain_.load()) {
      if (g->saved->generation() == name) {
        return Status::Error("E_EXISTS", who + " has a generation " + name);
      }
    }
    Status status = SavedPages::Create(directory, options_.id, name, options_.pages, &fork->saved);
    if (!status.ok()) return status;
    fork->dirty.assign((options_.pages + 63) / 64, 0);
    fork->zero.assign((options_.pages + 63) / 64, 0);
    fork_ = fork;
  }
  Status status;
  for (PageIndex first = 0; first < options_.pages && status.ok(); first += kChunkPages) {
    status = protect_chunk(*fork, first, std::min(kChunkPages, options_.pages - first));
  }
  {
    std::lock_guard lock(mutex_);
    if (fork_ != fork) return Status::Error("E_CLOSED", "the fork for " + name + " was aborted");
    fork->ready = status.ok();
  }
  if (!status.ok()) fork_abort(name);
  return status;
}

// Protects, and only then looks which pages were never written: from here on a write is seen.
Status Vm::protect_chunk(Fork& fork, PageIndex first, uint64_t count) {
  auto memory = memory_.load();
  if (memory == nullptr) return Status::Error("E_STATE", "VM " + options_.id + " is gone");
  const bool populate = options_.populate && options_.replica == nullptr;
  if (populate) {
    Status status = memory->populate(first, count);
    if (!status.ok()) return status;
  }
  Status status = memory->protect(first, count);
  if (!status.ok()) return status;
  std::vector<Residence> where;
  if (!memory->residence(first, count, &where)) {
    return Status::Error("E_STATE", "VM " + options_.id + " is gone");
  }
  for (uint64_t i = 0; i < count; i++) {
    const PageIndex page = first + i;
    if (where[i] == Residence::kNone && populate) {
      return Status::Error("E_USERFAULTFD", "cannot populate the memory of VM " + options_.id);
    }
    const bool untouched_zero =
        options_.replica == nullptr
            ? where[i] == Residence::kNone
            : where[i] != Residence::kPrivate && options_.replica->state(page) == PageState::kZero;
    if (!untouched_zero && where[i] != Residence::kZeroPage) continue;
    fork.zero[page / 64] |= uint64_t{1} << (page % 64);
  }
  return Status::Ok();
}

Status Vm::protect_dirty(const Fork& fork, uint64_t* pages) {
  auto memory = memory_.load();
  if (memory == nullptr) return Status::Error("E_STATE", "VM " + options_.id + " is gone");
  PageIndex start = 0;
  PageIndex end = 0;  // [start, end) is dirty and not protected yet
  const auto flush = [&] { return end > start ? memory->protect(start, end - start) : Status(); };
  for (uint64_t word = 0; word < fork.dirty.size(); word++) {
    for (uint64_t bits = fork.dirty[word]; bits != 0; bits &= bits - 1) {
      const PageIndex page = word * 64 + static_cast<uint64_t>(std::countr_zero(bits));
      ++*pages;
      if (end == 0 || page - end > kMergePages) {
        Status status = flush();
        if (!status.ok()) return status;
        start = page;
      }
      end = page + 1;
    }
  }
  return flush();
}

Status Vm::fork_commit(const std::string& name, CommitResult* out) {
  // The VM is paused for as long as this takes, and this thread has nothing else to do: go before
  // what else wants the CPU. Best effort.
  ::setpriority(PRIO_PROCESS, 0, -20);
  const auto begin = std::chrono::steady_clock::now();
  std::shared_ptr<Fork> fork;
  {
    std::lock_guard lock(mutex_);
    fork = fork_;
    if (fork == nullptr || fork->saved->generation() != name || !fork->ready) {
      return Status::Error("E_STATE", "VM " + options_.id + ": no fork begun for " + name);
    }
    Status status = protect_dirty(*fork, &out->dirty_pages);
    if (!status.ok()) return status;
    auto memory = memory_.load();
    if (memory == nullptr || memory->dying()) {
      return Status::Error("E_STATE", "VM " + options_.id + " is gone");
    }
    auto chain = std::make_shared<Chain>(*chain_.load());
    // In this order: killed between the two, the older one names no newer one, and nothing was
    // saved into that yet.
    fork->saved->set_state(SavedPages::State::kOpen);
    if (!chain->empty()) chain->back()->saved->set_newer(name);
    chain->push_back(std::make_shared<Generation>(fork->saved));
    chain_.store(std::move(chain));
    fork_ = nullptr;
  }
  // Nobody writes to the fork's bitmaps any more. The VM is still paused, but this is short.
  PageIndex page = 0;
  while (page < options_.pages) {
    if (page % 64 == 0 && (fork->zero[page / 64] & ~fork->dirty[page / 64]) == 0) {
      page += 64;
      continue;
    }
    if (!test_bit(fork->zero, page) || test_bit(fork->dirty, page)) {
      page++;
      continue;
    }
    const PageIndex first = page;
    while (page < options_.pages && test_bit(fork->zero, page) && !test_bit(fork->dirty, page)) {
      page++;
    }
    out->zero_runs.push_back(static_cast<uint32_t>(first));
    out->zero_runs.push_back(static_cast<uint32_t>(page - first));
  }
  out->duration_us = static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::microseconds>(
                                               std::chrono::steady_clock::now() - begin)
                                               .count());
  return Status::Ok();
}

Status Vm::fork_abort(const std::string& name) {
  std::shared_ptr<Fork> fork;
  {
    std::lock_guard lock(mutex_);
    if (fork_ == nullptr || fork_->saved->generation() != name) {
      return Status::Error("E_STATE", "VM " + options_.id + ": no fork begun for " + name);
    }
    fork = std::exchange(fork_, nullptr);
  }
  fork->saved->remove_files();
  lift_protection();
  return Status::Ok();
}

Status Vm::adopt(const std::string& name, const std::string& directory) {
  std::lock_guard lock(mutex_);
  if (attached_once_ || stopped_.load()) {
    return Status::Error("E_STATE", "VM " + options_.id + " is attached: too late to adopt");
  }
  auto chain = std::make_shared<Chain>(*chain_.load());
  for (auto& g : *chain) {
    if (g->saved->generation() == name) {
      return Status::Error("E_EXISTS", "VM " + options_.id + " has a generation " + name);
    }
  }
  std::shared_ptr<SavedPages> saved;
  Status status = SavedPages::Open(directory, options_.id, name, options_.pages, &saved);
  if (!status.ok()) return status;
  if (saved->state() == SavedPages::State::kProtecting) {
    saved->remove_files();
    return Status::Error("E_STATE", "generation " + name + " was never committed");
  }
  auto generation = std::make_shared<Generation>(saved);
  if (saved->state() == SavedPages::State::kFailed) {
    generation->state.store(Generation::State::kFailed);
  }
  if (!chain->empty()) {
    const std::string newer = chain->back()->saved->newer();
    if (newer.empty()) {
      chain->back()->saved->set_newer(name);  // see fork_commit()
    } else if (newer != name) {
      fail_older_than(chain->size(),
                      Status::Error("E_SOURCE_LOST",
                                    "generation " + newer + ", which it needs, was not adopted"));
    }
  }
  chain->push_back(std::move(generation));
  chain_.store(std::move(chain));
  return Status::Ok();
}

}  // namespace sf
