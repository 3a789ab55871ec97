#include "netback/lock.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <chrono>
#include <thread>

#include "netback/netns.h"

namespace sf {
namespace {

constexpr char kDirectory[] = "/run/snowflock";
constexpr char kFile[] = "/run/snowflock/netback.lock";
constexpr std::chrono::seconds kLimit{20};
constexpr std::chrono::milliseconds kPause{1};

}  // namespace

Status NetbackLock::Take() {
  if (::mkdir(kDirectory, 0755) != 0 && errno != EEXIST) {
    return Status::Errno("E_IO", std::string("make ") + kDirectory);
  }
  Fd file(::open(kFile, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!file.valid()) return Status::Errno("E_IO", std::string("open ") + kFile);
  struct stat netns;
  if (::stat(kThreadNetns, &netns) != 0) {
    return Status::Errno("E_IO", std::string("stat ") + kThreadNetns);
  }
  struct flock lock = {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  lock.l_start = static_cast<off_t>(netns.st_ino);
  lock.l_len = 1;
  const auto end = std::chrono::steady_clock::now() + kLimit;
  // Of the open file, not of the process: two filters of one process keep each other out as well.
  while (::fcntl(file.get(), F_OFD_SETLK, &lock) != 0) {
    if (errno != EAGAIN && errno != EACCES) {
      return Status::Errno("E_IO", std::string("lock ") + kFile);
    }
    if (std::chrono::steady_clock::now() > end) {
      return Status::Error("E_IN_USE",
                           "another process has been changing the network filters of this network "
                           "namespace for more than 20 s");
    }
    std::this_thread::sleep_for(kPause);
  }
  file_ = std::move(file);
  return Status::Ok();
}

}  // namespace sf
