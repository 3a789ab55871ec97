// sf-linkwatch INTERFACE CLIENT [ARGUMENT...]: runs a DHCP client and tells it of the carrier, as
// networkd and dhcpcd see by themselves and busybox's udhcpc does not: carrier gone, give the lease
// up (SIGUSR2); carrier back, ask at once (SIGUSR1). The host makes the carrier go and come back to
// say that this VM is a clone now. Ends with the client, and the client with it.
//
// The kernel may tell only once of a carrier that went and came back: how often it went is in each
// message. After lost messages (ENOBUFS) the state is asked for. Two signals that wait together are
// handled in the order in which they must be: Linux stacks the handlers, SIGUSR2's on top.

#include <errno.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

static void client_ended(int signal) {
  (void)signal;
  _exit(1);
}

// Answered with a message as the kernel sends by itself.
static bool ask(int link, unsigned interface) {
  struct {
    struct nlmsghdr head;
    struct ifinfomsg info;
  } request = {
      .head = {.nlmsg_len = sizeof request,
               .nlmsg_type = RTM_GETLINK,
               .nlmsg_flags = NLM_F_REQUEST},
      .info = {.ifi_family = AF_UNSPEC, .ifi_index = (int)interface},
  };
  return send(link, &request, sizeof request, 0) == sizeof request;
}

// How often the carrier has gone; 0 where the kernel does not say.
static unsigned times_gone(struct nlmsghdr *head) {
  int left = (int)IFLA_PAYLOAD(head);
  for (struct rtattr *each = IFLA_RTA(NLMSG_DATA(head)); RTA_OK(each, left);
       each = RTA_NEXT(each, left)) {
    unsigned count;
    if (each->rta_type != IFLA_CARRIER_DOWN_COUNT || RTA_PAYLOAD(each) < sizeof count) continue;
    memcpy(&count, RTA_DATA(each), sizeof count);
    return count;
  }
  return 0;
}

int main(int argc, char **argv) {
  unsigned interface = argc > 2 ? if_nametoindex(argv[1]) : 0;
  if (!interface) {
    fprintf(stderr, "sf-linkwatch: needs an interface that is there, and a DHCP client\n");
    return 2;
  }
  int link = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
  struct sockaddr_nl changes = {.nl_family = AF_NETLINK, .nl_groups = RTMGRP_LINK};
  if (link < 0 || bind(link, (struct sockaddr *)&changes, sizeof changes)) {
    perror("sf-linkwatch: rtnetlink");
    return 1;
  }
  signal(SIGCHLD, client_ended);
  pid_t client = fork();
  if (client < 0) {
    perror("sf-linkwatch: fork");
    return 1;
  }
  if (client == 0) {
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    // They would end a client that has no handlers yet.
    signal(SIGUSR1, SIG_IGN);
    signal(SIGUSR2, SIG_IGN);
    execvp(argv[2], argv + 2);
    perror(argv[2]);
    _exit(127);
  }
  // The first answer says how it stands; a client that has just begun needs no signal.
  bool known = false, carrier = true;
  unsigned gone = 0;
  if (!ask(link, interface)) perror("sf-linkwatch: RTM_GETLINK");
  for (;;) {
    static _Alignas(8) char buffer[16384];
    ssize_t got = recv(link, buffer, sizeof buffer, 0);
    if (got < 0) {
      if (errno == ENOBUFS) ask(link, interface);
      continue;
    }
    int left = (int)got;
    for (struct nlmsghdr *head = (struct nlmsghdr *)buffer; NLMSG_OK(head, left);
         head = NLMSG_NEXT(head, left)) {
      if (head->nlmsg_type != RTM_NEWLINK) continue;
      const struct ifinfomsg *info = NLMSG_DATA(head);
      if (info->ifi_index != (int)interface) continue;
      bool now = info->ifi_flags & IFF_RUNNING;
      unsigned times = times_gone(head);
      bool lost = known && carrier && (!now || times != gone);
      if (lost) kill(client, SIGUSR2);
      if (known && now && (lost || !carrier)) kill(client, SIGUSR1);
      known = true;
      carrier = now;
      gone = times;
    }
  }
}
