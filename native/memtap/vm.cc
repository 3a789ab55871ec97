#include "memtap/vm.h"

#include <linux/userfaultfd.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/resource.h>

#include <array>
#include <chrono>
#include <system_error>
#include <thread>

namespace sf {

Vm::Vm(VmOptions options, EventSink sink)
    : options_(std::move(options)),
      sink_(std::move(sink)),
      wakeup_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      chain_(std::make_shared<const Chain>()) {}

Vm::~Vm() = default;

pid_t Vm::pid() const {
  auto memory = memory_.load();
  return memory != nullptr && !ended_.load() ? memory->pid() : -1;
}

uint64_t Vm::open_generations() const { return chain_.load()->size(); }

void Vm::emit(VmEvent::Kind kind, const Status& status, const std::string& generation, pid_t pid) {
  sink_({kind, options_.id, generation, status, pid});
}

Status Vm::may_attach(bool resume, bool clone) const {
  std::lock_guard lock(mutex_);
  const std::string who = "VM " + options_.id;
  if (stopped_.load()) return Status::Error("E_CLOSED", who + " was removed");
  if (memory_.load() != nullptr) return Status::Error("E_IN_USE", who + " is attached already");
  if (!resume && !chain_.load()->empty()) {
    return Status::Error("E_STATE", who + " has generations of an earlier process");
  }
  if (resume && clone != (options_.replica != nullptr)) {
    return Status::Error("E_STATE", who + (clone ? " is a clone" : " is not a clone"));
  }
  return Status::Ok();
}

Status Vm::attach(GuestProcess process, const Kernel& kernel, Fd uffd, uint64_t base, Fd connection,
                  bool resume) {
  if (!wakeup_.valid()) return Status::Error("E_INTERNAL", "eventfd of VM " + options_.id);
  Status status = may_attach(resume, options_.replica != nullptr);
  if (!status.ok()) return status;
  auto memory = std::make_shared<GuestMemory>(kernel, std::move(process), std::move(uffd), base,
                                              options_.pages);
  status = memory->check();
  if (!status.ok()) return status;
  {
    std::lock_guard lock(mutex_);
    if (attached_once_) return Status::Error("E_IN_USE", "VM " + options_.id + " is attached");
    attached_once_ = true;
    auto chain = chain_.load();
    if (!chain->empty() && !chain->back()->saved->newer().empty()) {
      fail_older_than(chain->size(),
                      Status::Error("E_SOURCE_LOST", "generation " + chain->back()->saved->newer() +
                                                         ", which it needs, was not adopted"));
    }
    connection_ = std::move(connection);
    memory_.store(memory);
  }
  try {
    std::thread([self = shared_from_this()] { self->run_pager(); }).detach();
  } catch (const std::system_error& error) {
    return Status::Error("E_INTERNAL", std::string("pager thread: ") + error.what());
  }
  // Faults that an earlier data plane read but did not answer are in no queue any more: wake them
  // all, and those that still have a reason fault again.
  if (resume) memory->wake(0, options_.pages);
  emit(VmEvent::Kind::kAttached, {}, {}, memory->pid());
  return Status::Ok();
}

void Vm::stop(bool gone) {
  std::shared_ptr<const Chain> chain;
  std::shared_ptr<Fork> fork;
  {
    // With the chain empty nothing looks needed any more: whoever lifts protection or removes files
    // checks `stopped_` under this lock first.
    std::lock_guard lock(mutex_);
    stopped_.store(true);
    if (!gone) closed_->store(true);
    chain = chain_.exchange(std::make_shared<const Chain>());
    fork = std::exchange(fork_, nullptr);
  }
  const uint64_t one = 1;
  if (::write(wakeup_.get(), &one, sizeof one) < 0) {
    // Full: it is readable already, which is all that matters.
  }
  if (!gone) return;
  if (fork != nullptr) fork->saved->remove_files();
  for (auto& generation : *chain) {
    generation->state.store(Generation::State::kDropped);
    generation->saved->remove_files();
  }
}

void Vm::run_pager() {
  ::prctl(PR_SET_NAME, "memtap-pager");
  // A guest CPU waits for each fault: do not queue behind the CPUs of other guests. Best effort.
  ::setpriority(PRIO_PROCESS, 0, -10);
  auto memory = memory_.load();
  std::array<pollfd, 4> fds = {{{wakeup_.get(), POLLIN, 0},
                                {memory->pidfd(), POLLIN, 0},
                                {connection_.get(), POLLRDHUP, 0},
                                {memory->uffd(), POLLIN, 0}}};
  std::vector<PageIndex> absent;
  while (!stopped_.load()) {
    const bool waits = !absent.empty() || waits_->load() > 0;
    const bool lent = waits && fetch(absent, fds);
    absent.clear();
    if (!lent && ::poll(fds.data(), fds.size(), -1) < 0) continue;
    if (fds[0].revents != 0) continue;
    if (fds[1].revents != 0) break;
    if (fds[2].revents != 0) {
      // The agent's thread is gone. As long as the process is not, its faults must be served.
      connection_.reset();
      fds[2].fd = -1;
    }
    if (fds[3].revents != 0) handle_faults(&absent);
  }
  if (!stopped_.load()) {
    ended_.store(true);
    emit(VmEvent::Kind::kDetached, {}, {}, memory->pid());
  }
  connection_.reset();
  // Readers and replies under way hold the memory; without them its descriptors close here, and a
  // VM that still runs waits for the next data plane (its agent holds the userfaultfd).
  memory_.store(nullptr);
}

// Answers what can be answered now; `absent` is what has to be fetched.
void Vm::handle_faults(std::vector<PageIndex>* absent) {
  auto memory = memory_.load();
  std::array<uffd_msg, 32> messages;
  const ssize_t n = ::read(memory->uffd(), messages.data(), sizeof messages);
  if (n <= 0) return;  // another thread of the guest resolved it: EAGAIN
  const size_t count = static_cast<size_t>(n) / sizeof(uffd_msg);
  for (size_t i = 0; i < count && !stopped_.load(); i++) {
    const uffd_msg& message = messages[i];
    if (message.event != UFFD_EVENT_PAGEFAULT) continue;
    const uint64_t address = message.arg.pagefault.address;
    if (address < memory->base()) continue;
    const PageIndex page = (address - memory->base()) / kPageBytes;
    if (page >= options_.pages) continue;
    if ((message.arg.pagefault.flags & UFFD_PAGEFAULT_FLAG_WP) != 0) {
      on_write(page);
    } else {
      on_missing(page, absent);
    }
  }
}

void Vm::on_missing(PageIndex page, std::vector<PageIndex>* absent) {
  stats_.missing_faults.fetch_add(1, std::memory_order_relaxed);
  if (options_.replica == nullptr || options_.replica->state(page) != PageState::kAbsent) {
    resolve_missing(page);
  } else {
    absent->push_back(page);
  }
}

// Asks for these and lends the thread until none is waited for, or one of `watched` is ready.
bool Vm::fetch(std::span<const PageIndex> pages, std::span<pollfd> watched) {
  for (pollfd& fd : watched) fd.revents = 0;
  waits_->fetch_add(static_cast<uint32_t>(pages.size()));
  const auto done = [weak = weak_from_this(), waits = waits_](PageIndex page,
                                                              const Status& status) {
    waits->fetch_sub(1);
    auto self = weak.lock();
    if (self == nullptr || self->stopped_.load()) return;
    if (status.ok()) {
      if (self->options_.replica->state(page) == PageState::kPresent) {
        self->stats_.pages_fetched.fetch_add(1, std::memory_order_relaxed);
      }
      self->resolve_missing(page);
    } else if (!self->lost_.exchange(true)) {
      // The fault stays unanswered: the guest must not see anything in the page's place.
      self->emit(VmEvent::Kind::kLost, status);
    }
  };
  return options_.replica->fetch(pages, done, {*waits_, watched});
}

// The page is in the replica: whoever waits for it may look again.
void Vm::resolve_missing(PageIndex page) {
  auto memory = memory_.load();
  if (memory == nullptr) return;
  if (options_.replica != nullptr && options_.replica->state(page) == PageState::kZero) {
    stats_.zero_pages.fetch_add(1, std::memory_order_relaxed);
    memory->zero(page);
  } else {
    memory->wake(page, 1);
  }
}

// Sleeps a little for the file system to get space; false when the guest has waited long enough.
bool Vm::wait_for_space(uint32_t* waited_ms) {
  constexpr uint32_t kStepMs = 10;
  if (*waited_ms >= options_.save_wait_ms || stopped_.load()) return false;
  std::this_thread::sleep_for(std::chrono::milliseconds(kStepMs));
  *waited_ms += kStepMs;
  return true;
}

void Vm::on_write(PageIndex page) {
  stats_.wp_faults.fetch_add(1, std::memory_order_relaxed);
  auto memory = memory_.load();
  alignas(64) std::array<uint8_t, kPageBytes> old;
  uint32_t waited_ms = 0;
  for (;;) {
    {
      std::lock_guard lock(mutex_);
      if (stopped_.load()) return;
      auto chain = chain_.load();
      const size_t target = newest_active(*chain, chain->size());
      Status status;
      const bool needed = target != kNone && !saved_from(*chain, target, chain->size(), page);
      if (needed) {
        // The page is resident: its writer waits in this fault. So this read waits for nobody.
        if (memory->read(page, old.data())) {
          status = (*chain)[target]->saved->save(page, old.data());
          if (status.ok()) stats_.saved_pages.fetch_add(1, std::memory_order_relaxed);
        } else if (memory->dying()) {
          return;
        } else {
          status = Status::Error("E_IO", "cannot read a page of VM " + options_.id);
        }
      } else if (fork_ == nullptr) {
        stats_.spurious_faults.fetch_add(1, std::memory_order_relaxed);
      }
      if (status.code != "E_NO_SPACE" || waited_ms >= options_.save_wait_ms) {
        if (!status.ok()) fail_needing(page, chain->size(), status);
        if (fork_ != nullptr) {
          fork_->dirty[page / 64] |= uint64_t{1} << (page % 64);
          stats_.dirtied_pages.fetch_add(1, std::memory_order_relaxed);
        }
        memory->unprotect(page, 1);
        return;
      }
    }
    // Without the lock: what frees the space is a drop, and that needs it.
    if (!wait_for_space(&waited_ms) && stopped_.load()) return;
  }
}

}  // namespace sf
