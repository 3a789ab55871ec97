#include "blktap/nbd_connection.h"

#include <errno.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <algorithm>
#include <cstdlib>
#include <new>

namespace sf::nbd {
namespace {

constexpr size_t kInBytes = 256 * 1024;
constexpr size_t kSmallRead = 32 * 1024;
constexpr size_t kSmallWrite = 64 * 1024;
constexpr size_t kRingRead = 1 << 20;  // above: a worker's, so that others are not held up
constexpr size_t kChunkBytes = 128 * 1024;
constexpr size_t kMaxSmallBytes = 1 << 20;
constexpr size_t kMaxJobBytes = 64u << 20;
constexpr size_t kMaxJobs = 128;
constexpr size_t kMaxReplyHead = kChunkHeaderBytes + 8;
static_assert(kInBytes >= 2 * (kSmallWrite + kRequestBytes));
static_assert(kChunkBytes >= kSmallRead + kMaxReplyHead);

}  // namespace

size_t put_read_reply(uint8_t* p, const Request& request, bool structured, bool zero) {
  if (!structured) {
    put_simple_reply(p, request.cookie, 0);
    return kSimpleReplyBytes + request.length;
  }
  const uint32_t payload = zero ? 12 : 8 + request.length;
  put_chunk(p, kChunkDone, zero ? kChunkHole : kChunkData, request.cookie, payload);
  put64(p + kChunkHeaderBytes, request.offset);
  if (zero) put32(p + kChunkHeaderBytes + 8, request.length);
  return kChunkHeaderBytes + payload;
}

Connection::Connection(Exports& exports, Fd socket, Entrance entrance)
    : exports_(exports),
      entrance_(std::move(entrance)),
      socket_(std::move(socket)),
      stream_(new SocketStream(socket_.get())),
      event_(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
      in_(new uint8_t[kInBytes]) {}

void Connection::stop() { ::shutdown(socket_.get(), SHUT_RDWR); }

void Connection::run() {
  Handshake handshake(*stream_, exports_, shared_from_this(), entrance_);
  const bool entered = event_.valid() && handshake.run(&negotiated_);
  export_ = handshake.exported();
  auto tls = handshake.take_tls();
  plain_ = tls == nullptr;
  if (!plain_) stream_ = std::move(tls);
  if (entered) {
    if (plain_) ring_ = Ring::Make();
    transmit();
    end_ring();
  }
  stream_->goodbye();
  ::shutdown(socket_.get(), SHUT_RDWR);
  if (export_ != nullptr) export_->leave(this);
}

void Connection::transmit() {
  for (;;) {
    take_completions();
    parse();
    const bool sent = send_out();
    if (dead_ || (closing_ && jobs_.empty() && out_.empty())) return;
    if (stalled_ && sent) continue;  // there may be room now
    if (quiet()) {
      wait_quiet();
    } else if (ring_ != nullptr) {
      wait_ring();
    } else if (!receive()) {
      wait();
    }
  }
}

// Whatever the kernel still has in hand ends, and with it its use of our buffers.
void Connection::end_ring() {
  if (ring_ == nullptr) return;
  ::shutdown(socket_.get(), SHUT_RDWR);
  ring_->abandon();
  Ring::Turn turn;
  while (!ring_->idle()) {
    wake();
    if (ring_->wait(&turn) != 0) std::abort();  // going on would let it write into freed memory
  }
  ring_.reset();
}

void Connection::complete(JobPtr job) {
  std::lock_guard lock(done_mutex_);
  done_.push_back(std::move(job));
  if (done_.size() == 1) wake();  // else it was woken already
}

void Connection::wake() {
  const uint64_t one = 1;
  // It can fail only when the counter is full, and then the thread is woken anyway.
  if (::write(event_.get(), &one, sizeof one) < 0) return;
}

void Connection::clear_event() {
  uint64_t count = 0;
  if (::read(event_.get(), &count, sizeof count) < 0 && errno != EAGAIN) dead_ = true;
}

void Connection::take_completions() {
  std::vector<JobPtr> done;
  {
    std::lock_guard lock(done_mutex_);
    done.swap(done_);
  }
  for (auto& job : done) answer(job);
}

void Connection::answer(const JobPtr& job) {
  if (job->reply_bytes <= kMaxErrorReply) {  // many such answers share a buffer
    std::memcpy(small_space(job->reply_bytes), job->reply.get(), job->reply_bytes);
    small_commit(job->reply_bytes);
    job_bytes_ -= job->budget;
  } else {
    Out out;
    out.data = std::move(job->reply);
    out.size = job->reply_bytes;
    // An answer that nobody reads takes memory too, also where the request told nothing of it.
    out.budget = std::max(job->budget, job->reply_bytes + sizeof(Out));
    job_bytes_ += out.budget - job->budget;
    out_.push_back(std::move(out));
  }
  jobs_.erase(job);
}

bool Connection::room_for(size_t bytes) const {
  // Of the collected writes each may become a job.
  return jobs_.size() + collected_ < kMaxJobs &&
         job_bytes_ + collected_bytes_ + bytes <= kMaxJobBytes;
}

void Connection::parse_requests() {
  stalled_ = false;
  while (!dead_ && !closing_ && large_ == nullptr && in_to_ - in_from_ >= kRequestBytes) {
    Request request;
    if (!parse_request(in_.get() + in_from_, &request)) {
      dead_ = true;
      return;
    }
    const uint32_t payload = request.type == kWrite ? request.length : 0;
    if (payload > kMaxRequestBytes) {
      dead_ = true;  // cannot be answered without reading it all
      return;
    }
    const bool large = request.type == kRead || request.type == kCache;
    const uint32_t reply = large ? request.length : 0;
    if (small_bytes_ > kMaxSmallBytes || !room_for(payload + std::min(reply, kMaxRequestBytes))) {
      stalled_ = true;
      return;
    }
    if (payload > kSmallWrite) {
      in_from_ += kRequestBytes;
      begin_large_write(request, check(request));
      continue;
    }
    if (in_to_ - in_from_ < kRequestBytes + payload) return;
    const uint8_t* data = in_.get() + in_from_ + kRequestBytes;
    in_from_ += kRequestBytes + payload;
    handle(request, data);
  }
}

void Connection::parse() {
  parse_requests();
  write_collected();
}

// What the protocol wants for requests that cannot be served; 0 if it can.
int Connection::check(const Request& request) const {
  const Device& device = export_->device();
  // FUA means something for writes only, but is valid everywhere once it was offered.
  uint16_t flags = device.writable() ? kFlagFua : 0;
  bool writes = false;
  switch (request.type) {
    case kRead:
      if (negotiated_.structured) flags |= kFlagDf;
      // More than the advertised maximum. EOVERFLOW is for clients that were offered DF.
      if (request.length > kMaxRequestBytes) return negotiated_.structured ? EOVERFLOW : EINVAL;
      break;
    case kCache:
      break;
    case kWrite:
    case kTrim:
      writes = true;
      break;
    case kWriteZeroes:
      flags |= kFlagNoHole | kFlagFastZero;
      writes = true;
      break;
    case kBlockStatus:
      flags |= kFlagReqOne;
      if (negotiated_.contexts == 0) return EINVAL;
      break;
    case kFlush:
      if (request.offset != 0 || request.length != 0) return EINVAL;
      return (request.flags & ~flags) != 0 ? EINVAL : 0;
    default:
      return EINVAL;
  }
  if (writes && !device.writable()) return EPERM;
  if ((request.flags & ~flags) != 0 || request.length == 0) return EINVAL;
  if (request.offset > device.size() || request.length > device.size() - request.offset) {
    return writes && request.type != kTrim ? ENOSPC : EINVAL;
  }
  return 0;
}

void Connection::handle(const Request& request, const uint8_t* payload) {
  if (request.type == kDisconnect) {
    closing_ = true;
    return;
  }
  requests_.store(requests() + 1, std::memory_order_relaxed);  // of this thread alone
  const int error = check(request);
  if (error == 0 && request.type == kWrite && (request.flags & kFlagFua) == 0) {
    return collect_write(request, payload);
  }
  write_collected();
  if (error != 0) return refuse(request, error);
  if (request.type == kRead && request.length <= kSmallRead && small_read(request)) return;
  if (request.type == kRead && request.length <= kRingRead && ring_read(request)) return;
  dispatch(request, request.type == kWrite ? payload : nullptr);
}

bool Connection::small_read(const Request& request) {
  const size_t head = negotiated_.structured ? kMaxReplyHead : kSimpleReplyBytes;
  uint8_t* space = small_space(head + request.length);
  bool zero = false;
  const int error = export_->device().read(request.offset, request.length, space + head,
                                           ReadMode::kNowait, &zero);
  if (error != 0) return false;  // the slow path finds out what it is
  small_commit(put_read_reply(space, request, negotiated_.structured, zero));
  return true;
}

// False if a worker must do it: the kernel gives no ring, or pages have to be fetched first.
bool Connection::ring_read(const Request& request) {
  if (ring_ == nullptr) return false;
  const size_t head = negotiated_.structured ? kMaxReplyHead : kSimpleReplyBytes;
  std::unique_ptr<uint8_t[]> reply(new (std::nothrow) uint8_t[head + request.length]);
  if (reply == nullptr) return false;
  ReadPlan plan;
  if (export_->device().plan_read(request.offset, request.length, reply.get() + head, &plan) != 0) {
    return false;
  }
  JobPtr job = make_job(request, 0);
  job->reply = std::move(reply);
  const bool zero = plan.segments.empty();
  ring_->read(std::move(plan), [this, job, zero](int result) {
    const int error = export_->device().carried_out(result);
    if (error == 0) {
      job->reply_bytes = put_read_reply(job->reply.get(), job->request, job->structured, zero);
    } else {
      // The buffer has room: it was made for the data.
      job->reply_bytes = put_error_reply(job->reply.get(), job->request, job->structured, error);
    }
    answer(job);
  });
  return true;
}

// The payload stays in the buffer for as long as parse() runs.
void Connection::collect_write(const Request& request, const uint8_t* data) {
  if (collected_ == writes_.size()) write_collected();
  write_requests_[collected_] = request;
  writes_[collected_++] = {request.offset, request.length, data};
  collected_bytes_ += request.length;
}

void Connection::write_collected() {
  if (collected_ == 0) return;
  export_->device().write_many({writes_.data(), collected_});
  for (size_t i = 0; i < collected_; i++) {
    if (writes_[i].error == EAGAIN) {
      dispatch(write_requests_[i], writes_[i].data);
    } else {
      simple_reply(write_requests_[i], writes_[i].error);
    }
  }
  collected_ = 0;
  collected_bytes_ = 0;
}

JobPtr Connection::make_job(const Request& request, int error) {
  auto job = std::make_shared<Job>();
  job->connection = weak_from_this();
  job->request = request;
  job->structured = negotiated_.structured;
  job->contexts = negotiated_.contexts;
  job->error = error;
  // What it will hold at most: a write's payload, a read's reply. What is cached is no memory of
  // ours, but it waits for as many pages as a read.
  if (request.type == kWrite || request.type == kRead) job->budget = request.length;
  if (request.type == kCache) job->budget = std::min(request.length, kMaxRequestBytes);
  job_bytes_ += job->budget;
  jobs_.insert(job);
  return job;
}

void Connection::dispatch(const Request& request, const uint8_t* payload) {
  JobPtr job = make_job(request, 0);
  if (payload != nullptr) {
    job->payload.reset(new uint8_t[request.length]);
    std::memcpy(job->payload.get(), payload, request.length);
  }
  export_->submit(std::move(job));
}

void Connection::begin_large_write(const Request& request, int error) {
  std::unique_ptr<uint8_t[]> payload(new (std::nothrow) uint8_t[request.length]);
  if (payload == nullptr) {
    dead_ = true;
    return;
  }
  requests_.store(requests() + 1, std::memory_order_relaxed);
  large_ = make_job(request, error);
  large_->payload = std::move(payload);
  large_got_ = std::min<size_t>(in_to_ - in_from_, request.length);
  std::memcpy(large_->payload.get(), in_.get() + in_from_, large_got_);
  in_from_ += large_got_;
  end_large_write();
}

void Connection::end_large_write() {
  if (large_got_ < large_->request.length) return;
  export_->submit(std::move(large_));
  large_ = nullptr;
}

uint8_t* Connection::small_space(size_t bytes) {
  if (out_.empty() || out_.back().capacity - out_.back().size < bytes ||
      out_.back().capacity == 0) {
    Out out;
    out.data = spare_chunk_ != nullptr ? std::move(spare_chunk_)
                                       : std::unique_ptr<uint8_t[]>(new uint8_t[kChunkBytes]);
    out.capacity = kChunkBytes;
    out_.push_back(std::move(out));
  }
  return out_.back().data.get() + out_.back().size;
}

void Connection::small_commit(size_t bytes) {
  out_.back().size += bytes;
  small_bytes_ += bytes;
}

void Connection::simple_reply(const Request& request, int error) {
  put_simple_reply(small_space(kSimpleReplyBytes), request.cookie, wire_error(error));
  small_commit(kSimpleReplyBytes);
}

void Connection::refuse(const Request& request, int error) {
  uint8_t* space = small_space(kMaxErrorReply);
  small_commit(put_error_reply(space, request, negotiated_.structured, error));
}

std::pair<uint8_t*, size_t> Connection::receive_space() {
  if (large_ != nullptr) {
    return {large_->payload.get() + large_got_, large_->request.length - large_got_};
  }
  if (in_from_ == in_to_) {
    in_from_ = in_to_ = 0;
  } else if (kInBytes - in_to_ < kSmallWrite + kRequestBytes) {
    std::memmove(in_.get(), in_.get() + in_from_, in_to_ - in_from_);
    in_to_ -= in_from_;
    in_from_ = 0;
  }
  return {in_.get() + in_to_, kInBytes - in_to_};
}

bool Connection::receive() {
  if (!may_receive()) return false;
  const auto [into, bytes] = receive_space();
  const ssize_t n = stream_->receive(into, bytes);
  if (n < 0) {
    if (errno != EAGAIN && errno != EINTR) dead_ = true;
    return dead_;
  }
  received(n);
  return true;
}

void Connection::received(ssize_t bytes) {
  if (bytes == 0) {  // like a disconnect, unless it broke off inside a request
    closing_ = true;
    dead_ = large_ != nullptr || in_from_ != in_to_;
    return;
  }
  if (large_ == nullptr) {
    in_to_ += static_cast<size_t>(bytes);
    return;
  }
  large_got_ += static_cast<size_t>(bytes);
  end_large_write();
}

bool Connection::send_out() {
  bool sent = false;
  // Space that was taken for a reply which then went another way.
  if (!out_.empty() && out_.back().size == 0) {
    spare_chunk_ = std::move(out_.back().data);
    out_.pop_back();
  }
  while (!out_.empty() && !dead_) {
    iovec parts[16];
    size_t count = 0;
    for (auto& out : out_) {
      if (count == std::size(parts)) break;
      parts[count++] = {out.data.get() + out.at, out.size - out.at};
    }
    const ssize_t n = stream_->send(parts, count);
    if (n < 0) {
      if (errno == EINTR) continue;
      if (errno != EAGAIN) dead_ = true;
      return sent;
    }
    sent = true;
    auto left = static_cast<size_t>(n);
    while (!out_.empty()) {
      Out& out = out_.front();
      const size_t taken = std::min(left, out.size - out.at);
      out.at += taken;
      left -= taken;
      if (out.capacity != 0) small_bytes_ -= taken;
      if (out.at < out.size) break;
      job_bytes_ -= out.budget;
      if (out.capacity != 0) spare_chunk_ = std::move(out.data);
      out_.pop_front();
    }
  }
  return sent;
}

// Nothing is under way, here or with workers, and all answers have gone: only the client can give
// this thread something to do.
bool Connection::quiet() const {
  return plain_ && may_receive() && jobs_.empty() && out_.empty() &&
         (ring_ == nullptr || !ring_->receiving());
}

// A plain receive: it sleeps until the client sends, and its sender wakes it with less ado than
// through the ring. stop() ends it, as it shuts the socket down.
void Connection::wait_quiet() {
  const auto [into, bytes] = receive_space();
  const uint64_t answered = requests() - looked_at_;
  looked_at_ = requests();
  ssize_t n = answered == 1 && spin_.wanted() ? look(into, bytes) : -EAGAIN;
  if (n == -EAGAIN) {
    n = ::recv(socket_.get(), into, bytes, 0);
    if (n < 0) n = -errno;
  }
  if (n >= 0) {
    received(n);
  } else if (n != -EINTR && n != -EAGAIN) {
    dead_ = true;
  }
}

// Bytes, 0 at the end of the stream, or a negative errno: -EAGAIN if nothing came.
ssize_t Connection::look(uint8_t* into, size_t bytes) {
  const uint64_t start = now_ns();
  uint64_t took = 0;
  ssize_t n = 0;
  do {
    n = ::recv(socket_.get(), into, bytes, MSG_DONTWAIT);
    if (n < 0) n = -errno;
    took = now_ns() - start;
  } while (n == -EAGAIN && took < Spin::kLimit_ns);
  spin_.looked(n != -EAGAIN, took);
  return n;
}

void Connection::wait() {
  pollfd fds[2] = {{socket_.get(), 0, 0}, {event_.get(), POLLIN, 0}};
  if (!closing_ && !stalled_) fds[0].events |= POLLIN;
  if (!out_.empty()) fds[0].events |= POLLOUT;
  if (::poll(fds, 2, -1) < 0) {
    if (errno != EINTR) dead_ = true;
    return;
  }
  if ((fds[1].revents & POLLIN) != 0) clear_event();
  // Gone altogether: nobody is left to read an answer.
  if ((fds[0].revents & (POLLERR | POLLHUP | POLLNVAL)) != 0 && (fds[0].revents & POLLIN) == 0) {
    dead_ = true;
  }
}

void Connection::wait_ring() {
  if (!may_receive()) {
    watch_hang_up();
  } else if (!ring_->receiving()) {
    const auto [into, bytes] = receive_space();
    ring_->receive(socket_.get(), into, bytes);
  }
  if (!ring_->polling(Ring::kEvent)) ring_->poll(Ring::kEvent, event_.get(), POLLIN);
  if (!out_.empty() && !ring_->polling(Ring::kWritable)) {
    ring_->poll(Ring::kWritable, socket_.get(), POLLOUT);
  }
  Ring::Turn turn;
  if (dead_ || ring_->wait(&turn) != 0) dead_ = true;
  if (turn.polled[Ring::kEvent]) clear_event();
  // While something may be received, that tells of the end, after what was sent before it.
  if (turn.polled[Ring::kHangUp] && !may_receive() && hung_up()) dead_ = true;
  if (!turn.received.has_value()) return;
  const int result = *turn.received;
  if (result >= 0) {
    received(result);
  } else if (result != -EINTR && result != -EAGAIN) {
    dead_ = true;
  }
}

// io_uring takes an epoll's wake-up for readiness, and a peer that merely sends no more wakes it
// too: such a peer still waits for its answers.
bool Connection::hung_up() const {
  pollfd fd = {socket_.get(), 0, 0};
  return ::poll(&fd, 1, 0) > 0 && (fd.revents & (POLLERR | POLLHUP | POLLNVAL)) != 0;
}

// The ring's own poll of the socket would also end when the peer merely sends no more; an epoll
// that waits for nothing else reports a peer that has gone, and our own shutdown.
void Connection::watch_hang_up() {
  if (ring_->polling(Ring::kHangUp)) return;
  if (!hang_up_.valid()) {
    hang_up_ = Fd(::epoll_create1(EPOLL_CLOEXEC));
    epoll_event none = {};
    if (!hang_up_.valid() ||
        ::epoll_ctl(hang_up_.get(), EPOLL_CTL_ADD, socket_.get(), &none) != 0) {
      dead_ = true;  // out of descriptors: better to end it than never to notice its end
      return;
    }
  }
  ring_->poll(Ring::kHangUp, hang_up_.get(), POLLIN);
}

}  // namespace sf::nbd
