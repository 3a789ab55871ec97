#include "pagestore/prefetcher.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "pagestore/prefetch_loop.h"

namespace sf {
namespace {

constexpr uint64_t kWordPages = 64;
constexpr uint64_t kMaxLook = 4096;  // words of the bitmap in one turn: 1 GiB
constexpr uint64_t kMinBurstBytes = 16 * kPageBytes;
constexpr uint64_t kMaxBurstBytes = 4 << 20;
constexpr uint64_t kMostShare = 8;  // subscribes if at most one page in so many is not needed
constexpr std::chrono::seconds kLookAgain{1};  // done: has a user been added?

double seconds(Prefetcher::Clock::duration time) {
  return std::chrono::duration<double>(time).count();
}

// What may come at once after a pause: 10 ms of the rate, so that it stays a rate on the wire too.
uint64_t burst_of(uint64_t rate) { return std::clamp(rate / 100, kMinBurstBytes, kMaxBurstBytes); }

uint64_t bits_below(uint64_t bit) { return bit >= 64 ? ~uint64_t{0} : (uint64_t{1} << bit) - 1; }

}  // namespace

std::shared_ptr<Prefetcher> Prefetcher::Make(std::shared_ptr<Replica> replica,
                                             std::function<void()> on_end) {
  std::shared_ptr<Prefetcher> made(new Prefetcher(std::move(replica), std::move(on_end)));
  made->self_ = made;
  made->loop_ = PrefetchLoop::Shared();
  made->loop_->add(made.get());
  return made;
}

Prefetcher::Prefetcher(std::shared_ptr<Replica> replica, std::function<void()> on_end)
    : replica_(std::move(replica)), on_end_(std::move(on_end)) {}

Prefetcher::~Prefetcher() { close(); }

void Prefetcher::start(uint64_t rate_bytes_per_s) {
  std::lock_guard lock(mutex_);
  if (state_ == State::kClosed) return;
  const auto now = Clock::now();
  const bool runs = state_ == State::kRunning || state_ == State::kPaused;
  rate_ = rate_bytes_per_s;
  if (rate_ != 0) unsubscribe();
  tried_ = subscribed_;
  if (!runs) {
    run_++;
    state_ = State::kRunning;
    tokens_ = static_cast<double>(burst_of(rate_));
    filled_at_ = started_ = ended_ = heard_ = sampled_ = now;
    cursor_ = skipped_ = passed_ = 0;
    users_version_ = replica_->users_version();
    under_way_ = asked_bytes_ = pages_ = failed_pages_ = yields_ = 0;
    errors_in_row_ = yielded_ = 0;
    announce_ = false;
    first_error_ = error_ = Status::Ok();
    bytes_per_s_ = 0;
  }
  loop_->wake(this);
}

void Prefetcher::pause() {
  std::lock_guard lock(mutex_);
  if (state_ != State::kRunning) return;
  state_ = State::kPaused;
  unsubscribe();
}

void Prefetcher::resume() {
  std::lock_guard lock(mutex_);
  if (state_ != State::kPaused) return;
  state_ = State::kRunning;
  heard_ = Clock::now();
  loop_->wake(this);
}

void Prefetcher::close() {
  {
    std::lock_guard lock(mutex_);
    if (state_ == State::kClosed) return;
    ended_ = Clock::now();
    state_ = State::kClosed;
    run_++;
    unsubscribe();
  }
  loop_->remove(this);
}

void Prefetcher::unsubscribe() {
  if (std::exchange(subscribed_, false)) replica_->subscribe(false);
  tried_ = false;
}

// A push brings what is not needed as well.
bool Prefetcher::wants_most() const {
  uint64_t absent = 0;
  uint64_t needed = 0;
  for (PageIndex first = 0; first < replica_->pages(); first += kWordPages) {
    const uint64_t word = replica_->absent_mask(first);
    if (word == 0) continue;
    absent += static_cast<uint64_t>(std::popcount(word));
    needed += static_cast<uint64_t>(std::popcount(word & replica_->needed_mask(first)));
  }
  return needed > 0 && (absent - needed) * kMostShare <= absent;
}

bool Prefetcher::subscribe(Clock::time_point now) {
  if (rate_ != 0) return false;
  if (!std::exchange(tried_, true)) {
    seen_data_ = replica_->present_count();
    seen_known_ = replica_->held();
    subscribed_ = wants_most() && replica_->subscribe(true);
    heard_ = now;
  }
  if (!subscribed_) return false;
  const uint64_t data = replica_->present_count();
  const uint64_t known = replica_->held();
  if (known > seen_known_) {
    heard_ = now;
    pages_ += known - seen_known_;
    asked_bytes_ += (data - seen_data_) * kPageBytes;
    sample((data - seen_data_) * kPageBytes, now);
    seen_data_ = data;
    seen_known_ = known;
  }
  subscribed_ = replica_->subscribed();  // false: all is here, or the rest is not to be had so
  return subscribed_;
}

void Prefetcher::end(State state, const Status& error) {
  unsubscribe();
  state_ = state;
  error_ = error;
  ended_ = Clock::now();
  announce_ = true;
}

Prefetcher::Clock::time_point Prefetcher::turn(Clock::time_point now) {
  Clock::time_point due = Clock::time_point::max();
  bool announce = false;
  {
    std::lock_guard lock(mutex_);
    if (state_ == State::kDone && !replica_->complete()) {
      if (replica_->users_version() == users_version_) {
        due = now + kLookAgain;
      } else {
        state_ = State::kRunning;
        tried_ = false;
        heard_ = now;
      }
    }
    if (state_ == State::kRunning) due = ask(now);
    announce = std::exchange(announce_, false);
  }
  if (announce && on_end_) on_end_();
  return due;
}

uint64_t Prefetcher::budget(Clock::time_point now) {
  const uint64_t room = std::min(kBatchPages, kWindowPages - under_way_);
  if (rate_ == 0) return room;
  tokens_ = std::min(static_cast<double>(burst_of(rate_)),
                     tokens_ + static_cast<double>(rate_) * seconds(now - filled_at_));
  filled_at_ = now;
  return std::min(room, static_cast<uint64_t>(tokens_ / kPageBytes));
}

Prefetcher::Clock::time_point Prefetcher::ask(Clock::time_point now) {
  const bool pushed = subscribe(now);
  if ((pushed || under_way_ > 0) && now - heard_ > kStall) {
    end(State::kFailed,
        Status::Error("E_SOURCE_LOST", "prefetch of " + replica_->path() + ": no page came for " +
                                           std::to_string(kStall.count()) + " s"));
    return Clock::time_point::max();
  }
  if (pushed) return now + kTick;
  // arrived() wakes it.
  if (under_way_ > kWindowPages - kBatchPages) return heard_ + kStall + kTick;
  if (replica_->waiting_count() > 0 && yielded_ < kMaxYields) {
    yielded_++;
    yields_++;
    return now + kTick;
  }
  yielded_ = 0;
  uint64_t room = budget(now);
  if (room == 0) {  // of tokens: the window has room, see above
    const double lacking = kPageBytes - tokens_;
    const std::chrono::duration<double> wait(lacking / static_cast<double>(rate_));
    const auto longest = std::chrono::duration<double>(kLookAgain);  // the rate may be set anew
    return now + std::max<Clock::duration>(
                     kTick, std::chrono::duration_cast<Clock::duration>(std::min(wait, longest)));
  }
  auto done = [weak = self_, run = run_](PageIndex page, const Status& status) {
    if (auto self = weak.lock()) self->arrived(run, page, status);
  };
  for (uint64_t looked = 0; cursor_ < replica_->pages() && room > 0; looked++) {
    if (looked == kMaxLook) return now;
    const PageIndex first = cursor_ / kWordPages * kWordPages;
    const uint64_t absent = replica_->absent_mask(first) & ~bits_below(cursor_ - first);
    const uint64_t needed = absent == 0 ? 0 : absent & replica_->needed_mask(first);
    uint64_t left = needed;
    uint64_t passed = kWordPages;
    while (left != 0) {
      const auto bit = static_cast<uint64_t>(std::countr_zero(left));
      passed = bit;
      if (room == 0) break;
      const auto run = static_cast<uint64_t>(std::countr_one(left >> bit));
      const uint64_t count = std::min(run, room);
      uint64_t asked = 0;
      const Status status = replica_->prefetch(first + bit, count, done, &asked);
      if (!status.ok()) {
        end(State::kFailed, status);
        return Clock::time_point::max();
      }
      if (under_way_ == 0) heard_ = now;
      under_way_ += asked;
      asked_bytes_ += asked * kPageBytes;
      tokens_ -= static_cast<double>(asked * kPageBytes);
      room -= count;
      left &= ~bits_below(bit + count);
      passed = left == 0 ? kWordPages : bit + count;
    }
    passed_ += static_cast<uint64_t>(std::popcount(absent & ~needed & bits_below(passed)));
    cursor_ = first + passed;
  }
  if (cursor_ < replica_->pages()) {
    if (under_way_ > kWindowPages - kBatchPages) return heard_ + kStall + kTick;
    return rate_ == 0 ? now : now + kTick;
  }
  skipped_ = passed_;
  if (under_way_ > 0) return heard_ + kStall + kTick;
  if (replica_->users_version() != users_version_) {  // one more pass
    users_version_ = replica_->users_version();
    cursor_ = passed_ = 0;
    return now;
  }
  end(failed_pages_ == 0 ? State::kDone : State::kFailed, first_error_);
  return state_ == State::kDone ? now + kLookAgain : Clock::time_point::max();
}

void Prefetcher::arrived(uint64_t run, PageIndex page, const Status& status) {
  std::lock_guard lock(mutex_);
  if (run != run_) return;
  under_way_--;
  const auto now = Clock::now();
  if (status.ok()) {
    heard_ = now;
    errors_in_row_ = 0;
    if (!subscribed_) pages_++;  // else counted with all that comes
    if (replica_->state(page) == PageState::kZero) {
      asked_bytes_ -= kPageBytes;
      if (rate_ != 0) {
        tokens_ = std::min(static_cast<double>(burst_of(rate_)), tokens_ + kPageBytes);
      }
    } else if (!subscribed_) {
      sample(kPageBytes, now);
    }
  } else {
    failed_pages_++;
    if (first_error_.ok()) first_error_ = status;
    if (++errors_in_row_ >= kMaxPageErrors && state_ == State::kRunning) {
      end(State::kFailed, status);
      loop_->wake(this);
    }
  }
  if (under_way_ == 0 || under_way_ == kWindowPages - kBatchPages) loop_->wake(this);
}

void Prefetcher::sample(uint64_t bytes, Clock::time_point now) const {
  bytes_per_s_ = bytes_per_s_ * std::exp(-seconds(now - sampled_)) + static_cast<double>(bytes);
  sampled_ = now;
}

Prefetcher::Progress Prefetcher::progress() const {
  std::lock_guard lock(mutex_);
  const auto now = Clock::now();
  sample(0, now);
  const bool runs = state_ == State::kRunning || state_ == State::kPaused;
  Progress out;
  out.state = state_;
  out.total = replica_->pages();
  out.present = std::min(out.total, replica_->present_count() + replica_->zero_count());
  out.skipped = skipped_;
  out.rate = rate_;
  out.burst_bytes = rate_ == 0 ? 0 : burst_of(rate_);
  out.asked_bytes = asked_bytes_;
  out.pages = pages_;
  out.failed_pages = failed_pages_;
  out.yields = yields_;
  out.elapsed_ms = seconds((runs ? now : ended_) - started_) * 1000;
  out.bytes_per_s = bytes_per_s_;
  out.under_way = under_way_;
  out.error = error_;
  return out;
}

}  // namespace sf
