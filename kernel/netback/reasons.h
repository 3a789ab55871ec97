/* SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0 */
/*
 * What can become of a frame, numbered. The number is the index into the counters and stays with
 * its meaning: new ones are added at the end. src/netback-filter/reasons.ts says the same for
 * people; a test compares the two.
 */
#ifndef NETBACK_REASONS_H
#define NETBACK_REASONS_H

#define NETBACK_REASONS(X)                                                                         \
	X(0, guest_to_local)                                                                       \
	X(1, guest_to_wire)                                                                        \
	X(2, wire_to_guest)                                                                        \
	X(3, arp_answered)                                                                         \
	X(4, dhcp_to_host)                                                                         \
	X(5, guest_no_identity)                                                                    \
	X(6, guest_runt)                                                                           \
	X(7, guest_source_mac)                                                                     \
	X(8, guest_vlan)                                                                           \
	X(9, guest_ipv6)                                                                           \
	X(10, guest_ethertype)                                                                     \
	X(11, guest_malformed_ip)                                                                  \
	X(12, guest_source_ip)                                                                     \
	X(13, guest_dhcp_server)                                                                   \
	X(14, guest_broadcast)                                                                     \
	X(15, guest_multicast)                                                                     \
	X(16, guest_not_wire_mac)                                                                  \
	X(17, guest_foreign_family)                                                                \
	X(18, guest_to_gateway)                                                                    \
	X(19, guest_no_such_vm)                                                                    \
	X(20, guest_destination_ip)                                                                \
	X(21, arp_malformed)                                                                       \
	X(22, arp_reply)                                                                           \
	X(23, arp_source)                                                                          \
	X(24, arp_own_address)                                                                     \
	X(25, arp_outside)                                                                         \
	X(26, wire_stray_source)                                                                   \
	X(27, wire_vlan)                                                                           \
	X(28, wire_unknown_destination)                                                            \
	X(29, wire_foreign_source)                                                                 \
	X(30, wire_impossible_source)                                                              \
	X(31, wire_ethertype)                                                                      \
	X(32, wire_malformed_ip)                                                                   \
	X(33, wire_source_ip)                                                                      \
	X(34, wire_destination_ip)                                                                 \
	X(35, host_into_tap)                                                                       \
	X(36, helper_failed)                                                                       \
	X(37, gateway_from_guest)                                                                  \
	X(38, gateway_to_guest)                                                                    \
	X(39, gateway_no_such_vm)                                                                  \
	X(40, guest_to_wire_gateway)                                                               \
	X(41, gateway_to_wire)                                                                     \
	X(42, wire_to_gateway)                                                                     \
	X(43, gateway_from_wire)                                                                   \
	X(44, guest_checksum)

enum netback_reason {
#define NETBACK_REASON_ENUM(number, name) NETBACK_##name = number,
	NETBACK_REASONS(NETBACK_REASON_ENUM)
#undef NETBACK_REASON_ENUM
		NETBACK_REASON_COUNT
};

#endif
