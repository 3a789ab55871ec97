"""Attacks on the netback filter, by scapy, from the interface eth0 of the namespace it is run in.

attack.py guest|foreign|wire NAME[,NAME]... TARGETS COUNT SEED: sends the frames of attacks and prints, as JSON,
how many it sent by the reason under which the filter has to drop them. TARGETS is JSON: `self`,
`victim`, `peer`, `foreign`, each {"mac", "ip"} (wire addresses); `guest_mac`. IPv4 frames carry the
TOS byte MARK and ARP a trailer, so that a capture tells a forged frame from a real one with the same
addresses.
"""
import json
import random
import socket
import sys

from scapy.all import (ARP, BOOTP, DHCP, ICMP, IP, TCP, UDP, Dot1AD, Dot1Q, Ether,
                       ICMPv6NDOptPrefixInfo, ICMPv6ND_RA, IPv6, Raw, fragment)

MARK = 0x5C
BROADCAST = "ff:ff:ff:ff:ff:ff"
side, attack, targets, count, seed = sys.argv[1:6]
count = int(count)
dice = random.Random(int(seed))
T = json.loads(targets)
GUEST = T["guest_mac"]
self_, victim, peer, foreign = T["self"], T["victim"], T["peer"], T["foreign"]
GATEWAY = "10.86.0.1"


def ip(source, destination, **fields):
    return IP(src=source, dst=destination, tos=MARK, **fields)


def random_mac(first):
    return ":".join("%02x" % b for b in [first] + [dice.randrange(256) for _ in range(5)])


def random_ip():
    return "10.86.%d.%d" % (dice.randrange(100, 200), dice.randrange(1, 255))


def dhcp(kind, chaddr, **fields):
    return BOOTP(chaddr=bytes.fromhex(chaddr.replace(":", "")), xid=dice.getrandbits(32),
                 **fields) / DHCP(options=[("message-type", kind), "end"])


class Guest:
    """What a guest's root can do. `own`: the frame it may send to the victim."""

    def eth(self, destination=victim["mac"], source=GUEST, **fields):
        return Ether(dst=destination, src=source, **fields)

    def own(self):
        return ip(self_["ip"], victim["ip"])

    def spoofed_mac(self):
        for mac in (victim["mac"], peer["mac"], foreign["mac"], self_["mac"], BROADCAST):
            yield "guest_source_mac", self.eth(source=mac) / self.own() / UDP()
        for _ in range(count):
            yield "guest_source_mac", self.eth(source=random_mac(0x52)) / self.own() / UDP()

    def spoofed_ip(self):
        # As the victim's peer, into the middle of its TCP stream.
        for flags in "R", "F", "SA", "PA":
            yield "guest_source_ip", (self.eth() / ip(peer["ip"], victim["ip"]) /
                                      TCP(sport=T["port"], dport=T["port"], flags=flags))
        yield "guest_source_ip", self.eth() / ip(GATEWAY, victim["ip"]) / ICMP(type=5, gw=self_["ip"])
        for _ in range(count):
            yield "guest_source_ip", self.eth() / ip(random_ip(), victim["ip"]) / UDP()

    def arp_poisoning(self):
        def arp(**fields):
            return ARP(hwsrc=GUEST, **fields)
        for to, mac in ((victim, peer), (peer, victim), (victim, {"ip": GATEWAY})):
            yield "arp_reply", self.eth(to["mac"]) / arp(op=2, psrc=mac["ip"], pdst=to["ip"])
            yield "arp_reply", self.eth(BROADCAST) / arp(op=2, psrc=mac["ip"], pdst=mac["ip"])
            yield "arp_source", self.eth(BROADCAST) / arp(op=1, psrc=mac["ip"], pdst=mac["ip"])
            yield "arp_source", self.eth(to["mac"]) / arp(op=1, psrc=mac["ip"], pdst=to["ip"])
        # Its own gratuitous ARP and its own probe: met with silence.
        yield "arp_own_address", self.eth(BROADCAST) / arp(op=1, psrc=self_["ip"], pdst=self_["ip"])
        yield "arp_own_address", self.eth(BROADCAST) / arp(op=1, psrc="0.0.0.0", pdst=self_["ip"])
        yield "arp_malformed", self.eth(BROADCAST) / arp(op=3, psrc=self_["ip"], pdst=victim["ip"])
        yield "arp_malformed", self.eth(BROADCAST) / arp(op=8, psrc=self_["ip"], pdst=victim["ip"])
        for _ in range(count):
            yield "arp_source", self.eth(BROADCAST) / arp(op=1, psrc=random_ip(), pdst=victim["ip"])

    def rogue_dhcp_server(self):
        for kind in "offer", "ack", "nak":
            message = dhcp(kind, GUEST, op=2, yiaddr="10.86.66.66", siaddr=self_["ip"])
            for to, address in ((BROADCAST, "255.255.255.255"), (victim["mac"], victim["ip"])):
                for source in self_["ip"], GATEWAY:
                    yield "guest_dhcp_server", (self.eth(to) / ip(source, address) /
                                                UDP(sport=67, dport=68) / message)
                    yield "guest_dhcp_server", (self.eth(to) / ip(source, address) /
                                                UDP(sport=1067, dport=68) / message)

    def dhcp_starvation(self):
        for i in range(count):
            mac = random_mac(0x52)
            message = (ip("0.0.0.0", "255.255.255.255") / UDP(sport=68, dport=67) /
                       dhcp("discover" if i % 2 else "request", mac))
            yield "guest_source_mac", self.eth(BROADCAST, source=mac) / message
            # To the DHCP service of this tap alone.
            yield "dhcp_to_host", self.eth(BROADCAST) / message

    def vlan_hopping(self):
        for to in victim["mac"], foreign["mac"], BROADCAST:
            for vid in 0, 1, 2, 4094:
                tagged = self.eth(to) / Dot1Q(vlan=vid)
                yield "guest_vlan", tagged / self.own() / UDP()
                yield "guest_vlan", tagged / Dot1Q(vlan=20) / self.own() / UDP()
                yield "guest_vlan", tagged / ARP(hwsrc=GUEST, psrc=self_["ip"], pdst=victim["ip"])
                yield "guest_vlan", self.eth(to) / Dot1AD(vlan=vid) / Dot1Q(vlan=20) / self.own()

    def multicast(self):
        for group, port in (("224.0.0.251", 5353), ("224.0.0.1", 9), ("239.255.255.250", 1900)):
            octets = [int(it) for it in group.split(".")]
            mac = "01:00:5e:%02x:%02x:%02x" % (octets[1] & 127, octets[2], octets[3])
            yield "guest_multicast", self.eth(mac) / ip(self_["ip"], group) / UDP(dport=port)
            # The group's packets in frames to one VM.
            yield "guest_destination_ip", self.eth() / ip(self_["ip"], group) / UDP(dport=port)
        yield "guest_destination_ip", self.eth() / ip(self_["ip"], "10.86.255.255") / UDP()
        yield "guest_broadcast", self.eth(BROADCAST) / ip(self_["ip"], "10.86.255.255") / ICMP()
        yield "guest_broadcast", self.eth(BROADCAST) / self.own() / ICMP()

    def ipv6_router(self):
        advertisement = (IPv6(src="fe80::1", dst="ff02::1") / ICMPv6ND_RA(routerlifetime=1800) /
                         ICMPv6NDOptPrefixInfo(prefix="2001:db8::", prefixlen=64))
        for to in "33:33:00:00:00:01", victim["mac"], foreign["mac"], BROADCAST:
            yield "guest_ipv6", self.eth(to) / advertisement
        for _ in range(count):
            yield "guest_ipv6", self.eth("33:33:00:00:00:01") / advertisement

    def ethertypes(self):
        known = (0x0800, 0x0806, 0x86DD, 0x8100, 0x88A8)
        # 802.3 lengths (spanning tree), PPPoE, MPLS, EAPOL, LLDP, ATA over Ethernet, PTP, ...
        named = (0, 38, 1500, 1536, 0x8863, 0x8864, 0x8847, 0x888E, 0x88CC, 0x88A2, 0x88F7, 0x9000)
        for number in named + tuple(dice.randrange(1536, 65536) for _ in range(count)):
            if number not in known:
                for to in victim["mac"], "01:80:c2:00:00:00", BROADCAST:
                    yield "guest_ethertype", self.eth(to, type=number) / Raw(bytes(self.own()))

    def runts(self):
        whole = bytes(self.eth() / self.own())
        asking = bytes(self.eth(BROADCAST) / ARP(hwsrc=GUEST, psrc=self_["ip"], pdst=victim["ip"]))
        for size in range(14, 34):
            yield "guest_malformed_ip", whole[:size]
        for size in range(14, 42):
            yield "arp_malformed", asking[:size]

    def giants(self):
        for size in 1515, 4000, 9000:
            load = Raw(b"G" * (size - 42))
            yield "guest_source_mac", self.eth(source=peer["mac"]) / self.own() / UDP() / load
            yield "guest_source_ip", self.eth() / ip(peer["ip"], victim["ip"]) / UDP() / load
            yield "guest_foreign_family", (self.eth(foreign["mac"]) /
                                           ip(self_["ip"], foreign["ip"]) / UDP() / load)
            yield "guest_malformed_ip", (self.eth() / ip(self_["ip"], victim["ip"], len=65535) /
                                         UDP() / load)

    def fragments(self):
        # Fragments to a VM of the family pass; these are not to be, or break a rule in one piece.
        whole = ip(self_["ip"], foreign["ip"], id=7) / UDP(sport=9, dport=9) / Raw(b"F" * 4000)
        for piece in fragment(whole, 8):
            yield "guest_foreign_family", self.eth(foreign["mac"]) / piece
        for piece in fragment(ip(peer["ip"], victim["ip"], id=8) / ICMP() / Raw(b"F" * 4000), 1480):
            yield "guest_source_ip", self.eth() / piece
        def piece(offset, more, load):
            return self.eth() / ip(self_["ip"], victim["ip"], id=9, proto=17, frag=offset,
                                   flags="MF" if more else 0) / Raw(load)
        # Too small for ports; then a server's datagram, and pieces that would cover one another.
        server = bytes(UDP(sport=67, dport=68, len=100, chksum=0))
        for size in range(8):
            yield "guest_malformed_ip", piece(0, True, server[:size])
        for more in True, False:
            yield "guest_dhcp_server", piece(0, more, server)
            yield "guest_dhcp_server", piece(0, more, server + b"F" * 64)
        yield "guest_malformed_ip", self.eth() / ip(self_["ip"], victim["ip"], frag=1, len=1400) / Raw(b"F" * 8)

    def other_family(self):
        yield "guest_foreign_family", self.eth(foreign["mac"]) / ip(self_["ip"], foreign["ip"]) / ICMP()
        for _ in range(count):
            vmid, family = dice.randrange(65533), dice.randrange(9, 2**24)
            mac = "5e" + "".join(":%02x" % b for b in family.to_bytes(3, "big") + vmid.to_bytes(2, "big"))
            yield "guest_foreign_family", self.eth(mac) / ip(self_["ip"], victim["ip"]) / TCP()
        for mac in "02:00:00:00:01:01", "02:00:00:00:01:02", GUEST, "00:00:00:00:00:00":
            yield "guest_not_wire_mac", self.eth(mac) / ip(self_["ip"], "192.168.77.1") / TCP(dport=22)

    def flood(self):
        kinds = [next(iter(one())) for one in (self.spoofed_mac, self.spoofed_ip, self.arp_poisoning,
                                               self.vlan_hopping, self.multicast, self.ipv6_router)]
        kinds = [(reason, bytes(frame)) for reason, frame in kinds]
        for i in range(count):
            yield kinds[i % len(kinds)]


class Foreign(Guest):
    """A guest of another family than its victim's: `foreign` is the victim here. What is wrong with a
    packet's destination is not asked any more, since the frame's is in the wrong family."""

    def __getattribute__(self, name):
        attacks = object.__getattribute__(self, name)
        if name not in Guest.ATTACKS:
            return attacks
        late = {"guest_destination_ip": "guest_foreign_family"}
        return lambda: ((late.get(reason, reason), frame) for reason, frame in attacks())


Guest.ATTACKS = {name for name in vars(Guest) if name not in ("eth", "own") and name[0] != "_"}


class Wire:
    """What a machine on the wire can do that is none of the hosts."""

    def eth(self, destination=victim["mac"], source=foreign["mac"], **fields):
        return Ether(dst=destination, src=source, **fields)

    def as_peer(self):
        return ip(peer["ip"], victim["ip"])

    def spoofed_mac(self):
        # Group addresses as sources do not pass the switch.
        for mac in foreign["mac"], GUEST, "02:00:00:00:01:02":
            yield "wire_foreign_source", self.eth(source=mac) / self.as_peer() / TCP(flags="R")
        # VMs of the host that hears it.
        for one in victim, self_:
            yield "wire_impossible_source", self.eth(source=one["mac"]) / ip(one["ip"], victim["ip"]) / UDP()
        for _ in range(count):
            yield "wire_foreign_source", self.eth(source=random_mac(0x02)) / self.as_peer() / UDP()

    def spoofed_ip(self):
        for address in self_["ip"], victim["ip"], GATEWAY, "192.168.77.2":
            yield "wire_source_ip", self.eth(source=peer["mac"]) / ip(address, victim["ip"]) / UDP()
        for address in peer["ip"], "255.255.255.255", "224.0.0.1":
            yield "wire_destination_ip", self.eth(source=peer["mac"]) / ip(peer["ip"], address) / UDP()

    def arp_poisoning(self):
        for op in 1, 2:
            message = ARP(op=op, hwsrc=peer["mac"], psrc=peer["ip"], pdst=victim["ip"])
            yield "wire_ethertype", self.eth(source=peer["mac"]) / message
            yield "wire_stray_source", self.eth(BROADCAST, source=peer["mac"]) / message
            yield "wire_foreign_source", self.eth(source=foreign["mac"]) / message
            # Gratuitous, in the gateway's name and in the peer's.
            for address in GATEWAY, peer["ip"]:
                gratuitous = ARP(op=op, hwsrc=peer["mac"], psrc=address, pdst=address)
                yield "wire_stray_source", self.eth(BROADCAST, source=peer["mac"]) / gratuitous
                yield None, self.eth(BROADCAST, source="02:00:00:00:09:09") / gratuitous

    def dhcp_starvation(self):
        for i in range(count):
            message = (ip("0.0.0.0", "255.255.255.255") / UDP(sport=68, dport=67) /
                       dhcp("discover" if i % 2 else "request", random_mac(0x52)))
            yield "wire_stray_source", self.eth(BROADCAST, source=peer["mac"]) / message
            yield "wire_source_ip", self.eth(source=peer["mac"]) / message
            yield "wire_foreign_source", self.eth(source=random_mac(0x52)) / message
            yield None, self.eth(BROADCAST, source=random_mac(0x52)) / message

    def rogue_dhcp_server(self):
        for kind in "offer", "ack", "nak":
            message = UDP(sport=67, dport=68) / dhcp(kind, GUEST, op=2, yiaddr="10.86.66.66")
            yield "wire_stray_source", (self.eth(BROADCAST, source=peer["mac"]) /
                                        ip(GATEWAY, "255.255.255.255") / message)
            yield "wire_source_ip", self.eth(source=peer["mac"]) / ip(GATEWAY, victim["ip"]) / message
            yield "wire_foreign_source", (self.eth(source="02:00:00:00:09:09") /
                                          ip(GATEWAY, victim["ip"]) / message)
            # With an ordinary machine's source it is the host's own to hear, and no tap's.
            yield None, (self.eth(BROADCAST, source="02:00:00:00:09:09") /
                         ip(GATEWAY, "255.255.255.255") / message)

    def vlan_hopping(self):
        for vid in 0, 1, 4094:
            tagged = self.eth(source=peer["mac"]) / Dot1Q(vlan=vid)
            yield "wire_vlan", tagged / self.as_peer() / UDP()
            yield "wire_vlan", tagged / Dot1Q(vlan=20) / self.as_peer() / UDP()
            yield "wire_vlan", self.eth(source=peer["mac"]) / Dot1AD(vlan=vid) / self.as_peer() / UDP()

    def ipv6_router(self):
        message = IPv6(src="fe80::1", dst="ff02::1") / ICMPv6ND_RA(routerlifetime=1800)
        yield "wire_ethertype", self.eth(source=peer["mac"]) / message
        yield "wire_stray_source", self.eth("33:33:00:00:00:01", source=peer["mac"]) / message
        yield "wire_stray_source", self.eth(BROADCAST, source=foreign["mac"]) / message
        yield None, self.eth("33:33:00:00:00:01", source="02:00:00:00:09:09") / message

    def multicast(self):
        for mac in "01:00:5e:00:00:fb", BROADCAST, "01:80:c2:00:00:21", "02:00:00:00:01:01":
            yield "wire_stray_source", self.eth(mac, source=peer["mac"]) / ip(peer["ip"], "224.0.0.251") / UDP()

    def ethertypes(self):
        for number in (0, 38, 1536, 0x8863, 0x8847, 0x888E, 0x88CC, 0x88F7, 0x9000):
            yield "wire_ethertype", self.eth(source=peer["mac"], type=number) / Raw(bytes(self.as_peer()))

    def runts(self):
        whole = bytes(self.eth(source=peer["mac"]) / self.as_peer())
        for size in range(14, 34):
            yield "wire_malformed_ip", whole[:size]

    def giants(self):
        for size in 1515, 4000, 9000:
            load = Raw(b"G" * (size - 42))
            yield "wire_foreign_source", self.eth() / self.as_peer() / UDP() / load
            yield "wire_source_ip", self.eth(source=peer["mac"]) / ip(GATEWAY, victim["ip"]) / UDP() / load
            yield "wire_malformed_ip", (self.eth(source=peer["mac"]) /
                                        ip(peer["ip"], victim["ip"], len=65535) / UDP() / load)

    def fragments(self):
        for piece in fragment(ip(self_["ip"], victim["ip"], id=8) / UDP() / Raw(b"F" * 3000), 8):
            yield "wire_source_ip", self.eth(source=peer["mac"]) / piece
        for piece in fragment(ip(foreign["ip"], victim["ip"], id=9) / UDP() / Raw(b"F" * 3000), 1480):
            yield "wire_foreign_source", self.eth() / piece

    def flood(self):
        kinds = [next(iter(one())) for one in (self.spoofed_mac, self.spoofed_ip, self.arp_poisoning,
                                               self.vlan_hopping, self.ethertypes)]
        kinds = [(reason, bytes(frame)) for reason, frame in kinds]
        for i in range(count):
            yield kinds[i % len(kinds)]


sender = {"guest": Guest, "foreign": Foreign, "wire": Wire}[side]()
port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
port.bind(("eth0", 0))
sent = {}
for reason, frame in (each for name in attack.split(",") for each in getattr(sender, name)()):
    if not isinstance(frame, bytes):
        frame = bytes(frame / Raw(b"forged") if ARP in frame else frame)
    port.send(frame)
    if reason is not None:
        sent[reason] = sent.get(reason, 0) + 1
print(json.dumps(sent))
