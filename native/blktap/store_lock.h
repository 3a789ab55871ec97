// The lock of a store: one process has it open. And how a reader left over from before learns that
// the store has a new owner.
//
// A provider of a generation stays readable when its store is closed. The next owner may merge
// slices, and then the reader would read other bytes. So each owner gives store.lock a modification
// time nobody had before; a reader of a closed store looks at it after each read and, if it is
// another one, throws away what it read.
#pragma once

#include <time.h>

#include <atomic>
#include <string>

#include "common/fd.h"
#include "common/status.h"

namespace sf {

class StoreLock {
 public:
  // E_IN_USE, E_IO.
  Status take(const std::string& directory);
  void release(bool readers_left);
  // False if somebody may have changed files since. To be asked after a read.
  bool holds() const;

 private:
  Fd fd_;       // locked, until release()
  Fd witness_;  // opened apart: to look at the time, without the lock
  timespec stamp_ = {};
  std::atomic<bool> released_{false};
};

}  // namespace sf
