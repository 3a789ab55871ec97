// The transmission phase of one NBD connection.
//
// One thread does all socket I/O and never blocks on a peer that does not read or write: replies
// queue up. Small reads that lie in the page cache and small writes that need nothing from below
// are done on this thread, many per system call. Reads that must wait for a device go through the
// thread's io_uring, straight into the replies that are sent. All else is a Job for the export's
// workers, which never touch the socket. Replies leave in the order they are ready.
//
// Two engines, one behaviour. With a ring one system call receives and waits for everything; with
// TLS, or where the kernel refuses a ring (ring.h), the socket is polled and workers wait for the
// device. A ring receives only while parse() can do nothing more with what is there, so that the
// buffer never moves under it. While nothing is under way neither is used: the thread receives from
// the plain socket and sleeps in that, after a look for the next request (nbd_spin.h).
//
// Memory of a connection is bounded: input buffer (256 KiB), small replies (1 MiB), and jobs of at
// most 64 MiB or 128 in number. When a bound is reached no more is read from the socket.
#pragma once

#include <array>
#include <atomic>
#include <deque>
#include <memory>
#include <mutex>
#include <unordered_set>
#include <vector>

#include "blktap/nbd_handshake.h"
#include "blktap/nbd_spin.h"
#include "blktap/ring.h"
#include "common/fd.h"

namespace sf::nbd {

// Writes the header of a successful read into `p`, where the data already stands at its place
// behind it; returns the bytes to send. A structured answer to an all-zero read is a hole.
size_t put_read_reply(uint8_t* p, const Request& request, bool structured, bool zero);

class Connection : public std::enable_shared_from_this<Connection> {
 public:
  Connection(Exports& exports, Fd socket, Entrance entrance);
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
  void parse_requests();
  void handle(const Request& request, const uint8_t* payload);
  int check(const Request& request) const;
  bool small_read(const Request& request);
  void collect_write(const Request& request, const uint8_t* data);
  void write_collected();
  bool ring_read(const Request& request);
  void answer(const JobPtr& job);                                 // its reply is ready
  void dispatch(const Request& request, const uint8_t* payload);  // null, or copied
  JobPtr make_job(const Request& request, int error);
  void begin_large_write(const Request& request, int error);
  void end_large_write();
  bool room_for(size_t bytes) const;
  uint8_t* small_space(size_t bytes);  // uncommitted until small_commit()
  void small_commit(size_t bytes);
  void simple_reply(const Request& request, int error);
  void refuse(const Request& request, int error);
  void take_completions();
  bool may_receive() const { return !dead_ && !closing_ && !stalled_; }
  std::pair<uint8_t*, size_t> receive_space();
  void received(ssize_t bytes);  // 0 at the end of the stream
  bool receive();                // true if something came
  bool send_out();               // true if something went
  bool quiet() const;
  void wait_quiet();
  ssize_t look(uint8_t* into, size_t bytes);
  void wait();
  void wait_ring();
  void watch_hang_up();
  bool hung_up() const;
  void clear_event();
  void wake();
  void end_ring();

  Exports& exports_;
  const Entrance entrance_;
  std::shared_ptr<Export> export_;  // once the client has chosen
  std::atomic<uint64_t> requests_{0};
  Fd socket_;
  std::unique_ptr<ByteStream> stream_;  // on the socket; not used while a ring receives from it
  Fd event_;
  Fd hang_up_;                  // made when first needed
  std::unique_ptr<Ring> ring_;  // null: the other engine
  bool plain_ = false;          // no TLS
  Spin spin_;
  uint64_t looked_at_ = 0;  // requests() then
  Negotiated negotiated_;

  std::unique_ptr<uint8_t[]> in_;
  size_t in_from_ = 0;
  size_t in_to_ = 0;
  std::array<Device::Write, Device::kMaxWrites> writes_;  // to be done together
  std::array<Request, Device::kMaxWrites> write_requests_;
  size_t collected_ = 0;
  size_t collected_bytes_ = 0;
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
