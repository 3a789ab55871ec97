// One exported device: its connections, and the requests that wait for something.
//
// States: open -> closed (close(): removed from the server, or the server ends). A connection is
// admitted when its client chose this export, and counts until it has left.
//
// A request that cannot be answered at once on the connection's thread becomes a Job. It runs on
// one of the server's workers, or waits, holding none of them, for pages of a replica. Flushes (and
// the flush that FUA implies) go through a queue: one at a time, and all that were asked for while
// one runs are answered by the next.
//
// A job belongs to its connection: when that goes, so do its jobs, also those that wait. What stays
// in the wait table is one weak reference each, swept when the page is asked for again.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "blktap/device.h"
#include "blktap/nbd_proto.h"
#include "blktap/nbd_workers.h"

namespace sf::nbd {

class Connection;

struct ExportInfo {
  std::string name;
  std::string description;
  size_t max_connections = 64;
  bool is_default = false;  // what the empty name stands for
  uint64_t size = 0;        // this and the next are taken from the device
  bool writable = false;
};

struct ExportStats {
  size_t connections = 0;
  uint64_t accepted = 0;  // connections so far
  uint64_t requests = 0;
};

struct Job {
  std::weak_ptr<Connection> connection;
  Request request;
  bool structured = false;
  uint8_t contexts = 0;                // metadata contexts, of BLOCK_STATUS
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
  enum class Admission : uint8_t { kIn, kFull, kClosed };

  Export(ExportInfo info, std::shared_ptr<Device> device, Workers* workers)
      : info_(std::move(info)), device_(std::move(device)), queue_(workers->make_queue()) {}
  // Ends its connections and waits until they have left and no request is carried out any more;
  // jobs not begun are dropped, unanswered. Then it lets go of the device: whoever still has this
  // export (a connection's thread that is just ending) must not keep a closed disk from being
  // opened again. To be called once, before the last reference goes.
  void close();

  const ExportInfo& info() const { return info_; }
  Device& device() { return *device_; }
  ExportStats stats();
  Admission admit(const std::shared_ptr<Connection>& connection);
  void leave(Connection* connection);
  void submit(JobPtr job);

 private:
  void run(const JobPtr& job);
  void queue(Workers::Task task);
  bool wait_for_pages(const JobPtr& job, uint64_t bytes, Device::Access access);
  void arrived(PageIndex page, bool ok);
  void queue_flush(const JobPtr& job);
  void flush_all();
  void finish(const JobPtr& job, int error);

  const ExportInfo info_;
  std::shared_ptr<Device> device_;  // until closed
  const std::shared_ptr<Workers::Queue> queue_;

  std::mutex connections_mutex_;  // guards the five below
  std::condition_variable left_;
  std::unordered_map<Connection*, std::weak_ptr<Connection>> connections_;
  uint64_t accepted_ = 0;
  uint64_t past_requests_ = 0;  // of connections that have left
  bool closed_ = false;

  std::mutex wait_mutex_;
  std::unordered_map<PageIndex, std::vector<std::weak_ptr<Job>>> waiting_;

  std::mutex flush_mutex_;  // guards the two below
  std::vector<JobPtr> flushes_;
  bool flushing_ = false;
};

uint32_t wire_error(int error);  // errno as the protocol's error number

// Writes the reply to a request that failed, at most kMaxErrorReply bytes; returns how many.
constexpr size_t kMaxErrorReply = kChunkHeaderBytes + 6;
size_t put_error_reply(uint8_t* p, const Request& request, bool structured, int error);

}  // namespace sf::nbd
