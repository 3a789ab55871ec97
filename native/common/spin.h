// Whether a thread looks for what it waits for a moment before it sleeps.
//
// A peer with one request under way sends the next one as soon as it has the answer. To wake a
// sleeping thread on another CPU takes longer than the request itself, on a virtual machine ten
// times; QEMU's I/O threads poll for the same reason (its `poll-max-ns`). It is a bet: kLimit of
// CPU time against a wake-up.
//
// Rules:
//  - Only when what comes is answered at once, one thing at a time: of several, some had better
//  wait
//    and share system calls. The caller sees to it.
//  - What was lost is not bet again at once: 16 turns go by without a look, four times as many
//    after each further loss, at most kMaxPause. A look that wins halves that. So looking goes on
//    only where more than two in three win.
//  - A look that took much longer than its limit was interrupted by somebody who wants this CPU: it
//    counts as lost, whatever it brought. So where CPUs are scarce, or both sides share one, there
//    soon is a look in 1,024 turns; and one interruption among many wins costs 31 turns.
//  - On one CPU never: whoever is waited for could not run.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>

namespace sf {

class Spin {
 public:
  // Longer than a peer takes that has to be woken itself (20 to 40 µs on a virtual machine).
  static constexpr uint64_t kLimit_ns = 50'000;
  static constexpr uint32_t kMaxPause = 1024;  // turns

  // The environment variable of this name says 0: never, in what is made from now on.
  explicit Spin(const char* variable) {
    const char* wanted = std::getenv(variable);
    allowed_ = (wanted == nullptr || std::strcmp(wanted, "0") != 0) &&
               std::thread::hardware_concurrency() != 1;
  }

  // Each turn once, before the thread would sleep: true if it looks first.
  bool wanted() {
    if (left_ == 0) return allowed_;
    left_--;
    return false;
  }
  // What a look brought: whether something came, and how long it took.
  void looked(bool won, uint64_t took_ns) {
    if (won && took_ns <= 2 * kLimit_ns) {
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

}  // namespace sf
