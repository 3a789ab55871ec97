// Lets a writer wait until all reads that were under way are over, while a read costs two atomic
// additions and never waits (sleepable RCU, McKenney 2006).
//
// A reader is in a Section from before it looks a page up until it has the page's bytes. Whoever
// changed where pages lie calls synchronize() before it destroys, or writes over, the old place:
// then every reader that may have seen the old place is gone, and new ones see the new one.
//
// Two counters take turns. A reader that chose a counter just before a turn may count in it just
// after; therefore synchronize() waits for both, one after the other.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <thread>
#include <utility>

namespace sf {

class ReadGate {
  struct alignas(64) Shard {
    std::atomic<int64_t> readers[2] = {0, 0};
  };

 public:
  // May be moved to, and end on, another thread.
  class Section {
   public:
    explicit Section(ReadGate& gate) {
      Shard& shard = gate.shards_[shard_number()];
      counter_ = &shard.readers[gate.turn_.load() & 1];
      counter_->fetch_add(1);
    }
    Section(Section&& other) noexcept : counter_(std::exchange(other.counter_, nullptr)) {}
    Section(const Section&) = delete;
    Section& operator=(const Section&) = delete;
    Section& operator=(Section&&) = delete;
    ~Section() {
      if (counter_ != nullptr) counter_->fetch_sub(1);
    }

   private:
    std::atomic<int64_t>* counter_;
  };

  // False if reads that were under way are not over after `limit`.
  bool synchronize(std::chrono::milliseconds limit) {
    const auto deadline = std::chrono::steady_clock::now() + limit;
    std::lock_guard lock(mutex_);
    for (int turn = 0; turn < 2; turn++) {
      const unsigned old = turn_.fetch_add(1) & 1;
      for (auto& shard : shards_) {
        while (shard.readers[old].load() != 0) {
          if (std::chrono::steady_clock::now() > deadline) return false;
          std::this_thread::sleep_for(std::chrono::microseconds(50));
        }
      }
    }
    return true;
  }

 private:
  static unsigned shard_number() {
    static std::atomic<unsigned> next{0};
    thread_local const unsigned mine = next.fetch_add(1) % kShards;
    return mine;
  }
  static constexpr unsigned kShards = 16;
  std::array<Shard, kShards> shards_;
  std::atomic<unsigned> turn_{0};
  std::mutex mutex_;
};

}  // namespace sf
