// The bytes of one connection, whatever carries them: a socket, or TLS on one (nbd_tls.h).
//
// Handshake and Connection know nothing else of their peer, and so can change from one to the
// other in between (NBD_OPT_STARTTLS).
#pragma once

#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <cstddef>
#include <cstdint>

namespace sf::nbd {

uint64_t now_ms();  // monotonic
uint64_t now_ns();

// False once the deadline has passed, or if the descriptor cannot be waited for.
bool wait_until(int fd, short events, uint64_t deadline_ms);

// receive() and send() do not wait: -1 with EAGAIN, and then waits_for() says what to poll fd()
// for. Bytes may be here already that poll() does not tell of: receive until EAGAIN before waiting.
class ByteStream {
 public:
  virtual ~ByteStream() = default;
  virtual ssize_t receive(void* out, size_t bytes) = 0;  // 0: the peer has ended it
  // Some of the parts' bytes. What was not answered for stands at the head of the next call's.
  virtual ssize_t send(const iovec* parts, size_t count) = 0;
  virtual int fd() const = 0;
  // POLLIN or POLLOUT, after EAGAIN of a receive (`receiving`) or of a send.
  virtual short waits_for(bool receiving) const = 0;
  virtual void goodbye() {}  // if the peer takes it at once
};

class SocketStream final : public ByteStream {
 public:
  explicit SocketStream(int socket) : socket_(socket) {}  // not owned
  ssize_t receive(void* out, size_t bytes) override {
    return ::recv(socket_, out, bytes, MSG_DONTWAIT);
  }
  ssize_t send(const iovec* parts, size_t count) override {
    msghdr message = {};
    message.msg_iov = const_cast<iovec*>(parts);
    message.msg_iovlen = count;
    return ::sendmsg(socket_, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
  }
  int fd() const override { return socket_; }
  short waits_for(bool receiving) const override { return receiving ? POLLIN : POLLOUT; }

 private:
  int socket_;
};

}  // namespace sf::nbd
