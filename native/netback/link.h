// Network interfaces: taps, their settings, and the packet sockets of services. All of it in the
// network namespace of the calling thread.
#pragma once

#include <cstdint>
#include <string>

#include "common/fd.h"
#include "common/status.h"

namespace sf {

// E_NOT_FOUND, E_NETWORK. The MAC address is a number, first byte on the wire highest.
Status LinkAddress(const std::string& name, uint32_t* ifindex, uint64_t* mac);

// Sets or clears flags of the interface (IFF_UP, IFF_PROMISC). `changed`, if given, says whether
// they were otherwise before. E_NETWORK.
Status SetLinkFlags(const std::string& name, int flags, bool on, bool* changed = nullptr);

// A new tap that lives as long as its descriptor: up, without IPv6, close-on-exec, non-blocking.
// With `vnet_hdr` every frame carries a virtio_net_hdr (Documentation/networking/tuntap.rst).
// E_EXISTS: there is an interface of that name. E_ARGUMENT, E_NETWORK.
Status OpenTap(const std::string& name, bool vnet_hdr, uint32_t mtu, Fd* out);

// A packet(7) socket on the interface that receives what a DHCP client sends there (untagged,
// unfragmented IPv4, UDP 68 to 67) before tc sees it, and nothing the host sends. What is written
// to it goes out of the interface with the mark that lets it pass the filter. `receive_bytes` is
// what the kernel keeps at most (within net.core.rmem_max). E_NOT_FOUND, E_NETWORK.
Status OpenDhcpSocket(const std::string& name, bool relay, int receive_bytes, Fd* out);

// As OpenDhcpSocket, for TCP: receives the first bytes (headers) of segments that open or end a
// connection (SYN, FIN, RST), and of all whose IPv4 source (host order) is another than `address`;
// and ARP replies.
Status OpenTcpSocket(const std::string& name, uint32_t address, Fd* out);

}  // namespace sf
