#include "blktap/ring.h"

#include <errno.h>
#include <poll.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "blktap/data_file.h"

namespace sf {
namespace {

constexpr unsigned kEntries = 256;  // more than slots, polls and the receive together
// user_data: a slot's number, or one of these.
constexpr uint64_t kReceive = 1u << 16;
constexpr uint64_t kPoll = 1u << 17;
constexpr size_t kMaxPiece = 1u << 30;  // the kernel reads at most 2 GiB at once

}  // namespace

std::unique_ptr<Ring> Ring::Make() {
  const char* wanted = std::getenv("SNOWFLOCK_IO_URING");
  if (wanted != nullptr && std::strcmp(wanted, "0") == 0) return nullptr;
  std::unique_ptr<Ring> ring(new Ring());
  // Completions are handled when this thread asks for them and not by interrupting it (Linux 6.1).
  unsigned flags = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN;
  int error = io_uring_queue_init(kEntries, &ring->ring_, flags);
  if (error == -EINVAL) error = io_uring_queue_init(kEntries, &ring->ring_, 0);
  if (error < 0) return nullptr;
  ring->made_ = true;
  io_uring_register_ring_fd(&ring->ring_);  // saves a look-up a call; a refusal costs only that
  for (unsigned slot = kSlots; slot > 0; slot--) ring->free_.push_back(slot - 1);
  return ring;
}

Ring::~Ring() {
  if (made_) io_uring_queue_exit(&ring_);
}

io_uring_sqe* Ring::entry() {
  // Never null: what can be under way at once fits the queue.
  return io_uring_get_sqe(&ring_);
}

void Ring::receive(int socket, uint8_t* into, size_t bytes) {
  io_uring_sqe* sqe = entry();
  io_uring_prep_recv(sqe, socket, into, bytes, 0);
  io_uring_sqe_set_data64(sqe, kReceive);
  receiving_ = true;
}

void Ring::poll(Poll which, int fd, short events) {
  io_uring_sqe* sqe = entry();
  io_uring_prep_poll_add(sqe, fd, static_cast<unsigned>(events));
  io_uring_sqe_set_data64(sqe, kPoll + which);
  polling_[which] = true;
}

void Ring::read(ReadPlan plan, Done done) {
  auto read = std::make_shared<Read>();
  read->plan = std::move(plan);
  read->done = std::move(done);
  waiting_.push_back(std::move(read));
  fill_slots();
}

void Ring::fill_slots() {
  while (!waiting_.empty()) {
    auto& read = waiting_.front();
    auto& segments = read->plan.segments;
    while (read->next < segments.size() && read->error == 0 && !free_.empty()) {
      const ReadSegment& segment = segments[read->next++];
      if (segment.file.in_memory()) {
        read->error =
            segment.file.read(segment.offset, segment.bytes, segment.into, ReadMode::kBlock);
        if (read->error != 0 && segment.owner != nullptr) segment.owner->read_failed(read->error);
        continue;
      }
      const unsigned slot = free_.back();
      free_.pop_back();
      slots_[slot] = {read, segment};
      read->pending++;
      submit_slot(slot);
    }
    if (read->next < segments.size() && read->error == 0) return;  // no slot is free
    const auto submitted = std::move(read);
    waiting_.pop_front();
    if (submitted->pending == 0) submitted->done(submitted->error);
  }
}

void Ring::submit_slot(unsigned slot) {
  const ReadSegment& segment = slots_[slot].segment;
  io_uring_sqe* sqe = entry();
  io_uring_prep_read(sqe, segment.file.fd, segment.into,
                     static_cast<unsigned>(std::min(segment.bytes, kMaxPiece)), segment.offset);
  io_uring_sqe_set_data64(sqe, slot);
}

void Ring::slot_done(unsigned slot, int result) {
  ReadSegment& segment = slots_[slot].segment;
  if (result == -EINTR || result == -EAGAIN) return submit_slot(slot);
  if (result > 0 && static_cast<size_t>(result) < segment.bytes) {
    segment.offset += static_cast<unsigned>(result);
    segment.into += result;
    segment.bytes -= static_cast<unsigned>(result);
    return submit_slot(slot);
  }
  const std::shared_ptr<Read> read = std::move(slots_[slot].read);
  free_.push_back(slot);
  if (result <= 0) {
    const int error = result == 0 ? EIO : -result;
    if (segment.owner != nullptr) segment.owner->read_failed(error);
    if (read->error == 0) read->error = error;
  }
  read->pending--;
  const bool submitted = read->next == read->plan.segments.size() || read->error != 0;
  // A failed one that still has its place in the queue is finished there.
  if (read->pending == 0 && submitted && (waiting_.empty() || waiting_.front() != read)) {
    read->done(read->error);
  }
}

void Ring::abandon() {
  for (const auto& read : waiting_) read->error = ESHUTDOWN;
  fill_slots();
}

bool Ring::idle() const {
  return !receiving_ && free_.size() == kSlots && waiting_.empty() &&
         std::none_of(polling_.begin(), polling_.end(), [](bool is) { return is; });
}

int Ring::wait(Turn* turn) {
  const int submitted = io_uring_submit_and_wait(&ring_, 1);
  *turn = {};
  // Interrupted, or short of memory just now: what was not submitted is so the next time.
  if (submitted < 0 && submitted != -EINTR && submitted != -EAGAIN && submitted != -EBUSY) {
    return -submitted;
  }
  io_uring_cqe* cqe = nullptr;
  while (io_uring_peek_cqe(&ring_, &cqe) == 0) {
    const uint64_t what = io_uring_cqe_get_data64(cqe);
    const int result = cqe->res;
    io_uring_cqe_seen(&ring_, cqe);
    if (what == kReceive) {
      receiving_ = false;
      turn->received = result;
    } else if (what >= kPoll) {
      polling_[what - kPoll] = false;
      turn->polled[what - kPoll] = true;
    } else {
      slot_done(static_cast<unsigned>(what), result);
    }
  }
  fill_slots();
  return 0;
}

}  // namespace sf
