// sf-linkwatch INTERFACE CLIENT [ARGUMENT...]: runs a DHCP client and tells it of the carrier, as
// networkd and dhcpcd see by themselves and busybox's udhcpc does not: carrier gone, give the lease
// up (SIGUSR2); carrier back, ask at once (SIGUSR1). The host makes the carrier go and come back to
// say that this VM is a clone now. Ends with the client, and the client with it.

#include <linux/rtnetlink.h>
#include <net/if.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

static void client_ended(int signal) {
  (void)signal;
  _exit(1);
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
    execvp(argv[2], argv + 2);
    perror(argv[2]);
    _exit(127);
  }
  bool carrier = true;
  for (;;) {
    static _Alignas(8) char buffer[8192];
    ssize_t got = recv(link, buffer, sizeof buffer, 0);
    if (got < 0) continue;  // EINTR; ENOBUFS: the next change tells
    size_t left = (size_t)got;
    for (struct nlmsghdr *head = (struct nlmsghdr *)buffer; NLMSG_OK(head, left);
         head = NLMSG_NEXT(head, left)) {
      if (head->nlmsg_type != RTM_NEWLINK) continue;
      const struct ifinfomsg *info = NLMSG_DATA(head);
      bool now = info->ifi_flags & IFF_RUNNING;
      if (info->ifi_index != (int)interface || now == carrier) continue;
      carrier = now;
      kill(client, carrier ? SIGUSR1 : SIGUSR2);
    }
  }
}
