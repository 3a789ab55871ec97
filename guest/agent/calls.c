// Calls of local programs (libsnowflock), handed to the host and answered by it.
//
// A client sends `call TAG VERB key=value...` and reads `reply TAG ok|error ...`; one call at a
// time per connection. The line stays in the client's buffer until it is answered, so that it can
// be sent to the host again. `identity` is answered here. A call is sent with an id of its own;
// ids never repeat while the VM lives, also across a restart of the agent, so the host can tell a
// call sent again from a new one.

#include <errno.h>
#include <grp.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "agent.h"

#define SOCKET_GID 700  // group `snowflock` of the guest image: may fork this VM

static struct client {
  bool used;
  int fd;
  uint16_t len;      // bytes in the buffer
  uint16_t tag_len;  // of the pending call
  uint16_t tag_at;   // offset of its tag
  bool sent;         // to the host, in this epoch
  uint64_t id;       // of the pending call, 0 if none
} clients[SF_CLIENTS];
static char buffers[SF_CLIENTS][SF_CALL_BYTES];
static int listener = -1;
static uint64_t last_id;

bool calls_listen(void) {
  struct sockaddr_un at = {.sun_family = AF_UNIX};
  if (strlen(options.socket) >= sizeof at.sun_path) return false;
  strcpy(at.sun_path, options.socket);
  unlink(options.socket);
  listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (listener < 0 || bind(listener, (struct sockaddr *)&at, sizeof at)) return false;
  if (chmod(options.socket, 0660) || (chown(options.socket, 0, SOCKET_GID) && errno != EPERM))
    return false;
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  last_id = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
  return listen(listener, 64) == 0 && watch(listener, SRC_LISTEN, 0);
}

void calls_accept(void) {
  for (;;) {
    int fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0) return;
    unsigned index = 0;
    while (index < SF_CLIENTS && clients[index].used) index++;
    if (index == SF_CLIENTS || !watch(fd, SRC_CLIENT, index)) {
      static const char busy[] = "reply 0 error code=E_CAPACITY message=too%20many%20callers\n";
      if (send(fd, busy, sizeof busy - 1, MSG_NOSIGNAL) < 0) errno = 0;
      close(fd);
      continue;
    }
    clients[index] = (struct client){.used = true, .fd = fd};
  }
}

static void drop(struct client *client) {
  close(client->fd);
  client->used = false;
}

// Sends one line to the client. It reads one answer per call, so a full socket is its own fault.
static void answer(struct client *client, const char *what, const char *rest) {
  static char text[SF_LINE_BYTES];
  char *end = text + sizeof text - 1, *at = put_text(text, end, "reply ");
  char tag[33];
  memcpy(tag, buffers[client - clients] + client->tag_at, client->tag_len);
  tag[client->tag_len] = '\0';
  at = put_text(put_text(put_text(at, end, tag), end, what), end, rest);
  client->id = 0;
  if (!at) return drop(client);
  *at++ = '\n';
  if (send(client->fd, text, (size_t)(at - text), MSG_NOSIGNAL) != at - text) drop(client);
}

static void answer_identity(struct client *client) {
  char text[512], *end = text + sizeof text - 1;
  if (!epoch[0]) {
    answer(client, " error ", "code=E_STATE message=this%20VM%20has%20no%20identity%20yet");
    return;
  }
  char *at = put_u64(put_text(text, end, "vmid="), end, identity.vmid);
  at = put_u64(put_text(at, end, " family="), end, identity.family);
  at = put_escaped(put_text(at, end, " ip="), end, identity.ip);
  at = put_escaped(put_text(at, end, " hostname="), end, identity.hostname);
  at = put_escaped(put_text(at, end, " epoch="), end, epoch);
  if (!at) return drop(client);
  *at = '\0';
  answer(client, " ok ", text);
}

// Queues the client's pending call for the host; false if the queue is full.
static bool send_call(struct client *client) {
  const char *verb = buffers[client - clients] + client->tag_at + client->tag_len + 1;
  char *at = port_reserve(strlen(verb) + 32);
  if (!at) return false;
  char *end = at + strlen(verb) + 32;
  at = put_u64(put_text(at, end, "call "), end, client->id);
  port_commit(put_text(put_text(at, end, " "), end, verb));
  client->sent = true;
  return true;
}

// Looks at what the client has sent; called again when its pending call is answered.
static void parse(struct client *client) {
  char *text = buffers[client - clients];
  char *newline = memchr(text, '\n', client->len);
  if (!newline) {
    if (client->len == SF_CALL_BYTES) drop(client);
    return;
  }
  *newline = '\0';
  size_t tag = strncmp(text, "call ", 5) ? 0 : strcspn(text + 5, " ");
  if (strlen(text) != (size_t)(newline - text) || tag == 0 || tag > 32 || text[5 + tag] != ' ' ||
      memchr(text, 0x18, (size_t)(newline - text)))
    return drop(client);
  client->tag_at = 5;
  client->tag_len = (uint16_t)tag;
  client->id = ++last_id;
  client->sent = false;
  if (!strcmp(text + 6 + tag, "identity")) return answer_identity(client);
  if (epoch[0]) send_call(client);
}

void calls_event(unsigned index, uint32_t events) {
  struct client *client = &clients[index];
  if (!client->used) return;
  char *text = buffers[index];
  while (client->used && !client->id) {
    // The answered line, if any, is at the front: a client sends its next call only after that.
    ssize_t got = recv(client->fd, text + client->len, SF_CALL_BYTES - client->len, 0);
    if (got < 0 && errno == EAGAIN) break;
    if (got <= 0) return drop(client);
    client->len += (uint16_t)got;
    parse(client);
    if (client->used && !client->id) client->len = 0;
  }
  // A caller that is gone is forgotten; the host's answer then finds nobody.
  if (client->used && events & EPOLLHUP) drop(client);
}

void calls_reply(const char *id, const char *rest) {
  uint64_t wanted;
  if (!parse_u64(id, strlen(id), &wanted) || !wanted) return;
  for (struct client *client = clients; client < clients + SF_CLIENTS; client++) {
    if (!client->used || client->id != wanted) continue;
    answer(client, " ", rest);
    if (client->used) {
      client->len = 0;
      calls_event((unsigned)(client - clients), 0);
    }
  }
}

void calls_resend(void) {
  for (struct client *client = clients; client < clients + SF_CLIENTS; client++)
    client->sent = false;
  calls_pump();
}

void calls_forked(const char *keep) {
  uint64_t kept = 0;
  parse_u64(keep, strlen(keep), &kept);
  for (struct client *client = clients; client < clients + SF_CLIENTS; client++) {
    if (!client->used || !client->id || client->id == kept || !client->sent) continue;
    answer(client, " error ", "code=E_STATE message=this%20VM%20is%20a%20clone");
    client->len = 0;
  }
}

void calls_pump(void) {
  if (!epoch[0]) return;
  for (struct client *client = clients; client < clients + SF_CLIENTS; client++)
    if (client->used && client->id && !client->sent && !send_call(client)) return;
}
