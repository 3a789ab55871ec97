// A thread that waits for pages and receives for the client meanwhile.
#include <sched.h>

#include <algorithm>
#include <array>

#include "mcdist/client.h"

namespace sf::mcdist {
namespace {

// After a thread that lent itself has left, the next one is waited for so long. What comes
// meanwhile and nobody waits for stays in the sockets' buffers.
constexpr TimeNs kLent = 2 * kMillisecond;
// Likewise when nothing else is under way: what comes by is of use to nobody now.
constexpr TimeNs kLentIdle = 20 * kMillisecond;
// Of a look's turns one in so many asks for all descriptors; the others ask the sockets alone.
constexpr unsigned kLookAround = 4;
// Most answers are here sooner; then whoever is to answer may need this CPU. Not at once: where
// others compute, a yield costs a time slice.
constexpr TimeNs kYieldAfter = 25 * kMicrosecond;
constexpr size_t kOwn = 3;

}  // namespace

bool Client::fetch(std::span<const PageIndex> pages, const Lending& lending) {
  std::unique_lock role(role_mutex_, std::try_to_lock);
  if (role.owns_lock()) {
    std::lock_guard lock(mutex_);
    if (closing_) return false;
    helping_ = lent_ = true;
    lent_for_ = requester_.idle() ? kLentIdle : kLent;
  }
  for (PageIndex page : pages) want(page, Urgency::kFault);
  if (!role.owns_lock()) return false;  // whoever has it receives for all
  const bool over = receive_lent(lending);
  leave(over && lending.waits.load() > 0);
  return over;
}

// Whether what it was lent for is over; false: closing.
bool Client::receive_lent(const Lending& lending) {
  std::array<pollfd, kOwn + Lending::kMaxWatched> fds = {
      {{member_.get(), POLLIN, 0}, {unicast_.get(), POLLIN, 0}, {wake_.get(), POLLIN, 0}}};
  const size_t others = std::min(lending.watched.size(), Lending::kMaxWatched);
  std::copy_n(lending.watched.begin(), others, fds.begin() + kOwn);
  const TimeNs began = now_ns();
  TimeNs took = 0;  // of the look, without what is done with a packet that came
  bool looking = spin_.wanted();
  unsigned turn = 0;
  while (lending.waits.load() > 0) {
    for (pollfd& fd : fds) fd.revents = 0;
    bool group = true;
    bool unicast = true;
    if (looking) {
      turn++;
      if (turn % kLookAround == 0) ::poll(fds.data(), kOwn + others, 0);
    } else {
      wait_lent({fds.data(), kOwn + others});
      // After a time-out all is read before anything is taken for lost.
      const bool any = fds[0].revents != 0 || fds[1].revents != 0;
      group = !any || fds[0].revents != 0;
      unicast = !any || fds[1].revents != 0;
    }
    const bool woken = fds[2].revents != 0;
    if (woken && !clear_wake()) return false;
    // One batch, then: has its page come?
    size_t came = 0;
    if (group) came += receive(member_, true, &group);
    if (unicast) came += receive(unicast_, false, &unicast);
    const bool over = lending.waits.load() == 0;
    bool theirs = false;
    for (size_t i = 0; i < others; i++) {
      lending.watched[i].revents = fds[kOwn + i].revents;
      theirs = theirs || fds[kOwn + i].revents != 0;
    }
    if (looking) {
      if (came == 0) took = now_ns() - began;
      looking = !over && took < static_cast<TimeNs>(Spin::kLimit_ns);
      if (!looking) spin_.looked(over, static_cast<uint64_t>(took));
      if (came == 0 && !woken && !theirs) {
        if (looking && took >= kYieldAfter) ::sched_yield();
        continue;
      }
    }
    if (over) {
      std::lock_guard lock(mutex_);
      if (settled()) return true;
    }
    tend(!group && !unicast);
    if (theirs) return true;
  }
  return true;
}

// Sleeps until one of them is ready, or something is due.
void Client::wait_lent(std::span<pollfd> fds) {
  TimeNs due;
  {
    std::lock_guard lock(mutex_);
    due = armed_;
  }
  const TimeNs wait = std::clamp<TimeNs>(due - now_ns(), 0, kSecond);
  const timespec timeout = {wait / kSecond, wait % kSecond};
  if (::ppoll(fds.data(), fds.size(), &timeout, nullptr) != 0) return;
  std::lock_guard lock(mutex_);
  if (armed_ <= now_ns()) armed_ = kNever;  // the timer itself fires too, for nothing
}

// Nothing is to be sent or watched now: what flush() and its like are for can wait.
bool Client::settled() const {
  return cookie_ != 0 && requester_.idle() && !server_set_ && !wake_pending_ &&
         (group_heard_ || unicast_only_);
}

// `returns`: at once, after a look at something else.
void Client::leave(bool returns) {
  std::lock_guard lock(mutex_);
  helping_ = false;
  helped_at_ = now_ns();
  const bool idle = requester_.idle();
  if (closing_ || (!returns && (wake_pending_ || requester_.faults() > 0))) return give_back();
  if (std::exchange(lent_for_, idle ? kLentIdle : kLent) == kLentIdle && !idle) {
    role_changed_.notify_one();  // it waits no longer than that
  }
}

}  // namespace sf::mcdist
