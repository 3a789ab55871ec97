// Whether a connection's thread looks for the next request a moment before it sleeps.
//
// A client with one request under way sends the next one as soon as it has the answer. To wake a
// sleeping thread on another CPU takes longer than the request itself, on a virtual machine ten
// times; QEMU's I/O threads poll for the same reason (its `poll-max-ns`). It is a bet: kLimit of
// CPU time against a wake-up.
//
// Rules:
//  - Only when nothing is under way and the last turn had one request: several are better waited
//  for,
//    as they then share system calls.
//  - What was lost is not bet again at once: 16 turns go by without a look, four times as many
//  after
//    each further loss, at most kMaxPause. A look that wins halves that. So looking goes on only
//    where more than two in three win.
//  - A look that took much longer than its limit was interrupted by somebody who wants this CPU: it
//    counts as the last of many losses. So where CPUs are scarce, or client and server share one,
//    there is a look in 1,024 turns.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace sf::nbd {

class Spin {
 public:
  // Longer than a client takes that has to be woken itself (20 to 40 µs on a virtual machine).
  static constexpr uint64_t kLimit_ns = 50'000;
  static constexpr uint32_t kMaxPause = 1024;  // turns

  // SNOWFLOCK_NBD_SPIN=0: never, in connections made from now on.
  Spin() {
    const char* wanted = std::getenv("SNOWFLOCK_NBD_SPIN");
    allowed_ = wanted == nullptr || std::strcmp(wanted, "0") != 0;
  }

  // Each turn once, before the thread would sleep: true if it looks first.
  bool wanted() {
    if (left_ == 0) return allowed_;
    left_--;
    return false;
  }
  // What a look brought: whether something came, and how long it took.
  void looked(bool won, uint64_t took_ns) {
    if (took_ns > 2 * kLimit_ns) {
      pause_ = kMaxPause;
    } else if (won) {
      pause_ /= 2;
    } else {
      pause_ = std::clamp<uint32_t>(4 * pause_, 16, kMaxPause);
    }
    left_ = pause_;
  }

 private:
  bool allowed_ = true;
  uint32_t pause_ = 0;
  uint32_t left_ = 0;
};

}  // namespace sf::nbd
