// Preloaded into a server: makes calls on chosen files fail, from when and for as long as a test
// says.
//
// FAULT_RULE names a file, read at each call: empty, or "CALL SUFFIX NTH ERRNO". CALL is read,
// write or sync; the NTH call of that kind (from 1) on files whose path ends with SUFFIX, and those
// after it, fail with ERRNO and have no effect. Another text begins to count anew.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int rule_fd = -1;
static char rule[512];
static int count;

__attribute__((constructor)) static void start(void) {
  const char* path = getenv("FAULT_RULE");
  if (path != NULL) rule_fd = open(path, O_RDONLY | O_CLOEXEC);
  if (rule_fd < 0) {
    fprintf(stderr, "FAULT_RULE is not a file\n");
    abort();
  }
}

static int ends_with(const char* text, const char* end) {
  const size_t n = strlen(text);
  const size_t m = strlen(end);
  return n >= m && strcmp(text + n - m, end) == 0;
}

// 1 and errno if this call is to fail.
static int fails(const char* call, int fd) {
  const int error = errno;
  char text[512];
  const ssize_t n = syscall(SYS_pread64, rule_fd, text, sizeof text - 1, 0);
  char kind[16];
  char suffix[256];
  int nth = 0;
  int code = 0;
  if (n > 0) text[n] = 0;
  if (n <= 0 || sscanf(text, "%15s %255s %d %d", kind, suffix, &nth, &code) != 4 ||
      strcmp(kind, call) != 0) {
    errno = error;
    return 0;
  }
  char link[64];
  char path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t length = readlink(link, path, sizeof path - 1);
  errno = error;
  if (length < 0) return 0;
  path[length] = 0;
  if (!ends_with(path, suffix)) return 0;
  pthread_mutex_lock(&lock);
  if (strcmp(rule, text) != 0) count = 0;
  strcpy(rule, text);
  const int hit = ++count >= nth;
  pthread_mutex_unlock(&lock);
  if (hit) errno = code;
  return hit;
}

#define CALL(kind, type, name, number, parameters, ...) \
  type name parameters { return fails(kind, fd) ? (type)-1 : (type)syscall(number, __VA_ARGS__); }
#define PAIR(kind, name, other, number, parameters, ...)     \
  CALL(kind, ssize_t, name, number, parameters, __VA_ARGS__) \
  CALL(kind, ssize_t, other, number, parameters, __VA_ARGS__)

CALL("sync", int, fsync, SYS_fsync, (int fd), fd)
CALL("sync", int, fdatasync, SYS_fdatasync, (int fd), fd)
CALL("write", ssize_t, write, SYS_write, (int fd, const void* data, size_t n), fd, data, n)
CALL("write", ssize_t, writev, SYS_writev, (int fd, const struct iovec* parts, int n), fd, parts, n)
PAIR("write", pwrite, pwrite64, SYS_pwrite64, (int fd, const void* data, size_t n, off_t at), fd,
     data, n, at)
PAIR("write", pwritev, pwritev64, SYS_pwritev, (int fd, const struct iovec* parts, int n, off_t at),
     fd, parts, n, at, 0)
PAIR("write", pwritev2, pwritev64v2, SYS_pwritev2,
     (int fd, const struct iovec* parts, int n, off_t at, int flags), fd, parts, n, at, 0, flags)
PAIR("read", pread, pread64, SYS_pread64, (int fd, void* data, size_t n, off_t at), fd, data, n, at)
PAIR("read", preadv, preadv64, SYS_preadv, (int fd, const struct iovec* parts, int n, off_t at), fd,
     parts, n, at, 0)
PAIR("read", preadv2, preadv64v2, SYS_preadv2,
     (int fd, const struct iovec* parts, int n, off_t at, int flags), fd, parts, n, at, 0, flags)
