// Who this VM is. The order matters: entropy first, so that nothing a sibling could predict is
// generated; then the clock; then the network and the name.

#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"

#define SEED_BYTES 32
#define CLOCK_STEP_NS (100 * 1000 * 1000LL)  // smaller differences are left alone

struct identity identity;

static void note(const char *what, const char *value) {
  int fd = open(options.identity_log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
  if (fd < 0) return;
  char text[256], *end = text + sizeof text - 1;
  char *at = put_text(put_text(put_text(text, end, what), end, "="), end, value);
  if (at) {
    *at++ = '\n';
    if (write(fd, text, (size_t)(at - text)) < 0) at = text;
  }
  close(fd);
}

static int hex_value(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

static bool reseed(const char *rest) {
  struct {
    struct rand_pool_info info;
    uint8_t bytes[SEED_BYTES];
  } pool = {.info = {.entropy_count = SEED_BYTES * 8, .buf_size = SEED_BYTES}};
  uint8_t *bytes = (uint8_t *)pool.info.buf;
  size_t len;
  const char *seed = line_raw(rest, "seed", &len);
  if (!seed || len != 2 * SEED_BYTES) return false;
  for (size_t i = 0; i < SEED_BYTES; i++) {
    int high = hex_value(seed[2 * i]), low = hex_value(seed[2 * i + 1]);
    if (high < 0 || low < 0) return false;
    bytes[i] = (uint8_t)(high << 4 | low);
  }
  if (options.identity_log) return true;
  static int urandom = -1;
  if (urandom < 0) urandom = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
  bool ok = ioctl(urandom, RNDADDENTROPY, &pool) == 0 && ioctl(urandom, RNDRESEEDCRNG) == 0;
  explicit_bzero(&pool, sizeof pool);
  return ok;
}

// True unless the clock had to be set and could not be.
static bool set_clock(const char *rest) {
  uint64_t host_ns;
  if (!line_u64(rest, "time_ns", &host_ns) || host_ns > INT64_MAX) return false;
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  int64_t off_ns = (int64_t)host_ns - (now.tv_sec * 1000000000LL + now.tv_nsec);
  if (off_ns < CLOCK_STEP_NS && off_ns > -CLOCK_STEP_NS) return true;
  if (options.identity_log) {
    note("clock", "stepped");
    return true;
  }
  struct timespec to = {.tv_sec = (time_t)(host_ns / 1000000000u),
                        .tv_nsec = (long)(host_ns % 1000000000u)};
  return clock_settime(CLOCK_REALTIME, &to) == 0;
}

const char *identity_apply(const char *rest) {
  struct identity next = {.prefix = 16, .mtu = 1500};
  uint64_t value;
  if (!line_u64(rest, "vmid", &value) || value > 0xffff) return "bad-vmid";
  next.vmid = (uint32_t)value;
  if (!line_u64(rest, "family", &value) || value > 0xffffff) return "bad-family";
  next.family = (uint32_t)value;
  if (line_u64(rest, "prefix", &value)) next.prefix = (uint32_t)value;
  if (line_u64(rest, "mtu", &value)) next.mtu = (uint32_t)value;
  if (next.prefix > 32 || next.mtu < 576 || next.mtu > 65535) return "bad-network";
  if (!line_get(rest, "ip", next.ip, sizeof next.ip)) next.ip[0] = '\0';
  if (!line_get(rest, "gateway", next.gateway, sizeof next.gateway)) next.gateway[0] = '\0';
  if (!line_get(rest, "hostname", next.hostname, sizeof next.hostname)) next.hostname[0] = '\0';

  if (!reseed(rest)) return "seed";
  if (!set_clock(rest)) return "clock";
  const char *net;
  if (options.identity_log) {
    note("ip", next.ip);
    note("hostname", next.hostname);
    net = next.ip[0] ? "ok" : "none";
  } else {
    net = next.ip[0] ? net_apply(&next) : "none";
    if (next.hostname[0] && sethostname(next.hostname, strlen(next.hostname))) return "hostname";
  }
  identity = next;
  return net;
}
