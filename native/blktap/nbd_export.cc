#include "blktap/nbd_export.h"

#include <errno.h>
#include <pthread.h>

#include <new>

#include "blktap/nbd_connection.h"

namespace sf::nbd {
namespace {

constexpr size_t kMaxExtents = 4096;
constexpr uint64_t kMaxStatusBytes = uint64_t{1} << 30;  // looked at for one answer

std::unique_ptr<uint8_t[]> allocate(size_t bytes) {
  return std::unique_ptr<uint8_t[]>(new (std::nothrow) uint8_t[bytes]);
}

}  // namespace

uint32_t wire_error(int error) {
  switch (error) {
    case 0:
    case EPERM:
    case ENOMEM:
    case EINVAL:
    case ENOSPC:
    case EOVERFLOW:
    case EOPNOTSUPP:
    case ESHUTDOWN:
      return static_cast<uint32_t>(error);  // the protocol has Linux's numbers
    case EDQUOT:
      return ENOSPC;
    default:
      return EIO;
  }
}

void reply_simple(Job* job, int error) {
  job->reply = std::make_unique<uint8_t[]>(kSimpleReplyBytes);
  job->reply_bytes = kSimpleReplyBytes;
  put_simple_reply(job->reply.get(), job->request.cookie, wire_error(error));
}

void reply_error(Job* job, int error) {
  if (!job->structured) return reply_simple(job, error);
  job->reply = std::make_unique<uint8_t[]>(kChunkHeaderBytes + 6);
  job->reply_bytes = kChunkHeaderBytes + 6;
  put_chunk(job->reply.get(), kChunkDone, kChunkError, job->request.cookie, 6);
  put32(job->reply.get() + kChunkHeaderBytes, wire_error(error));
  put16(job->reply.get() + kChunkHeaderBytes + 4, 0);
}

Export::~Export() { stop(); }

void Export::start(unsigned workers) {
  for (unsigned i = 0; i < workers; i++) {
    workers_.emplace_back([this] {
      ::pthread_setname_np(::pthread_self(), "nbd-worker");
      work();
    });
  }
}

void Export::stop() {
  std::deque<std::function<void()>> dropped;
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
    dropped.swap(tasks_);
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
  workers_.clear();
}

void Export::queue(std::function<void()> task) {
  {
    std::lock_guard lock(mutex_);
    if (stopping_) return;
    tasks_.push_back(std::move(task));
  }
  wake_.notify_one();
}

void Export::work() {
  for (;;) {
    std::function<void()> task;
    {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [&] { return stopping_ || !tasks_.empty(); });
      if (stopping_) return;
      task = std::move(tasks_.front());
      tasks_.pop_front();
    }
    task();
  }
}

void Export::submit(JobPtr job) {
  if (job->request.type == kFlush) return queue_flush(job);
  queue([this, job = std::move(job)] { run(job); });
}

void Export::finish(const JobPtr& job, int error) {
  job->payload.reset();
  if (error != 0 || job->reply == nullptr) {
    if (job->request.type == kRead || job->request.type == kBlockStatus) {
      reply_error(job.get(), error);
    } else {
      reply_simple(job.get(), error);
    }
  }
  if (auto connection = job->connection.lock()) connection->complete(job);
}

void Export::run(const JobPtr& job) {
  const Request& request = job->request;
  if (job->connection.expired()) return;
  if (job->error != 0) return finish(job, job->error);
  if (job->wait_failed) return finish(job, EIO);
  int error = 0;
  switch (request.type) {
    case kRead: {
      if (wait_for_pages(job, Device::Access::kRead)) return;
      const size_t head = job->structured ? kChunkHeaderBytes + 8 : kSimpleReplyBytes;
      job->reply = allocate(head + request.length);
      if (job->reply == nullptr) return finish(job, ENOMEM);
      bool zero = false;
      error = device_->read(request.offset, request.length, job->reply.get() + head,
                            ReadMode::kBlock, &zero);
      job->reply_bytes = put_read_reply(job->reply.get(), request, job->structured, zero);
      return finish(job, error);
    }
    case kWrite:
      if (wait_for_pages(job, Device::Access::kWrite)) return;
      error = device_->write(request.offset, request.length, job->payload.get(), ReadMode::kBlock);
      break;
    case kTrim:
      error = device_->zero(request.offset, request.length, false);
      break;
    case kWriteZeroes:
      if (wait_for_pages(job, Device::Access::kWrite)) return;
      error = device_->zero(request.offset, request.length, true);
      break;
    case kBlockStatus:
      return block_status(job);
    default:
      error = EINVAL;
  }
  if (error == 0 && (request.flags & kFlagFua) != 0) return queue_flush(job);
  finish(job, error);
}

// True if the job waits now (or is queued again already) and must be left alone.
bool Export::wait_for_pages(const JobPtr& job, Device::Access access) {
  std::vector<PageIndex> pages;
  device_->missing(job->request.offset, job->request.length, access, &pages);
  if (pages.empty()) return false;
  job->waiting = pages.size() + 1;  // one for this function: it is not done before it has asked all
  std::vector<PageIndex> ask;
  {
    std::lock_guard lock(wait_mutex_);
    for (PageIndex page : pages) {
      auto& jobs = waiting_[page];
      if (jobs.empty()) {
        ask.push_back(page);
      } else {
        std::erase_if(jobs, [](const std::weak_ptr<Job>& other) { return other.expired(); });
      }
      jobs.push_back(job);
    }
  }
  for (PageIndex page : ask) {
    device_->want(page, [weak = weak_from_this(), page](const Status& status) {
      if (auto self = weak.lock()) self->arrived(page, status.ok());
    });
  }
  if (job->waiting.fetch_sub(1) == 1) queue([this, job] { run(job); });
  return true;
}

void Export::arrived(PageIndex page, bool ok) {
  std::vector<std::weak_ptr<Job>> jobs;
  {
    std::lock_guard lock(wait_mutex_);
    auto found = waiting_.find(page);
    if (found == waiting_.end()) return;
    jobs = std::move(found->second);
    waiting_.erase(found);
  }
  for (const auto& weak : jobs) {
    JobPtr job = weak.lock();
    if (job == nullptr) continue;
    if (!ok) job->wait_failed = true;
    if (job->waiting.fetch_sub(1) == 1) queue([this, job] { run(job); });
  }
}

void Export::queue_flush(const JobPtr& job) {
  {
    std::lock_guard lock(flush_mutex_);
    flushes_.push_back(job);
    if (flushing_) return;
    flushing_ = true;
  }
  queue([this] { flush_all(); });
}

void Export::flush_all() {
  for (;;) {
    std::vector<JobPtr> jobs;
    {
      std::lock_guard lock(flush_mutex_);
      if (flushes_.empty()) {
        flushing_ = false;
        return;
      }
      jobs.swap(flushes_);
    }
    const int error = device_->flush();
    for (const auto& job : jobs) finish(job, error);
  }
}

void Export::block_status(const JobPtr& job) {
  const Request& request = job->request;
  const uint64_t end = request.offset + std::min<uint64_t>(request.length, kMaxStatusBytes);
  const size_t most = (request.flags & kFlagReqOne) != 0 ? 1 : kMaxExtents;
  std::vector<std::pair<uint32_t, uint32_t>> extents;
  for (uint64_t off = request.offset; off < end && extents.size() < most;) {
    bool hole = false;
    const uint64_t n = device_->extent(off, end - off, &hole);
    extents.emplace_back(static_cast<uint32_t>(n), hole ? kStateHole | kStateZero : 0);
    off += n;
  }
  const size_t payload = 4 + extents.size() * 8;
  job->reply = std::make_unique<uint8_t[]>(kChunkHeaderBytes + payload);
  job->reply_bytes = kChunkHeaderBytes + payload;
  uint8_t* p = job->reply.get();
  put_chunk(p, kChunkDone, kChunkBlockStatus, request.cookie, static_cast<uint32_t>(payload));
  p += kChunkHeaderBytes;
  put32(p, kContextId);
  for (const auto& [bytes, state] : extents) {
    put32(p + 4, bytes);
    put32(p + 8, state);
    p += 8;
  }
  finish(job, 0);
}

}  // namespace sf::nbd
