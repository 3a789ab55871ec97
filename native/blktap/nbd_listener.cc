#include "blktap/nbd_listener.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <cstring>

namespace sf::nbd {
namespace {

constexpr int kBacklog = 128;
constexpr int kSocketBuffer = 1 << 20;
constexpr int kSocketFlags = SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK;
// A peer that is gone without a word is noticed within two minutes, silent or not.
constexpr int kIdleS = 60, kProbeS = 10, kProbes = 6, kUnackedMs = 120'000;

Status socket_address(const std::string& path, sockaddr_un* out) {
  *out = {};
  out->sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof out->sun_path) {
    return Status::Error("E_ARGUMENT", "socket path " + path + " is empty or longer than " +
                                           std::to_string(sizeof out->sun_path - 1) + " bytes");
  }
  std::memcpy(out->sun_path, path.data(), path.size());
  return Status::Ok();
}

// E_IN_USE if somebody listens there, E_EXISTS if it is no socket.
Status check_free(const std::string& path) {
  struct stat st = {};
  if (::lstat(path.c_str(), &st) != 0) {
    return errno == ENOENT ? Status::Ok() : Status::Errno("E_IO", "stat " + path);
  }
  if (!S_ISSOCK(st.st_mode)) return Status::Error("E_EXISTS", path + " exists, and is no socket");
  sockaddr_un address;
  Status status = socket_address(path, &address);
  if (!status.ok()) return status;
  Fd probe(::socket(AF_UNIX, kSocketFlags, 0));
  if (!probe.valid()) return Status::Errno("E_IO", "make a socket");
  const auto* to = reinterpret_cast<const sockaddr*>(&address);
  if (::connect(probe.get(), to, sizeof address) == 0 || errno == EAGAIN) {
    return Status::Error("E_IN_USE", "another server listens on " + path);
  }
  return Status::Ok();
}

union Address {
  sockaddr any;
  sockaddr_in v4;
  sockaddr_in6 v6;
};

Status tcp_address(const TcpPlace& place, Address* out) {
  addrinfo hints = {};
  hints.ai_flags = AI_NUMERICHOST | AI_NUMERICSERV | AI_PASSIVE;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  const std::string port = std::to_string(place.port);
  if (place.host.empty() || ::getaddrinfo(place.host.c_str(), port.c_str(), &hints, &found) != 0 ||
      found->ai_addrlen > sizeof *out) {
    if (found != nullptr) ::freeaddrinfo(found);
    return Status::Error("E_ARGUMENT", "\"" + place.host + "\" is no IPv4 or IPv6 address");
  }
  std::memcpy(out, found->ai_addr, found->ai_addrlen);
  ::freeaddrinfo(found);
  return Status::Ok();
}

bool is_loopback(const Address& address) {
  if (address.any.sa_family == AF_INET) return ntohl(address.v4.sin_addr.s_addr) >> 24 == 127;
  return IN6_IS_ADDR_LOOPBACK(&address.v6.sin6_addr);
}

void set(int socket, int level, int name, int value) {
  ::setsockopt(socket, level, name, &value, sizeof value);  // a refusal costs speed, or patience
}

}  // namespace

Status Listener::Unix(const UnixPlace& place, std::unique_ptr<Listener>* out) {
  sockaddr_un address;
  Status status = socket_address(place.path, &address);
  if (status.ok()) status = check_free(place.path);
  if (!status.ok()) return status;
  // Bound under a short name of its own in the same folder, then renamed: no client ever meets a
  // socket with the wrong owner or one that does not listen yet.
  const size_t slash = place.path.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : place.path.substr(0, slash);
  static std::atomic<unsigned> serial{0};
  const std::string temporary =
      folder + "/." + std::to_string(::getpid()) + "-" + std::to_string(serial++);
  std::unique_ptr<Listener> made(new Listener());
  status = made->listen_unix(place, temporary);
  if (status.ok()) *out = std::move(made);
  return status;
}

Status Listener::listen_unix(const UnixPlace& place, const std::string& temporary) {
  sockaddr_un address;
  Status status = socket_address(temporary, &address);
  if (!status.ok()) return status;
  fd_ = Fd(::socket(AF_UNIX, kSocketFlags, 0));
  if (!fd_.valid()) return Status::Errno("E_IO", "make a socket");
  ::unlink(temporary.c_str());
  const auto* to = reinterpret_cast<const sockaddr*>(&address);
  if (::bind(fd_.get(), to, sizeof address) != 0) {
    return Status::Errno("E_IO", "bind " + temporary);
  }
  struct stat st = {};
  if (::chmod(temporary.c_str(), place.mode) != 0 ||
      ::chown(temporary.c_str(), place.uid, place.gid) != 0 || ::listen(fd_.get(), kBacklog) != 0 ||
      ::lstat(temporary.c_str(), &st) != 0 ||
      ::rename(temporary.c_str(), place.path.c_str()) != 0) {
    status = Status::Errno("E_IO", "set up socket " + place.path);
    ::unlink(temporary.c_str());
    return status;
  }
  path_ = place.path;
  device_ = st.st_dev;
  inode_ = st.st_ino;
  return Status::Ok();
}

Status Listener::Tcp(TcpPlace place, std::unique_ptr<Listener>* out) {
  const std::string where = place.host + " port " + std::to_string(place.port);
  Address address = {};
  Status status = tcp_address(place, &address);
  if (!status.ok()) return status;
  if (place.tls.has_value() == place.plaintext) {
    return Status::Error("E_ARGUMENT",
                         "NBD on " + where + " needs TLS, or plaintext said, not both");
  }
  if (place.plaintext && !is_loopback(address)) {
    return Status::Error("E_ARGUMENT", "NBD without TLS is for loopback, not for " + where);
  }
  std::unique_ptr<Listener> made(new Listener());
  if (place.tls.has_value()) {
    status = TlsGate::Make(std::move(*place.tls), &made->gate_);
    if (!status.ok()) return status;
  }
  made->fd_ = Fd(::socket(address.any.sa_family, kSocketFlags, 0));
  if (!made->fd_.valid()) return Status::Errno("E_IO", "make a socket");
  set(made->fd_.get(), SOL_SOCKET, SO_REUSEADDR, 1);
  const socklen_t bytes = address.any.sa_family == AF_INET ? sizeof address.v4 : sizeof address.v6;
  if (::bind(made->fd_.get(), &address.any, bytes) != 0 ||
      ::listen(made->fd_.get(), kBacklog) != 0) {
    return Status::Errno(errno == EADDRINUSE ? "E_IN_USE" : "E_IO", "listen on " + where);
  }
  socklen_t room = sizeof address;
  if (::getsockname(made->fd_.get(), &address.any, &room) != 0) {
    return Status::Errno("E_IO", "listen on " + where);
  }
  // The port is at the same place in both kinds of address.
  made->port_ = ntohs(address.v4.sin_port);
  *out = std::move(made);
  return Status::Ok();
}

Listener::~Listener() {
  // Only our own socket: another process may have taken over the path.
  struct stat st = {};
  if (!path_.empty() && ::lstat(path_.c_str(), &st) == 0 && st.st_dev == device_ &&
      st.st_ino == inode_) {
    ::unlink(path_.c_str());
  }
}

Fd Listener::accept() {
  Fd socket(::accept4(fd_.get(), nullptr, nullptr, SOCK_CLOEXEC));
  if (!socket.valid()) return socket;
  if (port_ == 0) {  // room for a batch of replies
    set(socket.get(), SOL_SOCKET, SO_SNDBUF, kSocketBuffer);
    return socket;
  }
  // TCP finds the size of its buffers by itself.
  set(socket.get(), IPPROTO_TCP, TCP_NODELAY, 1);
  set(socket.get(), SOL_SOCKET, SO_KEEPALIVE, 1);
  set(socket.get(), IPPROTO_TCP, TCP_KEEPIDLE, kIdleS);
  set(socket.get(), IPPROTO_TCP, TCP_KEEPINTVL, kProbeS);
  set(socket.get(), IPPROTO_TCP, TCP_KEEPCNT, kProbes);
  set(socket.get(), IPPROTO_TCP, TCP_USER_TIMEOUT, kUnackedMs);
  return socket;
}

}  // namespace sf::nbd
