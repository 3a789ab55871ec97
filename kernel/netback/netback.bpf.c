// SPDX-License-Identifier: GPL-2.0-only
/*
 * The netback filter (SnowFlock, ACM TOCS 29(1), section 3.7): MAC rewriting and isolation.
 *
 * Three programs for tc clsact, direct action:
 *   from_guest  ingress of each tap: what a guest sends
 *   from_wire   ingress of the uplink: what arrives for guests, and the host's own traffic
 *   to_guest    egress of each tap: lets only frames of the first two, and of DHCP, into a guest
 *
 * Invariants:
 *   - a frame leaves from_guest only by bpf_redirect: no guest reaches the host's stack;
 *   - it leaves with the wire source MAC of its sender and to a VM of the sender's family;
 *   - a guest receives only IPv4 unicast of its own family, the filter's ARP replies and DHCP;
 *   - what it has looked at in a frame is not changed behind it: a sum that the guest leaves to the
 *     kernel is written behind addresses and ports, or the frame is dropped;
 *   - the host's own traffic on the uplink is neither changed nor slowed by a map look-up;
 *   - every other frame is dropped under exactly one reason (reasons.h);
 *   - the work per frame does not depend on how many VMs are known: hash look-ups, no loop.
 *
 * A family's gateway is a port with vmid NETBACK_VMID_GATEWAY: the end of a veth pair whose other
 * end routes in a namespace of its own. It differs from a guest in two rules: it sends with any
 * IPv4 source outside the family's network (or its own address), and only to VMs of this host; and
 * a guest reaches through it any unicast address outside. No gateway is reached over the wire, and
 * none sends there: each host has its own. Unless one host is the router for all: there gateways
 * are reached from the wire and send to it (NETBACK_GATEWAY_SHARED), on the others guests reach
 * them and are reached by them over the wire (NETBACK_GATEWAY_ELSEWHERE). ARP for a gateway is
 * answered whether it is there or not, so that DHCP clients can renew by unicast.
 *
 * Left out on purpose: IPv6 (dropped and counted), and any authentication of the wire: who can put
 * frames on it can pretend to be a remote VM.
 *
 * Frames may be GSO, non-linear and with partial checksums; only MAC addresses are written, which
 * no checksum above Ethernet covers. They are written in place: of a frame that somebody else holds
 * too (a packet socket), the kernel copies the headers before the program runs.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "netback.h"
#include "reasons.h"

#define BROADCAST 0xffffffffffffULL
#define MULTICAST_BIT (1ULL << 40)
#define PORT_DHCP_SERVER 67
#define PORT_DHCP_CLIENT 68
#define FRAGMENT_OFFSET 0x1fff
#define CHECKSUM_PARTIAL 3 /* linux/skbuff.h */
#define TCP_CHECKSUM_AT 16
#define UDP_CHECKSUM_AT 6
/* linux/if_arp.h pulls in the C library's headers, which do not exist for this target. */
#define ARPHRD_ETHER 1
#define ARPOP_REQUEST 1
#define ARPOP_REPLY 2

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, NETBACK_PORTS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u32);
	__type(value, struct netback_port);
} sf_ports SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, NETBACK_PORTS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, __u64);
	__type(value, struct netback_port);
} sf_by_wire SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct netback_config);
} sf_config SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, NETBACK_REASON_COUNT);
	__type(key, __u32);
	__type(value, __u64);
} sf_stats SEC(".maps");

/*
 * Of the kernel's own sk_buff (CO-RE finds the places): what __sk_buff does not show. The offsets
 * are from the start of the buffer.
 */
struct sk_buff {
	__u8 ip_summed : 2;
	__u16 csum_start;
	__u16 csum_offset;
	__u16 mac_header;
} __attribute__((preserve_access_index));

/* From Linux 6.2 on. Before, each read of the same is a call that takes 40 ns. */
extern void *bpf_cast_to_kern_ctx(void *context) __ksym __weak;
/* Of the kernel's verifier: it tells whether there is that function. */
enum special_kfunc_type {
	KF_bpf_cast_to_kern_ctx = 1,
};

struct arp_frame {
	__u8 eth_dst[6];
	__u8 eth_src[6];
	__be16 eth_type;
	__be16 hardware;
	__be16 protocol;
	__u8 hardware_bytes;
	__u8 protocol_bytes;
	__be16 operation;
	__u8 sender_mac[6];
	__be32 sender_ip;
	__u8 target_mac[6];
	__be32 target_ip;
} __attribute__((packed));

static __always_inline void count(__u32 reason)
{
	__u64 *counter = bpf_map_lookup_elem(&sf_stats, &reason);

	if (counter)
		*counter += 1; /* per CPU, and tc runs with bottom halves off: no other writer */
}

static __always_inline int drop(__u32 reason)
{
	count(reason);
	return TC_ACT_SHOT;
}

static __always_inline __u64 mac_at(const __u8 *p)
{
	return (__u64)p[0] << 40 | (__u64)p[1] << 32 | (__u64)p[2] << 24 | (__u64)p[3] << 16 |
	       (__u64)p[4] << 8 | p[5];
}

/*
 * The addresses of an Ethernet header, each with one load of eight bytes, two of which are not its
 * own: the header is long enough. Loads need no alignment here; on a machine where they do, the
 * verifier refuses the program.
 */
static __always_inline __u64 destination_of(const struct ethhdr *eth)
{
	return bpf_be64_to_cpu(*(const __be64 *)eth->h_dest) >> 16;
}

static __always_inline __u64 source_of(const struct ethhdr *eth)
{
	return bpf_be64_to_cpu(*(const __be64 *)eth->h_source) >> 16;
}

static __always_inline void put_addresses(struct ethhdr *eth, __u64 destination, __u64 source)
{
	*(__be64 *)eth->h_dest = bpf_cpu_to_be64(destination << 16 | source >> 32);
	*(__be32 *)(eth->h_source + 2) = bpf_htonl((__u32)source);
}

static __always_inline void put_mac(__u8 *p, __u64 mac)
{
	p[0] = mac >> 40;
	p[1] = mac >> 32;
	p[2] = mac >> 24;
	p[3] = mac >> 16;
	p[4] = mac >> 8;
	p[5] = mac;
}

static __always_inline int is_wire(__u64 mac)
{
	return mac >> 40 == NETBACK_WIRE_PREFIX;
}

static __always_inline int same_family(__u64 a, __u64 b)
{
	return (a ^ b) >> 16 == 0;
}

static __always_inline __u32 vmid_of(__u64 wire_mac)
{
	return wire_mac & 0xffff;
}

static __always_inline __u32 ip_of(__u32 vmid)
{
	return NETBACK_NETWORK + NETBACK_FIRST_HOST + vmid;
}

/* Of a port whose frames a family's gateway sends or gets. */
static __always_inline int is_gateway(__u64 wire_mac)
{
	return vmid_of(wire_mac) == NETBACK_VMID_GATEWAY;
}

/* The bits of NETBACK_GATEWAY_MODE. Asked only about frames to or from a gateway. */
static __always_inline __u32 gateway_mode(void)
{
	__u32 zero = 0;
	const struct netback_config *config = bpf_map_lookup_elem(&sf_config, &zero);

	return config ? config->flags & NETBACK_GATEWAY_MODE : 0;
}

/* A unicast address that is not the family's: what may be on the far side of a gateway. */
static __always_inline int is_outside(__u32 address)
{
	__u32 top = address >> 24;

	return (address & NETBACK_NETWORK_MASK) != NETBACK_NETWORK && top != 0 && top != 127 &&
	       top < 224;
}

static __always_inline __u32 ip_of_gateway(void)
{
	return NETBACK_NETWORK + ((NETBACK_VMID_GATEWAY + NETBACK_FIRST_HOST) & 0xffff);
}

/* Makes the first `bytes` of the frame readable in one piece; 0 if it is shorter. */
static __always_inline int readable(struct __sk_buff *skb, __u32 bytes)
{
	if ((void *)(long)skb->data + bytes <= (void *)(long)skb->data_end)
		return 1;
	return skb->len >= bytes && bpf_skb_pull_data(skb, bytes) == 0;
}

/* The parts of an IPv4 header the filter looks at; host byte order. */
struct ipv4 {
	__u32 source;
	__u32 destination;
	__u32 header_bytes;
	__u32 payload_bytes;
	__u16 fragment;
	__u8 protocol;
};

/* 0 if there is no whole IPv4 header or its lengths do not fit the frame. */
static __always_inline int parse_ipv4(struct __sk_buff *skb, struct ipv4 *out)
{
	const struct iphdr *ip;
	__u32 total;

	if (!readable(skb, ETH_HLEN + sizeof(*ip)))
		return 0;
	ip = (void *)(long)skb->data + ETH_HLEN;
	if ((void *)(ip + 1) > (void *)(long)skb->data_end)
		return 0;
	out->header_bytes = ip->ihl * 4;
	total = bpf_ntohs(ip->tot_len);
	if (ip->version != 4 || out->header_bytes < sizeof(*ip) || total < out->header_bytes ||
	    total > skb->len - ETH_HLEN)
		return 0;
	out->payload_bytes = total - out->header_bytes;
	out->source = bpf_ntohl(ip->saddr);
	out->destination = bpf_ntohl(ip->daddr);
	out->fragment = bpf_ntohs(ip->frag_off);
	out->protocol = ip->protocol;
	return 1;
}

/*
 * A guest may leave its checksum to whoever sends the frame on (virtio 1.2, 5.1.6.2, NEEDS_CSUM),
 * and names any two bytes for it, which are written when the filter has looked. 0 if they are
 * before the checksum of the packet's own TCP or UDP header, where addresses and ports are. Behind
 * it they may be: sums inside of tunnels are there.
 */
static __always_inline int checksum_is_own(struct __sk_buff *context, const struct ipv4 *ip)
{
	__u32 least = ETH_HLEN + ip->header_bytes;
	const struct sk_buff *skb;
	__u16 start, offset, frame;

	if (bpf_core_enum_value_exists(enum special_kfunc_type, KF_bpf_cast_to_kern_ctx)) {
		skb = bpf_cast_to_kern_ctx(context);
		if (BPF_CORE_READ_BITFIELD(skb, ip_summed) != CHECKSUM_PARTIAL)
			return 1;
		start = skb->csum_start;
		offset = skb->csum_offset;
		frame = skb->mac_header;
	} else {
		skb = (const void *)context;
		if (BPF_CORE_READ_BITFIELD_PROBED(skb, ip_summed) != CHECKSUM_PARTIAL)
			return 1;
		if (bpf_core_read(&start, sizeof(start), &skb->csum_start) ||
		    bpf_core_read(&offset, sizeof(offset), &skb->csum_offset) ||
		    bpf_core_read(&frame, sizeof(frame), &skb->mac_header))
			return 0;
	}
	least += ip->protocol == IPPROTO_TCP ? TCP_CHECKSUM_AT : UDP_CHECKSUM_AT;
	return start >= frame && (__u32)start - frame + offset >= least;
}

/* Source and destination port behind an IPv4 header; 0 if they cannot be read. */
static __always_inline int load_ports(struct __sk_buff *skb, __u32 header_bytes, __u32 *out)
{
	const __u8 *at = (void *)(long)skb->data + ETH_HLEN + header_bytes;
	__be32 ports;

	if (at + sizeof(ports) <= (const __u8 *)(long)skb->data_end)
		ports = *(const __be32 *)at;
	else if (bpf_skb_load_bytes(skb, ETH_HLEN + header_bytes, &ports, sizeof(ports)))
		return 0;
	*out = bpf_ntohl(ports);
	return 1;
}

static __always_inline int send(struct __sk_buff *skb, __u64 destination, __u64 source,
				__u32 ifindex, __u32 mark, __u32 reason)
{
	struct ethhdr *eth = (void *)(long)skb->data;

	if ((void *)(eth + 1) > (void *)(long)skb->data_end)
		return drop(NETBACK_helper_failed); /* never: it was read before */
	put_addresses(eth, destination, source);
	if (mark)
		skb->mark = mark;
	count(reason);
	return bpf_redirect(ifindex, 0);
}

/* To an interface of this host that has a port. */
static __always_inline int deliver(struct __sk_buff *skb, const struct netback_port *to,
				   __u64 source, __u32 reason)
{
	return send(skb, to->guest_mac, source, to->ifindex, NETBACK_MARK, reason);
}

static __always_inline int to_wire(struct __sk_buff *skb, __u64 destination, __u64 source,
				   __u32 reason)
{
	__u32 zero = 0;
	const struct netback_config *config = bpf_map_lookup_elem(&sf_config, &zero);

	if (!config)
		return drop(NETBACK_helper_failed);
	return send(skb, destination, source, config->uplink, 0, reason);
}

/*
 * Every family address but the guest's own is answered, whether that VM runs or not: the answer
 * follows from the scheme alone and clones find each other at once. Silence about the own address
 * is what duplicate address detection (RFC 5227) and gratuitous ARP want to hear.
 */
static __always_inline int arp_from_guest(struct __sk_buff *skb, const struct netback_port *port)
{
	struct arp_frame frame;
	__u32 sender, target;
	__u64 destination, answer;

	if (skb->len < sizeof(frame) || bpf_skb_load_bytes(skb, 0, &frame, sizeof(frame)))
		return drop(NETBACK_arp_malformed);
	if (frame.hardware != bpf_htons(ARPHRD_ETHER) || frame.protocol != bpf_htons(ETH_P_IP) ||
	    frame.hardware_bytes != 6 || frame.protocol_bytes != 4)
		return drop(NETBACK_arp_malformed);
	if (frame.operation == bpf_htons(ARPOP_REPLY))
		return drop(NETBACK_arp_reply);
	if (frame.operation != bpf_htons(ARPOP_REQUEST))
		return drop(NETBACK_arp_malformed);
	sender = bpf_ntohl(frame.sender_ip);
	target = bpf_ntohl(frame.target_ip);
	if (mac_at(frame.sender_mac) != port->guest_mac || (sender && sender != port->ip))
		return drop(NETBACK_arp_source);
	if (target == port->ip)
		return drop(NETBACK_arp_own_address);
	/* Unicast requests are how a neighbour that answered before is asked again. */
	destination = mac_at(frame.eth_dst);
	if (destination != BROADCAST &&
	    !(is_wire(destination) && same_family(destination, port->wire_mac)))
		return drop(NETBACK_arp_outside);
	if ((target & NETBACK_NETWORK_MASK) != NETBACK_NETWORK || target == NETBACK_NETWORK ||
	    target == (NETBACK_NETWORK | ~NETBACK_NETWORK_MASK))
		return drop(NETBACK_arp_outside);

	answer = (port->wire_mac & ~0xffffULL) |
		 ((target - NETBACK_NETWORK - NETBACK_FIRST_HOST) & 0xffff);
	put_mac(frame.eth_dst, port->guest_mac);
	put_mac(frame.eth_src, answer);
	frame.operation = bpf_htons(ARPOP_REPLY);
	put_mac(frame.target_mac, port->guest_mac);
	frame.target_ip = frame.sender_ip;
	put_mac(frame.sender_mac, answer);
	frame.sender_ip = bpf_htonl(target);
	if (bpf_skb_store_bytes(skb, 0, &frame, sizeof(frame), 0))
		return drop(NETBACK_helper_failed);
	skb->mark = NETBACK_MARK;
	count(NETBACK_arp_answered);
	return bpf_redirect(skb->ifindex, 0);
}

static __always_inline int ipv4_from_guest(struct __sk_buff *skb, const struct netback_port *port,
					   __u64 destination)
{
	const struct netback_port *local;
	struct ipv4 ip;
	__u32 vmid;

	if (!parse_ipv4(skb, &ip))
		return drop(NETBACK_guest_malformed_ip);
	if (!checksum_is_own(skb, &ip))
		return drop(NETBACK_guest_checksum);
	/* Of a fragmented datagram the first fragment has the ports; without it none is rebuilt. */
	if (ip.protocol == IPPROTO_UDP && !(ip.fragment & FRAGMENT_OFFSET)) {
		__u32 ports;
		__u16 from, to;

		if (ip.payload_bytes < 8 || !load_ports(skb, ip.header_bytes, &ports))
			return drop(NETBACK_guest_malformed_ip);
		from = ports >> 16;
		to = ports;
		if (from == PORT_DHCP_SERVER || to == PORT_DHCP_CLIENT)
			return drop(NETBACK_guest_dhcp_server);
		/* The DHCP service saw the frame on its packet socket, which comes before tc. */
		if (to == PORT_DHCP_SERVER)
			return drop(NETBACK_dhcp_to_host);
	}
	if (ip.source != port->ip && !(is_gateway(port->wire_mac) && is_outside(ip.source)))
		return drop(NETBACK_guest_source_ip);
	if (destination == BROADCAST)
		return drop(NETBACK_guest_broadcast);
	if (destination & MULTICAST_BIT)
		return drop(NETBACK_guest_multicast);
	if (!is_wire(destination))
		return drop(NETBACK_guest_not_wire_mac);
	if (!same_family(destination, port->wire_mac))
		return drop(NETBACK_guest_foreign_family);
	vmid = vmid_of(destination);
	if (destination == port->wire_mac)
		return drop(NETBACK_guest_no_such_vm);
	local = bpf_map_lookup_elem(&sf_by_wire, &destination);
	if (vmid == NETBACK_VMID_GATEWAY) {
		if (!local && !(gateway_mode() & NETBACK_GATEWAY_ELSEWHERE))
			return drop(NETBACK_guest_to_gateway);
		if (ip.destination != ip_of_gateway() && !is_outside(ip.destination))
			return drop(NETBACK_guest_destination_ip);
		if (!local)
			return to_wire(skb, destination, port->wire_mac,
				       NETBACK_guest_to_wire_gateway);
		return deliver(skb, local, port->wire_mac, NETBACK_gateway_from_guest);
	}
	if (vmid > NETBACK_VMID_LAST)
		return drop(NETBACK_guest_no_such_vm);
	/* Keeps broadcast and multicast IP out of unicast frames too. */
	if (ip.destination != ip_of(vmid))
		return drop(NETBACK_guest_destination_ip);

	if (is_gateway(port->wire_mac)) {
		if (local)
			return deliver(skb, local, port->wire_mac, NETBACK_gateway_to_guest);
		if (!(gateway_mode() & NETBACK_GATEWAY_SHARED))
			return drop(NETBACK_gateway_no_such_vm);
		return to_wire(skb, destination, port->wire_mac, NETBACK_gateway_to_wire);
	}
	if (local)
		return deliver(skb, local, port->wire_mac, NETBACK_guest_to_local);
	return to_wire(skb, destination, port->wire_mac, NETBACK_guest_to_wire);
}

SEC("tc")
int from_guest(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;
	const struct netback_port *port = bpf_map_lookup_elem(&sf_ports, &ifindex);
	const struct ethhdr *eth;
	__u64 destination;

	if (!port)
		return drop(NETBACK_guest_no_identity);
	if (!readable(skb, ETH_HLEN))
		return drop(NETBACK_guest_runt);
	eth = (void *)(long)skb->data;
	if ((void *)(eth + 1) > (void *)(long)skb->data_end)
		return drop(NETBACK_guest_runt);
	if (source_of(eth) != port->guest_mac)
		return drop(NETBACK_guest_source_mac);
	/* The kernel takes an outer tag off before tc: then only vlan_present tells of it. */
	if (skb->vlan_present)
		return drop(NETBACK_guest_vlan);
	destination = destination_of(eth);
	switch (eth->h_proto) {
	case bpf_htons(ETH_P_IP):
		return ipv4_from_guest(skb, port, destination);
	case bpf_htons(ETH_P_ARP):
		return arp_from_guest(skb, port);
	case bpf_htons(ETH_P_IPV6):
		return drop(NETBACK_guest_ipv6);
	case bpf_htons(ETH_P_8021Q):
	case bpf_htons(ETH_P_8021AD):
		return drop(NETBACK_guest_vlan);
	default:
		return drop(NETBACK_guest_ethertype);
	}
}

SEC("tc")
int from_wire(struct __sk_buff *skb)
{
	const struct ethhdr *eth = (void *)(long)skb->data;
	const struct netback_port *port;
	__u64 destination, source;
	struct ipv4 ip;
	int right, to_gateway, from_gateway;

	/* An Ethernet driver has always pulled the Ethernet header into the linear part. */
	if ((void *)(eth + 1) > (void *)(long)skb->data_end)
		return TC_ACT_UNSPEC;
	destination = destination_of(eth);
	source = source_of(eth);
	if (!is_wire(destination)) {
		if (is_wire(source))
			return drop(NETBACK_wire_stray_source);
		return TC_ACT_UNSPEC; /* the host's own, and other tc filters may follow */
	}
	if (skb->vlan_present)
		return drop(NETBACK_wire_vlan);
	port = bpf_map_lookup_elem(&sf_by_wire, &destination);
	to_gateway = is_gateway(destination);
	if (!port || (to_gateway && !(gateway_mode() & NETBACK_GATEWAY_SHARED)))
		return drop(NETBACK_wire_unknown_destination);
	if (!same_family(source, destination))
		return drop(NETBACK_wire_foreign_source);
	/* A VM or gateway of this host never sends from the wire; gateways do not speak together.
	 */
	from_gateway = is_gateway(source);
	if (from_gateway)
		right = !to_gateway && gateway_mode() & NETBACK_GATEWAY_ELSEWHERE;
	else
		right = vmid_of(source) <= NETBACK_VMID_LAST;
	if (!right || bpf_map_lookup_elem(&sf_by_wire, &source))
		return drop(NETBACK_wire_impossible_source);
	if (eth->h_proto != bpf_htons(ETH_P_IP))
		return drop(NETBACK_wire_ethertype);
	if (!parse_ipv4(skb, &ip))
		return drop(NETBACK_wire_malformed_ip);
	if (from_gateway)
		right = ip.source == ip_of_gateway() || is_outside(ip.source);
	else
		right = ip.source == ip_of(vmid_of(source));
	if (!right)
		return drop(NETBACK_wire_source_ip);
	if (ip.destination != port->ip && !(to_gateway && is_outside(ip.destination)))
		return drop(NETBACK_wire_destination_ip);
	if (to_gateway)
		return deliver(skb, port, source, NETBACK_wire_to_gateway);
	return deliver(skb, port, source,
		       from_gateway ? NETBACK_gateway_from_wire : NETBACK_wire_to_guest);
}

SEC("tc")
int to_guest(struct __sk_buff *skb)
{
	if (skb->mark != NETBACK_MARK)
		return drop(NETBACK_host_into_tap);
	skb->mark = 0;
	return TC_ACT_OK;
}

char LICENSE[] SEC("license") = "GPL";
