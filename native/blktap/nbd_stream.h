// The bytes of one NBD client: a plain socket, or TLS over one once STARTTLS was done.
//
// receive() and send() never wait; they answer as recv(2) and send(2) with MSG_DONTWAIT do: -1 with
// errno (EAGAIN: wait() for it), 0 from receive() at the end of the stream.
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "blktap/nbd_tls.h"

namespace sf::nbd {

uint64_t now_ms();  // monotonic

class Stream {
 public:
  explicit Stream(int socket) : socket_(socket) {}

  ssize_t receive(void* out, size_t bytes);
  ssize_t send(const iovec* parts, size_t count);
  // Bytes are here already that poll() does not tell of.
  bool pending() const { return tls_ != nullptr && tls_->pending(); }
  bool encrypted() const { return tls_ != nullptr; }
  int socket() const { return socket_; }

  // Whole transfers, for the option phase. False when the peer is gone or the deadline has passed.
  bool receive_all(void* out, size_t bytes, uint64_t deadline_ms);
  bool send_all(const void* data, size_t bytes, uint64_t deadline_ms);
  // Nothing may have been received ahead of the client's hello; the caller has seen to that by
  // receiving option by option. `peer` becomes what the client's certificate or key calls it.
  bool start_tls(const TlsCredentials& credentials, uint64_t deadline_ms, std::string* error);
  void end();  // says goodbye, if the peer still takes it

 private:
  bool wait(short events, uint64_t deadline_ms);

  const int socket_;
  std::unique_ptr<TlsSession> tls_;
};

}  // namespace sf::nbd
