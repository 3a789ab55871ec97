// TLS of NBD connections, by GnuTLS (which does not collide with the OpenSSL inside Node).
//
// States of a stream: handshaking -> open. Mutual by default: the client shows a certificate that
// the folder's CA signed for TLS clients, or knows a pre-shared key.
// Invariants:
//  - What came in plain text is never taken for data: options are received byte for byte, so what
//    a peer (or somebody between) sent ahead of the handshake is still in the socket, where GnuTLS
//    finds it to be no TLS record.
//  - GnuTLS holds the rest of a record that did not fit the socket, and must get rid of it before
//    anything else: `unsent_` counts its bytes, and send() answers for them when they have gone.
//  - A cut connection ends like one that is closed (proto.md's hard disconnect): a request is
//    carried out only when all of it has come.
// Left out on purpose: renegotiation and resumption (refused), kernel TLS, anonymous TLS, TLS
// before 1.2; io_uring (the connection's poll engine serves TLS).
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "blktap/byte_stream.h"
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
  friend class TlsStream;
  TlsCredentials() = default;
  gnutls_certificate_credentials_st* certificates_ = nullptr;
  gnutls_psk_server_credentials_st* keys_ = nullptr;
  bool verify_peer_ = true;
};

class TlsStream final : public ByteStream {
 public:
  // The server's side of a handshake on `socket` (not owned, made non-blocking), to its end or the
  // deadline. E_PEER_AUTH, E_TIMEOUT, E_IO.
  static Status Accept(int socket, std::unique_ptr<TlsCredentials> credentials,
                       uint64_t deadline_ms, std::unique_ptr<TlsStream>* out);
  ~TlsStream() override;
  ssize_t receive(void* out, size_t bytes) override;
  ssize_t send(const iovec* parts, size_t count) override;
  int fd() const override { return socket_; }
  short waits_for(bool receiving) const override { return receiving ? POLLIN : POLLOUT; }
  void goodbye() override;

 private:
  TlsStream(int socket, std::unique_ptr<TlsCredentials> credentials)
      : socket_(socket), credentials_(std::move(credentials)) {}
  Status set_up();
  Status handshake(uint64_t deadline_ms);
  ssize_t sent(ssize_t result, size_t bytes);

  const int socket_;
  const std::unique_ptr<TlsCredentials> credentials_;
  gnutls_session_int* session_ = nullptr;
  std::vector<uint8_t> gathered_;  // small replies, put together into one record
  size_t unsent_ = 0;              // bytes of the caller's that GnuTLS holds and has not sent
};

}  // namespace sf::nbd
