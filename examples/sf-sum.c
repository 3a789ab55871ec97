// sf-sum: a program that becomes many. It fills memory and a file with data, clones its VM, lets
// each clone sum its share of both, collects the sums over TCP and checks the total against the
// same work done alone. Prints one JSON object a line; `event` says which:
//
//   loaded   memory_bytes, disk_bytes, load_ms
//   ticket   ticket, requested, allocation, vmids
//   forked   vmid, fork_ms: from the call to its return in the parent
//   reply    vmid, index, ip, memory, disk, digest, work_ms, reply_ms: from the call to the reply
//   joined   results: [{vmid, status} or {vmid, error}]
//   answer   answer, expected, ok, shares: [{vmid, by: "clone"|"parent", ok}]
//   error    what, code, message
//
// Exit status: 0 right answer with every granted clone, 1 right answer but clones failed (their
// shares were computed here), 2 wrong usage, 3 no fork at all, 4 wrong answer.

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "snowflock.h"

#define BLOCK_WORDS 8192u  // 64 KiB at a time from disk
#define REPORT_WORDS 8192u
#define REPLY_BYTES 512
#define CLONE_FILE "/sf-sum.share"

static struct {
  unsigned clones, mib, port, timeout_s;
  uint64_t seed;
  const char *folder;
} options = {.clones = 8, .mib = 32, .port = 7086, .timeout_s = 120, .seed = 1, .folder = "/root"};

struct sums {
  uint64_t memory, disk;
};

struct reply {
  bool arrived, checked;
  struct sums sums;
  uint64_t digest;
};

static struct sf_ticket ticket;
static struct reply replies[SF_MAX_CLONES];
static uint64_t *data;
static size_t words;
static char data_path[512];

static uint64_t now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static double ms_since(uint64_t start_ns) { return (double)(now_ns() - start_ns) / 1e6; }

// splitmix64: word `index` of the sequence of `seed`.
static uint64_t word_of(uint64_t seed, uint64_t index) {
  uint64_t z = seed + (index + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}

// A sum to which every byte and its place count.
static uint64_t sum_words(const uint64_t *from, size_t count, uint64_t first_index) {
  uint64_t sum = 0;
  for (size_t i = 0; i < count; i++) sum += from[i] * (2 * (first_index + i) + 1) ^ from[i] >> 29;
  return sum;
}

static uint64_t fnv1a(const void *bytes, size_t len, uint64_t hash) {
  for (const unsigned char *at = bytes; len--; at++) hash = (hash ^ *at) * 0x100000001b3u;
  return hash;
}

static void fail_io(const char *what, const char *path) {
  printf("{\"event\":\"error\",\"what\":\"%s %s\",\"code\":\"E_IO\",\"message\":\"%s\"}\n", what,
         path, strerror(errno));
  exit(2);
}

static bool write_all(int fd, const void *bytes, size_t len) {
  for (const char *at = bytes; len;) {
    ssize_t put = write(fd, at, len);
    if (put < 0 && errno == EINTR) continue;
    if (put <= 0) return false;
    at += put;
    len -= (size_t)put;
  }
  return true;
}

static bool read_all(int fd, void *bytes, size_t len, off_t at) {
  for (char *to = bytes; len;) {
    ssize_t got = pread(fd, to, len, at);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    to += got;
    at += got;
    len -= (size_t)got;
  }
  return true;
}

static void load(void) {
  uint64_t start = now_ns();
  words = (size_t)options.mib << 17;
  data = malloc(words * sizeof *data);
  uint64_t *block = malloc(BLOCK_WORDS * sizeof *block);
  if (!data || !block) fail_io("malloc", "");
  for (size_t i = 0; i < words; i++) data[i] = word_of(options.seed, i);
  snprintf(data_path, sizeof data_path, "%s/sf-sum.data", options.folder);
  int fd = open(data_path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (fd < 0) fail_io("open", data_path);
  for (size_t i = 0; i < words; i += BLOCK_WORDS) {
    for (size_t j = 0; j < BLOCK_WORDS; j++) block[j] = word_of(~options.seed, i + j);
    if (!write_all(fd, block, BLOCK_WORDS * sizeof *block)) fail_io("write", data_path);
  }
  // Out of the page cache, so that the clones read it from their disks and not from memory.
  if (fsync(fd) || posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED)) fail_io("fsync", data_path);
  close(fd);
  free(block);
  printf("{\"event\":\"loaded\",\"memory_bytes\":%zu,\"disk_bytes\":%zu,\"load_ms\":%.1f}\n",
         words * sizeof *data, words * sizeof *data, ms_since(start));
}

// The sums of share `index` of `of`, read from memory and from disk.
static struct sums work(unsigned index, unsigned of) {
  uint64_t *block = malloc(BLOCK_WORDS * sizeof *block);
  size_t blocks = words / BLOCK_WORDS;
  size_t first = blocks * index / of, last = blocks * (index + 1) / of;
  int fd = open(data_path, O_RDONLY | O_CLOEXEC);
  if (!block || fd < 0) fail_io("open", data_path);
  struct sums sums = {0};
  for (size_t i = first * BLOCK_WORDS; i < last * BLOCK_WORDS; i += BLOCK_WORDS) {
    sums.memory += sum_words(data + i, BLOCK_WORDS, i);
    if (!read_all(fd, block, BLOCK_WORDS * sizeof *block, (off_t)(i * sizeof *block)))
      fail_io("read", data_path);
    sums.disk += sum_words(block, BLOCK_WORDS, i);
  }
  close(fd);
  free(block);
  return sums;
}

// What a clone writes on its disk: a text only it could write, and its digest.
static void report_text(uint64_t *text, unsigned vmid, struct sums sums) {
  for (size_t i = 0; i < REPORT_WORDS; i++)
    text[i] = word_of(sums.memory ^ sums.disk ^ (uint64_t)vmid << 48, i);
}

static uint64_t expected_digest(unsigned vmid, struct sums sums) {
  static uint64_t text[REPORT_WORDS];
  report_text(text, vmid, sums);
  return fnv1a(text, sizeof text, 0xcbf29ce484222325u);
}

static uint64_t write_report(unsigned vmid, struct sums sums) {
  static uint64_t text[REPORT_WORDS];
  char path[512];
  snprintf(path, sizeof path, "%s" CLONE_FILE, options.folder);
  report_text(text, vmid, sums);
  int fd = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (fd < 0 || !write_all(fd, text, sizeof text) || fsync(fd)) fail_io("write", path);
  // Read back from the disk, not from the cache.
  memset(text, 0, sizeof text);
  posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
  if (!read_all(fd, text, sizeof text, 0)) fail_io("read", path);
  close(fd);
  return fnv1a(text, sizeof text, 0xcbf29ce484222325u);
}

static int connect_parent(const char *ip, uint64_t deadline_ns) {
  struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons((uint16_t)options.port)};
  inet_pton(AF_INET, ip, &to.sin_addr);
  while (now_ns() < deadline_ns) {
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) return -1;
    if (connect(fd, (struct sockaddr *)&to, sizeof to) == 0) return fd;
    if (errno == EINPROGRESS) {
      struct pollfd wait = {.fd = fd, .events = POLLOUT};
      int error = 0;
      socklen_t len = sizeof error;
      if (poll(&wait, 1, 2000) == 1 && !getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &len) &&
          !error)
        return fd;
    }
    close(fd);
    poll(NULL, 0, 50);
  }
  return -1;
}

// The clone's life. Never returns.
static void be_clone(unsigned vmid, unsigned parent_vmid) {
  uint64_t start = now_ns(), deadline = start + options.timeout_s * 1000000000ull;
  int index = sf_ticket_index(&ticket, vmid);
  if (index < 0) sf_exit(10);
  struct sums sums = work((unsigned)index, ticket.allocation);
  uint64_t digest = write_report(vmid, sums);
  double work_ms = ms_since(start);
  char ip[16], text[REPLY_BYTES];
  if (sf_ip_of(parent_vmid, ip, sizeof ip) < 0) sf_exit(11);
  int fd = connect_parent(ip, deadline);
  if (fd < 0) sf_exit(12);
  struct sockaddr_in own = {0};
  socklen_t own_len = sizeof own;
  getsockname(fd, (struct sockaddr *)&own, &own_len);
  inet_ntop(AF_INET, &own.sin_addr, ip, sizeof ip);
  int len = snprintf(text, sizeof text, "%u %s %016llx %016llx %016llx %.1f\n", vmid, ip,
                     (unsigned long long)sums.memory, (unsigned long long)sums.disk,
                     (unsigned long long)digest, work_ms);
  struct pollfd wait = {.fd = fd, .events = POLLIN};
  if (!write_all(fd, text, (size_t)len)) sf_exit(13);
  // The parent closes once it has the reply: only then may this VM, and its network, go away.
  int left_ms = options.timeout_s * 1000;
  bool taken = poll(&wait, 1, left_ms) == 1 && read(fd, text, 1) == 0;
  sf_exit(taken ? 0 : 14);
  _exit(15);
}

// ---- the parent ----

struct joiner {
  int done[2];  // its read end becomes readable when sf_join has returned
  int result;
  size_t count;
  struct sf_result results[SF_MAX_CLONES];
};
static struct joiner joiner;

static void *join_clones(void *arg) {
  (void)arg;
  joiner.result = sf_join(&ticket, joiner.results, SF_MAX_CLONES, &joiner.count);
  close(joiner.done[1]);
  return NULL;
}

// Takes one clone's report; false if it is not what a clone of ours would say.
static bool take_reply(const char *text, const char *peer, uint64_t fork_start) {
  unsigned vmid;
  char ip[16], wanted[16];
  unsigned long long memory, disk, digest;
  double work_ms;
  if (sscanf(text, "%u %15s %llx %llx %llx %lf", &vmid, ip, &memory, &disk, &digest, &work_ms) != 6)
    return false;
  int index = sf_ticket_index(&ticket, vmid);
  if (index < 0 || replies[index].arrived || strcmp(ip, peer)) return false;
  if (sf_ip_of(vmid, wanted, sizeof wanted) < 0 || strcmp(wanted, peer)) return false;
  replies[index] =
      (struct reply){.arrived = true, .sums = {.memory = memory, .disk = disk}, .digest = digest};
  printf(
      "{\"event\":\"reply\",\"vmid\":%u,\"index\":%d,\"ip\":\"%s\",\"memory\":\"%016llx\","
      "\"disk\":\"%016llx\",\"digest\":\"%016llx\",\"work_ms\":%.1f,\"reply_ms\":%.1f}\n",
      vmid, index, ip, memory, disk, digest, work_ms, ms_since(fork_start));
  return true;
}

#define CONNECTIONS (SF_MAX_CLONES + 16)
struct connection {
  char ip[16], text[REPLY_BYTES];
  size_t len;
};

// Collects replies until all are there, all clones have ended, or time is up.
static void collect(int listener, uint64_t fork_start) {
  static struct connection connections[CONNECTIONS];
  struct pollfd fds[CONNECTIONS + 2] = {{.fd = listener, .events = POLLIN},
                                        {.fd = joiner.done[0], .events = POLLIN}};
  for (int i = 2; i < CONNECTIONS + 2; i++) fds[i] = (struct pollfd){.fd = -1, .events = POLLIN};
  uint64_t deadline = fork_start + options.timeout_s * 1000000000ull;
  bool ended = false;
  for (unsigned left = ticket.allocation; left && now_ns() < deadline;) {
    // Only as far as there are connections: poll(2) refuses more entries than RLIMIT_NOFILE.
    nfds_t used = 2;
    for (nfds_t i = 2; i < CONNECTIONS + 2; i++) {
      if (fds[i].fd >= 0) used = i + 1;
    }
    int ready = poll(fds, used, ended ? 500 : 1000);
    if (ready < 0 && errno != EINTR) return;
    if (ready == 0 && ended) return;  // every clone has ended and nothing more is on the way
    if (ready <= 0) continue;
    if (fds[1].revents) {
      ended = true;
      fds[1].fd = -1;
    }
    for (nfds_t i = 2; i < used; i++) {
      struct connection *c = &connections[i - 2];
      if (fds[i].fd < 0 || !fds[i].revents) continue;
      ssize_t got = read(fds[i].fd, c->text + c->len, sizeof c->text - 1 - c->len);
      if (got > 0) c->len += (size_t)got;
      c->text[c->len] = '\0';
      bool whole = strchr(c->text, '\n') != NULL;
      if (got > 0 && !whole && c->len < sizeof c->text - 1) continue;
      if (whole && take_reply(c->text, c->ip, fork_start)) left--;
      close(fds[i].fd);
      fds[i].fd = -1;
    }
    if (!fds[0].revents) continue;
    struct sockaddr_in from = {0};
    socklen_t len = sizeof from;
    int fd = accept4(listener, (struct sockaddr *)&from, &len, SOCK_CLOEXEC), slot = 2;
    while (slot < CONNECTIONS + 2 && fds[slot].fd >= 0) slot++;
    if (fd < 0) continue;
    if (slot == CONNECTIONS + 2) {
      close(fd);  // more at once than our clones would be
      continue;
    }
    connections[slot - 2].len = 0;
    inet_ntop(AF_INET, &from.sin_addr, connections[slot - 2].ip, 16);
    fds[slot].fd = fd;
  }
}

static void print_joined(void) {
  if (joiner.result < 0) {
    printf("{\"event\":\"error\",\"what\":\"join\",\"code\":\"%s\",\"message\":\"%s\"}\n",
           sf_errorname(joiner.result), sf_strerror(joiner.result));
    return;
  }
  printf("{\"event\":\"joined\",\"results\":[");
  for (size_t i = 0; i < joiner.count && i < SF_MAX_CLONES; i++) {
    const struct sf_result *clone = &joiner.results[i];
    printf("%s{\"vmid\":%u,", i ? "," : "", clone->vmid);
    if (clone->error)
      printf("\"error\":\"%s\"}", sf_errorname(clone->error));
    else
      printf("\"status\":%d}", clone->status);
  }
  printf("]}\n");
}

// Does all the work alone, compares share by share, and gives the exit status.
static int finish(bool forked) {
  unsigned shares = forked && ticket.allocation ? ticket.allocation : 1;
  uint64_t answer = 0, expected = 0;
  bool all_clones = forked, all_right = true;
  char *list = malloc(64 * shares + 1), *at = list;
  if (!list) return 4;
  *list = '\0';
  for (unsigned i = 0; i < shares; i++) {
    struct sums alone = work(i, shares);
    struct reply *reply = &replies[i];
    bool by_clone = forked && reply->arrived;
    unsigned vmid = forked ? ticket.vmids[i] : 0;
    struct sums given = by_clone ? reply->sums : alone;
    bool right = given.memory == alone.memory && given.disk == alone.disk &&
                 (!by_clone || reply->digest == expected_digest(vmid, alone));
    answer += given.memory ^ given.disk;
    expected += alone.memory ^ alone.disk;
    all_clones &= by_clone;
    all_right &= right;
    at += sprintf(at, "%s{\"vmid\":%u,\"by\":\"%s\",\"ok\":%s}", i ? "," : "", vmid,
                  by_clone ? "clone" : "parent", right ? "true" : "false");
  }
  bool ok = all_right && answer == expected;
  printf(
      "{\"event\":\"answer\",\"answer\":\"%016llx\",\"expected\":\"%016llx\",\"ok\":%s,"
      "\"shares\":[%s]}\n",
      (unsigned long long)answer, (unsigned long long)expected, ok ? "true" : "false", list);
  free(list);
  return !ok ? 4 : !forked ? 3 : !all_clones ? 1 : 0;
}

static int listen_on(unsigned port) {
  struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
  int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one) ||
      bind(fd, (struct sockaddr *)&at, sizeof at) || listen(fd, 1024))
    fail_io("listen", "tcp");
  return fd;
}

static int no_fork(const char *what, int error) {
  printf("{\"event\":\"error\",\"what\":\"%s\",\"code\":\"%s\",\"message\":\"%s\"}\n", what,
         sf_errorname(error), sf_strerror(error));
  return finish(false);
}

static bool parse_options(int argc, char **argv) {
  for (int i = 1; i + 1 < argc; i += 2) {
    const char *name = argv[i], *value = argv[i + 1];
    char *end = "";
    unsigned long number = strcmp(name, "--folder") ? strtoul(value, &end, 10) : 0;
    if (*end) return false;
    if (!strcmp(name, "--folder"))
      options.folder = value;
    else if (!strcmp(name, "--clones") && number >= 1 && number <= SF_MAX_CLONES)
      options.clones = (unsigned)number;
    else if (!strcmp(name, "--mib") && number >= 1 && number <= 65536)
      options.mib = (unsigned)number;
    else if (!strcmp(name, "--port") && number >= 1 && number <= 65535)
      options.port = (unsigned)number;
    else if (!strcmp(name, "--timeout-s") && number >= 1 && number <= 86400)
      options.timeout_s = (unsigned)number;
    else if (!strcmp(name, "--seed"))
      options.seed = number;
    else
      return false;
  }
  return argc % 2 == 1 && strlen(options.folder) < 400;
}

int main(int argc, char **argv) {
  if (!parse_options(argc, argv)) {
    fprintf(stderr,
            "usage: sf-sum [--clones N] [--mib MIB] [--seed N] [--port P] [--timeout-s S]\n"
            "              [--folder PATH]\n"
            "Sums MIB of memory and MIB of disk with N clones of this VM; see the source.\n");
    return 2;
  }
  setvbuf(stdout, NULL, _IOLBF, 0);
  load();
  int parent_vmid = sf_vmid();
  if (parent_vmid < 0) return no_fork("identity", parent_vmid);
  int listener = listen_on(options.port);
  int result = sf_request_ticket(options.clones, 0, &ticket);
  if (result == SF_OK && ticket.allocation == 0) result = SF_E_CAPACITY;
  if (result < 0) return no_fork("request_ticket", result);
  printf("{\"event\":\"ticket\",\"ticket\":\"%s\",\"requested\":%u,\"allocation\":%u,\"vmids\":[",
         ticket.id, ticket.requested, ticket.allocation);
  for (unsigned i = 0; i < ticket.allocation; i++) printf("%s%u", i ? "," : "", ticket.vmids[i]);
  printf("]}\n");
  fflush(stdout);

  uint64_t fork_start = now_ns();
  int vmid = sf_clone(&ticket);
  if (vmid < 0) return no_fork("clone", vmid);
  if (vmid > 0) be_clone((unsigned)vmid, (unsigned)parent_vmid);
  printf("{\"event\":\"forked\",\"vmid\":%d,\"fork_ms\":%.1f}\n", vmid, ms_since(fork_start));

  pthread_t thread;
  if (pipe2(joiner.done, O_CLOEXEC) || pthread_create(&thread, NULL, join_clones, NULL))
    fail_io("pthread_create", "");
  collect(listener, fork_start);
  struct pollfd wait = {.fd = joiner.done[0], .events = POLLIN};
  uint64_t deadline = fork_start + (options.timeout_s + 10) * 1000000000ull;
  while (poll(&wait, 1, 1000) == 0 && now_ns() < deadline) {
  }
  if (!wait.revents) {
    // A clone that neither replies nor ends: it is ended, and sf_join returns.
    sf_kill(&ticket);
    poll(&wait, 1, 10000);
  }
  if (wait.revents) {
    pthread_join(thread, NULL);
    print_joined();
  }
  return finish(true);
}
