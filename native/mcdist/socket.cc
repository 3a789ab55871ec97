#include "mcdist/socket.h"

#include <arpa/inet.h>
#include <linux/sock_diag.h>
#include <linux/sockios.h>
#include <netinet/udp.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <time.h>

#include <algorithm>

namespace sf::mcdist {
namespace {

// Asked for; the kernel doubles it for its own overhead. Holds more than a full prefetch window.
constexpr int kBufferBytes = 16 << 20;
// What may wait for the link, with the kernel's overhead counted (it doubles this): 2 ms of 1
// Gbit/s. Less than a link's queue takes, so that a slow link makes us wait and drops nothing, and
// little for a fault's answer to wait behind.
constexpr int kSendBufferBytes = 128 << 10;
// Receive buffers of less are no window: what is on the way is more than they hold.
constexpr uint32_t kWindowBytes = 4 << 20;
constexpr int kSendWaitMs = 20;
constexpr int kSendTries = 5;
constexpr long kQueueWaitNs = 500'000;
constexpr int kQueueTries = 40;
constexpr size_t kErrorsAtOnce = 64;
// Beside a power of two: messages that begin at multiples of it share few lines of the caches.
constexpr size_t kColour = 25 * 64;
constexpr size_t kTrainBytes = 65507;  // of an IP packet, without headers

template <typename T>
Status option(const Fd& fd, int level, int name, const T& value, const char* what) {
  if (::setsockopt(fd.get(), level, name, &value, sizeof value) == 0) return Status::Ok();
  return Status::Errno("E_NETWORK", std::string("setsockopt ") + what);
}

void size_buffer(const Fd& fd, int force, int plain, int bytes) {
  // Without the privilege the system's limit applies: slower under load, never wrong.
  if (::setsockopt(fd.get(), SOL_SOCKET, force, &bytes, sizeof bytes) != 0) {
    ::setsockopt(fd.get(), SOL_SOCKET, plain, &bytes, sizeof bytes);
  }
}

Status open_udp(Fd* out) {
  Fd fd(::socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!fd.valid()) return Status::Errno("E_NETWORK", "socket");
  size_buffer(fd, SO_RCVBUFFORCE, SO_RCVBUF, kBufferBytes);
  size_buffer(fd, SO_SNDBUFFORCE, SO_SNDBUF, kSendBufferBytes);
  // PROBE: "don't fragment", and forged ICMP messages about the path's MTU are not believed.
  Status status =
      option(fd, IPPROTO_IP, IP_MTU_DISCOVER, int{IP_PMTUDISC_PROBE}, "IP_MTU_DISCOVER");
  if (status.ok()) status = option(fd, IPPROTO_IP, IP_MULTICAST_ALL, int{0}, "IP_MULTICAST_ALL");
  if (status.ok()) *out = std::move(fd);
  return status;
}

std::string text(const sockaddr_in& address) {
  char buffer[INET_ADDRSTRLEN] = "";
  ::inet_ntop(AF_INET, &address.sin_addr, buffer, sizeof buffer);
  return std::string(buffer) + ":" + std::to_string(ntohs(address.sin_port));
}

Status bind_to(const Fd& fd, const sockaddr_in& address) {
  if (::bind(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0) {
    return Status::Ok();
  }
  return Status::Errno(errno == EADDRINUSE ? "E_IN_USE" : "E_NETWORK", "bind " + text(address));
}

}  // namespace

TimeNs now_ns() {
  timespec now = {};
  ::clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * kSecond + now.tv_nsec;
}

Status parse_address(const std::string& address, int64_t port, sockaddr_in* out) {
  *out = {};
  out->sin_family = AF_INET;
  if (port < 0 || port > 65535) {
    return Status::Error("E_ARGUMENT", "bad port " + std::to_string(port));
  }
  out->sin_port = htons(static_cast<uint16_t>(port));
  if (::inet_pton(AF_INET, address.c_str(), &out->sin_addr) != 1) {
    return Status::Error("E_ARGUMENT", "not an IPv4 address: " + address);
  }
  return Status::Ok();
}

Status parse_group(const std::string& group, int64_t port, sockaddr_in* out) {
  Status status = parse_address(group, port, out);
  if (!status.ok()) return status;
  if (!IN_MULTICAST(ntohl(out->sin_addr.s_addr)) || port == 0) {
    return Status::Error("E_ARGUMENT", "not a multicast group and port: " + text(*out));
  }
  return Status::Ok();
}

Status open_unicast(const sockaddr_in& address, const in_addr& interface_address, int ttl,
                    Fd* out) {
  Fd fd;
  Status status = open_udp(&fd);
  ip_mreqn interface = {};
  interface.imr_address = interface_address;
  if (status.ok()) status = option(fd, IPPROTO_IP, IP_MULTICAST_TTL, ttl, "IP_MULTICAST_TTL");
  if (status.ok()) status = option(fd, IPPROTO_IP, IP_MULTICAST_LOOP, int{1}, "IP_MULTICAST_LOOP");
  if (status.ok()) {
    status = option(fd, IPPROTO_IP, IP_MULTICAST_IF, interface,
                    "IP_MULTICAST_IF: no interface has the address given");
  }
  if (status.ok()) status = bind_to(fd, address);
  if (status.ok()) *out = std::move(fd);
  return status;
}

Status open_member(const sockaddr_in& group, const in_addr& interface_address, Fd* out) {
  Fd fd;
  Status status = open_udp(&fd);
  // Other clients of this host may be in the same group; each gets its copy.
  if (status.ok()) status = option(fd, SOL_SOCKET, SO_REUSEADDR, int{1}, "SO_REUSEADDR");
  if (status.ok()) status = bind_to(fd, group);
  ip_mreqn member = {};
  member.imr_multiaddr = group.sin_addr;
  member.imr_address = interface_address;
  if (status.ok()) {
    status = option(fd, IPPROTO_IP, IP_ADD_MEMBERSHIP, member,
                    "IP_ADD_MEMBERSHIP: no interface has the address given");
  }
  if (status.ok()) *out = std::move(fd);
  return status;
}

uint16_t bound_port(const Fd& fd) {
  sockaddr_in address = {};
  socklen_t size = sizeof address;
  if (::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&address), &size) != 0) return 0;
  return ntohs(address.sin_port);
}

void coalesce(const Fd& fd) {
  const int on = 1;
  ::setsockopt(fd.get(), SOL_UDP, UDP_GRO, &on, sizeof on);
}

ReceiveBatch::ReceiveBatch(bool coalesced)
    : message_bytes_(coalesced ? kCoalescedBytes : kMaxMtuBytes),
      stride_(message_bytes_ + kColour),
      count_(coalesced ? kCoalesced : kPackets),
      buffer_(count_ * stride_),
      control_(count_ * kControlBytes),
      from_(count_),
      vectors_(count_),
      messages_(count_) {
  packets_.reserve(count_);
}

size_t ReceiveBatch::receive(const Fd& fd, bool* full) {
  // What the call before used up is made ready again; the rest is.
  for (size_t i = 0; i < count_; i++) {
    msghdr& message = messages_[i].msg_hdr;
    if (message.msg_iov != nullptr && messages_[i].msg_len == 0) break;
    vectors_[i] = {buffer_.data() + i * stride_, message_bytes_};
    messages_[i] = {};
    message.msg_name = &from_[i];
    message.msg_namelen = sizeof(sockaddr_in);
    message.msg_iov = &vectors_[i];
    message.msg_iovlen = 1;
    message.msg_control = control_.data() + i * kControlBytes;
    message.msg_controllen = kControlBytes;
  }
  packets_.clear();
  if (full != nullptr) *full = false;
  // An error here is of an earlier packet (e.g. ICMP port unreachable while the server restarts);
  // reading it clears it, and the packets behind it come with the next call.
  const int n =
      ::recvmmsg(fd.get(), messages_.data(), static_cast<unsigned>(count_), MSG_DONTWAIT, nullptr);
  if (n < 0) return 0;
  if (full != nullptr) *full = static_cast<size_t>(n) == count_;
  for (size_t i = 0; i < static_cast<size_t>(n); i++) {
    msghdr& message = messages_[i].msg_hdr;
    size_t left = (message.msg_flags & MSG_TRUNC) != 0 ? 0 : messages_[i].msg_len;
    size_t piece = left;
    for (cmsghdr* at = CMSG_FIRSTHDR(&message); at != nullptr; at = CMSG_NXTHDR(&message, at)) {
      if (at->cmsg_level != SOL_UDP || at->cmsg_type != UDP_GRO) continue;
      int size = 0;
      std::memcpy(&size, CMSG_DATA(at), sizeof size);
      if (size > 0) piece = static_cast<size_t>(size);
    }
    const uint8_t* data = buffer_.data() + i * stride_;
    do {
      const size_t size = std::min(piece, left);
      packets_.push_back({data, size, i});
      data += size;
      left -= size;
    } while (left > 0);
    if (messages_[i].msg_len == 0) messages_[i].msg_len = 1;  // used: an empty datagram
  }
  return packets_.size();
}

SendBatch::SendBatch(size_t datagram_bytes)
    : datagram_bytes_(datagram_bytes), buffer_(kPackets * datagram_bytes) {
  trains_.reserve(kPackets);
}

void SendBatch::commit(size_t size, const sockaddr_in& to) {
  const auto joins = [&](const Train& last) {
    return segments_ && size <= last.size && last.bytes == last.count * last.size &&
           last.bytes + size <= kTrainBytes && last.to.sin_addr.s_addr == to.sin_addr.s_addr &&
           last.to.sin_port == to.sin_port;
  };
  if (!trains_.empty() && joins(trains_.back())) {
    trains_.back().bytes += size;
    trains_.back().count++;
  } else {
    trains_.push_back({to, used_, size, size, 1});
  }
  used_ += size;
  packets_++;
}

void SendBatch::prepare(size_t first) {
  const size_t n = trains_.size();
  vectors_.resize(n);
  messages_.resize(n);
  controls_.resize(n);
  for (size_t i = first; i < n; i++) {
    Train& train = trains_[i];
    vectors_[i] = {buffer_.data() + train.at, train.bytes};
    msghdr& header = messages_[i].msg_hdr;
    header = {};
    header.msg_name = &train.to;
    header.msg_namelen = sizeof train.to;
    header.msg_iov = &vectors_[i];
    header.msg_iovlen = 1;
    if (train.count == 1) continue;
    header.msg_control = controls_[i].bytes;
    header.msg_controllen = sizeof controls_[i].bytes;
    cmsghdr* control = CMSG_FIRSTHDR(&header);
    control->cmsg_level = SOL_UDP;
    control->cmsg_type = UDP_SEGMENT;
    control->cmsg_len = CMSG_LEN(sizeof(uint16_t));
    const uint16_t size = static_cast<uint16_t>(train.size);
    std::memcpy(CMSG_DATA(control), &size, sizeof size);
  }
}

// Each datagram on its own, from now on.
void SendBatch::split() {
  segments_ = false;
  std::vector<Train> single;
  for (const Train& train : trains_) {
    for (size_t at = 0; at < train.bytes; at += train.size) {
      const size_t size = std::min(train.size, train.bytes - at);
      single.push_back({train.to, train.at + at, size, size, 1});
    }
  }
  trains_ = std::move(single);
}

SendBatch::Result SendBatch::flush(const Fd& fd) {
  Result result;
  size_t done = 0;
  int tries = 0;
  prepare(0);
  while (done < trains_.size()) {
    const int n = ::sendmmsg(fd.get(), messages_.data() + done,
                             static_cast<unsigned>(trains_.size() - done), MSG_DONTWAIT);
    if (n > 0) {
      done += static_cast<size_t>(n);
      tries = 0;
      continue;
    }
    if (errno == EINTR) continue;
    if (errno == EAGAIN && tries++ < kSendTries) {
      result.waits++;
      pollfd wait = {fd.get(), POLLOUT, 0};
      ::poll(&wait, 1, kSendWaitMs);
      continue;
    }
    if (errno == ENOBUFS && tries++ < kQueueTries) {  // the link's queue: nothing tells of room
      result.waits++;
      const timespec wait = {0, kQueueWaitNs};
      ::nanosleep(&wait, nullptr);
      continue;
    }
    // Of an earlier packet, reported now: this one was not tried. Reading it clears it.
    if (drain_errors(fd) > 0 && tries++ < kSendTries) continue;
    if (trains_[done].count > 1 && (errno == EIO || errno == EINVAL || errno == EMSGSIZE)) {
      trains_.erase(trains_.begin(), trains_.begin() + static_cast<std::ptrdiff_t>(done));
      split();
      prepare(0);
      done = 0;
      continue;
    }
    // This one cannot be sent (too long for the path, unreachable); who needs it asks again.
    result.failed += trains_[done].count;
    done++;
    tries = 0;
  }
  trains_.clear();
  used_ = packets_ = 0;
  return result;
}

Status report_errors(const Fd& fd) {
  return option(fd, IPPROTO_IP, IP_RECVERR, int{1}, "IP_RECVERR");
}

uint64_t unsent_bytes(const Fd& fd) {
  int bytes = 0;
  return ::ioctl(fd.get(), SIOCOUTQ, &bytes) == 0 ? static_cast<uint64_t>(bytes) : 0;
}

uint64_t receive_room(const Fd& fd) {
  uint32_t info[SK_MEMINFO_VARS] = {};
  socklen_t size = sizeof info;
  if (::getsockopt(fd.get(), SOL_SOCKET, SO_MEMINFO, info, &size) != 0) return 0;
  const uint32_t all = info[SK_MEMINFO_RCVBUF];
  if (all < 2 * kWindowBytes) return 0;
  // The kernel counts its overhead: up to three times as much as the packets have bytes.
  return (all - std::min(all, info[SK_MEMINFO_RMEM_ALLOC])) / 4;
}

size_t drain_errors(const Fd& fd) {
  const int error = errno;
  size_t n = 0;
  for (; n < kErrorsAtOnce; n++) {
    char control[256];
    msghdr header = {};
    header.msg_control = control;
    header.msg_controllen = sizeof control;
    if (::recvmsg(fd.get(), &header, MSG_ERRQUEUE | MSG_DONTWAIT) < 0) break;
  }
  errno = error;
  return n;
}

}  // namespace sf::mcdist
