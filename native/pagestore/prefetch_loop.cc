#include "pagestore/prefetch_loop.h"

#include <algorithm>

namespace sf {

std::shared_ptr<PrefetchLoop> PrefetchLoop::Shared() {
  static std::mutex mutex;
  static std::weak_ptr<PrefetchLoop> shared;
  std::lock_guard lock(mutex);
  auto loop = shared.lock();
  if (loop == nullptr) {
    loop.reset(new PrefetchLoop());
    shared = loop;
  }
  return loop;
}

PrefetchLoop::PrefetchLoop() : thread_([this] { run(); }) {}

PrefetchLoop::~PrefetchLoop() {
  {
    std::lock_guard lock(mutex_);
    ending_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void PrefetchLoop::add(Prefetcher* prefetcher) {
  std::lock_guard lock(mutex_);
  entries_.push_back({prefetcher, Clock::time_point::max()});
}

void PrefetchLoop::remove(Prefetcher* prefetcher) {
  std::unique_lock lock(mutex_);
  turned_.wait(lock, [&] { return running_ != prefetcher; });
  std::erase_if(entries_, [&](const Entry& entry) { return entry.prefetcher == prefetcher; });
}

void PrefetchLoop::wake(Prefetcher* prefetcher) {
  std::lock_guard lock(mutex_);
  for (Entry& entry : entries_) {
    if (entry.prefetcher != prefetcher) continue;
    entry.due = std::min(entry.due, Clock::now());
    entry.woken = true;
    changed_.notify_all();
  }
}

void PrefetchLoop::run() {
  std::unique_lock lock(mutex_);
  while (!ending_) {
    // The one that has been due longest: so all get their turns. There are as many as replicas.
    auto next = std::min_element(entries_.begin(), entries_.end(),
                                 [](const Entry& a, const Entry& b) { return a.due < b.due; });
    if (next == entries_.end() || next->due == Clock::time_point::max()) {
      changed_.wait(lock);
      continue;
    }
    Clock::time_point now = Clock::now();
    if (next->due > now) {
      changed_.wait_until(lock, next->due);
      continue;
    }
    Prefetcher* prefetcher = running_ = next->prefetcher;
    next->woken = false;
    lock.unlock();
    const Clock::time_point due = prefetcher->turn(now);
    lock.lock();
    running_ = nullptr;
    for (Entry& entry : entries_) {
      // Woken meanwhile: at once again, but after those that waited.
      if (entry.prefetcher == prefetcher) entry.due = entry.woken ? now : due;
    }
    turned_.notify_all();
  }
}

}  // namespace sf
