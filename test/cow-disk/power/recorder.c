// Preloaded into a server: appends every call that changes or syncs a file below a folder to a log.
//
// Environment: REC_ROOT the folder; REC_LOG the log, which exists; REC_CONTROL a file of two
// counters of 4 bytes, of entries and of beginnings of syncs: the process is killed right after the
// entry that counts one of them down to 0; REC_BOOT_ID a file that is read in place of the kernel's
// boot id, so that another process is in "another boot".
//
// Order. One lock is held over a call and its entry, so entries stand in the order in which the
// calls took effect. A sync has an entry before and one after and holds no lock: what it makes
// durable is what stands before the first, from the second on. What goes out on sockets and on
// stdout has entries too: an answer's entry stands after all calls it depended on, and before all
// that came after it.
//
// A file is an inode number; a directory entry is the directory's inode number and a name.
// What the library cannot put into the log aborts the process (ioctl clones, ranges collapsed).
// What it does not see (mappings, io_uring, calls inside libc) is found by the reader, who compares
// the log played to its end with the real folder.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum Kind {
  kStart = 1,      // a=pid
  kCreate = 2,     // a=directory b=inode c=1 if a directory; name
  kLink = 3,       // a=directory b=inode; name
  kUnlink = 4,     // a=directory; name
  kRename = 5,     // a=directory b=directory; name NUL name
  kWrite = 6,      // a=inode b=offset; data
  kSize = 7,       // a=inode b=size
  kZero = 8,       // a=inode b=offset c=length
  kSyncBegin = 9,  // a=inode (0: all) b=token
  kSyncEnd = 10,   // a=inode b=token c=errno
  kAccept = 11,    // a=connection, counted from 0 in this process
  kSent = 12,      // a=connection b=bytes
  kStdout = 13,    // data
};

struct Entry {
  uint32_t kind;
  uint32_t bytes;
  uint64_t a, b, c;
};

#define MAX_FDS 4096
#define MAX_PARTS 1024
#define MAX_INODES 65536  // a power of two

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char root[PATH_MAX];
static size_t root_bytes;
static dev_t root_device;
static int log_fd = -1;
static volatile uint32_t* countdown;
static const char* boot_id;
static uint64_t inodes[MAX_INODES];  // files below root; 0: free
static int connections[MAX_FDS];     // 1 + connection; 0: none
static int connection_count;
static uint64_t sync_count;

static void die(const char* what) {
  char text[256];
  const int n = snprintf(text, sizeof text, "recorder: %s (errno %d)\n", what, errno);
  syscall(SYS_write, 2, text, n);
  abort();
}

static void append(uint32_t kind, uint64_t a, uint64_t b, uint64_t c, const struct iovec* data,
                   int parts, size_t bytes) {
  struct Entry entry = {kind, (uint32_t)bytes, a, b, c};
  struct iovec all[MAX_PARTS + 1] = {{&entry, sizeof entry}};
  if (parts > MAX_PARTS) die("too many parts");
  int count = 1;
  size_t left = bytes;
  for (int i = 0; i < parts && left > 0; i++) {
    const size_t n = data[i].iov_len < left ? data[i].iov_len : left;
    all[count].iov_base = data[i].iov_base;
    all[count++].iov_len = n;
    left -= n;
  }
  if (syscall(SYS_writev, log_fd, all, count) != (ssize_t)(sizeof entry + bytes)) {
    die("the log cannot be written");
  }
  const int over = countdown[0] > 0 && --countdown[0] == 0;
  const int sync_over = kind == kSyncBegin && countdown[1] > 0 && --countdown[1] == 0;
  if (over || sync_over) syscall(SYS_kill, getpid(), SIGKILL);
}

static void append_text(uint32_t kind, uint64_t a, uint64_t b, uint64_t c, const char* text) {
  const struct iovec part = {(void*)text, strlen(text)};
  append(kind, a, b, c, &part, 1, part.iov_len);
}

__attribute__((constructor)) static void start(void) {
  const char* folder = getenv("REC_ROOT");
  const char* log = getenv("REC_LOG");
  const char* control = getenv("REC_CONTROL");
  boot_id = getenv("REC_BOOT_ID");
  if (folder == NULL || log == NULL || control == NULL) die("REC_ROOT, REC_LOG, REC_CONTROL");
  if (realpath(folder, root) == NULL) die("REC_ROOT");
  root_bytes = strlen(root);
  struct stat st;
  if (stat(root, &st) != 0) die("REC_ROOT");
  root_device = st.st_dev;
  const int low = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CLOEXEC, 0);
  log_fd = fcntl(low, F_DUPFD_CLOEXEC, 900);
  const int fd = syscall(SYS_openat, AT_FDCWD, control, O_RDWR | O_CLOEXEC, 0);
  countdown = mmap(NULL, 8, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (log_fd < 0 || countdown == MAP_FAILED) die("REC_LOG or REC_CONTROL");
  syscall(SYS_close, low);
  syscall(SYS_close, fd);
  append(kStart, getpid(), 0, 0, NULL, 0, 0);
}

static uint64_t* slot(uint64_t inode) {
  uint64_t at = inode * 0x9e3779b97f4a7c15u >> 48;
  for (int i = 0; i < MAX_INODES; i++, at++) {
    uint64_t* found = &inodes[at % MAX_INODES];
    if (*found == inode || *found == 0) return found;
  }
  die("too many files");
  return NULL;
}

static int below_root(const char* path) {
  return strncmp(path, root, root_bytes) == 0 && (path[root_bytes] == '/' || path[root_bytes] == 0);
}

static int path_of(int fd, char* out) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const ssize_t n = syscall(SYS_readlink, link, out, PATH_MAX - 1);
  if (n < 0) return -1;
  out[n] = 0;
  return 0;
}

// The inode of `fd` if it is a file below root that was opened; else 0.
static uint64_t watched(int fd) {
  struct stat st;
  const int error = errno;
  const int failed = fstat(fd, &st);
  errno = error;
  if (failed != 0 || !S_ISREG(st.st_mode) || st.st_dev != root_device) return 0;
  return *slot(st.st_ino);
}

// The directory that holds `path`, if it is below root, else 0; `*name` is the last part.
static uint64_t parent(int at, const char* path, const char** name) {
  char folder[PATH_MAX];
  snprintf(folder, sizeof folder, "%s", path);
  size_t end = strlen(folder);
  while (end > 1 && folder[end - 1] == '/') folder[--end] = 0;
  char* cut = strrchr(folder, '/');
  *name = cut == NULL ? path : path + (cut - folder) + 1;
  if (cut == NULL) {
    strcpy(folder, ".");
  } else {
    cut[cut == folder] = 0;
  }
  const int error = errno;
  uint64_t inode = 0;
  char real[PATH_MAX];
  struct stat st;
  const int fd = syscall(SYS_openat, at, folder, O_PATH | O_DIRECTORY | O_CLOEXEC, 0);
  if (fd >= 0) {
    if (path_of(fd, real) == 0 && below_root(real) && fstat(fd, &st) == 0) inode = st.st_ino;
    syscall(SYS_close, fd);
  }
  errno = error;
  return inode;
}

static void unlock(void) {
  const int error = errno;
  pthread_mutex_unlock(&lock);
  errno = error;
}

static int do_open(int at, const char* path, int flags, mode_t mode) {
  if (boot_id != NULL && strcmp(path, "/proc/sys/kernel/random/boot_id") == 0) path = boot_id;
  if ((flags & O_DSYNC) != 0) {
    const char* name;
    if (parent(at, path, &name) != 0) die("O_DSYNC is not recorded");
  }
  if ((flags & (O_CREAT | O_TRUNC)) == 0) {
    const int fd = syscall(SYS_openat, at, path, flags, mode);
    if (fd < 0) return fd;
    char real[PATH_MAX];
    struct stat st;
    const int error = errno;
    if (fstat(fd, &st) == 0 && S_ISREG(st.st_mode) && path_of(fd, real) == 0 && below_root(real)) {
      pthread_mutex_lock(&lock);
      *slot(st.st_ino) = st.st_ino;
      pthread_mutex_unlock(&lock);
    }
    errno = error;
    return fd;
  }
  pthread_mutex_lock(&lock);
  const char* name;
  const uint64_t folder = parent(at, path, &name);
  struct stat st;
  const int error = errno;
  const int existed = fstatat(at, path, &st, 0) == 0;
  errno = error;
  const int fd = syscall(SYS_openat, at, path, flags, mode);
  if (fd >= 0 && folder != 0) {
    if (fstat(fd, &st) != 0) die("fstat");
    *slot(st.st_ino) = st.st_ino;
    if (!existed) append_text(kCreate, folder, st.st_ino, 0, name);
    if (existed && (flags & O_TRUNC) != 0) append(kSize, st.st_ino, 0, 0, NULL, 0, 0);
  }
  unlock();
  return fd;
}

static mode_t mode_of(int flags, va_list arguments) {
  return (flags & (O_CREAT | O_TMPFILE)) != 0 ? va_arg(arguments, mode_t) : 0;
}
#define OPEN(name)                                 \
  int name(const char* path, int flags, ...) {     \
    va_list arguments;                             \
    va_start(arguments, flags);                    \
    const mode_t mode = mode_of(flags, arguments); \
    va_end(arguments);                             \
    return do_open(AT_FDCWD, path, flags, mode);   \
  }
#define OPENAT(name)                                   \
  int name(int at, const char* path, int flags, ...) { \
    va_list arguments;                                 \
    va_start(arguments, flags);                        \
    const mode_t mode = mode_of(flags, arguments);     \
    va_end(arguments);                                 \
    return do_open(at, path, flags, mode);             \
  }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
int creat(const char* path, mode_t mode) {
  return do_open(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode);
}

static size_t total(const struct iovec* parts, int count) {
  size_t bytes = 0;
  for (int i = 0; i < count; i++) bytes += parts[i].iov_len;
  return bytes;
}

// Writes that go on where the last one ended, to a file, a socket or stdout.
static ssize_t do_write(int fd, const struct iovec* parts, int count) {
  const int connection = fd >= 0 && fd < MAX_FDS ? connections[fd] : 0;
  if (connection == 0 && fd != STDOUT_FILENO && watched(fd) == 0) {
    return syscall(SYS_writev, fd, parts, count);
  }
  pthread_mutex_lock(&lock);
  const ssize_t n = syscall(SYS_writev, fd, parts, count);
  if (n > 0) {
    const uint64_t inode = watched(fd);
    if (inode != 0) {
      append(kWrite, inode, lseek(fd, 0, SEEK_CUR) - n, 0, parts, count, n);
    } else if (connection != 0) {
      append(kSent, connection - 1, n, 0, NULL, 0, 0);
    } else {
      append(kStdout, 0, 0, 0, parts, count, n);
    }
  }
  unlock();
  return n;
}
ssize_t write(int fd, const void* data, size_t bytes) {
  const struct iovec part = {(void*)data, bytes};
  return do_write(fd, &part, 1);
}
ssize_t writev(int fd, const struct iovec* parts, int count) { return do_write(fd, parts, count); }

static ssize_t do_pwritev(int fd, const struct iovec* parts, int count, off_t at, int flags) {
  const uint64_t inode = watched(fd);
  if (inode == 0) return syscall(SYS_pwritev2, fd, parts, count, at, 0, flags);
  if ((flags & (RWF_DSYNC | RWF_SYNC | RWF_APPEND)) != 0 || at < 0) die("pwritev2 with flags");
  pthread_mutex_lock(&lock);
  const ssize_t n = syscall(SYS_pwritev2, fd, parts, count, at, 0, flags);
  if (n > 0) append(kWrite, inode, at, 0, parts, count, n);
  unlock();
  return n;
}
static ssize_t do_pwrite(int fd, const void* data, size_t bytes, off_t at) {
  const struct iovec part = {(void*)data, bytes};
  return do_pwritev(fd, &part, 1, at, 0);
}
#define PWRITE(name)                                               \
  ssize_t name(int fd, const void* data, size_t bytes, off_t at) { \
    return do_pwrite(fd, data, bytes, at);                         \
  }
#define PWRITEV(name)                                                    \
  ssize_t name(int fd, const struct iovec* parts, int count, off_t at) { \
    return do_pwritev(fd, parts, count, at, 0);                          \
  }
#define PWRITEV2(name)                                                              \
  ssize_t name(int fd, const struct iovec* parts, int count, off_t at, int flags) { \
    return do_pwritev(fd, parts, count, at, flags);                                 \
  }
PWRITE(pwrite)
PWRITE(pwrite64)
PWRITEV(pwritev)
PWRITEV(pwritev64)
PWRITEV2(pwritev2)
PWRITEV2(pwritev64v2)

// Data that came from another file: what is there now is read back.
static void append_copied(int fd, uint64_t inode, off_t at, size_t bytes) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const int in = syscall(SYS_openat, AT_FDCWD, link, O_RDONLY | O_CLOEXEC, 0);
  void* data = malloc(bytes);
  if (in < 0 || data == NULL || syscall(SYS_pread64, in, data, bytes, at) != (ssize_t)bytes) {
    die("copied data cannot be read back");
  }
  const struct iovec part = {data, bytes};
  append(kWrite, inode, at, 0, &part, 1, bytes);
  free(data);
  syscall(SYS_close, in);
}
// `at`: where it was written to, or NULL: the file's own position.
static ssize_t copied(int fd, uint64_t inode, const off_t* at, off_t before, ssize_t n) {
  if (n > 0) append_copied(fd, inode, at != NULL ? before : lseek(fd, 0, SEEK_CUR) - n, n);
  unlock();
  return n;
}
ssize_t copy_file_range(int in, off_t* in_at, int out, off_t* out_at, size_t bytes,
                        unsigned flags) {
  const uint64_t inode = watched(out);
  if (inode == 0) return syscall(SYS_copy_file_range, in, in_at, out, out_at, bytes, flags);
  pthread_mutex_lock(&lock);
  const off_t before = out_at == NULL ? 0 : *out_at;
  const ssize_t n = syscall(SYS_copy_file_range, in, in_at, out, out_at, bytes, flags);
  return copied(out, inode, out_at, before, n);
}
ssize_t splice(int in, off_t* in_at, int out, off_t* out_at, size_t bytes, unsigned flags) {
  const uint64_t inode = watched(out);
  if (inode == 0) return syscall(SYS_splice, in, in_at, out, out_at, bytes, flags);
  pthread_mutex_lock(&lock);
  const off_t before = out_at == NULL ? 0 : *out_at;
  const ssize_t n = syscall(SYS_splice, in, in_at, out, out_at, bytes, flags);
  return copied(out, inode, out_at, before, n);
}
static ssize_t do_sendfile(int out, int in, off_t* at, size_t bytes) {
  const int connection = out >= 0 && out < MAX_FDS ? connections[out] : 0;
  const uint64_t inode = watched(out);
  if (inode == 0 && connection == 0) return syscall(SYS_sendfile, out, in, at, bytes);
  pthread_mutex_lock(&lock);
  const ssize_t n = syscall(SYS_sendfile, out, in, at, bytes);
  if (inode != 0) return copied(out, inode, NULL, 0, n);
  if (n > 0) append(kSent, connection - 1, n, 0, NULL, 0, 0);
  unlock();
  return n;
}
ssize_t sendfile(int out, int in, off_t* at, size_t bytes) {
  return do_sendfile(out, in, at, bytes);
}
ssize_t sendfile64(int out, int in, off_t* at, size_t bytes) {
  return do_sendfile(out, in, at, bytes);
}

static int do_ftruncate(int fd, off_t size) {
  const uint64_t inode = watched(fd);
  if (inode == 0) return syscall(SYS_ftruncate, fd, size);
  pthread_mutex_lock(&lock);
  const int failed = syscall(SYS_ftruncate, fd, size);
  if (failed == 0) append(kSize, inode, size, 0, NULL, 0, 0);
  unlock();
  return failed;
}
int ftruncate(int fd, off_t size) { return do_ftruncate(fd, size); }
int ftruncate64(int fd, off_t size) { return do_ftruncate(fd, size); }
static int do_truncate(const char* path, off_t size) {
  const int fd = do_open(AT_FDCWD, path, O_WRONLY | O_CLOEXEC, 0);
  if (fd < 0) return -1;
  const int failed = do_ftruncate(fd, size);
  const int error = errno;
  syscall(SYS_close, fd);
  errno = error;
  return failed;
}
int truncate(const char* path, off_t size) { return do_truncate(path, size); }
int truncate64(const char* path, off_t size) { return do_truncate(path, size); }

static int do_fallocate(int fd, int mode, off_t at, off_t bytes) {
  const uint64_t inode = watched(fd);
  if (inode == 0) return syscall(SYS_fallocate, fd, mode, at, bytes);
  const int zeroes = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE;
  if ((mode & ~(zeroes | FALLOC_FL_KEEP_SIZE)) != 0) die("fallocate mode");
  pthread_mutex_lock(&lock);
  const int failed = syscall(SYS_fallocate, fd, mode, at, bytes);
  if (failed == 0) {
    if ((mode & zeroes) != 0) append(kZero, inode, at, bytes, NULL, 0, 0);
    struct stat st;
    if (fstat(fd, &st) != 0) die("fstat");
    if ((mode & FALLOC_FL_KEEP_SIZE) == 0) append(kSize, inode, st.st_size, 0, NULL, 0, 0);
  }
  unlock();
  return failed;
}
int fallocate(int fd, int mode, off_t at, off_t bytes) { return do_fallocate(fd, mode, at, bytes); }
int fallocate64(int fd, int mode, off_t at, off_t bytes) {
  return do_fallocate(fd, mode, at, bytes);
}
int posix_fallocate(int fd, off_t at, off_t bytes) {
  return do_fallocate(fd, 0, at, bytes) == 0 ? 0 : errno;
}
int posix_fallocate64(int fd, off_t at, off_t bytes) {
  return do_fallocate(fd, 0, at, bytes) == 0 ? 0 : errno;
}

static int do_sync(int number, int fd) {
  struct stat st;
  const int error = errno;
  st.st_ino = UINT64_MAX;  // a file elsewhere
  if (fd >= 0 && (fstat(fd, &st) != 0 || st.st_dev != root_device)) st.st_ino = UINT64_MAX;
  errno = error;
  const uint64_t inode = number == SYS_syncfs || fd < 0 ? 0 : st.st_ino;
  pthread_mutex_lock(&lock);
  const uint64_t token = ++sync_count;
  append(kSyncBegin, inode, token, 0, NULL, 0, 0);
  unlock();
  const int failed = fd < 0 ? syscall(number) : syscall(number, fd);
  const int outcome = errno;
  pthread_mutex_lock(&lock);
  append(kSyncEnd, inode, token, failed == 0 ? 0 : outcome, NULL, 0, 0);
  unlock();
  errno = outcome;
  return failed;
}
int fsync(int fd) { return do_sync(SYS_fsync, fd); }
int fdatasync(int fd) { return do_sync(SYS_fdatasync, fd); }
int syncfs(int fd) { return do_sync(SYS_syncfs, fd); }
void sync(void) { do_sync(SYS_sync, -1); }

static int do_rename(int at, const char* path, int to_at, const char* to, unsigned flags) {
  pthread_mutex_lock(&lock);
  const char* name;
  const char* to_name;
  const uint64_t folder = parent(at, path, &name);
  const uint64_t to_folder = parent(to_at, to, &to_name);
  if ((folder == 0) != (to_folder == 0)) die("rename into or out of the folder");
  if (folder != 0 && (flags & ~1u) != 0) die("renameat2 flags");
  const int failed = syscall(SYS_renameat2, at, path, to_at, to, flags);
  if (failed == 0 && folder != 0) {
    const struct iovec parts[2] = {{(void*)name, strlen(name) + 1},
                                   {(void*)to_name, strlen(to_name)}};
    append(kRename, folder, to_folder, 0, parts, 2, total(parts, 2));
  }
  unlock();
  return failed;
}
int rename(const char* path, const char* to) { return do_rename(AT_FDCWD, path, AT_FDCWD, to, 0); }
int renameat(int at, const char* path, int to_at, const char* to) {
  return do_rename(at, path, to_at, to, 0);
}
int renameat2(int at, const char* path, int to_at, const char* to, unsigned flags) {
  return do_rename(at, path, to_at, to, flags);
}

static int do_unlink(int at, const char* path, int flags) {
  pthread_mutex_lock(&lock);
  const char* name;
  const uint64_t folder = parent(at, path, &name);
  const int failed = syscall(SYS_unlinkat, at, path, flags);
  if (failed == 0 && folder != 0) append_text(kUnlink, folder, 0, 0, name);
  unlock();
  return failed;
}
int unlink(const char* path) { return do_unlink(AT_FDCWD, path, 0); }
int rmdir(const char* path) { return do_unlink(AT_FDCWD, path, AT_REMOVEDIR); }
int unlinkat(int at, const char* path, int flags) { return do_unlink(at, path, flags); }

// A new name; `kind` says of what.
static int named(int failed, int kind, int at, const char* path) {
  const char* name;
  const uint64_t folder = failed == 0 ? parent(at, path, &name) : 0;
  struct stat st;
  if (folder != 0) {
    if (fstatat(at, path, &st, AT_SYMLINK_NOFOLLOW) != 0) die("fstatat");
    append_text(kind, folder, st.st_ino, S_ISDIR(st.st_mode), name);
  }
  unlock();
  return failed;
}
int mkdirat(int at, const char* path, mode_t mode) {
  pthread_mutex_lock(&lock);
  return named(syscall(SYS_mkdirat, at, path, mode), kCreate, at, path);
}
int mkdir(const char* path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }
int linkat(int at, const char* path, int to_at, const char* to, int flags) {
  pthread_mutex_lock(&lock);
  return named(syscall(SYS_linkat, at, path, to_at, to, flags), kLink, to_at, to);
}
int link(const char* path, const char* to) { return linkat(AT_FDCWD, path, AT_FDCWD, to, 0); }

int ioctl(int fd, unsigned long request, ...) {
  va_list arguments;
  va_start(arguments, request);
  void* argument = va_arg(arguments, void*);
  va_end(arguments);
  const int clone = request == FICLONE || request == FICLONERANGE || request == FIDEDUPERANGE;
  if (clone && watched(fd) != 0) die("ioctl that clones a file");
  return syscall(SYS_ioctl, fd, request, argument);
}

static int accepted(int fd) {
  if (fd < 0) return fd;
  if (fd >= MAX_FDS) die("too many descriptors");
  pthread_mutex_lock(&lock);
  connections[fd] = ++connection_count;
  append(kAccept, connection_count - 1, 0, 0, NULL, 0, 0);
  unlock();
  return fd;
}
int accept4(int fd, struct sockaddr* address, socklen_t* bytes, int flags) {
  return accepted(syscall(SYS_accept4, fd, address, bytes, flags));
}
int accept(int fd, struct sockaddr* address, socklen_t* bytes) {
  return accept4(fd, address, bytes, 0);
}
int close(int fd) {
  if (fd >= 0 && fd < MAX_FDS) connections[fd] = 0;
  return syscall(SYS_close, fd);
}
static ssize_t sent(int connection, ssize_t n) {
  if (connection == 0) return n;
  if (n > 0) append(kSent, connection - 1, n, 0, NULL, 0, 0);
  unlock();
  return n;
}
static int begin_send(int fd) {
  const int connection = fd >= 0 && fd < MAX_FDS ? connections[fd] : 0;
  if (connection != 0) pthread_mutex_lock(&lock);
  return connection;
}
ssize_t sendmsg(int fd, const struct msghdr* message, int flags) {
  const int connection = begin_send(fd);
  return sent(connection, syscall(SYS_sendmsg, fd, message, flags));
}
ssize_t sendto(int fd, const void* data, size_t bytes, int flags, const struct sockaddr* to,
               socklen_t to_bytes) {
  const int connection = begin_send(fd);
  return sent(connection, syscall(SYS_sendto, fd, data, bytes, flags, to, to_bytes));
}
ssize_t send(int fd, const void* data, size_t bytes, int flags) {
  return sendto(fd, data, bytes, flags, NULL, 0);
}
