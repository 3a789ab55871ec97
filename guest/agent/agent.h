// sf-agent: the guest's end of the guest channel (docs/guest-protocol.md).
//
// One thread, one epoll set, all memory static. After a fork every page this program touches is
// fetched over the network before the clone's program can go on, so: no heap, no stdio, state in a
// few small arrays, large buffers apart from them and touched only as far as they are filled.
//
// States: UNKNOWN (started, no hello yet: calls wait) -> IDENTIFIED(epoch). A hello with the same
// epoch resumes (sfld came back): the output is restarted and pending calls are sent again. A hello
// with another epoch means this VM is now a clone (or has just booted): identity is applied, exec
// sessions are detached, pending calls end with E_STATE except the one named by `call=`.
//
// Invariants: a line is queued for the port whole or not at all; at most one call is pending per
// client connection; a session's output never exceeds the window the host has given.

#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define SF_LINE_BYTES 65536  // longest line on the port, newline included
#define SF_DATA_BYTES 32768  // most payload bytes in one stdout/stderr/stdin line
#define SF_CLIENTS 32
#define SF_SESSIONS 16
#define SF_CALL_BYTES 4096      // longest line from a local client
#define SF_WINDOW_BYTES 65536u  // stdin window given to the host, per session

// ---- main.c: the event loop ----
enum source { SRC_PORT, SRC_LISTEN, SRC_CLIENT, SRC_SIGNAL, SRC_STDIN, SRC_STDOUT, SRC_STDERR };
struct options {
  const char *port;          // device, `unix:PATH` (tests), or NULL: found by name in /sys
  const char *socket;        // local clients connect here
  const char *interface;     // the guest's network interface
  const char *console;       // where the output of detached sessions goes
  const char *identity_log;  // tests: identity steps are written here and not carried out
};
extern struct options options;
extern char epoch[65];
// Adds `fd` to the epoll set, edge-triggered for reading and writing. False: errno tells why.
bool watch(int fd, enum source source, unsigned index);

// ---- line.c: text ----
struct line {
  const char *verb;
  const char *id;  // second word if it has no '=', else ""
  char *rest;      // everything behind verb and id
};
struct line line_split(char *text);
// The value of `key` in `rest`, still percent-encoded, its length in *len; NULL if absent.
const char *line_raw(const char *rest, const char *key, size_t *len);
// The decoded value of `key` in `out`. False if absent, malformed or too long.
bool line_get(const char *rest, const char *key, char *out, size_t out_bytes);
bool line_u64(const char *rest, const char *key, uint64_t *out);
bool parse_u64(const char *text, size_t len, uint64_t *out);
char *put_text(char *at, char *end, const char *text);  // NULL-propagating appends
char *put_u64(char *at, char *end, uint64_t value);
char *put_escaped(char *at, char *end, const char *text);
size_t base64_encode(char *out, const uint8_t *data, size_t len);
// Decoded length, or -1 if malformed or longer than `out_bytes`.
ssize_t base64_decode(uint8_t *out, size_t out_bytes, const char *text, size_t len);

// ---- port.c: the virtio-serial port ----
bool port_open(void);
void port_readable(void);  // reads everything there is and handles each whole line
void port_flush(void);     // writes until the port would block
void port_restart(void);   // forgets queued output and starts with the cancel mark
// Space for one line of up to `bytes`, or NULL if the queue is too full; then port_commit.
char *port_reserve(size_t bytes);
void port_commit(char *end);       // adds the newline
bool port_line(const char *text);  // queues a whole short line
void handle_line(char *text);      // in main.c

// ---- identity.c and net.c ----
struct identity {
  uint32_t vmid, family, prefix, mtu;
  char ip[16], gateway[16], hostname[65];
};
extern struct identity identity;
// Takes on the identity of a hello line: entropy, clock, network, host name. The result's text goes
// into the `ready` line: net=ok|none|absent|ERROR.
const char *identity_apply(const char *rest);
const char *net_apply(const struct identity *to);
// Work that may come after `ready`: neighbours and connections of the address before.
void net_forget_old(void);

// ---- calls.c: local clients ----
bool calls_listen(void);
void calls_accept(void);
void calls_event(unsigned index, uint32_t events);
void calls_reply(const char *id, const char *rest);
void calls_resend(void);              // same epoch: the host may have lost them
void calls_forked(const char *keep);  // new epoch: all but call `keep` end with E_STATE
void calls_pump(void);                // sends what waits for space in the port's queue

// ---- exec.c: programs run for the host ----
void exec_start(const char *id, const char *rest);
void exec_stdin(const char *id, const char *rest, bool eof);
void exec_credit(const char *id, const char *rest);
void exec_signal(const char *id, const char *rest);
void exec_resize(const char *id, const char *rest);
void exec_event(enum source source, unsigned index);
void exec_reap(void);
void exec_detach_all(void);
bool exec_pump(void);  // moves data; true if it may have more to move at once
