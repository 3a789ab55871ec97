// The io_uring of one connection's thread: receives, polls, and reads of a plan (read_plan.h).
//
// One system call a turn submits what is new and waits for what is done. Reads of files that are
// not in the page cache wait on the device here, all at once, with no thread of their own. Slots
// bound what the kernel has in hand (kSlots); the rest of a plan queues behind, in order of its
// requests.
//
// Rules:
//  - All calls are made by one thread, the one that called Make().
//  - The kernel writes into what receive() and read() were given until they are reported: the owner
//    keeps that alive, and before it goes it makes all of it end (abandon(), then wait() until
//    idle()).
// Files that live in memory are read at once: no device, nothing to wait for.
// Left out: sending through the ring (sendmsg is done when it returns, most often), registered
// files and buffers (slices come and go; a reply's buffer lives as long as the reply).
#pragma once

#include <liburing.h>

#include <array>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "blktap/read_plan.h"

namespace sf {

class Ring {
 public:
  enum Poll : uint8_t { kEvent, kWritable, kHangUp, kPolls };
  using Done = std::function<void(int error)>;

  // What wait() found.
  struct Turn {
    std::optional<int> received;  // bytes, 0 at the end of the stream, or a negative errno
    std::array<bool, kPolls> polled = {};
  };

  // Null if the kernel refuses (ENOSYS, EPERM, a seccomp filter, a limit) or SNOWFLOCK_IO_URING=0.
  static std::unique_ptr<Ring> Make();
  ~Ring();

  void receive(int socket, uint8_t* into, size_t bytes);  // one at a time
  void poll(Poll which, int fd, short events);            // once; one of each kind at a time
  bool receiving() const { return receiving_; }
  bool polling(Poll which) const { return polling_[which]; }
  // `done` is called by wait(), or at once, with 0 or an errno. A short file is EIO, never zeros.
  void read(ReadPlan plan, Done done);
  void abandon();     // reads not yet submitted end with ESHUTDOWN
  bool idle() const;  // the kernel has nothing of ours in hand

  // Submits, waits for at least one completion. 0 or an errno.
  int wait(Turn* turn);

 private:
  static constexpr unsigned kSlots = 128;
  struct Read {
    ReadPlan plan;
    Done done;
    size_t next = 0;     // first segment not yet submitted
    size_t pending = 0;  // segments in the kernel's hands
    int error = 0;
  };
  struct Slot {
    std::shared_ptr<Read> read;
    ReadSegment segment;
  };

  Ring() = default;
  io_uring_sqe* entry();
  void submit_slot(unsigned slot);
  void fill_slots();
  void slot_done(unsigned slot, int result);

  io_uring ring_ = {};
  bool made_ = false;
  bool receiving_ = false;
  std::array<bool, kPolls> polling_ = {};
  std::array<Slot, kSlots> slots_;
  std::vector<unsigned> free_;
  std::deque<std::shared_ptr<Read>> waiting_;  // with segments not yet submitted
};

}  // namespace sf
