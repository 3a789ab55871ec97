// The virtio-serial port as a stream of lines.
//
// Input: lines longer than the limit, and lines holding the cancel mark (CAN, 0x18), are discarded
// as a whole. After a fork the clone's host begins with CAN and a newline, so whatever half line
// the parent's host had left in this buffer cannot be taken for a command.
// Output: a queue of whole lines. While the host side is not connected the driver answers EAGAIN
// and raises POLLHUP; the edge-triggered epoll set then reports changes only, so this never spins.

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "agent.h"

#define CANCEL "\x18\n"
#define PORT_NAME "org.snowflock.0"

static int port = -1;
static size_t in_len, out_head, out_len;
static bool discarding;
static char in[SF_LINE_BYTES];
static char out[3 * SF_LINE_BYTES];

static int open_by_name(void) {
  DIR *dir = opendir("/sys/class/virtio-ports");
  struct dirent *entry;
  int fd = -1;
  while (dir && fd < 0 && (entry = readdir(dir))) {
    char path[320], name[64] = "";
    snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) continue;
    ssize_t len = read(file, name, sizeof name - 1);
    close(file);
    if (len <= 0 || strncmp(name, PORT_NAME "\n", sizeof name)) continue;
    snprintf(path, sizeof path, "/dev/%s", entry->d_name);
    fd = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
  }
  if (dir) closedir(dir);
  return fd;
}

bool port_open(void) {
  if (!options.port) {
    port = open_by_name();
  } else if (!strncmp(options.port, "unix:", 5)) {
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    snprintf(to.sun_path, sizeof to.sun_path, "%s", options.port + 5);
    port = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (port >= 0 && connect(port, (struct sockaddr *)&to, sizeof to)) {
      close(port);
      port = -1;
    }
    if (port >= 0) fcntl(port, F_SETFL, O_NONBLOCK);
  } else {
    port = open(options.port, O_RDWR | O_NONBLOCK | O_CLOEXEC | O_NOCTTY);
  }
  return port >= 0 && watch(port, SRC_PORT, 0);
}

void port_readable(void) {
  for (;;) {
    ssize_t got = read(port, in + in_len, sizeof in - in_len);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return;  // EAGAIN, or 0: the host side is not connected
    char *start = in, *scan = in + in_len, *end = scan + got, *newline;
    while ((newline = memchr(scan, '\n', (size_t)(end - scan)))) {
      *newline = '\0';
      size_t len = (size_t)(newline - start);
      if (!discarding && len && !memchr(start, 0x18, len) && strlen(start) == len)
        handle_line(start);
      discarding = false;
      start = scan = newline + 1;
    }
    in_len = (size_t)(end - start);
    if (in_len == sizeof in) {
      discarding = true;
      in_len = 0;
    }
    if (in_len && start != in) memmove(in, start, in_len);
  }
}

void port_flush(void) {
  while (out_len) {
    ssize_t sent = write(port, out + out_head, out_len);
    if (sent < 0 && errno == EINTR) continue;
    if (sent <= 0) return;
    out_head += (size_t)sent;
    out_len -= (size_t)sent;
    if (!out_len) out_head = 0;
  }
}

void port_restart(void) {
  out_head = 0;
  out_len = strlen(CANCEL);
  memcpy(out, CANCEL, out_len);
}

char *port_reserve(size_t bytes) {
  if (bytes + 1 > sizeof out - out_len) return NULL;
  if (bytes + 1 > sizeof out - out_head - out_len) {
    memmove(out, out + out_head, out_len);
    out_head = 0;
  }
  return out + out_head + out_len;
}

void port_commit(char *end) {
  *end++ = '\n';
  out_len = (size_t)(end - out) - out_head;
}

bool port_line(const char *text) {
  size_t len = strlen(text);
  char *at = port_reserve(len);
  if (!at) return false;
  memcpy(at, text, len);
  port_commit(at + len);
  return true;
}
