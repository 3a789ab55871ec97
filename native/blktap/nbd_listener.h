// Where clients come in: a Unix socket, or TCP.
//
// TCP is for other hosts, and takes TLS; without it only loopback addresses are allowed, and only
// when that was asked for (any user of the host could connect).
#pragma once

#include <sys/types.h>

#include <memory>
#include <optional>
#include <string>

#include "blktap/nbd_tls_gate.h"
#include "common/fd.h"

namespace sf::nbd {

struct UnixPlace {
  std::string path;
  uid_t uid = static_cast<uid_t>(-1);  // -1: as created
  gid_t gid = static_cast<gid_t>(-1);
  mode_t mode = 0600;
};

struct TcpPlace {
  std::string host;   // an IPv4 or IPv6 address, no name
  uint16_t port = 0;  // 0: one that is free
  std::optional<TlsConfig> tls;
  bool plaintext = false;
};

class Listener {
 public:
  // The socket appears at its path complete, with its owner and mode. A socket left there by a dead
  // process is replaced; one that somebody listens on is E_IN_USE, any other file E_EXISTS.
  static Status Unix(const UnixPlace& place, std::unique_ptr<Listener>* out);
  // E_ARGUMENT, E_CONFIG (TLS), E_IN_USE, E_IO.
  static Status Tcp(TcpPlace place, std::unique_ptr<Listener>* out);
  ~Listener();  // the socket's file goes too, if it is still ours
  Listener(const Listener&) = delete;
  Listener& operator=(const Listener&) = delete;

  int fd() const { return fd_.get(); }
  void close() { fd_.reset(); }  // nobody can connect any more
  Fd accept();                   // invalid, with errno, if there is none
  TlsGate* gate() const { return gate_.get(); }
  uint16_t port() const { return port_; }  // 0: not TCP

 private:
  Listener() = default;
  Status listen_unix(const UnixPlace& place, const std::string& temporary);

  Fd fd_;
  std::string path_;  // of a Unix socket
  dev_t device_ = 0;
  ino_t inode_ = 0;
  uint16_t port_ = 0;
  std::unique_ptr<TlsGate> gate_;
};

}  // namespace sf::nbd
