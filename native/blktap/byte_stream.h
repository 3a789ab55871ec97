// The bytes of one connection, whatever carries them: a socket, or TLS on one.
//
// The option phase knows nothing else of its peer, and so can change from one to the other in
// between (NBD_OPT_STARTTLS).
#pragma once

#include <poll.h>
#include <sys/socket.h>

#include <cstddef>

namespace sf::nbd {

// receive() and send() do not wait: -1 with EAGAIN, and then waits_for() says what to poll fd()
// for.
class ByteStream {
 public:
  virtual ~ByteStream() = default;
  virtual ssize_t receive(void* out, size_t bytes) = 0;  // 0: the peer has ended it
  virtual ssize_t send(const void* data, size_t bytes) = 0;
  virtual int fd() const = 0;
  // POLLIN or POLLOUT, after EAGAIN of a receive (`receiving`) or of a send.
  virtual short waits_for(bool receiving) const = 0;
};

class SocketStream final : public ByteStream {
 public:
  explicit SocketStream(int socket) : socket_(socket) {}  // not owned
  ssize_t receive(void* out, size_t bytes) override {
    return ::recv(socket_, out, bytes, MSG_DONTWAIT);
  }
  ssize_t send(const void* data, size_t bytes) override {
    return ::send(socket_, data, bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
  }
  int fd() const override { return socket_; }
  short waits_for(bool receiving) const override { return receiving ? POLLIN : POLLOUT; }

 private:
  int socket_;
};

}  // namespace sf::nbd
