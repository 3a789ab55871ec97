#include "blktap/nbd_tls_gate.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <sys/socket.h>

#include <algorithm>

namespace sf::nbd {
namespace {

constexpr uint64_t kLingerMs = 1000;
constexpr size_t kLingerBytes = 64 * 1024;

std::string peer_of(int socket) {
  sockaddr_storage address = {};
  socklen_t bytes = sizeof address;
  char host[NI_MAXHOST] = "", port[NI_MAXSERV] = "";
  auto* to = reinterpret_cast<sockaddr*>(&address);
  if (::getpeername(socket, to, &bytes) != 0 ||
      ::getnameinfo(to, bytes, host, sizeof host, port, sizeof port,
                    NI_NUMERICHOST | NI_NUMERICSERV) != 0) {
    return "a client that is gone";
  }
  return std::string(host) + " port " + port;
}

// A socket closed over bytes not read is reset, and the peer would lose the alert that tells it why
// it was refused. Waits a moment for it to close its own end.
void linger(int socket, uint64_t deadline_ms) {
  if (::shutdown(socket, SHUT_WR) != 0) return;
  deadline_ms = std::min(deadline_ms, now_ms() + kLingerMs);
  uint8_t dropped[4096];
  for (size_t got = 0; got < kLingerBytes;) {
    if (!wait_until(socket, POLLIN, deadline_ms)) return;
    const ssize_t n = ::recv(socket, dropped, sizeof dropped, MSG_DONTWAIT);
    if (n <= 0) return;
    got += static_cast<size_t>(n);
  }
}

}  // namespace

Status TlsGate::Make(TlsConfig config, std::unique_ptr<TlsGate>* out) {
  std::unique_ptr<TlsCredentials> tried;
  Status status = TlsCredentials::Load(config, &tried);
  if (status.ok()) out->reset(new TlsGate(std::move(config)));
  return status;
}

void TlsGate::note(const std::string& what) {
  std::lock_guard lock(mutex_);
  stats_.failed++;
  stats_.last_error = what;
}

std::unique_ptr<TlsCredentials> TlsGate::credentials() {
  std::unique_ptr<TlsCredentials> out;
  const Status status = TlsCredentials::Load(config_, &out);
  if (!status.ok()) note(status.message);
  return out;
}

std::unique_ptr<ByteStream> TlsGate::accept(int socket, std::unique_ptr<TlsCredentials> credentials,
                                            uint64_t deadline_ms) {
  std::unique_ptr<TlsStream> out;
  const Status status = TlsStream::Accept(socket, std::move(credentials), deadline_ms, &out);
  if (status.ok()) {
    std::lock_guard lock(mutex_);
    stats_.accepted++;
    return out;
  }
  note(peer_of(socket) + ": " + status.message);
  linger(socket, deadline_ms);
  return nullptr;
}

TlsGate::Stats TlsGate::stats() {
  std::lock_guard lock(mutex_);
  return stats_;
}

}  // namespace sf::nbd
