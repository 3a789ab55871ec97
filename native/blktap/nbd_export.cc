#include "blktap/nbd_export.h"

#include <errno.h>

#include <new>

#include "blktap/nbd_connection.h"
#include "blktap/nbd_status.h"

namespace sf::nbd {
namespace {

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

size_t put_error_reply(uint8_t* p, const Request& request, bool structured, int error) {
  // Structured where a success would be; all other commands are answered simply.
  if (!structured || (request.type != kRead && request.type != kBlockStatus)) {
    put_simple_reply(p, request.cookie, wire_error(error));
    return kSimpleReplyBytes;
  }
  put_chunk(p, kChunkDone, kChunkError, request.cookie, 6);
  put32(p + kChunkHeaderBytes, wire_error(error));
  put16(p + kChunkHeaderBytes + 4, 0);
  return kMaxErrorReply;
}

Export::Admission Export::admit(const std::shared_ptr<Connection>& connection) {
  std::lock_guard lock(connections_mutex_);
  if (closed_) return Admission::kClosed;
  if (connections_.size() >= info_.max_connections) return Admission::kFull;
  connections_.emplace(connection.get(), connection);
  accepted_++;
  return Admission::kIn;
}

void Export::leave(Connection* connection) {
  std::lock_guard lock(connections_mutex_);
  if (connections_.erase(connection) == 0) return;
  past_requests_ += connection->requests();
  if (connections_.empty()) left_.notify_all();
}

void Export::close() {
  {
    std::unique_lock lock(connections_mutex_);
    closed_ = true;
    for (const auto& [key, weak] : connections_) {
      if (auto connection = weak.lock()) connection->stop();
    }
    left_.wait(lock, [&] { return connections_.empty(); });
  }
  queue_->close();
  device_.reset();
}

ExportStats Export::stats() {
  std::lock_guard lock(connections_mutex_);
  ExportStats out{connections_.size(), accepted_, past_requests_};
  for (const auto& [key, weak] : connections_) {
    if (auto connection = weak.lock()) out.requests += connection->requests();
  }
  return out;
}

void Export::queue(Workers::Task task) { queue_->post(std::move(task)); }

void Export::submit(JobPtr job) {
  if (job->request.type == kFlush) return queue_flush(job);
  queue([this, job = std::move(job)] { run(job); });
}

void Export::finish(const JobPtr& job, int error) {
  job->payload.reset();
  if (error != 0 || job->reply == nullptr) {
    job->reply = std::make_unique<uint8_t[]>(kMaxErrorReply);
    job->reply_bytes = put_error_reply(job->reply.get(), job->request, job->structured, error);
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
      if (wait_for_pages(job, request.length, Device::Access::kRead)) return;
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
      if (wait_for_pages(job, request.length, Device::Access::kWrite)) return;
      error = device_->write(request.offset, request.length, job->payload.get(), ReadMode::kBlock);
      break;
    case kTrim:
      error = device_->zero(request.offset, request.length, Device::Zero::kTrim, false);
      break;
    case kWriteZeroes: {
      const bool fast = (request.flags & kFlagFastZero) != 0;
      const bool allocate = (request.flags & kFlagNoHole) != 0;
      // What is fast fetches nothing: a page that would have to come is refused.
      if (!fast && wait_for_pages(job, request.length, Device::Access::kWrite)) return;
      error = device_->zero(request.offset, request.length,
                            allocate ? Device::Zero::kAllocate : Device::Zero::kZeroes, fast);
      break;
    }
    case kCache: {
      // A hint: what lies beyond the bound is not cached, which is no error.
      const uint32_t bytes = std::min(request.length, kMaxRequestBytes);
      if (wait_for_pages(job, bytes, Device::Access::kRead)) return;
      device_->cache(request.offset, bytes);
      return finish(job, 0);
    }
    case kBlockStatus:
      block_status(*device_, job.get());
      return finish(job, 0);
    default:
      error = EINVAL;
  }
  if (error == 0 && (request.flags & kFlagFua) != 0) return queue_flush(job);
  finish(job, error);
}

// True if the job waits now (or is queued again already) and must be left alone.
bool Export::wait_for_pages(const JobPtr& job, uint64_t bytes, Device::Access access) {
  std::vector<PageIndex> pages;
  device_->missing(job->request.offset, bytes, access, &pages);
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

}  // namespace sf::nbd
