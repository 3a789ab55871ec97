#include "blktap/store_lock.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/random.h>
#include <sys/stat.h>

#include "blktap/files.h"

namespace sf {

Status StoreLock::take(const std::string& directory) {
  const std::string path = directory + "/store.lock";
  fd_ = Fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!fd_.valid()) return file_error("open " + path);
  if (::flock(fd_.get(), LOCK_EX | LOCK_NB) != 0) {
    const int error = errno;
    fd_.reset();
    if (error != EWOULDBLOCK) return file_error("lock " + path, error);
    return Status::Error("E_IN_USE", "store " + directory + " is open already");
  }
  witness_ = Fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW));
  if (!witness_.valid()) return file_error("open " + path);
  uint32_t nonce = 0;
  if (::getrandom(&nonce, sizeof nonce, 0) != sizeof nonce) return file_error("getrandom");
  timespec times[2] = {{0, UTIME_OMIT}, {0, 0}};
  ::clock_gettime(CLOCK_REALTIME, &times[1]);
  times[1].tv_nsec = static_cast<long>(nonce % 1000000000u);
  if (::futimens(fd_.get(), times) != 0) return file_error("set the time of " + path);
  struct stat st = {};
  if (::fstat(fd_.get(), &st) != 0) return file_error("stat " + path);
  stamp_ = st.st_mtim;  // as the file system kept it
  return Status::Ok();
}

void StoreLock::release(bool readers_left) {
  released_ = true;
  fd_.reset();
  if (!readers_left) witness_.reset();
}

bool StoreLock::holds() const {
  if (!released_.load(std::memory_order_acquire)) return true;
  struct stat st = {};
  return ::fstat(witness_.get(), &st) == 0 && st.st_nlink > 0 &&
         st.st_mtim.tv_sec == stamp_.tv_sec && st.st_mtim.tv_nsec == stamp_.tv_nsec;
}

}  // namespace sf
