// The transmission phase of one NBD connection.
//
// One thread does all socket I/O and never blocks on a peer that does not read or write: the socket
// is polled, replies queue up. Small reads that lie in the page cache and small writes that need
// nothing from below are done on this thread, many per system call; all else is a Job for the
// export's workers, which never touch the socket. Replies leave in the order they are ready.
//
// Memory of a connection is bounded: input buffer (256 KiB), small replies (1 MiB), and jobs of at
// most 64 MiB or 128 in number. When a bound is reached no more is read from the socket.
#pragma once

#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <unordered_set>
#include <vector>

#include "blktap/nbd_handshake.h"
#include "common/fd.h"

namespace sf::nbd {

// Writes the header of a successful read into `p`, where the data already stands at its place
// behind it; returns the bytes to send. A structured answer to an all-zero read is a hole.
size_t put_read_reply(uint8_t* p, const Request& request, bool structured, bool zero);

class Connection : public std::enable_shared_from_this<Connection> {
 public:
  Connection(Exports& exports, Fd socket);
  void run();                 // until the client leaves or stop()
  void stop();                // any thread
  void complete(JobPtr job);  // any thread: `reply` is ready
  uint64_t requests() const { return requests_.load(std::memory_order_relaxed); }

 private:
  struct Out {
    std::unique_ptr<uint8_t[]> data;
    size_t size = 0;
    size_t at = 0;
    size_t capacity = 0;  // 0: a job's reply, not to be added to
    size_t budget = 0;
  };

  void transmit();
  void parse();
  void handle(const Request& request, const uint8_t* payload);
  int check(const Request& request) const;
  bool small_read(const Request& request);
  bool small_write(const Request& request, const uint8_t* data);
  void dispatch(const Request& request, std::unique_ptr<uint8_t[]> payload);
  JobPtr make_job(const Request& request, int error);
  void begin_large_write(const Request& request, int error);
  void end_large_write();
  bool room_for(size_t bytes) const;
  uint8_t* small_space(size_t bytes);  // uncommitted until small_commit()
  void small_commit(size_t bytes);
  void simple_reply(const Request& request, int error);
  void refuse(const Request& request, int error);
  void take_completions();
  bool receive();   // true if something came
  bool send_out();  // true if something went
  void wait();

  Exports& exports_;
  std::shared_ptr<Export> export_;  // once the client has chosen
  std::atomic<uint64_t> requests_{0};
  Fd socket_;
  Fd event_;
  Negotiated negotiated_;

  std::unique_ptr<uint8_t[]> in_;
  size_t in_from_ = 0;
  size_t in_to_ = 0;
  JobPtr large_;  // a write whose payload is being received
  size_t large_got_ = 0;

  std::deque<Out> out_;
  std::unique_ptr<uint8_t[]> spare_chunk_;
  size_t small_bytes_ = 0;
  std::unordered_set<JobPtr> jobs_;  // under way; keeps them alive
  size_t job_bytes_ = 0;             // of jobs under way and of their replies not yet sent
  bool stalled_ = false;             // a bound is reached
  bool closing_ = false;             // disconnect asked for: answer what is under way
  bool dead_ = false;

  std::mutex done_mutex_;
  std::vector<JobPtr> done_;
};

}  // namespace sf::nbd
