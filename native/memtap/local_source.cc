#include "memtap/local_source.h"

#include <array>
#include <system_error>

namespace sf {

Status LocalSource::Open(std::shared_ptr<Replica> replica, std::shared_ptr<PageProvider> provider,
                         std::chrono::milliseconds patience, std::unique_ptr<LocalSource>* out) {
  if (replica->pages() != provider->pages()) {
    return Status::Error("E_REPLICA_MISMATCH", "replica and generation differ in size");
  }
  std::unique_ptr<LocalSource> source(new LocalSource());
  source->replica_ = std::move(replica);
  source->provider_ = std::move(provider);
  source->patience_ = patience;
  try {
    source->thread_ = std::thread([s = source.get()] { s->run(); });
  } catch (const std::system_error& error) {
    return Status::Error("E_INTERNAL", std::string("source thread: ") + error.what());
  }
  source->replica_->set_fetcher(source.get());
  *out = std::move(source);
  return Status::Ok();
}

LocalSource::~LocalSource() {
  if (replica_ != nullptr && thread_.joinable()) replica_->set_fetcher(nullptr);
  {
    std::lock_guard lock(mutex_);
    closing_ = true;
  }
  changed_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void LocalSource::want(PageIndex page, Urgency urgency) {
  {
    std::lock_guard lock(mutex_);
    // A fault overtakes the prefetch of the same page; served twice, it is found filled.
    if (!queued_.insert(page).second && urgency == Urgency::kPrefetch) return;
    (urgency == Urgency::kFault ? faults_ : prefetches_).push_back(page);
  }
  changed_.notify_one();
}

void LocalSource::run() {
  for (;;) {
    PageIndex page = 0;
    Urgency urgency = Urgency::kFault;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return closing_ || !faults_.empty() || !prefetches_.empty(); });
      if (closing_) return;
      urgency = faults_.empty() ? Urgency::kPrefetch : Urgency::kFault;
      auto& queue = faults_.empty() ? prefetches_ : faults_;
      page = queue.front();
      queue.pop_front();
      queued_.erase(page);
    }
    if (!serve(page, urgency)) return;
  }
}

bool LocalSource::serve(PageIndex page, Urgency urgency) {
  if (replica_->state(page) != PageState::kAbsent) return true;
  const auto deadline = std::chrono::steady_clock::now() + patience_;
  alignas(64) std::array<uint8_t, kPageBytes> data;
  for (;;) {
    Status status;
    switch (provider_->read(page, data.data())) {
      case ReadResult::kData:
        status = replica_->fill(page, data.data());
        break;
      case ReadResult::kZero:
        status = replica_->fill_zero(page);
        break;
      case ReadResult::kError:
        status = Status::Error("E_SOURCE_LOST", "the generation cannot be read any more");
        break;
      case ReadResult::kAbsent: {
        if (urgency == Urgency::kPrefetch) return true;
        std::unique_lock lock(mutex_);
        if (std::chrono::steady_clock::now() < deadline) {
          changed_.wait_for(lock, std::chrono::milliseconds(1), [this] { return closing_; });
          if (closing_) return false;
          continue;
        }
        status = Status::Error("E_SOURCE_LOST", "the generation's page did not come in time");
      }
    }
    if (status.ok()) {
      served_.fetch_add(1, std::memory_order_relaxed);
      return true;
    }
    replica_->fail(status);
    return status.code != "E_SOURCE_LOST";
  }
}

}  // namespace sf
