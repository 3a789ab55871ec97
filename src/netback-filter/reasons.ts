/**
 * What can become of a frame, by number: kernel/netback/reasons.h in words. `passed` reasons count
 * frames that did what their sender wanted; all others are drops.
 */
interface Reason {
  readonly name: string;
  readonly passed: boolean;
  /** For people: what the frame was. */
  readonly text: string;
}

const pass = (name: string, text: string): Reason => ({ name, passed: true, text });
const drop = (name: string, text: string): Reason => ({ name, passed: false, text });

/** The index is the reason's number. */
export const REASONS: readonly Reason[] = [
  pass('guest_to_local', 'from a guest to one of its family on this host'),
  pass('guest_to_wire', 'from a guest to one of its family elsewhere'),
  pass('wire_to_guest', 'from the wire to a guest'),
  pass('arp_answered', 'ARP request answered from the address scheme'),
  pass('dhcp_to_host', 'DHCP request, given to the host and not forwarded'),
  drop('guest_no_identity', 'from an interface without an identity'),
  drop('guest_runt', 'from a guest, shorter than an Ethernet header'),
  drop('guest_source_mac', "from a guest with another's source MAC address"),
  drop('guest_vlan', 'from a guest with a VLAN tag'),
  drop('guest_ipv6', 'IPv6 from a guest'),
  drop('guest_ethertype', 'from a guest, neither IPv4 nor ARP'),
  drop('guest_malformed_ip', 'from a guest, IPv4 header or lengths wrong'),
  drop('guest_source_ip', "from a guest with another's IPv4 address"),
  drop('guest_dhcp_server', 'from a guest that acts as a DHCP server'),
  drop('guest_broadcast', 'broadcast from a guest, neither ARP nor DHCP'),
  drop('guest_multicast', 'multicast from a guest'),
  drop('guest_not_wire_mac', "from a guest to an address that is no VM's"),
  drop('guest_foreign_family', 'from a guest to another family'),
  drop('guest_to_gateway', 'from a guest to the gateway, which this host has not'),
  drop('guest_no_such_vm', 'from a guest to itself or to a number that no VM has'),
  drop('guest_destination_ip', "from a guest, IPv4 address not the destination MAC's"),
  drop('arp_malformed', 'ARP from a guest, cut short or not for IPv4 on Ethernet'),
  drop('arp_reply', 'ARP reply from a guest'),
  drop('arp_source', "ARP from a guest with another's MAC or IPv4 address"),
  drop('arp_own_address', "ARP for the guest's own address"),
  drop('arp_outside', 'ARP for or to an address outside the family'),
  drop('wire_stray_source', "from a VM's address on the wire, to none"),
  drop('wire_vlan', 'from the wire to a VM with a VLAN tag'),
  drop('wire_unknown_destination', 'from the wire to a VM that is not here'),
  drop('wire_foreign_source', "from the wire to a VM, not from its family's"),
  drop('wire_impossible_source', 'from the wire with the address of a VM of this host or of none'),
  drop('wire_ethertype', 'from the wire to a VM, not IPv4'),
  drop('wire_malformed_ip', 'from the wire to a VM, IPv4 header or lengths wrong'),
  drop('wire_source_ip', "from the wire to a VM, IPv4 address not the source MAC's"),
  drop('wire_destination_ip', 'from the wire to a VM, not its IPv4 address'),
  drop('host_into_tap', 'from the host itself into a tap'),
  drop('helper_failed', 'the kernel refused to read or change the frame'),
  pass('gateway_from_guest', "from a guest to its family's gateway on this host"),
  pass('gateway_to_guest', 'from a gateway to a guest of its family on this host'),
  drop('gateway_no_such_vm', 'from a gateway to a VM that is not here'),
  pass('guest_to_wire_gateway', "from a guest to its family's gateway on the router"),
  pass('gateway_to_wire', 'from a gateway of this router to a guest of its family elsewhere'),
  pass('wire_to_gateway', "from a guest elsewhere to its family's gateway on this router"),
  pass('gateway_from_wire', "from the router's gateway to a guest of its family"),
  drop('guest_checksum', 'from a guest, a sum left to the kernel that overwrites its headers'),
];
