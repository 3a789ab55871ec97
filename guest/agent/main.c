#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"

struct options options = {
    .socket = "/run/snowflock.sock", .interface = "eth0", .console = "/dev/console"};
char epoch[65];

static int events = -1;
static bool forget_old;  // net_forget_old is due once the lines at hand are handled

bool watch(int fd, enum source source, unsigned index) {
  struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET,
                              .data.u64 = (uint64_t)source << 32 | index};
  return epoll_ctl(events, EPOLL_CTL_ADD, fd, &event) == 0;
}

static void answer_hello(const char *next, const char *net) {
  char text[256], *end = text + sizeof text - 1;
  bool ok = !strcmp(net, "ok") || !strcmp(net, "none") || !strcmp(net, "absent");
  char *at = put_text(text, end, ok ? "ready epoch=" : "failed epoch=");
  at = put_text(put_escaped(at, end, next), end, ok ? " net=" : " step=");
  at = put_text(at, end, net);
  if (ok) at = put_u64(put_text(at, end, " vmid="), end, identity.vmid);
  *at = '\0';
  port_line(text);
}

static void handle_hello(const char *rest) {
  static const char *net = "none";
  char next[sizeof epoch], call[33] = "";
  if (!line_get(rest, "epoch", next, sizeof next) || !next[0]) return;
  port_restart();
  exec_detach_all();
  bool changed = strcmp(next, epoch) != 0;
  if (changed) {
    net = identity_apply(rest);
    if (!strcmp(net, "ok") || !strcmp(net, "none") || !strcmp(net, "absent")) strcpy(epoch, next);
  }
  answer_hello(next, net);
  if (changed) {
    line_get(rest, "call", call, sizeof call);
    calls_forked(call);
    forget_old = true;
    port_flush();
  }
  calls_resend();
}

void handle_line(char *text) {
  struct line line = line_split(text);
  const char *verb = line.verb;
  if (!strcmp(verb, "hello")) return handle_hello(line.rest);
  if (!epoch[0]) return;
  if (!strcmp(verb, "reply")) return calls_reply(line.id, line.rest);
  if (!strcmp(verb, "stdin")) return exec_stdin(line.id, line.rest, false);
  if (!strcmp(verb, "eof")) return exec_stdin(line.id, line.rest, true);
  if (!strcmp(verb, "credit")) return exec_credit(line.id, line.rest);
  if (!strcmp(verb, "exec")) return exec_start(line.id, line.rest);
  if (!strcmp(verb, "signal")) return exec_signal(line.id, line.rest);
  if (!strcmp(verb, "resize")) return exec_resize(line.id, line.rest);
  if (!strcmp(verb, "ping")) {
    char pong[48], *end = pong + sizeof pong - 1;
    *put_text(put_text(pong, end, "pong "), end, line.id) = '\0';
    port_line(pong);
  }
  // Anything else is of a later version and means nothing here.
}

static int usage(int status) {
  dprintf(status ? 2 : 1,
          "usage: sf-agent [--port DEVICE|unix:PATH] [--socket PATH] [--interface NAME]\n"
          "                [--console DEVICE] [--identity-log FILE]\n"
          "The guest's end of the SnowFlock guest channel; started by init.\n"
          "--identity-log writes the identity to FILE instead of taking it on (for tests).\n");
  return status;
}

static bool parse_options(int argc, char **argv) {
  for (int i = 1; i < argc; i++) {
    const char **to = !strcmp(argv[i], "--port")           ? &options.port
                      : !strcmp(argv[i], "--socket")       ? &options.socket
                      : !strcmp(argv[i], "--interface")    ? &options.interface
                      : !strcmp(argv[i], "--console")      ? &options.console
                      : !strcmp(argv[i], "--identity-log") ? &options.identity_log
                                                           : NULL;
    if (!to || ++i == argc) return false;
    *to = argv[i];
  }
  return true;
}

static int fail(const char *what) {
  dprintf(2, "sf-agent: %s: %s\n", what, strerror(errno));
  return 1;
}

static void handle_event(const struct epoll_event *event, int signals) {
  enum source source = (enum source)(event->data.u64 >> 32);
  unsigned index = (uint32_t)event->data.u64;
  struct signalfd_siginfo info;
  switch (source) {
    case SRC_PORT:
      port_readable();
      break;
    case SRC_LISTEN:
      calls_accept();
      break;
    case SRC_CLIENT:
      calls_event(index, event->events);
      break;
    case SRC_SIGNAL:
      while (read(signals, &info, sizeof info) > 0) exec_reap();
      break;
    default:
      exec_event(source, index);
  }
}

int main(int argc, char **argv) {
  if (argc == 2 && !strcmp(argv[1], "--help")) return usage(0);
  if (!parse_options(argc, argv)) return usage(2);
  // Locked as touched: never swapped out, and nothing is made present that is not used.
  if (!options.identity_log && mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT))
    return fail("mlockall");
  int score = open("/proc/self/oom_score_adj", O_WRONLY | O_CLOEXEC);
  if (!options.identity_log && score >= 0 && write(score, "-1000", 5) < 0) errno = 0;
  if (score >= 0) close(score);

  sigset_t mask;
  sigemptyset(&mask);
  sigaddset(&mask, SIGCHLD);
  sigprocmask(SIG_BLOCK, &mask, NULL);
  signal(SIGPIPE, SIG_IGN);
  events = epoll_create1(EPOLL_CLOEXEC);
  int signals = signalfd(-1, &mask, SFD_NONBLOCK | SFD_CLOEXEC);
  if (events < 0 || signals < 0 || !watch(signals, SRC_SIGNAL, 0)) return fail("epoll");
  if (!calls_listen()) return fail(options.socket);
  // Without the port there is nothing to do; init tries again.
  if (!port_open()) {
    struct timespec pause = {.tv_sec = 1};
    int status = fail(options.port ? options.port : "port org.snowflock.0");
    nanosleep(&pause, NULL);
    return status;
  }
  port_restart();
  port_line("hi version=1");

  for (bool more = true;;) {
    struct epoll_event ready[16];
    int count = epoll_wait(events, ready, 16, more ? 0 : -1);
    if (count < 0 && errno != EINTR) return fail("epoll_wait");
    for (int i = 0; i < count; i++) handle_event(&ready[i], signals);
    calls_pump();
    more = exec_pump();
    port_flush();
    if (forget_old && !more) {
      forget_old = false;
      net_forget_old();
    }
  }
}
