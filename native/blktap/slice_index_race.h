// Checks SliceIndex's thread rules under load: the owner changes its index while other threads
// read, copy and drop copies of it. Free of JavaScript, so that it can be built with a sanitizer.
#pragma once

#include <condition_variable>
#include <deque>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "blktap/slice_index.h"

namespace sf {

// The number of wrong answers that `readers` threads got from `copies` copies of an index of
// `pages` pages (few: each copy comes with its whole truth).
inline uint64_t race_slice_index(uint64_t pages, unsigned readers, unsigned copies, uint32_t seed) {
  struct Copy {
    SliceIndex index;
    std::vector<SliceIndex::Entry> truth;
  };
  constexpr size_t kWaiting = 32;
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Copy> waiting;
  bool over = false;
  std::atomic<uint64_t> wrong{0};
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < readers; i++) {
    threads.emplace_back([&] {
      while (true) {
        std::unique_lock lock(mutex);
        changed.wait(lock, [&] { return over || !waiting.empty(); });
        if (waiting.empty()) return;
        Copy copy = std::move(waiting.front());
        waiting.pop_front();
        lock.unlock();
        changed.notify_all();
        const SliceIndex second = copy.index;
        for (PageIndex page = 0; page < pages; page++) {
          if (second.get(page) != copy.truth[page]) wrong++;
        }
      }
    });
  }
  std::mt19937 random(seed);
  Copy own{SliceIndex(pages), std::vector<SliceIndex::Entry>(pages, SliceIndex::kBase)};
  for (unsigned i = 0; i < copies; i++) {
    for (unsigned change = 0; change < 20; change++) {
      const PageIndex first = random() % pages;
      const uint64_t count = 1 + random() % std::min<uint64_t>(200, pages - first);
      const uint32_t kind = random() % 8;
      const SliceIndex::Entry entry = kind == 0   ? SliceIndex::kZero
                                      : kind == 1 ? SliceIndex::kBase
                                                  : 1 + i / 4;
      own.index.set(first, kind < 5 ? 1 : count, entry);
      std::fill_n(own.truth.begin() + static_cast<ptrdiff_t>(first), kind < 5 ? 1 : count, entry);
    }
    Copy copy = own;
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return waiting.size() < kWaiting; });
    waiting.push_back(std::move(copy));
    lock.unlock();
    changed.notify_all();
  }
  {
    std::lock_guard lock(mutex);
    over = true;
  }
  changed.notify_all();
  for (auto& thread : threads) thread.join();
  for (PageIndex page = 0; page < pages; page++) {
    if (own.index.get(page) != own.truth[page]) wrong++;
  }
  return wrong;
}

}  // namespace sf
