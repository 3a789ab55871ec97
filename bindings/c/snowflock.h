/*
 * libsnowflock: fork() for virtual machines, from inside one.
 *
 * The calls are those of the SnowFlock API (Lagar-Cavilla et al., ACM TOCS 29(1), 2011, table I).
 * They go to the agent of this VM over a Unix socket, and from it to the host. Each call opens a
 * connection of its own: the library keeps no state, and any thread may call at any time.
 *
 *   struct sf_ticket ticket;
 *   if (sf_request_ticket(8, 0, &ticket) < 0) ...
 *   int vmid = sf_clone(&ticket);                  // returns in the parent and in every clone
 *   if (vmid > 0) {                                // a clone: its own share of the work
 *     work(sf_ticket_index(&ticket, vmid), ticket.allocation);
 *     sf_exit(0);
 *   }
 *   sf_join(&ticket, NULL, 0, NULL);
 *
 * Every call returns a negative `enum sf_error` on failure; sf_strerror says what it means.
 */
#ifndef SNOWFLOCK_H
#define SNOWFLOCK_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Most clones of one ticket. */
#define SF_MAX_CLONES 1024
#define SF_MAX_REGIONS 90 /* of sf_disjoint */
/* Bytes of a ticket's or a checkpoint's id, with the terminating NUL. */
#define SF_ID_BYTES 80

/* Stable: a number never changes its meaning. */
enum sf_error {
  SF_OK = 0,
  SF_E_ARGUMENT = -1,
  SF_E_AGENT = -2, /* no agent, or it went away: the call may or may not have been carried out */
  SF_E_STATE = -3, /* not allowed now, e.g. sf_exit in the parent, or this VM became a clone */
  SF_E_CAPACITY = -4,
  SF_E_TICKET_UNKNOWN = -5,
  SF_E_TICKET_USED = -6,
  SF_E_TICKET_EXPIRED = -7,
  SF_E_TICKET_OWNER = -8,
  SF_E_FORK = -9, /* no clone was made; this VM runs on as it was */
  SF_E_CLONE_START = -10,
  SF_E_TIMEOUT = -11,
  SF_E_NOT_FOUND = -12,
  SF_E_PEER = -13,
  SF_E_NO_SPACE = -14,
  SF_E_INTERNAL = -15,
  SF_E_OTHER = -16, /* a code this version of the library does not know */
  SF_E_PROTOCOL = -17,
  SF_E_CLOSED = -18
};

/* Flags of sf_request_ticket. */
#define SF_HIERARCHICAL 1u /* the clones will fork processes to fill their processors */

struct sf_ticket {
  char id[SF_ID_BYTES];
  uint32_t requested;
  uint32_t allocation;           /* clones granted: at most `requested`, possibly fewer */
  uint16_t vmids[SF_MAX_CLONES]; /* of the clones to be, `allocation` of them */
};

/* A part of this VM's disk, in bytes from its begin. */
struct sf_region {
  uint64_t offset;
  uint64_t bytes;
};

struct sf_checkpoint {
  char id[SF_ID_BYTES];
};

/* What became of one clone. */
struct sf_result {
  uint16_t vmid;
  int error;  /* 0 if it called sf_exit, else a negative sf_error: it failed or was killed */
  int status; /* what it gave to sf_exit, if error is 0 */
};

struct sf_identity {
  uint16_t vmid; /* 0: the family's first parent */
  uint32_t family;
  char ip[16]; /* "" if it has none */
  char hostname[65];
  char epoch[65]; /* differs after each fork */
};

/*
 * Asks for room for `n` clones (1 to SF_MAX_CLONES). On success fills in the ticket, which may
 * grant fewer. A ticket is good for one fork of this VM and expires if unused.
 */
int sf_request_ticket(unsigned n, unsigned flags, struct sf_ticket *ticket);

/*
 * Clones this VM. Returns 0 in the parent, once the clones run (those that could not be started
 * are reported by sf_join), and its vmid in each clone. Memory, processes and disk are those of the
 * parent at one instant; address, host name and random numbers are the clone's own.
 */
int sf_clone(const struct sf_ticket *ticket);

/*
 * Keeps this instant for clones made later. Returns 0 in the parent with *checkpoint filled in,
 * and again, with its vmid, in each clone that sf_create_clones makes of it.
 */
int sf_checkpoint_parent(struct sf_checkpoint *checkpoint);

/* Makes clones of a checkpoint of this VM. Returns 0: the clones return elsewhere, see above. */
int sf_create_clones(const struct sf_checkpoint *checkpoint, const struct sf_ticket *ticket);

/*
 * Names parts of the disk of which each clone will need a share of its own: they are not worth
 * multicasting. For forks from now on, in place of what was named before; `count` (SF_MAX_REGIONS
 * at most) may be 0. A hint: pages come as they are touched, named or not.
 */
int sf_disjoint(const struct sf_region *disk, size_t count);

/* Ends this clone, with a status for sf_join. Returns only if that is not possible. */
int sf_exit(int status);

/*
 * Waits until every clone of the ticket has ended. Fills in up to `capacity` results and sets
 * *count to how many there are; both may be NULL. The ticket is used up by it.
 */
int sf_join(const struct sf_ticket *ticket, struct sf_result *results, size_t capacity,
            size_t *count);

/* Ends all clones of a ticket at once, and the ticket. */
int sf_kill(const struct sf_ticket *ticket);

/* Ends one clone of this VM. */
int sf_kill_vm(unsigned vmid);

/* Who this VM is now; answered by the agent without asking the host. */
int sf_identity(struct sf_identity *identity);

/* The vmid of this VM. */
int sf_vmid(void);

/* Address of a member of this family, dotted ("10.86.0.2"), in `ip` of at least 16 bytes. */
int sf_ip_of(unsigned vmid, char *ip, size_t ip_bytes);

/* Position of `vmid` among the ticket's clones, from 0; SF_E_NOT_FOUND if it is not one. */
int sf_ticket_index(const struct sf_ticket *ticket, unsigned vmid);

/* A sentence for a return value; and its stable name ("E_TICKET_USED"). Never NULL. */
const char *sf_strerror(int error);
const char *sf_errorname(int error);

/*
 * Makes one call of the guest protocol (docs/guest-protocol.md): `request` is `VERB key=value...`,
 * encoded. The answer's `key=value...` text goes to `answer`. For tools; the calls above use it.
 * The socket is $SNOWFLOCK_SOCKET, else /run/snowflock.sock.
 */
int sf_call(const char *request, char *answer, size_t answer_bytes);

/* The decoded value of `key` in such an answer. SF_E_NOT_FOUND, SF_E_PROTOCOL. */
int sf_answer_get(const char *answer, const char *key, char *value, size_t value_bytes);

#ifdef __cplusplus
}
#endif
#endif
