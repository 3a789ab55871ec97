// One process at a time changes the filters of a network namespace.
//
// The kernel's maps keep each change whole, but giving a VM its place takes several of them, and
// the look before them. Two processes that look at once would both find the place free.
//
// A lock on one byte of one file of the machine: the namespace's inode number is the byte. It goes
// with its holder, however that ends. Only root can open the file, so no guest's process can hold
// it.
#pragma once

#include "common/fd.h"
#include "common/status.h"

namespace sf {

class NetbackLock {
 public:
  // For the namespace of the calling thread; kept until destroyed. Waits 20 s at most, then
  // E_IN_USE. E_IO.
  Status Take();

 private:
  Fd file_;
};

}  // namespace sf
