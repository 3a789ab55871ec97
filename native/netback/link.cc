#include "netback/link.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include "kernel/netback/netback.h"

namespace sf {
namespace {

constexpr char kTun[] = "/dev/net/tun";
constexpr int kTcpReceiveBytes = 512 * 1024;
// Ethernet, IPv4 and TCP headers at their longest.
constexpr uint32_t kTcpHeaderBytes = ETH_HLEN + 60 + 60;
constexpr uint32_t kAncillary = static_cast<uint32_t>(SKF_AD_OFF);
constexpr uint32_t kIp = ETH_HLEN;

// Names that mean one file under /proc/sys and nothing to a shell.
bool IsName(const std::string& name) {
  constexpr char kAllowed[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-";
  return !name.empty() && name.size() < IF_NAMESIZE &&
         name.find_first_not_of(kAllowed) == std::string::npos;
}

ifreq Request(const std::string& name) {
  ifreq request = {};
  name.copy(request.ifr_name, IF_NAMESIZE - 1);
  return request;
}

Status ControlSocket(Fd* out) {
  out->reset(::socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  return out->valid() ? Status::Ok() : Status::Errno("E_NETWORK", "open a control socket");
}

// Before the interface comes up, so that the host never sends a router solicitation into a guest.
Status DisableIpv6(const std::string& name) {
  const std::string path = "/proc/sys/net/ipv6/conf/" + name + "/disable_ipv6";
  Fd file(::open(path.c_str(), O_WRONLY | O_CLOEXEC));
  if (!file.valid()) {
    // A kernel without IPv6 has nothing to switch off.
    return errno == ENOENT && ::access("/proc/sys/net/ipv6", F_OK) != 0
               ? Status::Ok()
               : Status::Errno("E_NETWORK", "open " + path);
  }
  return ::write(file.get(), "1", 1) == 1 ? Status::Ok()
                                          : Status::Errno("E_NETWORK", "write " + path);
}

Status SetMtu(const std::string& name, uint32_t mtu) {
  Fd control;
  Status status = ControlSocket(&control);
  if (!status.ok()) return status;
  ifreq request = Request(name);
  request.ifr_mtu = static_cast<int>(mtu);
  if (::ioctl(control.get(), SIOCSIFMTU, &request) != 0) {
    return Status::Errno("E_NETWORK", "set the MTU of " + name + " to " + std::to_string(mtu));
  }
  return Status::Ok();
}

// What `filter` takes of the frames that come out of the interface.
Status OpenPacketSocket(const std::string& name, const sock_fprog& filter, int receive_bytes,
                        Fd* out) {
  sockaddr_ll address = {};
  address.sll_family = AF_PACKET;
  // The filters ask for IPv4; a socket bound to one protocol only would come after tc.
  address.sll_protocol = htons(ETH_P_ALL);
  address.sll_ifindex = static_cast<int>(if_nametoindex(name.c_str()));
  if (address.sll_ifindex == 0) return Status::Error("E_NOT_FOUND", "no interface " + name);
  // Protocol 0 receives nothing until bind(): not a frame arrives before the filter is in place.
  Fd socket(::socket(AF_PACKET, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!socket.valid()) return Status::Errno("E_NETWORK", "open a packet socket");
  const int one = 1;
  const uint32_t mark = NETBACK_MARK;
  if (::setsockopt(socket.get(), SOL_SOCKET, SO_ATTACH_FILTER, &filter, sizeof filter) != 0 ||
      ::setsockopt(socket.get(), SOL_PACKET, PACKET_IGNORE_OUTGOING, &one, sizeof one) != 0 ||
      ::setsockopt(socket.get(), SOL_SOCKET, SO_MARK, &mark, sizeof mark) != 0 ||
      ::setsockopt(socket.get(), SOL_SOCKET, SO_RCVBUF, &receive_bytes, sizeof receive_bytes) !=
          0) {
    return Status::Errno("E_NETWORK", "set up a packet socket on " + name);
  }
  if (::bind(socket.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) {
    return Status::Errno("E_NETWORK", "bind a packet socket to " + name);
  }
  *out = std::move(socket);
  return Status::Ok();
}

}  // namespace

Status LinkAddress(const std::string& name, uint32_t* ifindex, uint64_t* mac) {
  Fd control;
  Status status = ControlSocket(&control);
  if (!status.ok()) return status;
  *ifindex = if_nametoindex(name.c_str());
  if (*ifindex == 0) return Status::Error("E_NOT_FOUND", "no interface " + name);
  ifreq request = Request(name);
  if (::ioctl(control.get(), SIOCGIFHWADDR, &request) != 0) {
    return Status::Errno("E_NETWORK", "read the MAC address of " + name);
  }
  *mac = 0;
  for (int i = 0; i < 6; ++i) {
    *mac = *mac << 8 | static_cast<uint8_t>(request.ifr_hwaddr.sa_data[i]);
  }
  return Status::Ok();
}

Status SetLinkFlags(const std::string& name, int flags, bool on, bool* changed) {
  Fd control;
  Status status = ControlSocket(&control);
  if (!status.ok()) return status;
  ifreq request = Request(name);
  if (::ioctl(control.get(), SIOCGIFFLAGS, &request) != 0) {
    return Status::Errno("E_NETWORK", "read the flags of " + name);
  }
  const int before = request.ifr_flags;
  const int wanted = on ? before | flags : before & ~flags;
  if (changed != nullptr) *changed = wanted != before;
  request.ifr_flags = static_cast<int16_t>(wanted);
  if (wanted != before && ::ioctl(control.get(), SIOCSIFFLAGS, &request) != 0) {
    return Status::Errno("E_NETWORK", "change the flags of " + name);
  }
  return Status::Ok();
}

Status OpenTap(const std::string& name, bool vnet_hdr, uint32_t mtu, Fd* out) {
  if (!IsName(name)) {
    return Status::Error("E_ARGUMENT", "a tap's name has 1 to 15 letters, digits, - or _");
  }
  Fd tap(::open(kTun, O_RDWR | O_CLOEXEC | O_NONBLOCK));
  if (!tap.valid()) return Status::Errno("E_NETWORK", std::string("open ") + kTun);
  ifreq request = Request(name);
  request.ifr_flags =
      static_cast<int16_t>(IFF_TAP | IFF_NO_PI | IFF_TUN_EXCL | (vnet_hdr ? IFF_VNET_HDR : 0));
  if (::ioctl(tap.get(), TUNSETIFF, &request) != 0) {
    const bool exists = errno == EBUSY || errno == EEXIST || errno == EINVAL;
    return Status::Errno(exists && if_nametoindex(name.c_str()) != 0 ? "E_EXISTS" : "E_NETWORK",
                         "make tap " + name);
  }
  Status status = DisableIpv6(name);
  if (status.ok()) status = SetMtu(name, mtu);
  if (status.ok()) status = SetLinkFlags(name, IFF_UP, true);
  if (status.ok()) *out = std::move(tap);
  return status;
}

Status OpenDhcpSocket(const std::string& name, bool relay, int receive_bytes, Fd* out) {
  sock_filter program[] = {
      BPF_STMT(BPF_LD | BPF_B | BPF_ABS, kAncillary + SKF_AD_VLAN_TAG_PRESENT),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 13),
      BPF_STMT(BPF_LD | BPF_H | BPF_ABS, 12),  // EtherType
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ETH_P_IP, 0, 11),
      BPF_STMT(BPF_LD | BPF_B | BPF_ABS, kIp + 9),  // protocol
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, IPPROTO_UDP, 0, 9),
      BPF_STMT(BPF_LD | BPF_H | BPF_ABS, kIp + 6),  // fragment offset and "more fragments"
      BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, 0x3fff, 7, 0),
      BPF_STMT(BPF_LDX | BPF_B | BPF_MSH, kIp),
      BPF_STMT(BPF_LD | BPF_H | BPF_IND, kIp),  // source port
      // 68 for a client; 67 too for a relay. What is less wraps around.
      BPF_STMT(BPF_ALU | BPF_SUB | BPF_K, relay ? 67u : 68u),
      BPF_JUMP(BPF_JMP | BPF_JGT | BPF_K, relay ? 1u : 0u, 3, 0),
      BPF_STMT(BPF_LD | BPF_H | BPF_IND, kIp + 2),  // destination port
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 67, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, 0xffff),
      BPF_STMT(BPF_RET | BPF_K, 0),
  };
  return OpenPacketSocket(name, {static_cast<uint16_t>(std::size(program)), program}, receive_bytes,
                          out);
}

Status OpenTcpSocket(const std::string& name, uint32_t address, Fd* out) {
  sock_filter program[] = {
      BPF_STMT(BPF_LD | BPF_B | BPF_ABS, kAncillary + SKF_AD_VLAN_TAG_PRESENT),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0, 0, 15),
      BPF_STMT(BPF_LD | BPF_H | BPF_ABS, 12),  // EtherType
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ETH_P_IP, 3, 0),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ETH_P_ARP, 0, 12),
      BPF_STMT(BPF_LD | BPF_H | BPF_ABS, kIp + 6),  // operation
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 2, 9, 10),
      BPF_STMT(BPF_LD | BPF_B | BPF_ABS, kIp + 9),  // protocol
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, IPPROTO_TCP, 0, 8),
      BPF_STMT(BPF_LD | BPF_H | BPF_ABS, kIp + 6),  // fragment offset
      BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, 0x1fff, 6, 0),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, kIp + 12),  // source
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, address, 0, 3),
      BPF_STMT(BPF_LDX | BPF_B | BPF_MSH, kIp),
      BPF_STMT(BPF_LD | BPF_B | BPF_IND, kIp + 13),      // flags
      BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, 0x07, 0, 1),  // FIN, SYN, RST
      BPF_STMT(BPF_RET | BPF_K, kTcpHeaderBytes),
      BPF_STMT(BPF_RET | BPF_K, 0),
  };
  return OpenPacketSocket(name, {static_cast<uint16_t>(std::size(program)), program},
                          kTcpReceiveBytes, out);
}

}  // namespace sf
