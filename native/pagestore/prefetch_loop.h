// The thread that gives all prefetchers of a process their turns. It lives while there is one.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "pagestore/prefetcher.h"

namespace sf {

class PrefetchLoop {
 public:
  static std::shared_ptr<PrefetchLoop> Shared();
  ~PrefetchLoop();

  void add(Prefetcher* prefetcher);
  // Waits for its turn to end if it has one just now; not to be called from within.
  void remove(Prefetcher* prefetcher);
  void wake(Prefetcher* prefetcher);

 private:
  using Clock = Prefetcher::Clock;
  struct Entry {
    Prefetcher* prefetcher;
    Clock::time_point due;
    bool woken = false;  // during its turn
  };
  PrefetchLoop();
  void run();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::condition_variable turned_;
  std::vector<Entry> entries_;
  Prefetcher* running_ = nullptr;
  bool ending_ = false;
  std::thread thread_;
};

}  // namespace sf
