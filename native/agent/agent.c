// The memtap agent: preloaded into QEMU, it puts the guest's RAM under the data plane's control.
//
// QEMU runs with `memory-backend-memfd,share=on` and believes its RAM is a shared file, so that the
// migration capability `x-ignore-shared` leaves RAM out of the device state. When it maps that
// memfd, the agent maps something else in its place: anonymous memory for a VM that boots, a
// private mapping of the replica for a clone; registers it with a userfaultfd, and hands that to
// the data plane before QEMU sees the first byte.
//
// States:  unmapped -> attached <-> detached (the data plane is gone; faults wait)
// Invariants:
//  - No mapping of the memfd is ever returned that is not registered and acknowledged. Whatever
//    fails, mmap() fails, and QEMU with it: a clone would read zeros, a parent's writes would go
//    unseen.
//  - The userfaultfd stays open here until the process ends. If the last descriptor closed, the
//    kernel would release every waiting fault to read zeros.
//  - Guest RAM is never discarded or made huge behind the data plane's back (madvise below): a page
//    that vanishes loses its write protection and with it the old bytes.
//  - A forked child has neither the RAM (MADV_DONTFORK) nor the descriptors: it cannot read what
//    nobody serves for it, and does not keep the VM looking alive.
// Limits, on purpose: one RAM block per process; pages pinned for DMA (VFIO, registered buffers)
// escape write protection in any userfaultfd design and are not to be configured. libc only.
#undef _FILE_OFFSET_BITS  // else the headers would rename mmap to mmap64, and both are defined here

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "protocol.h"

#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

#define EXPORT __attribute__((visibility("default")))

enum { HANDSHAKE_TIMEOUT_S = 10, BACKOFF_FIRST_MS = 5, BACKOFF_LAST_MS = 200 };

static struct {
  pthread_mutex_t lock;  // held by the one call of mmap() that takes the RAM
  bool taken;
  int uffd;
  int socket;
  uint64_t base;
  uint64_t bytes;
  bool clone;
  uint64_t replica_dev;
  uint64_t replica_ino;
  struct sockaddr_un address;
  char vm[sizeof((struct memtap_hello *)0)->vm];
  char token[sizeof((struct memtap_hello *)0)->token];
} agent = {.lock = PTHREAD_MUTEX_INITIALIZER, .uffd = -1, .socket = -1};

static void *raw_mmap(void *addr, size_t length, int prot, int flags, int fd, off_t offset) {
  return (void *)syscall(SYS_mmap, addr, length, (long)prot, (long)flags, (long)fd, offset);
}

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...) {
  char line[512];
  va_list args;
  va_start(args, format);
  vsnprintf(line, sizeof line, format, args);
  va_end(args);
  dprintf(STDERR_FILENO, "memtap-agent: %s\n", line);
}

static bool copy_env(const char *name, char *out, size_t room) {
  const char *value = getenv(name);
  if (value == NULL || value[0] == '\0' || strlen(value) >= room) {
    say("E_CONFIG: %s is %s", name, value == NULL ? "not set" : "empty or too long");
    return false;
  }
  strcpy(out, value);
  return true;
}

static bool configure(void) {
  agent.address.sun_family = AF_UNIX;
  return copy_env("SF_MEMTAP_SOCKET", agent.address.sun_path, sizeof agent.address.sun_path) &&
         copy_env("SF_MEMTAP_VM", agent.vm, sizeof agent.vm) &&
         copy_env("SF_MEMTAP_TOKEN", agent.token, sizeof agent.token);
}

// Sends one packet, with at most one descriptor.
static bool send_packet(int socket, const void *data, size_t size, int fd) {
  struct iovec iov = {.iov_base = (void *)data, .iov_len = size};
  union {
    struct cmsghdr header;
    char room[CMSG_SPACE(sizeof(int))];
  } control;
  struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1};
  if (fd >= 0) {
    memset(&control, 0, sizeof control);
    message.msg_control = control.room;
    message.msg_controllen = sizeof control.room;
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(header), &fd, sizeof fd);
  }
  ssize_t sent;
  do {
    sent = sendmsg(socket, &message, MSG_NOSIGNAL);
  } while (sent < 0 && errno == EINTR);
  return sent == (ssize_t)size;
}

// Receives one packet of exactly `size` bytes and up to two descriptors (-1 where none came).
static bool receive_packet(int socket, void *data, size_t size, int fds[2]) {
  fds[0] = fds[1] = -1;
  struct iovec iov = {.iov_base = data, .iov_len = size};
  union {
    struct cmsghdr header;
    char room[CMSG_SPACE(2 * sizeof(int))];
  } control;
  struct msghdr message = {.msg_iov = &iov,
                           .msg_iovlen = 1,
                           .msg_control = control.room,
                           .msg_controllen = sizeof control.room};
  ssize_t got;
  do {
    got = recvmsg(socket, &message, MSG_CMSG_CLOEXEC);
  } while (got < 0 && errno == EINTR);
  if (got < 0) return false;
  for (struct cmsghdr *header = CMSG_FIRSTHDR(&message); header != NULL;
       header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    memcpy(fds, CMSG_DATA(header), (count < 2 ? count : 2) * sizeof(int));
  }
  if (got == (ssize_t)size && (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) == 0) return true;
  errno = EPROTO;
  return false;
}

static void close_fd(int *fd) {
  if (*fd >= 0) close(*fd);
  *fd = -1;
}

static int connect_server(void) {
  int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  if (fd < 0) return -1;
  const struct timeval limit = {.tv_sec = HANDSHAKE_TIMEOUT_S};
  if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit) == 0 &&
      setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit) == 0 &&
      connect(fd, (const struct sockaddr *)&agent.address, sizeof agent.address) == 0) {
    return fd;
  }
  const int error = errno;
  close(fd);
  errno = error;
  return -1;
}

// Says hello; true with the offer and its descriptors if the data plane accepts this VM.
static bool exchange_hello(int socket, uint32_t flags, struct memtap_offer *offer, int fds[2]) {
  struct memtap_hello hello = {
      .magic = MEMTAP_MAGIC,
      .version = MEMTAP_VERSION,
      .flags = flags,
      .ram_bytes = agent.bytes,
      .replica_dev = agent.replica_dev,
      .replica_ino = agent.replica_ino,
  };
  memcpy(hello.vm, agent.vm, sizeof hello.vm);
  memcpy(hello.token, agent.token, sizeof hello.token);
  fds[0] = fds[1] = -1;
  if (!send_packet(socket, &hello, sizeof hello, -1) ||
      !receive_packet(socket, offer, sizeof *offer, fds)) {
    snprintf(offer->code, sizeof offer->code, "E_DATAPLANE");
    snprintf(offer->message, sizeof offer->message, "handshake: %s", strerror(errno));
    return false;
  }
  offer->code[sizeof offer->code - 1] = offer->message[sizeof offer->message - 1] = '\0';
  if (offer->magic != MEMTAP_MAGIC || offer->version != MEMTAP_VERSION) {
    snprintf(offer->code, sizeof offer->code, "E_DATAPLANE");
    snprintf(offer->message, sizeof offer->message, "the data plane speaks another version");
    return false;
  }
  return offer->code[0] == '\0';
}

// Hands the userfaultfd over and waits until it is served.
static bool exchange_attach(int socket, uint64_t nonce, struct memtap_ack *ack) {
  const struct memtap_attach attach = {.magic = MEMTAP_MAGIC,
                                       .version = MEMTAP_VERSION,
                                       .nonce = nonce,
                                       .base = agent.base,
                                       .bytes = agent.bytes};
  int fds[2];
  if (!send_packet(socket, &attach, sizeof attach, agent.uffd) ||
      !receive_packet(socket, ack, sizeof *ack, fds)) {
    snprintf(ack->code, sizeof ack->code, "E_DATAPLANE");
    snprintf(ack->message, sizeof ack->message, "hand-over: %s", strerror(errno));
    return false;
  }
  ack->code[sizeof ack->code - 1] = ack->message[sizeof ack->message - 1] = '\0';
  if (ack->magic != MEMTAP_MAGIC) snprintf(ack->code, sizeof ack->code, "E_DATAPLANE");
  return ack->code[0] == '\0';
}

static void sleep_ms(int ms) {
  struct timespec left = {.tv_sec = ms / 1000, .tv_nsec = (ms % 1000) * 1000000L};
  while (nanosleep(&left, &left) != 0 && errno == EINTR) {
  }
}

static bool resume(void) {
  int socket = connect_server();
  if (socket < 0) return false;
  struct memtap_offer offer;
  struct memtap_ack ack;
  int fds[2];
  const uint32_t flags = MEMTAP_RESUME | (agent.clone ? MEMTAP_CLONE : 0);
  bool ok =
      exchange_hello(socket, flags, &offer, fds) && exchange_attach(socket, offer.nonce, &ack);
  close_fd(&fds[0]);
  close_fd(&fds[1]);
  if (ok) {
    agent.socket = socket;
  } else {
    close(socket);
  }
  return ok;
}

// Watches the connection; when it ends, hands the userfaultfd to whoever serves the socket next.
// It never gives up: the guest's faults wait meanwhile, and only the operator ends a VM.
static void *keep_attached(void *unused) {
  (void)unused;
  prctl(PR_SET_NAME, "memtap-agent");
  const struct timeval forever = {0};
  for (;;) {
    setsockopt(agent.socket, SOL_SOCKET, SO_RCVTIMEO, &forever, sizeof forever);
    char byte;
    ssize_t got;
    do {
      got = recv(agent.socket, &byte, sizeof byte, 0);
    } while (got > 0 || (got < 0 && errno == EINTR));
    close_fd(&agent.socket);
    say("the data plane is gone; faults wait for the next one");
    int wait_ms = BACKOFF_FIRST_MS;
    while (!resume()) {
      sleep_ms(wait_ms);
      if (wait_ms < BACKOFF_LAST_MS) wait_ms *= 2;
      if (wait_ms > BACKOFF_LAST_MS) wait_ms = BACKOFF_LAST_MS;
    }
    say("attached again");
  }
  return NULL;
}

// Only the forking thread lives on in the child: it must hold neither descriptor.
static void in_child(void) {
  close_fd(&agent.uffd);
  close_fd(&agent.socket);
}

static bool start_thread(void) {
  sigset_t all, before;
  sigfillset(&all);
  if (pthread_atfork(NULL, NULL, in_child) != 0) return false;
  if (pthread_sigmask(SIG_SETMASK, &all, &before) != 0) return false;
  pthread_t thread;
  const int error = pthread_create(&thread, NULL, keep_attached, NULL);
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (error != 0) {
    errno = error;
    return false;
  }
  pthread_detach(thread);
  return true;
}

static bool register_memory(int device, const struct memtap_offer *offer) {
  agent.uffd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
  if (agent.uffd < 0) {
    say("E_USERFAULTFD: USERFAULTFD_IOC_NEW: %s", strerror(errno));
    return false;
  }
  struct uffdio_api api = {.api = UFFD_API, .features = offer->features};
  if (ioctl(agent.uffd, UFFDIO_API, &api) != 0) {
    say("E_USERFAULTFD: UFFDIO_API, features 0x%llx: %s", (unsigned long long)offer->features,
        strerror(errno));
    return false;
  }
  struct uffdio_register reg = {.range = {.start = agent.base, .len = agent.bytes},
                                .mode = offer->register_mode};
  if (ioctl(agent.uffd, UFFDIO_REGISTER, &reg) != 0) {
    say("E_USERFAULTFD: UFFDIO_REGISTER of %llu bytes: %s", (unsigned long long)agent.bytes,
        strerror(errno));
    return false;
  }
  if ((reg.ioctls & (1ull << _UFFDIO_WRITEPROTECT)) == 0) {
    say("E_USERFAULTFD: this kernel cannot write-protect the guest's RAM");
    return false;
  }
  return true;
}

// Maps, registers and hands over. On failure nothing is left but the reservation QEMU had made.
static void *take_ram(void *addr, size_t length, int prot, int flags, off_t offset) {
  if (agent.taken || offset != 0) {
    say("E_STATE: the RAM of a VM must be one memory backend, mapped once and whole");
    errno = EBUSY;
    return MAP_FAILED;
  }
  struct memtap_offer offer;
  struct memtap_ack ack;
  struct stat st = {0};
  int fds[2] = {-1, -1};
  void *ram = MAP_FAILED;
  agent.bytes = length;
  if (!configure()) goto failed;
  agent.socket = connect_server();
  if (agent.socket < 0) {
    say("E_DATAPLANE: connect %s: %s", agent.address.sun_path, strerror(errno));
    goto failed;
  }
  if (!exchange_hello(agent.socket, 0, &offer, fds)) {
    say("%s: %s", offer.code, offer.message);
    goto failed;
  }
  agent.clone = offer.clone != 0;
  if (fds[0] < 0 || (agent.clone && (fds[1] < 0 || fstat(fds[1], &st) != 0))) {
    say("E_DATAPLANE: the offer lacks a descriptor");
    goto failed;
  }
  if (agent.clone && (uint64_t)st.st_size != length) {
    say("E_REPLICA_MISMATCH: the replica has %llu bytes, the RAM %zu",
        (unsigned long long)st.st_size, length);
    goto failed;
  }
  agent.replica_dev = st.st_dev;
  agent.replica_ino = st.st_ino;
  const int kind = MAP_PRIVATE | MAP_NORESERVE | (agent.clone ? 0 : MAP_ANONYMOUS);
  ram = raw_mmap(addr, length, prot, (flags & MAP_FIXED) | kind, agent.clone ? fds[1] : -1, 0);
  if (ram == MAP_FAILED) {
    say("E_CAPACITY: map %zu bytes of RAM: %s", length, strerror(errno));
    goto failed;
  }
  // Huge pages would turn one written byte into 2 MiB that are no longer known to be zero, and are
  // split by the first fork anyway. Failing to advise that is harmless; sharing with a child is
  // not.
  syscall(SYS_madvise, ram, length, MADV_NOHUGEPAGE);
  syscall(SYS_madvise, ram, length, MADV_DONTDUMP);
  if (syscall(SYS_madvise, ram, length, MADV_DONTFORK) != 0) {
    say("E_INTERNAL: MADV_DONTFORK: %s", strerror(errno));
    goto failed;
  }
  agent.base = (uint64_t)(uintptr_t)ram;
  if (!register_memory(fds[0], &offer)) goto failed;
  if (!exchange_attach(agent.socket, offer.nonce, &ack)) {
    say("%s: %s", ack.code, ack.message);
    goto failed;
  }
  if (!start_thread()) {
    say("E_INTERNAL: thread: %s", strerror(errno));
    goto failed;
  }
  agent.taken = true;
  close_fd(&fds[0]);
  close_fd(&fds[1]);
  return ram;

failed:
  close_fd(&fds[0]);
  close_fd(&fds[1]);
  if (ram != MAP_FAILED) {
    if ((flags & MAP_FIXED) != 0) {
      raw_mmap(ram, length, PROT_NONE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
               0);
    } else {
      munmap(ram, length);
    }
  }
  agent.base = 0;
  close_fd(&agent.uffd);
  close_fd(&agent.socket);
  errno = EIO;
  return MAP_FAILED;
}

static bool is_guest_ram(int fd) {
  char link[64], target[sizeof MEMTAP_MEMFD_LINK - 1];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  const int error = errno;
  const ssize_t n = readlink(link, target, sizeof target);
  errno = error;
  return n == sizeof target && memcmp(target, MEMTAP_MEMFD_LINK, sizeof target) == 0;
}

EXPORT void *mmap64(void *addr, size_t length, int prot, int flags, int fd, off64_t offset) {
  if (fd < 0 || (flags & MAP_ANONYMOUS) != 0 || !is_guest_ram(fd)) {
    return raw_mmap(addr, length, prot, flags, fd, offset);
  }
  pthread_mutex_lock(&agent.lock);
  void *ram = take_ram(addr, length, prot, flags, offset);
  pthread_mutex_unlock(&agent.lock);
  return ram;
}

EXPORT void *mmap(void *addr, size_t length, int prot, int flags, int fd, off_t offset) {
  return mmap64(addr, length, prot, flags, fd, offset);
}

EXPORT int madvise(void *addr, size_t length, int advice) {
  const uint64_t start = (uint64_t)(uintptr_t)addr;
  const uint64_t end = start + length;
  if (agent.base != 0 && start < agent.base + agent.bytes && (end > agent.base || end < start)) {
    switch (advice) {
      case MADV_NORMAL:
      case MADV_RANDOM:
      case MADV_SEQUENTIAL:
      case MADV_WILLNEED:
      case MADV_DONTFORK:
      case MADV_DONTDUMP:
      case MADV_NOHUGEPAGE:
        break;
      default:  // discards, merging, huge pages, and whatever a later kernel invents
        errno = EINVAL;
        return -1;
    }
  }
  return (int)syscall(SYS_madvise, addr, length, advice);
}
