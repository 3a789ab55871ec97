// Behaves towards the agent as QEMU does (memfd, reservation, MAP_FIXED) and lets a test touch the
// memory. Commands on stdin, one a line; each answers one line on stdout, "ok ..." or "error ...".
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "protocol.h"

enum { PAGE = 4096 };

static uint8_t *ram;
static uint64_t pages;
static pthread_t writer;
static atomic_bool writing;
static atomic_ulong writes;
static uint64_t writer_seed;

static uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

static void fill(uint64_t page, uint64_t seed) {
  uint64_t *words = (uint64_t *)(ram + page * PAGE);
  for (int i = 0; i < PAGE / 8; i++) words[i] = mix(seed * 1000003 + page * 512 + (uint64_t)i);
}

static void *write_on(void *unused) {
  (void)unused;
  uint64_t state = writer_seed;
  while (atomic_load(&writing)) {
    state = mix(state);
    fill(state % pages, state);
    atomic_fetch_add(&writes, 1);
  }
  return NULL;
}

static const char *map_ram(uint64_t bytes) {
  int fd = memfd_create("memory-backend-memfd", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0 || ftruncate(fd, (off_t)bytes) != 0) return "memfd";
  uint8_t *place =
      mmap(NULL, bytes + PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (place == MAP_FAILED) return "reserve";
  ram = mmap(place, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
  pages = bytes / PAGE;
  return ram == MAP_FAILED ? "map" : NULL;
}

static double now_us(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

// Touches one page after the other; the i-th at `start_ns` + i * `period_ns` of the monotonic clock,
// unless that is 0. Answers with the microseconds each touch took.
static void time_touches(uint64_t first, uint64_t count, uint64_t start_ns, uint64_t period_ns) {
  uint64_t sum = 0;
  prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);
  printf("ok");
  for (uint64_t i = 0; i < count; i++) {
    if (start_ns != 0) {
      const uint64_t ns = start_ns + i * period_ns;
      const struct timespec until = {(time_t)(ns / 1000000000), (long)(ns % 1000000000)};
      while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL) == EINTR) {
      }
    }
    const double begin = now_us();
    sum += *(volatile uint8_t *)(ram + (first + i) * PAGE);
    printf(" %.1f", now_us() - begin);
  }
  printf(" %" PRIu64 "\n", sum);
}

// In a forked child: 0 if neither the RAM nor a descriptor of the agent is there.
static int child_leftovers(void) {
  int leftovers = 0;
  int pipe_fds[2];
  if (pipe(pipe_fds) != 0 || write(pipe_fds[1], ram, 1) != -1 || errno != EFAULT) leftovers |= 1;
  for (int fd = 3; fd < 64; fd++) {
    char link[64], target[64] = "";
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    if (readlink(link, target, sizeof target - 1) < 0) continue;
    if (strstr(target, "userfaultfd") != NULL || strncmp(target, "socket:", 7) == 0) leftovers |= 2;
  }
  return leftovers;
}

static int connect_to(const char *path) {
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  strncpy(address.sun_path, path, sizeof address.sun_path - 1);
  int fd = socket(AF_UNIX, SOCK_SEQPACKET, 0);
  return connect(fd, (const struct sockaddr *)&address, sizeof address) == 0 ? fd : -1;
}

// Says hello rightly, then hands over what is no userfaultfd, or from another address.
static void attach_wrongly(const char *path, int passed, uint64_t base, uint64_t bytes) {
  struct memtap_hello hello = {
      .magic = MEMTAP_MAGIC, .version = MEMTAP_VERSION, .ram_bytes = bytes, .vm = "vm"};
  strcpy(hello.token, "secret");
  int fd = connect_to(path);
  struct memtap_offer offer = {0};
  send(fd, &hello, sizeof hello, MSG_NOSIGNAL);
  recv(fd, &offer, sizeof offer, 0);
  struct memtap_attach attach = {.magic = MEMTAP_MAGIC,
                                 .version = MEMTAP_VERSION,
                                 .nonce = offer.nonce,
                                 .base = base,
                                 .bytes = bytes};
  struct iovec iov = {.iov_base = &attach, .iov_len = sizeof attach};
  union {
    struct cmsghdr header;
    char room[CMSG_SPACE(sizeof(int))];
  } control = {0};
  struct msghdr message = {.msg_iov = &iov,
                           .msg_iovlen = 1,
                           .msg_control = control.room,
                           .msg_controllen = sizeof control.room};
  struct cmsghdr *header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  memcpy(CMSG_DATA(header), &passed, sizeof passed);
  sendmsg(fd, &message, MSG_NOSIGNAL);
  struct memtap_ack ack = {0};
  recv(fd, &ack, sizeof ack, 0);
  close(fd);
}

// Everything a peer should not send: wrong sizes, wrong magic, text without an end, wrong
// hand-overs.
static void misbehave(const char *path, uint64_t bytes) {
  static char noise[65536];
  for (size_t i = 0; i < sizeof noise; i++) noise[i] = (char)mix(i);
  const size_t sizes[] = {1,
                          sizeof(struct memtap_hello) - 1,
                          sizeof(struct memtap_hello),
                          sizeof(struct memtap_hello) + 1,
                          sizeof(struct memtap_attach),
                          65536};
  for (int rounds = 0; rounds < 50; rounds++) {
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
      int fd = connect_to(path);
      send(fd, noise, sizes[i], MSG_NOSIGNAL);
      close(fd);
    }
  }
  struct memtap_hello endless = {.magic = MEMTAP_MAGIC, .version = MEMTAP_VERSION};
  memset(endless.vm, 'v', sizeof endless.vm);
  memset(endless.token, 't', sizeof endless.token);
  int fd = connect_to(path);
  send(fd, &endless, sizeof endless, MSG_NOSIGNAL);
  struct memtap_offer offer;
  recv(fd, &offer, sizeof offer, 0);
  close(fd);
  int file = memfd_create("no userfaultfd", MFD_CLOEXEC);
  attach_wrongly(path, file, PAGE, bytes);
  attach_wrongly(path, file, 1, bytes);
  attach_wrongly(path, file, UINT64_MAX - PAGE + 1, bytes);
  close(file);
}

int main(void) {
  char line[512], command[32], path[400];
  setvbuf(stdout, NULL, _IOLBF, 0);
  while (fgets(line, sizeof line, stdin) != NULL) {
    uint64_t a = 0, b = 0, c = 0, d = 0;
    path[0] = '\0';
    if (sscanf(line, "%31s", command) != 1) continue;
    sscanf(line, "%*s %" SCNu64 " %" SCNu64 " %" SCNu64 " %" SCNu64, &a, &b, &c, &d);
    sscanf(line, "%*s %*u %*u %399s", path);
    if (strcmp(command, "map") == 0) {
      const char *failed = map_ram(a);
      if (failed != NULL) {
        printf("error %s %d\n", failed, errno);
      } else {
        printf("ok\n");
      }
    } else if (strcmp(command, "fill") == 0) {  // fill FIRST COUNT SEED
      for (uint64_t i = 0; i < b; i++) fill(a + i, c);
      printf("ok\n");
    } else if (strcmp(command, "touch") == 0 || strcmp(command, "poke") == 0) {  // FIRST COUNT STEP
      const double begin = now_us();
      uint64_t sum = 0;
      if (c == 0) c = 1;
      for (uint64_t i = 0; i < b; i++) {
        volatile uint8_t *byte = ram + (a + i * c) * PAGE;
        if (command[0] == 't') {
          sum += *byte;
        } else {
          *byte = (uint8_t)(*byte + 1);
        }
      }
      printf("ok %.2f %" PRIu64 "\n", b == 0 ? 0 : (now_us() - begin) / (double)b, sum);
    } else if (strcmp(command, "time") == 0) {  // time FIRST COUNT START_NS PERIOD_NS: us of each
      time_touches(a, b, c, d);
    } else if (strcmp(command, "dump") == 0) {  // dump FIRST COUNT PATH: write(2) out of the RAM
      int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
      uint64_t done = 0;
      while (fd >= 0 && done < b * PAGE) {
        ssize_t n = write(fd, ram + a * PAGE + done, b * PAGE - done);
        if (n <= 0) break;
        done += (uint64_t)n;
      }
      close(fd);
      printf(done == b * PAGE ? "ok\n" : "error dump\n");
    } else if (strcmp(command, "load") == 0) {  // load FIRST COUNT PATH: read(2) into the RAM
      int fd = open(path, O_RDONLY | O_CLOEXEC);
      uint64_t done = 0;
      while (fd >= 0 && done < b * PAGE) {
        ssize_t n = read(fd, ram + a * PAGE + done, b * PAGE - done);
        if (n <= 0) break;
        done += (uint64_t)n;
      }
      close(fd);
      printf(done == b * PAGE ? "ok\n" : "error load\n");
    } else if (strcmp(command, "write-on") == 0) {  // write-on SEED: random pages until paused
      writer_seed = a;
      atomic_store(&writing, true);
      printf(pthread_create(&writer, NULL, write_on, NULL) == 0 ? "ok\n" : "error thread\n");
    } else if (strcmp(command, "pause") == 0) {
      atomic_store(&writing, false);
      pthread_join(writer, NULL);
      printf("ok %lu\n", atomic_load(&writes));
    } else if (strcmp(command, "discard") == 0) {  // discard FIRST COUNT ADVICE
      const int failed = madvise(ram + a * PAGE, b * PAGE, (int)c);
      printf("ok %d\n", failed == 0 ? 0 : errno);
    } else if (strcmp(command, "misbehave") == 0) {  // misbehave BYTES 0 SOCKET
      misbehave(path, a);
      printf("ok\n");
    } else if (strcmp(command, "fork") == 0) {
      fflush(stdout);
      pid_t child = fork();
      if (child == 0) _exit(child_leftovers());
      int status = -1;
      waitpid(child, &status, 0);
      printf("ok %d\n", WIFEXITED(status) ? WEXITSTATUS(status) : -1);
    } else {
      printf("error unknown\n");
    }
  }
  return 0;
}
