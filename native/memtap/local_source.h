// Fills a replica from a provider in the same process: a clone on its parent's own host, and every
// test that wants a clone without a network.
//
// One thread, one queue of pages; faults go before prefetches. The queue is bounded by the pages of
// the generation: a page is in it once. A page the provider does not have yet (a clone's, being
// fetched itself) is asked again until `patience`; then, or on an error, the source is lost.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_set>

#include "pagestore/replica.h"

namespace sf {

class LocalSource final : public PageFetcher {
 public:
  static Status Open(std::shared_ptr<Replica> replica, std::shared_ptr<PageProvider> provider,
                     std::chrono::milliseconds patience, std::unique_ptr<LocalSource>* out);
  ~LocalSource() override;  // waits for the page under way

  void want(PageIndex page, Urgency urgency) override;
  uint64_t served() const { return served_.load(std::memory_order_relaxed); }

 private:
  LocalSource() = default;
  void run();
  bool serve(PageIndex page, Urgency urgency);

  std::shared_ptr<Replica> replica_;
  std::shared_ptr<PageProvider> provider_;
  std::chrono::milliseconds patience_{0};
  std::atomic<uint64_t> served_{0};

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<PageIndex> faults_;
  std::deque<PageIndex> prefetches_;
  std::unordered_set<PageIndex> queued_;
  bool closing_ = false;
  std::thread thread_;
};

}  // namespace sf
