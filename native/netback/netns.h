// The network namespace a thread works in. Sockets, taps, tc filters and /proc/sys/net all belong
// to the namespace of the thread that opens them; an open descriptor stays in its own.
#pragma once

#include <fcntl.h>
#include <sched.h>
#include <sys/stat.h>

#include <string>

#include "common/fd.h"
#include "common/status.h"

namespace sf {

constexpr char kThreadNetns[] = "/proc/thread-self/ns/net";

inline Status OpenNetns(const std::string& path, Fd* out) {
  out->reset(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  return out->valid() ? Status::Ok() : Status::Errno("E_NETWORK", "open namespace " + path);
}

// Moves the calling thread into a namespace and, when destroyed, back.
class NetnsScope {
 public:
  NetnsScope() = default;
  NetnsScope(const NetnsScope&) = delete;
  NetnsScope& operator=(const NetnsScope&) = delete;
  ~NetnsScope() {
    // A thread left in the wrong namespace would let guests loose on the wrong host.
    if (before_.valid() && ::setns(before_.get(), CLONE_NEWNET) != 0) std::abort();
  }

  Status Enter(int netns) {
    Fd before;
    Status status = OpenNetns(kThreadNetns, &before);
    if (!status.ok()) return status;
    struct stat here, there;
    if (::fstat(before.get(), &here) != 0 || ::fstat(netns, &there) != 0) {
      return Status::Errno("E_NETWORK", "stat a network namespace");
    }
    if (here.st_dev == there.st_dev && here.st_ino == there.st_ino) return Status::Ok();
    if (::setns(netns, CLONE_NEWNET) != 0) {
      return Status::Errno("E_NETWORK", "enter a network namespace");
    }
    before_ = std::move(before);
    return Status::Ok();
  }

 private:
  Fd before_;
};

}  // namespace sf
