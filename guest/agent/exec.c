// Programs run for the host, their input and output carried over the port.
//
// Flow: the host gives a window of bytes for each output (`window=`, then `credit`), the agent
// gives SF_WINDOW_BYTES of input and returns credit as the program takes it. A host that sends more
// than it was given has its session's input ended. A detached session (inherited over a fork, or
// its host went away) runs on: its input ends, its output goes to the console or nowhere, never
// waiting.
//
// When the program ends, what it had written is sent first, then `exited`; processes it left behind
// keep a detached session until they close their output.

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include "agent.h"

#define MAX_ARGS 512
#define DRAIN_BYTES 65536  // per turn and session, so that one cannot starve the others

static struct session {
  bool used, detached, exited, in_ended, tty;
  bool readable[2];
  char id[33];
  pid_t pid;
  int in, out[2];  // the program's stdin; stdout and stderr; -1 when closed
  int status;
  uint32_t window[2];        // bytes of stdout and of stderr the host will still take
  uint32_t in_head, in_len;  // stdin waiting, in its buffer
  uint32_t returned;         // input bytes taken and not yet given back as credit
} sessions[SF_SESSIONS];
static uint8_t input[SF_SESSIONS][SF_WINDOW_BYTES];
static uint8_t chunk[SF_DATA_BYTES];
static int console = -1;

static struct session *find(const char *id) {
  for (struct session *s = sessions; s < sessions + SF_SESSIONS; s++)
    if (s->used && !s->detached && !strcmp(s->id, id)) return s;
  return NULL;
}

// To the whole group; to the program itself as long as it has not made its group.
static void send_signal(const struct session *s, int number) {
  if (kill(-s->pid, number)) kill(s->pid, number);
}

static void close_fd(int *fd) {
  if (*fd >= 0) close(*fd);
  *fd = -1;
}

static void refuse(const char *id, const char *code, const char *message) {
  char text[256], *end = text + sizeof text - 1;
  char *at = put_text(put_text(put_text(text, end, "exited "), end, id), end, " error=");
  at = put_escaped(put_text(put_text(at, end, code), end, " message="), end, message);
  if (at) *at = '\0';
  if (at) port_line(text);
}

// Splits NUL-separated strings in place; false if there are too many.
static bool split(char *text, size_t len, char **out, size_t *count) {
  text[len] = '\0';
  for (size_t at = 0; at < len; at += strlen(text + at) + 1) {
    if (*count == MAX_ARGS - 1) return false;
    out[(*count)++] = text + at;
  }
  out[*count] = NULL;
  return true;
}

static ssize_t get_strings(const char *rest, const char *key, char *text, size_t bytes, char **out,
                           size_t *count) {
  size_t len;
  const char *raw = line_raw(rest, key, &len);
  if (!raw) return 0;
  ssize_t got = base64_decode((uint8_t *)text, bytes - 1, raw, len);
  return got >= 0 && split(text, (size_t)got, out, count) ? got : -1;
}

static void run_child(char **argv, char **env, const int fds[3], bool tty) {
  setsid();
  for (int fd = 0; fd < 3; fd++) dup2(fds[fd], fd);
  if (tty) ioctl(0, TIOCSCTTY, 0);
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, NULL);
  signal(SIGPIPE, SIG_DFL);
  int score = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
  if (score >= 0 && write(score, "0", 1) < 0) errno = 0;
  if (chdir("/root")) errno = 0;
  environ = env;
  execvp(argv[0], argv);
  // 127: not found, 126: found but not runnable, as shells do.
  int code = errno == ENOENT ? 127 : 126;
  dprintf(2, "%s: %s\n", argv[0], strerror(errno));
  _exit(code);
}

static bool open_tty(int fds[3], int ours[3], const char *rest) {
  int zero = 0, number;
  char path[32];
  int master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
  if (master < 0) return false;
  ours[0] = master;
  if (ioctl(master, TIOCSPTLCK, &zero) || ioctl(master, TIOCGPTN, &number)) return false;
  snprintf(path, sizeof path, "/dev/pts/%d", number);
  fds[0] = open(path, O_RDWR | O_NOCTTY | O_CLOEXEC);
  if (fds[0] < 0) return false;
  fds[1] = fds[2] = fds[0];
  ours[1] = fcntl(master, F_DUPFD_CLOEXEC, 3);
  uint64_t rows = 24, cols = 80;
  line_u64(rest, "rows", &rows);
  line_u64(rest, "cols", &cols);
  struct winsize size = {.ws_row = (unsigned short)rows, .ws_col = (unsigned short)cols};
  ioctl(master, TIOCSWINSZ, &size);
  return ours[1] >= 0;
}

static bool open_pipes(int fds[3], int ours[3]) {
  for (int i = 0; i < 3; i++) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC)) return false;
    fds[i] = ends[i ? 1 : 0];
    ours[i] = ends[i ? 0 : 1];
  }
  return true;
}

void exec_start(const char *id, const char *rest) {
  static char text[SF_LINE_BYTES];
  char *argv[MAX_ARGS] = {0},
       *env[MAX_ARGS] = {"HOME=/root", "TERM=linux",
                         "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"};
  size_t args = 0, vars = 0, first = 3;
  if (!*id || find(id)) return refuse(id, "E_ARGUMENT", "session id missing or in use");
  ssize_t used = get_strings(rest, "argv", text, sizeof text, argv, &args);
  if (used < 0 || !args) return refuse(id, "E_ARGUMENT", "argv missing or malformed");
  // With env= the environment is exactly that, without it a plain one.
  size_t ignored;
  if (line_raw(rest, "env", &ignored)) {
    first = 0;
    char *at = text + used + 1;
    if (get_strings(rest, "env", at, sizeof text - (size_t)used - 1, env, &vars) < 0)
      return refuse(id, "E_ARGUMENT", "env malformed");
  }
  env[first + vars] = NULL;
  uint64_t window = 0, tty = 0;
  line_u64(rest, "tty", &tty);
  if (!line_u64(rest, "window", &window) || window > UINT32_MAX)
    return refuse(id, "E_ARGUMENT", "window missing");

  struct session *s = sessions;
  while (s < sessions + SF_SESSIONS && s->used) s++;
  if (s == sessions + SF_SESSIONS) return refuse(id, "E_CAPACITY", "too many exec sessions");

  int fds[3] = {-1, -1, -1}, ours[3] = {-1, -1, -1};
  pid_t pid = -1;
  if (tty ? open_tty(fds, ours, rest) : open_pipes(fds, ours)) pid = fork();
  if (pid == 0) run_child(argv, env, fds, tty != 0);
  for (int i = 0; i < (tty ? 1 : 3); i++) close_fd(&fds[i]);
  if (pid < 0) {
    for (int i = 0; i < 3; i++) close_fd(&ours[i]);
    return refuse(id, "E_GUEST", strerror(errno));
  }
  *s = (struct session){.used = true,
                        .tty = tty != 0,
                        .pid = pid,
                        .in = ours[0],
                        .out = {ours[1], ours[2]},
                        .window = {(uint32_t)window, (uint32_t)window},
                        .readable = {true, true}};
  strcpy(s->id, id);
  unsigned index = (unsigned)(s - sessions);
  for (int i = 0; i < 3; i++) {
    if (ours[i] < 0) continue;
    fcntl(ours[i], F_SETFL, O_NONBLOCK);
    watch(ours[i], SRC_STDIN + i, index);
  }
  char line[96], *end = line + sizeof line - 1;
  char *at = put_text(put_text(put_text(line, end, "started "), end, id), end, " window=");
  at = put_u64(put_text(put_u64(at, end, SF_WINDOW_BYTES), end, " pid="), end, (uint64_t)pid);
  *at = '\0';
  port_line(line);
}

void exec_stdin(const char *id, const char *rest, bool eof) {
  struct session *s = find(id);
  if (!s || s->in_ended) return;
  if (eof) {
    s->in_ended = true;
    return;
  }
  size_t len;
  const char *raw = line_raw(rest, "data", &len);
  ssize_t got = raw ? base64_decode(chunk, sizeof chunk, raw, len) : -1;
  unsigned index = (unsigned)(s - sessions);
  if (got < 0 || (size_t)got > SF_WINDOW_BYTES - s->in_len) {
    s->in_ended = true;  // more than it was given, or garbage: never a silent gap in the data
    s->in_len = 0;
    send_signal(s, SIGKILL);
    return;
  }
  if (s->in_head + s->in_len + (size_t)got > SF_WINDOW_BYTES) {
    memmove(input[index], input[index] + s->in_head, s->in_len);
    s->in_head = 0;
  }
  memcpy(input[index] + s->in_head + s->in_len, chunk, (size_t)got);
  s->in_len += (uint32_t)got;
}

void exec_credit(const char *id, const char *rest) {
  struct session *s = find(id);
  uint64_t bytes;
  size_t len;
  const char *stream = line_raw(rest, "stream", &len);
  if (!s || !stream || len != 6 || !line_u64(rest, "bytes", &bytes) || bytes > UINT32_MAX) return;
  uint32_t *window = &s->window[memcmp(stream, "stderr", 6) == 0];
  if (__builtin_add_overflow(*window, (uint32_t)bytes, window)) *window = UINT32_MAX;
}

void exec_signal(const char *id, const char *rest) {
  struct session *s = find(id);
  uint64_t number;
  if (s && !s->exited && line_u64(rest, "sig", &number) && number > 0 && number < 65)
    send_signal(s, (int)number);
}

void exec_resize(const char *id, const char *rest) {
  struct session *s = find(id);
  uint64_t rows, cols;
  if (!s || !s->tty || !line_u64(rest, "rows", &rows) || !line_u64(rest, "cols", &cols)) return;
  struct winsize size = {.ws_row = (unsigned short)rows, .ws_col = (unsigned short)cols};
  ioctl(s->in, TIOCSWINSZ, &size);
}

void exec_event(enum source source, unsigned index) {
  if (source == SRC_STDOUT) sessions[index].readable[0] = true;
  if (source == SRC_STDERR) sessions[index].readable[1] = true;
}

void exec_reap(void) {
  int status;
  pid_t pid;
  while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
    for (struct session *s = sessions; s < sessions + SF_SESSIONS; s++)
      if (s->used && s->pid == pid && !s->exited) {
        s->exited = true;
        s->status = status;
        s->readable[0] = s->readable[1] = true;
      }
}

void exec_detach_all(void) {
  for (struct session *s = sessions; s < sessions + SF_SESSIONS; s++) {
    if (!s->used) continue;
    s->detached = true;
    s->in_ended = true;
    s->readable[0] = s->readable[1] = true;
  }
}

static void pump_input(struct session *s) {
  unsigned index = (unsigned)(s - sessions);
  while (s->in >= 0 && s->in_len) {
    ssize_t put = write(s->in, input[index] + s->in_head, s->in_len);
    if (put < 0 && errno == EINTR) continue;
    if (put < 0 && errno == EAGAIN) break;
    if (put < 0) put = (ssize_t)s->in_len;  // nobody reads it any more: taken, and dropped
    s->in_head += (uint32_t)put;
    s->in_len -= (uint32_t)put;
    s->returned += (uint32_t)put;
    if (!s->in_len) s->in_head = 0;
  }
  if (s->in_ended && !s->in_len && s->in >= 0) {
    // A terminal is read and written through one device: its end is the character for it.
    if (s->tty && !s->detached && write(s->in, "\x04", 1) < 0) errno = 0;
    close_fd(&s->in);
  }
  if (s->returned >= SF_WINDOW_BYTES / 4 && !s->detached && !s->in_ended) {
    char line[96], *end = line + sizeof line - 1;
    char *at = put_text(put_text(put_text(line, end, "credit "), end, s->id), end, " bytes=");
    *put_u64(at, end, s->returned) = '\0';
    if (port_line(line)) s->returned = 0;
  }
}

// Moves output of one stream. True if there may be more at once.
static bool pump_output(struct session *s, int stream) {
  static const char *const names[] = {"stdout ", "stderr "};
  size_t moved = 0;
  while (s->readable[stream] && s->out[stream] >= 0) {
    if (moved >= DRAIN_BYTES) return true;
    size_t want = sizeof chunk;
    char *at = NULL;
    if (!s->detached) {
      if (want > s->window[stream]) want = s->window[stream];
      if (!want || !(at = port_reserve(want * 4 / 3 + 64))) return false;
    }
    ssize_t got = read(s->out[stream], chunk, want);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0 && errno == EAGAIN) {
      s->readable[stream] = false;
    } else if (got <= 0) {  // end, or EIO from a terminal without users
      close_fd(&s->out[stream]);
    } else if (s->detached) {
      if (console < 0)
        console = open(options.console, O_WRONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
      if (console >= 0 && write(console, chunk, (size_t)got) < 0) errno = 0;
    } else {
      char *end = at + want * 4 / 3 + 64;
      at = put_text(put_text(put_text(at, end, names[stream]), end, s->id), end, " data=");
      port_commit(at + base64_encode(at, chunk, (size_t)got));
      s->window[stream] -= (uint32_t)got;
    }
    if (got > 0) moved += (size_t)got;
  }
  return false;
}

static void report_exit(struct session *s) {
  for (int i = 0; i < 2; i++)
    if (s->out[i] >= 0 && s->readable[i]) return;  // what it wrote goes first
  if (!s->detached) {
    char line[96], *end = line + sizeof line - 1;
    bool signalled = WIFSIGNALED(s->status);
    char *at = put_text(put_text(line, end, "exited "), end, s->id);
    at = put_text(at, end, signalled ? " signal=" : " status=");
    int value = signalled ? WTERMSIG(s->status) : WEXITSTATUS(s->status);
    *put_u64(at, end, (uint64_t)value) = '\0';
    if (!port_line(line)) return;
    s->detached = true;
    s->in_ended = true;
    s->in_len = 0;
  }
  close_fd(&s->in);
  if (s->out[0] < 0 && s->out[1] < 0) s->used = false;
}

bool exec_pump(void) {
  bool more = false;
  for (struct session *s = sessions; s < sessions + SF_SESSIONS; s++) {
    if (!s->used) continue;
    pump_input(s);
    for (int i = 0; i < 2; i++) more |= pump_output(s, i);
    if (s->exited) report_exit(s);
  }
  return more;
}
