// A server's worker threads, shared by its exports.
//
// Each export has a queue of tasks, of which a few run at once; queues take turns. So a device that
// hangs keeps its own few threads and no others, as long as there are more; and exports that
// nobody uses cost none: threads are started when a task finds none free, up to a bound, and stay.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace sf::nbd {

class Workers {
 public:
  static constexpr size_t kMaxThreads = 64;
  static constexpr size_t kAtOnce = 4;  // tasks of one queue
  using Task = std::function<void()>;

  class Queue {
   public:
    explicit Queue(Workers* workers) : workers_(workers) {}
    bool post(Task task);  // false, and nothing happens, once it is closed
    void close();          // drops what has not begun, waits for what runs; not from a task

   private:
    friend class Workers;
    bool ready() const { return !tasks_.empty() && running_ < kAtOnce; }
    // All guarded by the workers' mutex_.
    Workers* const workers_;
    std::deque<Task> tasks_;
    size_t running_ = 0;
    bool listed_ = false;  // is in ready_
    bool closed_ = false;
    std::condition_variable idle_;
  };

  ~Workers() { stop(); }
  void stop();  // after all queues are closed
  // The queue must be closed before these workers go.
  std::shared_ptr<Queue> make_queue() { return std::make_shared<Queue>(this); }
  size_t threads();

 private:
  void list(Queue* queue);
  void work();

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Queue*> ready_;  // each once
  std::vector<std::thread> threads_;
  size_t free_ = 0;
  bool stopping_ = false;
};

}  // namespace sf::nbd
