#include "blktap/nbd_workers.h"

#include <pthread.h>

#include <algorithm>
#include <system_error>
#include <utility>

namespace sf::nbd {

bool Workers::Queue::post(Task task) {
  std::lock_guard lock(workers_->mutex_);
  if (closed_) return false;
  tasks_.push_back(std::move(task));
  workers_->list(this);
  return true;
}

void Workers::Queue::close() {
  std::deque<Task> dropped;  // destroyed without the lock
  std::unique_lock lock(workers_->mutex_);
  closed_ = true;
  dropped.swap(tasks_);
  if (listed_) std::erase(workers_->ready_, this);
  listed_ = false;
  idle_.wait(lock, [&] { return running_ == 0; });
}

void Workers::list(Queue* queue) {
  if (!queue->ready()) return;
  if (!queue->listed_) {
    queue->listed_ = true;
    ready_.push_back(queue);
  }
  // A thread that was woken or just started counts as free until it runs, and what it is to take
  // counts as ready until then.
  if (ready_.size() <= free_ || threads_.size() == kMaxThreads) {
    wake_.notify_one();
    return;
  }
  try {
    threads_.emplace_back([this] {
      ::pthread_setname_np(::pthread_self(), "nbd-worker");
      work();
    });
    free_++;
  } catch (const std::system_error&) {
    // None to be had: those there are will come to it, or the next task tries again.
  }
}

void Workers::work() {
  std::unique_lock lock(mutex_);
  for (;;) {  // it is counted as free here
    wake_.wait(lock, [&] { return stopping_ || !ready_.empty(); });
    free_--;
    if (stopping_) return;
    Queue* queue = ready_.front();
    ready_.pop_front();
    queue->listed_ = false;
    Task task = std::move(queue->tasks_.front());
    queue->tasks_.pop_front();
    queue->running_++;
    list(queue);
    lock.unlock();
    task();
    task = nullptr;
    lock.lock();
    free_++;
    queue->running_--;
    if (queue->running_ == 0 && queue->closed_) queue->idle_.notify_all();
    list(queue);  // may be for this very thread
  }
}

void Workers::stop() {
  std::vector<std::thread> threads;
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    threads.swap(threads_);
  }
  wake_.notify_all();
  for (auto& thread : threads) thread.join();
}

size_t Workers::threads() {
  std::lock_guard lock(mutex_);
  return threads_.size();
}

}  // namespace sf::nbd
