// The guest's address, by rtnetlink (rtnetlink(7), sock_diag(7)).
//
// One sendmsg carries the whole change: old address out, new address in, default route. Only the
// last message asks for an acknowledgement; an earlier one that fails answers on its own.

#include <arpa/inet.h>
#include <errno.h>
#include <linux/inet_diag.h>
#include <linux/neighbour.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <linux/sock_diag.h>
#include <net/if.h>
#include <netinet/in.h>
#include <stdbool.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "agent.h"

#define TCP_LIVE 0xb3e  // a bit per TCP state: all but TIME_WAIT (6), CLOSE (7), LISTEN (10)
#define DUMP_LIMIT 256  // messages of one dump that are looked at

struct batch {
  size_t len;
  _Alignas(8) char bytes[512];
};

static int route = -1, ifindex;
static uint32_t sequence, old_address;

static struct nlmsghdr *add_message(struct batch *batch, int type, int flags, const void *body,
                                    size_t body_len) {
  struct nlmsghdr *head = (struct nlmsghdr *)(batch->bytes + batch->len);
  *head = (struct nlmsghdr){.nlmsg_len = NLMSG_LENGTH(body_len),
                            .nlmsg_type = (uint16_t)type,
                            .nlmsg_flags = (uint16_t)(NLM_F_REQUEST | flags),
                            .nlmsg_seq = ++sequence};
  memcpy(NLMSG_DATA(head), body, body_len);
  batch->len += NLMSG_ALIGN(head->nlmsg_len);
  return head;
}

static void add_u32(struct batch *batch, struct nlmsghdr *head, int type, uint32_t value) {
  struct rtattr *attr = (struct rtattr *)((char *)head + NLMSG_ALIGN(head->nlmsg_len));
  *attr = (struct rtattr){.rta_len = RTA_LENGTH(4), .rta_type = (uint16_t)type};
  memcpy(RTA_DATA(attr), &value, 4);
  head->nlmsg_len = NLMSG_ALIGN(head->nlmsg_len) + RTA_LENGTH(4);
  batch->len += RTA_LENGTH(4);
}

// Sends the batch and waits for the acknowledgement of its last message. 0 or an errno; an
// address that was already gone, or already there, is as good as done.
static int exchange(int fd, const struct batch *batch) {
  if (send(fd, batch->bytes, batch->len, 0) != (ssize_t)batch->len) return errno;
  int error = 0;
  for (int i = 0; i < 16; i++) {
    _Alignas(8) char answer[512];
    ssize_t got = recv(fd, answer, sizeof answer, 0);
    if (got < (ssize_t)NLMSG_LENGTH(sizeof(struct nlmsgerr))) return got < 0 ? errno : EPROTO;
    struct nlmsghdr *head = (struct nlmsghdr *)answer;
    if (head->nlmsg_type != NLMSG_ERROR) continue;
    int code = -((struct nlmsgerr *)NLMSG_DATA(head))->error;
    if (code && code != EADDRNOTAVAIL && code != EEXIST && !error) error = code;
    if (head->nlmsg_seq == sequence) return error;
  }
  return EPROTO;
}

static int open_route(void) {
  if (route >= 0) return 0;
  route = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
  return route < 0 ? errno : 0;
}

// The interface's first IPv4 address, 0 if it has none. Fills in `ifindex`.
static uint32_t current_address(void) {
  static int any = -1;
  struct ifreq request = {0};
  if (any < 0) any = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  strncpy(request.ifr_name, options.interface, IFNAMSIZ - 1);
  if (!ifindex && ioctl(any, SIOCGIFINDEX, &request) == 0) ifindex = request.ifr_ifindex;
  if (ioctl(any, SIOCGIFADDR, &request) != 0) return 0;
  return ((struct sockaddr_in *)&request.ifr_addr)->sin_addr.s_addr;
}

const char *net_apply(const struct identity *to) {
  uint32_t address, gateway = 0;
  if (inet_pton(AF_INET, to->ip, &address) != 1) return "bad-ip";
  if (to->gateway[0] && inet_pton(AF_INET, to->gateway, &gateway) != 1) return "bad-gateway";
  uint32_t before = current_address();
  if (!ifindex) return "absent";
  if (open_route()) return "netlink";

  struct batch batch = {0};
  struct nlmsghdr *head = NULL;
  static uint32_t mtu_set;
  if (mtu_set != to->mtu) {  // first time only: a clone's link is up as it was
    struct ifinfomsg link = {.ifi_index = ifindex, .ifi_flags = IFF_UP, .ifi_change = IFF_UP};
    head = add_message(&batch, RTM_NEWLINK, 0, &link, sizeof link);
    add_u32(&batch, head, IFLA_MTU, to->mtu);
  }
  struct ifaddrmsg ifa = {
      .ifa_family = AF_INET, .ifa_prefixlen = (uint8_t)to->prefix, .ifa_index = (uint32_t)ifindex};
  if (before && before != address) {
    head = add_message(&batch, RTM_DELADDR, 0, &ifa, sizeof ifa);
    add_u32(&batch, head, IFA_LOCAL, before);
    old_address = before;
  }
  uint32_t mask = to->prefix ? htonl(~0u << (32 - to->prefix)) : 0;
  head = add_message(&batch, RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, &ifa, sizeof ifa);
  add_u32(&batch, head, IFA_LOCAL, address);
  add_u32(&batch, head, IFA_ADDRESS, address);
  add_u32(&batch, head, IFA_BROADCAST, address | ~mask);
  if (gateway) {
    struct rtmsg rtm = {.rtm_family = AF_INET,
                        .rtm_table = RT_TABLE_MAIN,
                        .rtm_protocol = RTPROT_BOOT,
                        .rtm_scope = RT_SCOPE_UNIVERSE,
                        .rtm_type = RTN_UNICAST};
    head = add_message(&batch, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &rtm, sizeof rtm);
    add_u32(&batch, head, RTA_GATEWAY, gateway);
    add_u32(&batch, head, RTA_OIF, (uint32_t)ifindex);
  }
  head->nlmsg_flags |= NLM_F_ACK;
  int error = exchange(route, &batch);
  if (!error) mtu_set = to->mtu;
  if (!error) return "ok";
  static char text[24] = "errno-";
  *put_u64(text + 6, text + sizeof text - 1, (uint64_t)error) = '\0';
  return text;
}

// Runs a dump and calls `each` for every message; what `each` sends goes out on another socket.
static void dump(int fd, const void *request, size_t len,
                 void (*each)(const struct nlmsghdr *head)) {
  if (send(fd, request, len, 0) != (ssize_t)len) return;
  static _Alignas(8) char answer[8192];
  for (int seen = 0; seen < DUMP_LIMIT;) {
    ssize_t got = recv(fd, answer, sizeof answer, 0);
    if (got <= 0) return;
    size_t left = (size_t)got;
    for (struct nlmsghdr *head = (struct nlmsghdr *)answer; NLMSG_OK(head, left);
         head = NLMSG_NEXT(head, left)) {
      if (head->nlmsg_type == NLMSG_DONE || head->nlmsg_type == NLMSG_ERROR) return;
      each(head);
      seen++;
    }
  }
}

static int changes = -1;  // where the deletions of a dump are sent

static void forget_neighbour(const struct nlmsghdr *found) {
  const struct ndmsg *entry = NLMSG_DATA(found);
  if (entry->ndm_ifindex != ifindex || entry->ndm_state & (NUD_PERMANENT | NUD_NOARP)) return;
  size_t left = found->nlmsg_len - NLMSG_LENGTH(sizeof *entry);
  for (struct rtattr *attr = (struct rtattr *)(entry + 1); RTA_OK(attr, left);
       attr = RTA_NEXT(attr, left)) {
    if (attr->rta_type != NDA_DST || RTA_PAYLOAD(attr) != 4) continue;
    struct batch batch = {0};
    uint32_t address;
    memcpy(&address, RTA_DATA(attr), 4);
    struct ndmsg body = {.ndm_family = AF_INET, .ndm_ifindex = ifindex};
    add_u32(&batch, add_message(&batch, RTM_DELNEIGH, NLM_F_ACK, &body, sizeof body), NDA_DST,
            address);
    exchange(changes, &batch);
  }
}

// Of either family: a server listening on [::] has IPv4 connections with mapped addresses.
static void reset_connection(const struct nlmsghdr *found) {
  const struct inet_diag_msg *entry = NLMSG_DATA(found);
  const uint32_t *from = entry->id.idiag_src;
  bool mapped = entry->idiag_family == AF_INET6 && !from[0] && !from[1] && from[2] == htonl(0xffff);
  if (entry->idiag_family != AF_INET && !mapped) return;
  if (from[mapped ? 3 : 0] != old_address) return;
  struct inet_diag_req_v2 body = {.sdiag_family = entry->idiag_family,
                                  .sdiag_protocol = IPPROTO_TCP,
                                  .idiag_states = ~0u,
                                  .id = entry->id};
  struct batch batch = {0};
  add_message(&batch, SOCK_DESTROY, NLM_F_ACK, &body, sizeof body);
  exchange(changes, &batch);
}

static void dump_connections(int diag, uint8_t family) {
  struct batch batch = {0};
  struct inet_diag_req_v2 body = {
      .sdiag_family = family, .sdiag_protocol = IPPROTO_TCP, .idiag_states = TCP_LIVE};
  add_message(&batch, SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, &body, sizeof body);
  dump(diag, batch.bytes, batch.len, reset_connection);
}

void net_forget_old(void) {
  if (!old_address || options.identity_log) return;
  changes = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
  if (changes >= 0) {
    struct batch batch = {0};
    struct ndmsg body = {.ndm_family = AF_INET};
    add_message(&batch, RTM_GETNEIGH, NLM_F_DUMP, &body, sizeof body);
    dump(route, batch.bytes, batch.len, forget_neighbour);
    close(changes);
  }
  // Connections of the old address can never carry a packet again: their users learn it now
  // (ECONNABORTED) instead of after minutes. Needs the module tcp_diag; without it they time out.
  int diag = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG);
  changes = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_SOCK_DIAG);
  if (diag >= 0 && changes >= 0) {
    dump_connections(diag, AF_INET);
    dump_connections(diag, AF_INET6);
  }
  if (diag >= 0) close(diag);
  if (changes >= 0) close(changes);
  old_address = 0;
}
