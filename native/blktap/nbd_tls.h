// TLS of NBD connections, by GnuTLS (which does not collide with the OpenSSL inside Node).
//
// States of a session: handshaking -> open -> ended. Mutual by default: the client shows a
// certificate that the folder's CA signed for TLS clients, or knows a pre-shared key.
// Invariants:
//  - Credentials are read for every new connection, so that renewed certificates, revocations and
//    keys count from the next connection on; those that stand go on.
//  - GnuTLS must be given the rest of a record that did not fit the socket before anything else:
//    `unsent_` counts it, and send() answers for its bytes when they have gone.
// Left out on purpose: renegotiation, resumption, kernel TLS, anonymous TLS; io_uring (the
// connection's poll engine serves TLS).
#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "common/status.h"

struct gnutls_session_int;
struct gnutls_certificate_credentials_st;
struct gnutls_psk_server_credentials_st;

namespace sf::nbd {

struct TlsConfig {
  // ca-cert.pem, server-cert.pem, server-key.pem and, if there, ca-crl.pem: the names that QEMU's
  // tls-creds-x509 and nbdkit use. Empty: no certificates.
  std::string directory;
  std::string psk_file;     // lines `user:hex key`, as psktool writes; empty: no pre-shared keys
  bool verify_peer = true;  // with certificates: a client must show one
};

class TlsCredentials {
 public:
  // E_CONFIG with the file's name if one is missing, unreadable or no credential.
  static Status Load(const TlsConfig& config, std::unique_ptr<TlsCredentials>* out);
  ~TlsCredentials();

 private:
  friend class TlsSession;
  TlsCredentials() = default;
  gnutls_certificate_credentials_st* certificates_ = nullptr;
  gnutls_psk_server_credentials_st* keys_ = nullptr;
  bool verify_peer_ = true;
};

// Over a socket it does not own; the credentials must outlive it.
class TlsSession {
 public:
  static std::unique_ptr<TlsSession> Make(int socket, const TlsCredentials& credentials,
                                          std::string* error);
  ~TlsSession();
  // 0: done; POLLIN or POLLOUT: call again after that; -1: refused, `error` says why.
  int handshake(std::string* error);
  // As of Stream.
  ssize_t receive(void* out, size_t bytes);
  ssize_t send(const iovec* parts, size_t count);
  bool pending() const;
  void goodbye();

 private:
  TlsSession() = default;
  ssize_t sent(ssize_t result, size_t bytes);
  gnutls_session_int* session_ = nullptr;
  std::vector<uint8_t> gathered_;  // small replies, put together into one record
  size_t unsent_ = 0;              // bytes of the caller's that GnuTLS holds and has not sent
};

}  // namespace sf::nbd
