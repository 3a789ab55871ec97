// The chain of a VM's generations: reading through it, taking one out, giving one up.
#include <array>
#include <bit>

#include "memtap/vm.h"

namespace sf {

// True if a generation in [from, to) of the chain saved the page.
bool Vm::saved_from(const Chain& chain, size_t from, size_t to, PageIndex page) {
  for (size_t i = from; i < to; i++) {
    if (chain[i]->saved->has(page)) return true;
  }
  return false;
}

// The newest active generation at an index below `before`, or kNone.
size_t Vm::newest_active(const Chain& chain, size_t before) {
  for (size_t i = before; i > 0; i--) {
    if (chain[i - 1]->state.load() == Generation::State::kActive) return i - 1;
  }
  return kNone;
}

void Vm::fail_generation(Generation& generation, const Status& status) {
  auto expected = Generation::State::kActive;
  if (!generation.state.compare_exchange_strong(expected, Generation::State::kFailed)) return;
  generation.saved->set_state(SavedPages::State::kFailed);
  emit(VmEvent::Kind::kGenerationFailed, status, generation.saved->generation());
}

// Gives up every generation below index `before` that would need the page from there or beyond.
void Vm::fail_needing(PageIndex page, size_t before, const Status& status) {
  auto chain = chain_.load();
  for (size_t i = before; i > 0; i--) {
    if ((*chain)[i - 1]->saved->has(page)) return;  // serves itself and all that are older
    fail_generation(*(*chain)[i - 1], status);
  }
}

void Vm::fail_older_than(size_t end, const Status& status) {
  auto chain = chain_.load();
  for (size_t i = 0; i < end; i++) fail_generation(*(*chain)[i], status);
}

// Copies 64 pages' worth of what `from` saved to the next older active generation (I3). Out of
// space: E_NO_SPACE, to be called again; on the last try those that would need the page are given
// up.
Status Vm::move_pages(const std::shared_ptr<Generation>& from, uint64_t word_index, bool last_try) {
  auto chain = chain_.load();
  size_t at = 0;
  while (at < chain->size() && (*chain)[at] != from) at++;
  if (at == chain->size()) return Status::Ok();  // stopped meanwhile; drop() sees it
  std::array<uint8_t, kPageBytes> data;
  for (uint64_t bits = from->saved->word(word_index); bits != 0; bits &= bits - 1) {
    const PageIndex page = word_index * 64 + static_cast<uint64_t>(std::countr_zero(bits));
    const size_t older = newest_active(*chain, at);
    if (older == kNone) return Status::Ok();
    if (saved_from(*chain, older, at, page)) continue;
    const ReadResult result = from->saved->read(page, data.data());
    Status status;
    if (result == ReadResult::kZero) data.fill(0);
    if (result == ReadResult::kError) {
      status = Status::Error("E_IO", "read a saved page of " + from->saved->generation());
    } else {
      status = (*chain)[older]->saved->save(page, data.data());
    }
    if (status.code == "E_NO_SPACE" && !last_try) return status;
    if (!status.ok()) fail_needing(page, at, status);
    stats_.moved_pages.fetch_add(1, std::memory_order_relaxed);
  }
  return Status::Ok();
}

void Vm::unlink_from_chain(const std::shared_ptr<Generation>& generation) {
  auto chain = std::make_shared<Chain>(*chain_.load());
  for (size_t i = 0; i < chain->size(); i++) {
    if ((*chain)[i] != generation) continue;
    if (i > 0) {
      const bool last = i + 1 == chain->size();
      (*chain)[i - 1]->saved->set_newer(last ? "" : (*chain)[i + 1]->saved->generation());
    }
    chain->erase(chain->begin() + static_cast<ptrdiff_t>(i));
    break;
  }
  chain_.store(std::move(chain));
}

Status Vm::drop(const std::string& name) {
  std::shared_ptr<Generation> generation;
  {
    std::lock_guard lock(mutex_);
    for (auto& g : *chain_.load()) {
      if (g->saved->generation() == name) generation = g;
    }
    if (generation == nullptr) {
      return Status::Error("E_NOT_FOUND", "VM " + options_.id + " has no generation " + name);
    }
    if (generation->state.exchange(Generation::State::kClosing) == Generation::State::kClosing) {
      return Status::Error("E_STATE", "generation " + name + " is being dropped");
    }
  }
  // Nothing is saved into it any more, so one pass over its bits finds all.
  uint32_t waited_ms = 0;
  for (uint64_t word = 0; word < (options_.pages + 63) / 64; word++) {
    if (generation->saved->word(word) == 0) continue;
    for (bool last_try = false;; last_try = !wait_for_space(&waited_ms)) {
      std::lock_guard lock(mutex_);
      if (move_pages(generation, word, last_try).ok()) break;
    }
  }
  {
    std::lock_guard lock(mutex_);
    if (stopped_.load()) return Status::Error("E_CLOSED", "VM " + options_.id + " was let go");
    unlink_from_chain(generation);
    generation->state.store(Generation::State::kDropped);
  }
  generation->saved->remove_files();
  lift_protection();
  return Status::Ok();
}

// If nobody needs protection any more, lifts it in bulk. In steps, so that a fork that begins
// meanwhile, or a fault, waits for one of them only.
void Vm::lift_protection() {
  constexpr uint64_t kStep = 2048;
  for (PageIndex first = 0; first < options_.pages; first += kStep) {
    std::lock_guard lock(mutex_);
    auto memory = memory_.load();
    auto chain = chain_.load();
    if (memory == nullptr || fork_ != nullptr || stopped_.load()) return;
    if (newest_active(*chain, chain->size()) != kNone) return;
    if (!memory->unprotect(first, std::min(kStep, options_.pages - first)).ok()) return;
  }
}

// A generation as the rest of the system reads it. JavaScript may hold it long after the generation
// is dropped: it must not keep the files' space meanwhile.
class Vm::View final : public PageProvider {
 public:
  View(const std::shared_ptr<Vm>& vm, std::weak_ptr<Generation> generation)
      : vm_(vm),
        generation_(std::move(generation)),
        closed_(vm->closed_),
        pages_(vm->options_.pages) {}
  uint64_t pages() const override { return pages_; }
  ReadResult read(PageIndex page, uint8_t* out) override {
    auto vm = vm_.lock();
    auto generation = generation_.lock();
    ReadResult result = ReadResult::kError;
    if (vm != nullptr && generation != nullptr) result = vm->read(*generation, page, out);
    // A data plane on its way out does not mean that the generation is lost.
    return result == ReadResult::kError && closed_->load() ? ReadResult::kAbsent : result;
  }

 private:
  const std::weak_ptr<Vm> vm_;
  const std::weak_ptr<Generation> generation_;
  const std::shared_ptr<const std::atomic<bool>> closed_;
  const uint64_t pages_;
};

Status Vm::provider(const std::string& name, std::shared_ptr<PageProvider>* out) {
  for (auto& generation : *chain_.load()) {
    if (generation->saved->generation() != name) continue;
    *out = std::make_shared<View>(shared_from_this(), generation);
    return Status::Ok();
  }
  return Status::Error("E_NOT_FOUND", "VM " + options_.id + " has no generation " + name);
}

ReadResult Vm::read(const Generation& generation, PageIndex page, uint8_t* out) {
  if (page >= options_.pages) return ReadResult::kError;
  ReadResult live = ReadResult::kAbsent;
  for (int round = 0; round < 2; round++) {
    auto chain = chain_.load();
    if (generation.state.load() != Generation::State::kActive) return ReadResult::kError;
    size_t at = 0;
    while (at < chain->size() && (*chain)[at].get() != &generation) at++;
    if (at == chain->size()) return ReadResult::kError;
    for (; at < chain->size(); at++) {
      const SavedPages& saved = *(*chain)[at]->saved;
      if (saved.has(page)) return saved.read(page, out);
    }
    if (round == 0) {
      live = read_live(page, out);
      std::atomic_thread_fence(std::memory_order_seq_cst);  // I2: look for copies only afterwards
    }
  }
  return live;
}

ReadResult Vm::read_live(PageIndex page, uint8_t* out) {
  if (ended_.load()) return ReadResult::kError;
  auto memory = memory_.load();
  // Adopted after a restart and its agent not back yet: that takes a moment, so ask again.
  if (memory == nullptr) return ended_.load() ? ReadResult::kError : ReadResult::kAbsent;
  stats_.live_reads.fetch_add(1, std::memory_order_relaxed);
  std::vector<Residence> where;
  if (!memory->residence(page, 1, &where)) return ReadResult::kError;
  // kReplica without a replica: not memory the agent mapped; read what is there.
  if (where[0] == Residence::kPrivate ||
      (where[0] == Residence::kReplica && options_.replica == nullptr)) {
    return memory->read(page, out) ? ReadResult::kData : ReadResult::kError;
  }
  if (where[0] != Residence::kReplica && memory->dying()) return ReadResult::kError;
  if (where[0] == Residence::kZeroPage || options_.replica == nullptr) return ReadResult::kZero;
  const ReadResult result = options_.replica->read(page, out);
  if (result == ReadResult::kAbsent) ask_replica(page);
  return result;
}

// A clone's page that not even the clone has. The reader must not wait for the network here; it
// gets kAbsent now, and the page when it asks again.
void Vm::ask_replica(PageIndex page) {
  {
    std::lock_guard lock(asked_mutex_);
    if (!asked_.insert(page).second) return;
  }
  std::weak_ptr<Vm> weak = weak_from_this();
  options_.replica->want(page, [weak, page](const Status&) {
    auto self = weak.lock();
    if (self == nullptr) return;
    std::lock_guard lock(self->asked_mutex_);
    self->asked_.erase(page);
  });
}

}  // namespace sf
