#include "blktap/nbd_stream.h"

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <time.h>

namespace sf::nbd {

uint64_t now_ms() {
  timespec ts = {};
  ::clock_gettime(CLOCK_MONOTONIC, &ts);
  return static_cast<uint64_t>(ts.tv_sec) * 1000 + static_cast<uint64_t>(ts.tv_nsec) / 1000000;
}

ssize_t Stream::receive(void* out, size_t bytes) {
  if (tls_ != nullptr) return tls_->receive(out, bytes);
  return ::recv(socket_, out, bytes, MSG_DONTWAIT);
}

ssize_t Stream::send(const iovec* parts, size_t count) {
  if (tls_ != nullptr) return tls_->send(parts, count);
  msghdr message = {};
  message.msg_iov = const_cast<iovec*>(parts);
  message.msg_iovlen = count;
  return ::sendmsg(socket_, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
}

bool Stream::wait(short events, uint64_t deadline_ms) {
  for (;;) {
    const uint64_t now = now_ms();
    if (now >= deadline_ms) return false;
    pollfd fd = {socket_, events, 0};
    const int n = ::poll(&fd, 1, static_cast<int>(deadline_ms - now));
    if (n > 0) return true;
    if (n < 0 && errno != EINTR) return false;
  }
}

bool Stream::receive_all(void* out, size_t bytes, uint64_t deadline_ms) {
  auto* p = static_cast<uint8_t*>(out);
  while (bytes > 0) {
    const ssize_t n = receive(p, bytes);
    if (n > 0) {
      p += n;
      bytes -= static_cast<size_t>(n);
    } else if (n == 0 || (errno != EAGAIN && errno != EINTR) || !wait(POLLIN, deadline_ms)) {
      return false;
    }
  }
  return true;
}

bool Stream::send_all(const void* data, size_t bytes, uint64_t deadline_ms) {
  auto* p = static_cast<uint8_t*>(const_cast<void*>(data));
  while (bytes > 0) {
    const iovec part = {p, bytes};
    const ssize_t n = send(&part, 1);
    if (n >= 0) {
      p += n;
      bytes -= static_cast<size_t>(n);
    } else if ((errno != EAGAIN && errno != EINTR) || !wait(POLLOUT, deadline_ms)) {
      return false;
    }
  }
  return true;
}

bool Stream::start_tls(const TlsCredentials& credentials, uint64_t deadline_ms,
                       std::string* error) {
  auto session = TlsSession::Make(socket_, credentials, error);
  if (session == nullptr) return false;
  for (;;) {
    const int events = session->handshake(error);
    if (events < 0) return false;
    if (events == 0) break;
    if (!wait(static_cast<short>(events), deadline_ms)) {
      *error = "the client did not finish its TLS handshake in time";
      return false;
    }
  }
  tls_ = std::move(session);
  return true;
}

void Stream::end() {
  if (tls_ != nullptr) tls_->goodbye();
}

}  // namespace sf::nbd
