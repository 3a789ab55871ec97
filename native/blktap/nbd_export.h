// One exported device: its workers, and the requests that wait for something.
//
// A request that cannot be answered at once on the connection's thread becomes a Job. It runs on
// one of a few worker threads, or waits, holding none of them, for pages of a replica. Flushes (and
// the flush that FUA implies) go through a queue: one at a time, and all that were asked for while
// one runs are answered by the next.
//
// A job belongs to its connection: when that goes, so do its jobs, also those that wait. What stays
// in the wait table is one weak reference each, swept when the page is asked for again.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "blktap/device.h"
#include "blktap/nbd_handshake.h"

namespace sf::nbd {

class Connection;

struct Job {
  std::weak_ptr<Connection> connection;
  Request request;
  bool structured = false;
  std::unique_ptr<uint8_t[]> payload;  // of a write
  std::unique_ptr<uint8_t[]> reply;
  size_t reply_bytes = 0;
  int error = 0;
  size_t budget = 0;  // what it counts against its connection's memory

  std::atomic<uint64_t> waiting{0};
  std::atomic<bool> wait_failed{false};
};
using JobPtr = std::shared_ptr<Job>;

class Export : public std::enable_shared_from_this<Export> {
 public:
  Export(ExportInfo info, std::shared_ptr<Device> device)
      : info_(std::move(info)), device_(std::move(device)) {}
  ~Export();
  void start(unsigned workers);
  void stop();  // jobs not begun are dropped, unanswered

  const ExportInfo& info() const { return info_; }
  Device& device() { return *device_; }
  void submit(JobPtr job);

 private:
  void work();
  void run(const JobPtr& job);
  void queue(std::function<void()> task);
  bool wait_for_pages(const JobPtr& job, Device::Access access);
  void arrived(PageIndex page, bool ok);
  void queue_flush(const JobPtr& job);
  void flush_all();
  void block_status(const JobPtr& job);
  void finish(const JobPtr& job, int error);

  const ExportInfo info_;
  const std::shared_ptr<Device> device_;

  std::mutex mutex_;  // guards tasks_ and stopping_
  std::condition_variable wake_;
  std::deque<std::function<void()>> tasks_;
  bool stopping_ = false;
  std::vector<std::thread> workers_;

  std::mutex wait_mutex_;
  std::unordered_map<PageIndex, std::vector<std::weak_ptr<Job>>> waiting_;

  std::mutex flush_mutex_;  // guards the two below
  std::vector<JobPtr> flushes_;
  bool flushing_ = false;
};

uint32_t wire_error(int error);  // errno as the protocol's error number

// Fill in job->reply.
void reply_simple(Job* job, int error);
void reply_error(Job* job, int error);  // of a command whose replies are structured

}  // namespace sf::nbd
