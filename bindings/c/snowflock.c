#include "snowflock.h"

#include <arpa/inet.h>
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define SOCKET_PATH "/run/snowflock.sock"
#define ANSWER_BYTES 32768

static const struct {
  int error;
  const char *name, *text;
} table[] = {
    {SF_OK, "OK", "success"},
    {SF_E_ARGUMENT, "E_ARGUMENT", "an argument is not valid"},
    {SF_E_AGENT, "E_AGENT", "the SnowFlock agent of this VM does not answer"},
    {SF_E_STATE, "E_STATE", "not allowed in the state this VM is in"},
    {SF_E_CAPACITY, "E_CAPACITY", "the hosts have no room for it"},
    {SF_E_TICKET_UNKNOWN, "E_TICKET_UNKNOWN", "there is no such ticket"},
    {SF_E_TICKET_USED, "E_TICKET_USED", "the ticket has been used"},
    {SF_E_TICKET_EXPIRED, "E_TICKET_EXPIRED", "the ticket has expired"},
    {SF_E_TICKET_OWNER, "E_TICKET_OWNER", "the ticket belongs to another VM"},
    {SF_E_FORK, "E_FORK", "the fork failed; no clone was made"},
    {SF_E_CLONE_START, "E_CLONE_START", "the clone could not be started"},
    {SF_E_TIMEOUT, "E_TIMEOUT", "it took longer than its limit"},
    {SF_E_NOT_FOUND, "E_NOT_FOUND", "not found"},
    {SF_E_PEER, "E_PEER", "a host does not answer"},
    {SF_E_NO_SPACE, "E_NO_SPACE", "a host has no space left"},
    {SF_E_INTERNAL, "E_INTERNAL", "the host met a defect; see its log"},
    {SF_E_OTHER, "E_OTHER", "the host gave an error this library does not know"},
    {SF_E_PROTOCOL, "E_PROTOCOL", "the agent's answer makes no sense"},
    {SF_E_CLOSED, "E_CLOSED", "ended while the call was under way"},
};
#define TABLE_LEN (sizeof table / sizeof *table)

const char *sf_strerror(int error) {
  for (size_t i = 0; i < TABLE_LEN; i++)
    if (table[i].error == error) return table[i].text;
  return error > 0 ? "success" : "unknown error";
}

const char *sf_errorname(int error) {
  for (size_t i = 0; i < TABLE_LEN; i++)
    if (table[i].error == error) return table[i].name;
  return error > 0 ? "OK" : "E_OTHER";
}

static int error_of(const char *name) {
  for (size_t i = 1; i < TABLE_LEN; i++)
    if (!strcmp(table[i].name, name)) return table[i].error;
  return SF_E_OTHER;
}

static int connect_agent(void) {
  const char *path = getenv("SNOWFLOCK_SOCKET");
  struct sockaddr_un to = {.sun_family = AF_UNIX};
  if (!path) path = SOCKET_PATH;
  if (strlen(path) >= sizeof to.sun_path) return -1;
  strcpy(to.sun_path, path);
  int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return -1;
  while (connect(fd, (struct sockaddr *)&to, sizeof to)) {
    if (errno == EINTR) continue;
    close(fd);
    return -1;
  }
  return fd;
}

static bool send_all(int fd, const char *data, size_t len) {
  while (len) {
    ssize_t sent = send(fd, data, len, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent <= 0) return false;
    data += sent;
    len -= (size_t)sent;
  }
  return true;
}

/* Reads one line of at most `bytes - 1`, its newline replaced by NUL. */
static int read_line(int fd, char *line, size_t bytes) {
  size_t len = 0;
  for (;;) {
    if (len == bytes) return SF_E_PROTOCOL;
    ssize_t got = recv(fd, line + len, bytes - len, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return SF_E_AGENT;
    char *newline = memchr(line + len, '\n', (size_t)got);
    len += (size_t)got;
    if (!newline) continue;
    *newline = '\0';
    return SF_OK;
  }
}

int sf_call(const char *request, char *answer, size_t answer_bytes) {
  if (!request || !answer || !answer_bytes || strpbrk(request, "\n\x18")) return SF_E_ARGUMENT;
  answer[0] = '\0';
  int fd = connect_agent();
  if (fd < 0) return SF_E_AGENT;
  char *line = malloc(ANSWER_BYTES);
  int result = line ? SF_OK : SF_E_INTERNAL;
  if (line) {
    int len = snprintf(line, ANSWER_BYTES, "call 1 %s\n", request);
    if (len >= ANSWER_BYTES)
      result = SF_E_ARGUMENT;
    else if (!send_all(fd, line, (size_t)len))
      result = SF_E_AGENT;
    else
      result = read_line(fd, line, ANSWER_BYTES);
  }
  close(fd);
  if (result == SF_OK) {
    static const char ok[] = "reply 1 ok", error[] = " error ";
    char *failed = strstr(line, error);
    char code[40];
    if (!strncmp(line, ok, sizeof ok - 1) && (line[sizeof ok - 1] == ' ' || !line[sizeof ok - 1])) {
      const char *rest = line + sizeof ok - 1;
      if (*rest == ' ') rest++;
      if (strlen(rest) >= answer_bytes)
        result = SF_E_PROTOCOL;
      else
        strcpy(answer, rest);
    } else if (!strncmp(line, "reply ", 6) && failed) {
      result = sf_answer_get(failed + sizeof error - 1, "code", code, sizeof code);
      result = result == SF_OK ? error_of(code) : SF_E_PROTOCOL;
      sf_answer_get(failed + sizeof error - 1, "message", answer, answer_bytes);
    } else {
      result = SF_E_PROTOCOL;
    }
  }
  free(line);
  return result;
}

static int hex_digit(char c) {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

int sf_answer_get(const char *answer, const char *key, char *value, size_t value_bytes) {
  size_t key_len = strlen(key), used = 0;
  for (const char *at = answer; *at; at += strspn(at, " ")) {
    size_t word = strcspn(at, " ");
    if (word <= key_len || at[key_len] != '=' || strncmp(at, key, key_len)) {
      at += word;
      continue;
    }
    for (const char *from = at + key_len + 1, *end = at + word; from < end; from++) {
      int c = (unsigned char)*from;
      if (c == '%') {
        if (end - from < 3) return SF_E_PROTOCOL;
        int high = hex_digit(from[1]), low = hex_digit(from[2]);
        if (high < 0 || low < 0) return SF_E_PROTOCOL;
        c = high << 4 | low;
        from += 2;
      }
      if (c == 0 || used + 1 >= value_bytes) return SF_E_PROTOCOL;
      value[used++] = (char)c;
    }
    if (!value_bytes) return SF_E_PROTOCOL;
    value[used] = '\0';
    return SF_OK;
  }
  return SF_E_NOT_FOUND;
}

static int get_number(const char *answer, const char *key, long max, long *out) {
  char text[24], *end;
  int result = sf_answer_get(answer, key, text, sizeof text);
  if (result < 0) return result;
  errno = 0;
  *out = strtol(text, &end, 10);
  return errno || *end || end == text || *out < 0 || *out > max ? SF_E_PROTOCOL : SF_OK;
}

/* An id of ours: letters, digits and -._: only, so that it needs no encoding. */
static bool plain_id(const char *id) {
  size_t len = strnlen(id, SF_ID_BYTES);
  if (len == 0 || len == SF_ID_BYTES) return false;
  for (size_t i = 0; i < len; i++) {
    char c = id[i];
    bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
    if (!letter && !strchr("-._:", c)) return false;
  }
  return true;
}

/* `1-3,7` as numbers. Returns how many, or SF_E_PROTOCOL. */
static int parse_vmids(const char *text, uint16_t *out) {
  int count = 0;
  while (*text) {
    char *end;
    long first = strtol(text, &end, 10), last = first;
    if (end == text) return SF_E_PROTOCOL;
    if (*end == '-') {
      text = end + 1;
      last = strtol(text, &end, 10);
      if (end == text) return SF_E_PROTOCOL;
    }
    if (first < 1 || last > 0xffff || first > last) return SF_E_PROTOCOL;
    for (long vmid = first; vmid <= last; vmid++) {
      if (count == SF_MAX_CLONES) return SF_E_PROTOCOL;
      out[count++] = (uint16_t)vmid;
    }
    if (*end == ',')
      end++;
    else if (*end)
      return SF_E_PROTOCOL;
    text = end;
  }
  return count;
}

int sf_request_ticket(unsigned n, unsigned flags, struct sf_ticket *ticket) {
  if (n < 1 || n > SF_MAX_CLONES || flags & ~SF_HIERARCHICAL || !ticket) return SF_E_ARGUMENT;
  char request[80], answer[ANSWER_BYTES / 2], vmids[8 * SF_MAX_CLONES];
  memset(ticket, 0, sizeof *ticket);
  snprintf(request, sizeof request, "request_ticket n=%u hierarchical=%d", n,
           flags & SF_HIERARCHICAL ? 1 : 0);
  int result = sf_call(request, answer, sizeof answer);
  if (result < 0) return result;
  long allocation;
  result = sf_answer_get(answer, "ticket", ticket->id, sizeof ticket->id);
  if (result == SF_OK) result = get_number(answer, "allocation", n, &allocation);
  if (result < 0 || !plain_id(ticket->id)) return SF_E_PROTOCOL;
  ticket->requested = n;
  ticket->allocation = (uint32_t)allocation;
  result = sf_answer_get(answer, "vmids", vmids, sizeof vmids);
  if (result < 0 || parse_vmids(vmids, ticket->vmids) != (int)allocation) return SF_E_PROTOCOL;
  return SF_OK;
}

/* A call whose answer is `vmid=K`, here and in the clones. */
static int call_vmid(const char *request, char *answer, size_t answer_bytes) {
  long vmid;
  int result = sf_call(request, answer, answer_bytes);
  if (result < 0) return result;
  return get_number(answer, "vmid", 0xffff, &vmid) == SF_OK ? (int)vmid : SF_E_PROTOCOL;
}

int sf_clone(const struct sf_ticket *ticket) {
  char request[SF_ID_BYTES + 32], answer[ANSWER_BYTES / 2];
  if (!ticket || !plain_id(ticket->id)) return SF_E_ARGUMENT;
  snprintf(request, sizeof request, "clone ticket=%s", ticket->id);
  return call_vmid(request, answer, sizeof answer);
}

int sf_checkpoint_parent(struct sf_checkpoint *checkpoint) {
  char answer[1024];
  if (!checkpoint) return SF_E_ARGUMENT;
  memset(checkpoint, 0, sizeof *checkpoint);
  int vmid = call_vmid("checkpoint_parent", answer, sizeof answer);
  if (vmid != 0) return vmid;
  if (sf_answer_get(answer, "checkpoint", checkpoint->id, sizeof checkpoint->id) < 0 ||
      !plain_id(checkpoint->id))
    return SF_E_PROTOCOL;
  return SF_OK;
}

int sf_disjoint(const struct sf_region *disk, size_t count) {
  /* A line of SF_CALL_BYTES (4096) of the agent: 90 times two numbers of 20 digits, "+" and ",". */
  char request[16 + SF_MAX_REGIONS * 42], answer[256];
  if (count > SF_MAX_REGIONS || (count && !disk)) return SF_E_ARGUMENT;
  size_t used = (size_t)snprintf(request, sizeof request, "disjoint disk=");
  for (size_t i = 0; i < count; i++)
    used += (size_t)snprintf(request + used, sizeof request - used, "%s%" PRIu64 "+%" PRIu64,
                             i ? "," : "", disk[i].offset, disk[i].bytes);
  return sf_call(request, answer, sizeof answer);
}

int sf_create_clones(const struct sf_checkpoint *checkpoint, const struct sf_ticket *ticket) {
  char request[2 * SF_ID_BYTES + 48], answer[ANSWER_BYTES / 2];
  if (!checkpoint || !plain_id(checkpoint->id) || !ticket || !plain_id(ticket->id))
    return SF_E_ARGUMENT;
  snprintf(request, sizeof request, "create_clones checkpoint=%s ticket=%s", checkpoint->id,
           ticket->id);
  return sf_call(request, answer, sizeof answer);
}

int sf_exit(int status) {
  char request[32], answer[1024];
  snprintf(request, sizeof request, "exit status=%d", status & 0xff);
  int result = sf_call(request, answer, sizeof answer);
  if (result < 0) return result;
  for (;;) poll(NULL, 0, -1); /* the host ends this VM now */
}

/* `1:0,2:E_CLONE_START` as results. Returns how many, or SF_E_PROTOCOL. */
static int parse_results(char *text, struct sf_result *results, size_t capacity) {
  size_t count = 0;
  char *state = NULL;
  for (char *word = strtok_r(text, ",", &state); word; word = strtok_r(NULL, ",", &state)) {
    char *colon = strchr(word, ':'), *end;
    long vmid = strtol(word, &end, 10);
    if (!colon || end != colon || end == word || vmid < 0 || vmid > 0xffff) return SF_E_PROTOCOL;
    if (count == SF_MAX_CLONES) return SF_E_PROTOCOL;
    struct sf_result result = {.vmid = (uint16_t)vmid};
    if (!strncmp(colon + 1, "E_", 2)) {
      result.error = error_of(colon + 1);
    } else {
      long status = strtol(colon + 1, &end, 10);
      if (*end || end == colon + 1 || status < 0 || status > 255) return SF_E_PROTOCOL;
      result.status = (int)status;
    }
    if (results && count < capacity) results[count] = result;
    count++;
  }
  return (int)count;
}

int sf_join(const struct sf_ticket *ticket, struct sf_result *results, size_t capacity,
            size_t *count) {
  char request[SF_ID_BYTES + 32];
  if (!ticket || !plain_id(ticket->id)) return SF_E_ARGUMENT;
  if (count) *count = 0;
  snprintf(request, sizeof request, "join ticket=%s", ticket->id);
  char *answer = malloc(2 * ANSWER_BYTES);
  if (!answer) return SF_E_INTERNAL;
  char *list = answer + ANSWER_BYTES;
  int result = sf_call(request, answer, ANSWER_BYTES);
  if (result == SF_OK) {
    result = sf_answer_get(answer, "results", list, ANSWER_BYTES);
    if (result == SF_OK) result = parse_results(list, results, capacity);
    if (result >= 0 && count) *count = (size_t)result;
    if (result > 0) result = SF_OK;
    if (result == SF_E_NOT_FOUND) result = SF_E_PROTOCOL;
  }
  free(answer);
  return result;
}

int sf_kill(const struct sf_ticket *ticket) {
  char request[SF_ID_BYTES + 32], answer[1024];
  if (!ticket || !plain_id(ticket->id)) return SF_E_ARGUMENT;
  snprintf(request, sizeof request, "kill ticket=%s", ticket->id);
  return sf_call(request, answer, sizeof answer);
}

int sf_kill_vm(unsigned vmid) {
  char request[32], answer[1024];
  if (vmid > 0xffff) return SF_E_ARGUMENT;
  snprintf(request, sizeof request, "kill vmid=%u", vmid);
  return sf_call(request, answer, sizeof answer);
}

int sf_identity(struct sf_identity *identity) {
  char answer[1024];
  long vmid, family;
  if (!identity) return SF_E_ARGUMENT;
  memset(identity, 0, sizeof *identity);
  int result = sf_call("identity", answer, sizeof answer);
  if (result < 0) return result;
  if (get_number(answer, "vmid", 0xffff, &vmid) < 0 ||
      get_number(answer, "family", 0xffffff, &family) < 0 ||
      sf_answer_get(answer, "ip", identity->ip, sizeof identity->ip) < 0 ||
      sf_answer_get(answer, "hostname", identity->hostname, sizeof identity->hostname) < 0 ||
      sf_answer_get(answer, "epoch", identity->epoch, sizeof identity->epoch) < 0)
    return SF_E_PROTOCOL;
  identity->vmid = (uint16_t)vmid;
  identity->family = (uint32_t)family;
  return SF_OK;
}

int sf_vmid(void) {
  struct sf_identity identity;
  int result = sf_identity(&identity);
  return result < 0 ? result : identity.vmid;
}

/* A family's addresses follow its vmids, so ours gives all others. */
int sf_ip_of(unsigned vmid, char *ip, size_t ip_bytes) {
  struct sf_identity identity;
  struct in_addr address;
  if (vmid > 0xffff || !ip || ip_bytes < 16) return SF_E_ARGUMENT;
  int result = sf_identity(&identity);
  if (result < 0) return result;
  if (inet_pton(AF_INET, identity.ip, &address) != 1) return SF_E_STATE;
  address.s_addr = htonl(ntohl(address.s_addr) - identity.vmid + vmid);
  return inet_ntop(AF_INET, &address, ip, (socklen_t)ip_bytes) ? SF_OK : SF_E_ARGUMENT;
}

int sf_ticket_index(const struct sf_ticket *ticket, unsigned vmid) {
  if (!ticket || ticket->allocation > SF_MAX_CLONES) return SF_E_ARGUMENT;
  for (uint32_t i = 0; i < ticket->allocation; i++)
    if (ticket->vmids[i] == vmid) return (int)i;
  return SF_E_NOT_FOUND;
}
