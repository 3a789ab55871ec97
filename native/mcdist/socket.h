// UDP sockets and batches of datagrams. No packet of ours is ever cut by IP: "don't fragment" is
// set, and what does not fit the path is an error that is counted.
#pragma once

#include <netinet/in.h>
#include <sys/socket.h>

#include <cstdint>
#include <string>
#include <vector>

#include "common/fd.h"
#include "common/status.h"
#include "mcdist/policy.h"
#include "mcdist/wire.h"

namespace sf::mcdist {

TimeNs now_ns();  // CLOCK_MONOTONIC

Status parse_address(const std::string& address, int64_t port, sockaddr_in* out);
Status parse_group(const std::string& group, int64_t port, sockaddr_in* out);  // 224.0.0.0/4 only

// A socket bound to `address`; sends multicast out of the interface that has `interface_address`,
// and to members on this host too.
Status open_unicast(const sockaddr_in& address, const in_addr& interface_address, int ttl, Fd* out);
// A socket bound to the group's address and port, member on the interface that has that address.
// Other groups' packets do not reach it even if other sockets of this host joined them.
Status open_member(const sockaddr_in& group, const in_addr& interface_address, Fd* out);
uint16_t bound_port(const Fd& fd);

// Lets the kernel hand over several datagrams of one sender at once. Best effort: without it they
// come one by one.
void coalesce(const Fd& fd);

class ReceiveBatch {
 public:
  static constexpr size_t kPackets = 64;
  // For sockets that coalesce(): fewer, longer messages, of up to kCoalescedBytes each.
  explicit ReceiveBatch(bool coalesced = false);
  // Number of datagrams received without waiting. `full`: more may be there.
  size_t receive(const Fd& fd, bool* full = nullptr);
  const uint8_t* data(size_t i) const { return packets_[i].data; }
  // 0 for a datagram that was cut short: too long to be one of ours.
  size_t size(size_t i) const { return packets_[i].size; }
  const sockaddr_in& from(size_t i) const { return from_[packets_[i].message]; }

 private:
  static constexpr size_t kCoalescedBytes = 65536;
  static constexpr size_t kCoalesced = 32;
  static constexpr size_t kControlBytes = CMSG_SPACE(sizeof(int));
  struct Packet {
    const uint8_t* data;
    size_t size;
    size_t message;
  };
  const size_t message_bytes_;
  const size_t stride_;  // between messages
  const size_t count_;
  std::vector<uint8_t> buffer_;
  std::vector<uint8_t> control_;
  std::vector<sockaddr_in> from_;
  std::vector<iovec> vectors_;
  std::vector<mmsghdr> messages_;
  std::vector<Packet> packets_;
};

// Datagrams gathered and sent with as few system calls as possible. Those of one size to one
// destination, one after the other, are one send that the kernel (or the card) cuts (UDP_SEGMENT);
// if it refuses that, each goes alone.
class SendBatch {
 public:
  static constexpr size_t kPackets = 64;
  struct Result {
    size_t failed = 0;  // datagrams not sent: too long for the path, unreachable, no room for long
    size_t waits = 0;   // times the socket or the local link had no room
  };
  // `datagram_bytes`: the longest datagram, at most kMaxMtuBytes.
  explicit SendBatch(size_t datagram_bytes);
  bool full() const { return packets_ == kPackets; }
  bool empty() const { return packets_ == 0; }
  // Where to write the next datagram; then commit(). Not when full.
  uint8_t* next() { return buffer_.data() + used_; }
  void commit(size_t size, const sockaddr_in& to);
  // Sends all, waiting a bounded time for room.
  Result flush(const Fd& fd);
  bool segments() const { return segments_; }

 private:
  struct Train {  // datagrams of `size` bytes each but the last, which may be shorter
    sockaddr_in to;
    size_t at, size, bytes, count;
  };
  struct alignas(cmsghdr) Control {
    char bytes[CMSG_SPACE(sizeof(uint16_t))];
  };
  void prepare(size_t first);
  void split();
  const size_t datagram_bytes_;
  std::vector<uint8_t> buffer_;
  std::vector<Train> trains_;
  std::vector<iovec> vectors_;
  std::vector<mmsghdr> messages_;
  std::vector<Control> controls_;
  size_t used_ = 0;
  size_t packets_ = 0;
  bool segments_ = true;
};

// From now on sends fail if the local link's queue is full, rather than drop in silence; and what
// the network says of packets sent has to be read away with drain_errors().
Status report_errors(const Fd& fd);
// Reads away what the network reported about packets sent (IP_RECVERR): nobody else does, and the
// socket would be readable for ever. Bounded; returns how many there were.
size_t drain_errors(const Fd& fd);
// Bytes sent that have not left the host's queues yet, with the system's own overhead.
uint64_t unsent_bytes(const Fd& fd);

// Bytes of packets that still fit the receive buffer; 0: it is too small to be told of.
uint64_t receive_room(const Fd& fd);

}  // namespace sf::mcdist
