/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * What the filter's programs and their loader share: the address scheme and the shapes of the maps.
 * A changed shape needs a new map name (or a detach first): a restarted loader takes over the maps
 * of the programs it finds and refuses other shapes.
 *
 * MAC addresses are kept as numbers, first byte on the wire highest: 5e:FF:FF:FF:VV:VV is
 * 0x5eFFFFFFVVVV, so that the family is a shift and two addresses are of one family if they differ
 * in the lowest 16 bits only. IPv4 addresses are numbers in host order.
 */
#ifndef NETBACK_H
#define NETBACK_H

#include <linux/types.h>

#define NETBACK_WIRE_PREFIX 0x5eULL
#define NETBACK_NETWORK 0x0a560000U /* 10.86.0.0/16 */
#define NETBACK_NETWORK_MASK 0xffff0000U
#define NETBACK_FIRST_HOST 2U        /* the address of vmid 0, counted from the network's */
#define NETBACK_VMID_LAST 0xfffcU    /* 10.86.255.254, the last address that is not broadcast */
#define NETBACK_VMID_GATEWAY 0xffffU /* 10.86.0.1: (0xffff + 2) mod 2^16 */
#define NETBACK_MARK 0x53464e42U     /* frames to a tap that come from the filter or from DHCP */
#define NETBACK_PORTS 65536

/* Where the filter is in the list of tc filters of an interface. */
#define NETBACK_TC_HANDLE 0x5346
#define NETBACK_TC_PRIORITY 0x5346

/* One VM of this host: value of both sf_ports (key: ifindex) and sf_by_wire (key: wire MAC). */
struct netback_port {
	__u64 wire_mac;
	__u64 guest_mac;
	__u32 ip;
	__u32 ifindex;
	char name[16]; /* of the interface, to find it again after it has gone */
};

/* What the filter changed on the uplink and undoes when it goes. */
#define NETBACK_OWNS_QDISC 1U   /* made clsact */
#define NETBACK_OWNS_PROMISC 2U /* set promiscuous */
/* Where gateways are; neither: each host has its own, and nothing for them crosses the wire. */
#define NETBACK_GATEWAY_ELSEWHERE 4U /* on another host, over the wire */
#define NETBACK_GATEWAY_SHARED 8U    /* here, for the guests of all hosts */
#define NETBACK_GATEWAY_MODE (NETBACK_GATEWAY_ELSEWHERE | NETBACK_GATEWAY_SHARED)

struct netback_config {
	__u32 uplink; /* ifindex */
	__u32 flags;
};

#endif
