// sf: the SnowFlock API for shell scripts. Data on stdout, errors on stderr.

#include <errno.h>
#include <fcntl.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "snowflock.h"

static const char help[] =
    "usage: sf [--json] COMMAND\n"
    "\n"
    "  sf ticket N            ask for room for N clones; prints the ticket, then the granted "
    "number\n"
    "  sf clone TICKET        clone this VM; prints the vmid: 0 in the parent, its own in a clone\n"
    "  sf fork N              ticket and clone in one; prints vmid, ticket, granted number\n"
    "  sf checkpoint          keep this instant; prints 0 and the checkpoint, or a clone's vmid\n"
    "  sf create CHECKPOINT TICKET   make clones of a checkpoint\n"
    "  sf disjoint FILE...    of these files each clone will need a part of its own; of nothing "
    "else\n"
    "  sf exit [STATUS]       end this clone\n"
    "  sf join TICKET         wait for all clones of a ticket; prints vmid and status of each\n"
    "  sf kill TICKET | sf kill --vmid K     end clones\n"
    "  sf info [--local]      who this VM is; --local does not ask the host\n"
    "  sf ip VMID             address of a member of this family\n"
    "\n"
    "A script goes on in the parent and in every clone:\n"
    "  set -- $(sf fork 4); vmid=$1 ticket=$2\n"
    "  if [ \"$vmid\" != 0 ]; then work \"$vmid\"; sf exit; fi\n"
    "  sf join \"$ticket\"\n"
    "\n"
    "Exit status: 0 done, 1 the call failed (the code is on stderr), 2 wrong usage,\n"
    "3 no agent; join: 4 if any clone failed or ended with a status other than 0.\n";

static bool json;

static int failed(const char *what, int error, const char *message) {
  fprintf(stderr, "sf: %s: %s: %s\n", what, sf_errorname(error),
          message && *message ? message : sf_strerror(error));
  return error == SF_E_AGENT ? 3 : error == SF_E_ARGUMENT ? 2 : 1;
}

static int usage(const char *problem) {
  fprintf(stderr, "sf: %s; `sf --help` shows what is accepted\n", problem);
  return 2;
}

static bool number(const char *text, unsigned max, unsigned *out) {
  char *end;
  errno = 0;
  unsigned long value = strtoul(text, &end, 10);
  if (errno || *end || end == text || *text == '-' || value > max) return false;
  *out = (unsigned)value;
  return true;
}

// A ticket known by its id only.
static bool ticket_of(const char *id, struct sf_ticket *ticket) {
  memset(ticket, 0, sizeof *ticket);
  if (strlen(id) >= sizeof ticket->id) return false;
  strcpy(ticket->id, id);
  return true;
}

static void json_string(const char *text) {
  putchar('"');
  for (; *text; text++) {
    unsigned char c = (unsigned char)*text;
    if (c == '"' || c == '\\')
      printf("\\%c", c);
    else if (c < 0x20)
      printf("\\u%04x", c);
    else
      putchar(c);
  }
  putchar('"');
}

static int run_ticket(const char *count) {
  struct sf_ticket ticket;
  unsigned n;
  if (!number(count, SF_MAX_CLONES, &n) || n == 0) return usage("N is a number from 1 to 1024");
  int result = sf_request_ticket(n, 0, &ticket);
  if (result < 0) return failed("ticket", result, NULL);
  if (!json) {
    printf("%s %u\n", ticket.id, ticket.allocation);
    return 0;
  }
  printf("{\"ticket\":\"%s\",\"requested\":%u,\"allocation\":%u,\"vmids\":[", ticket.id, n,
         ticket.allocation);
  for (unsigned i = 0; i < ticket.allocation; i++) printf("%s%u", i ? "," : "", ticket.vmids[i]);
  printf("]}\n");
  return 0;
}

static int run_clone(const char *id) {
  struct sf_ticket ticket;
  int vmid = ticket_of(id, &ticket) ? sf_clone(&ticket) : SF_E_ARGUMENT;
  if (vmid < 0) return failed("clone", vmid, NULL);
  printf(json ? "{\"vmid\":%d}\n" : "%d\n", vmid);
  return 0;
}

static int run_fork(const char *count) {
  struct sf_ticket ticket;
  unsigned n;
  if (!number(count, SF_MAX_CLONES, &n) || n == 0) return usage("N is a number from 1 to 1024");
  int result = sf_request_ticket(n, 0, &ticket);
  if (result < 0) return failed("ticket", result, NULL);
  if (ticket.allocation == 0) return failed("fork", SF_E_CAPACITY, NULL);
  int vmid = sf_clone(&ticket);
  if (vmid < 0) return failed("clone", vmid, NULL);
  printf(json ? "{\"vmid\":%d,\"ticket\":\"%s\",\"allocation\":%u}\n" : "%d %s %u\n", vmid,
         ticket.id, ticket.allocation);
  return 0;
}

static int run_checkpoint(void) {
  struct sf_checkpoint checkpoint;
  int vmid = sf_checkpoint_parent(&checkpoint);
  if (vmid < 0) return failed("checkpoint", vmid, NULL);
  if (json)
    printf("{\"vmid\":%d,\"checkpoint\":\"%s\"}\n", vmid, checkpoint.id);
  else
    printf("%d %s\n", vmid, checkpoint.id);
  return 0;
}

static int run_create(const char *checkpoint_id, const char *ticket_id) {
  struct sf_checkpoint checkpoint = {0};
  struct sf_ticket ticket;
  if (strlen(checkpoint_id) >= sizeof checkpoint.id || !ticket_of(ticket_id, &ticket))
    return failed("create", SF_E_ARGUMENT, NULL);
  strcpy(checkpoint.id, checkpoint_id);
  int result = sf_create_clones(&checkpoint, &ticket);
  return result < 0 ? failed("create", result, NULL) : 0;
}

// Adds where on the disk a file lies; if there is no room, in place of something smaller: it is a
// hint.
static int add_file(const char *path, struct sf_region *regions, size_t *count) {
  enum { EXTENTS = 64 };
  union {
    struct fiemap map;
    char space[sizeof(struct fiemap) + EXTENTS * sizeof(struct fiemap_extent)];
  } got;
  const uint32_t elsewhere = FIEMAP_EXTENT_UNKNOWN | FIEMAP_EXTENT_ENCODED |
                             FIEMAP_EXTENT_DATA_INLINE | FIEMAP_EXTENT_NOT_ALIGNED;
  struct stat root, own;
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0 || fstat(fd, &own) || stat("/", &root)) goto failed;
  if (own.st_dev != root.st_dev) {
    fprintf(stderr, "sf: disjoint: %s is not on the VM's disk\n", path);
    close(fd);
    return 1;
  }
  for (uint64_t at = 0;;) {
    memset(&got, 0, sizeof got.map);
    got.map.fm_start = at;
    got.map.fm_length = FIEMAP_MAX_OFFSET - at;
    got.map.fm_flags = FIEMAP_FLAG_SYNC;
    got.map.fm_extent_count = EXTENTS;
    if (ioctl(fd, FS_IOC_FIEMAP, &got.map)) goto failed;
    const struct fiemap_extent *extent = got.map.fm_extents;
    const struct fiemap_extent *end = extent + got.map.fm_mapped_extents;
    if (extent == end) break;
    for (; extent < end; extent++) {
      at = extent->fe_logical + extent->fe_length;
      if (extent->fe_flags & elsewhere) continue;
      struct sf_region found = {extent->fe_physical, extent->fe_length};
      struct sf_region *last = *count ? &regions[*count - 1] : NULL;
      if (last && last->offset + last->bytes == found.offset) {
        last->bytes += found.bytes;
        continue;
      }
      if (*count < SF_MAX_REGIONS) {
        regions[(*count)++] = found;
        continue;
      }
      struct sf_region *least = regions;
      for (size_t i = 1; i < *count; i++)
        if (regions[i].bytes < least->bytes) least = &regions[i];
      if (least->bytes < found.bytes) *least = found;
    }
    if (end[-1].fe_flags & FIEMAP_EXTENT_LAST) break;
  }
  close(fd);
  return 0;
failed:
  fprintf(stderr, "sf: disjoint: %s: %s\n", path, strerror(errno));
  if (fd >= 0) close(fd);
  return 1;
}

static int run_disjoint(int count, char **paths) {
  struct sf_region regions[SF_MAX_REGIONS];
  size_t used = 0;
  for (int i = 0; i < count; i++)
    if (add_file(paths[i], regions, &used)) return 1;
  int result = sf_disjoint(regions, used);
  return result < 0 ? failed("disjoint", result, NULL) : 0;
}

static int run_exit(const char *status) {
  unsigned value = 0;
  if (status && !number(status, 255, &value)) return usage("STATUS is a number from 0 to 255");
  return failed("exit", sf_exit((int)value), NULL);
}

static int run_join(const char *id) {
  static struct sf_result results[SF_MAX_CLONES];
  struct sf_ticket ticket;
  size_t count = 0;
  int result =
      ticket_of(id, &ticket) ? sf_join(&ticket, results, SF_MAX_CLONES, &count) : SF_E_ARGUMENT;
  if (result < 0) return failed("join", result, NULL);
  bool all_well = true;
  if (json) printf("[");
  for (size_t i = 0; i < count; i++) {
    const struct sf_result *clone = &results[i];
    all_well &= clone->error == 0 && clone->status == 0;
    if (json && clone->error)
      printf("%s{\"vmid\":%u,\"error\":\"%s\"}", i ? "," : "", clone->vmid,
             sf_errorname(clone->error));
    else if (json)
      printf("%s{\"vmid\":%u,\"status\":%d}", i ? "," : "", clone->vmid, clone->status);
    else if (clone->error)
      printf("%u %s\n", clone->vmid, sf_errorname(clone->error));
    else
      printf("%u %d\n", clone->vmid, clone->status);
  }
  if (json) printf("]\n");
  return all_well ? 0 : 4;
}

static int run_kill(int argc, char **argv) {
  struct sf_ticket ticket;
  unsigned vmid;
  int result;
  if (argc == 2 && !strcmp(argv[0], "--vmid")) {
    if (!number(argv[1], 0xffff, &vmid)) return usage("K is a number from 1 to 65535");
    result = sf_kill_vm(vmid);
  } else if (argc == 1) {
    result = ticket_of(argv[0], &ticket) ? sf_kill(&ticket) : SF_E_ARGUMENT;
  } else {
    return usage("kill takes a ticket, or --vmid K");
  }
  return result < 0 ? failed("kill", result, NULL) : 0;
}

// Prints an answer's `key=value` words as lines, or as one JSON object of strings.
static int run_info(bool local) {
  char answer[16384], key[128], value[4096];
  int result = sf_call(local ? "identity" : "info", answer, sizeof answer);
  if (result < 0) return failed("info", result, answer);
  bool first = true;
  if (json) printf("{");
  for (const char *at = answer; *at; at += strspn(at, " ")) {
    size_t word = strcspn(at, " "), key_len = strcspn(at, "=");
    if (key_len < word && key_len < sizeof key) {
      memcpy(key, at, key_len);
      key[key_len] = '\0';
      if (sf_answer_get(at, key, value, sizeof value) == SF_OK) {
        if (json) {
          if (!first) printf(",");
          json_string(key);
          printf(":");
          json_string(value);
        } else {
          printf("%s %s\n", key, value);
        }
        first = false;
      }
    }
    at += word;
  }
  if (json) printf("}\n");
  return 0;
}

static int run_ip(const char *text) {
  unsigned vmid;
  char ip[16];
  if (!number(text, 0xffff, &vmid)) return usage("VMID is a number from 0 to 65535");
  int result = sf_ip_of(vmid, ip, sizeof ip);
  if (result < 0) return failed("ip", result, NULL);
  if (json)
    printf("{\"vmid\":%u,\"ip\":\"%s\"}\n", vmid, ip);
  else
    puts(ip);
  return 0;
}

int main(int argc, char **argv) {
  if (argc > 1 && !strcmp(argv[1], "--json")) {
    json = true;
    argc--;
    argv++;
  }
  const char *command = argc > 1 ? argv[1] : "";
  int args = argc - 2;
  char **arg = argv + 2;
  if (!strcmp(command, "--help") || !strcmp(command, "-h") || !strcmp(command, "help")) {
    fputs(help, stdout);
    return 0;
  }
  int status;
  if (!strcmp(command, "ticket") && args == 1)
    status = run_ticket(arg[0]);
  else if (!strcmp(command, "clone") && args == 1)
    status = run_clone(arg[0]);
  else if (!strcmp(command, "fork") && args == 1)
    status = run_fork(arg[0]);
  else if (!strcmp(command, "checkpoint") && args == 0)
    status = run_checkpoint();
  else if (!strcmp(command, "create") && args == 2)
    status = run_create(arg[0], arg[1]);
  else if (!strcmp(command, "disjoint"))
    status = run_disjoint(args, arg);
  else if (!strcmp(command, "exit") && args <= 1)
    status = run_exit(args ? arg[0] : NULL);
  else if (!strcmp(command, "join") && args == 1)
    status = run_join(arg[0]);
  else if (!strcmp(command, "kill"))
    status = run_kill(args, arg);
  else if (!strcmp(command, "info") && args <= 1 && (!args || !strcmp(arg[0], "--local")))
    status = run_info(args == 1);
  else if (!strcmp(command, "ip") && args == 1)
    status = run_ip(arg[0]);
  else
    return usage(*command ? "unknown command, or wrong arguments" : "no command");
  if (fflush(stdout)) {
    perror("sf: stdout");
    return 1;
  }
  return status;
}
