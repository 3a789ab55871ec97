#include "blktap/nbd_tls.h"

#include <errno.h>
#include <fcntl.h>
#include <gnutls/gnutls.h>
#include <gnutls/x509.h>
#include <unistd.h>

#include <algorithm>

namespace sf::nbd {
namespace {

constexpr size_t kRecordBytes = 16 * 1024;
constexpr char kPriority[] = "NORMAL:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2";
constexpr char kKeyPriority[] =
    "NORMAL:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2:+ECDHE-PSK:+DHE-PSK:+PSK";

Status bad(const std::string& what, int code) {
  return Status::Error("E_CONFIG", "TLS: " + what + ": " + gnutls_strerror(code));
}

bool readable(const std::string& path) { return ::access(path.c_str(), R_OK) == 0; }

}  // namespace

Status TlsCredentials::Load(const TlsConfig& config, std::unique_ptr<TlsCredentials>* out) {
  if (config.directory.empty() && config.psk_file.empty()) {
    return Status::Error("E_CONFIG", "TLS needs a folder of certificates or a file of keys");
  }
  std::unique_ptr<TlsCredentials> made(new TlsCredentials());
  made->verify_peer_ = config.verify_peer;
  if (!config.directory.empty()) {
    const std::string stem = config.directory + "/";
    for (const char* name : {"ca-cert.pem", "server-cert.pem", "server-key.pem"}) {
      if (!readable(stem + name)) {
        return Status::Error("E_CONFIG", "TLS: cannot read " + stem + name);
      }
    }
    int code = gnutls_certificate_allocate_credentials(&made->certificates_);
    if (code < 0) return bad("out of memory", code);
    code = gnutls_certificate_set_x509_trust_file(
        made->certificates_, (stem + "ca-cert.pem").c_str(), GNUTLS_X509_FMT_PEM);
    if (code < 0) return bad(stem + "ca-cert.pem", code);
    // A list that is there and cannot be used must not count as an empty one.
    if (::access((stem + "ca-crl.pem").c_str(), F_OK) == 0) {
      code = gnutls_certificate_set_x509_crl_file(
          made->certificates_, (stem + "ca-crl.pem").c_str(), GNUTLS_X509_FMT_PEM);
      if (code < 0) return bad(stem + "ca-crl.pem", code);
    }
    code = gnutls_certificate_set_x509_key_file(
        made->certificates_, (stem + "server-cert.pem").c_str(), (stem + "server-key.pem").c_str(),
        GNUTLS_X509_FMT_PEM);
    if (code < 0) return bad(stem + "server-cert.pem and server-key.pem", code);
  }
  if (!config.psk_file.empty()) {
    if (!readable(config.psk_file)) {
      return Status::Error("E_CONFIG", "TLS: cannot read " + config.psk_file);
    }
    int code = gnutls_psk_allocate_server_credentials(&made->keys_);
    if (code < 0) return bad("out of memory", code);
    code = gnutls_psk_set_server_credentials_file(made->keys_, config.psk_file.c_str());
    if (code < 0) return bad(config.psk_file, code);
  }
  *out = std::move(made);
  return Status::Ok();
}

TlsCredentials::~TlsCredentials() {
  if (certificates_ != nullptr) gnutls_certificate_free_credentials(certificates_);
  if (keys_ != nullptr) gnutls_psk_free_server_credentials(keys_);
}

Status TlsStream::Accept(int socket, std::unique_ptr<TlsCredentials> credentials,
                         uint64_t deadline_ms, std::unique_ptr<TlsStream>* out) {
  std::unique_ptr<TlsStream> made(new TlsStream(socket, std::move(credentials)));
  Status status = made->set_up();
  if (status.ok()) status = made->handshake(deadline_ms);
  if (status.ok()) *out = std::move(made);
  return status;
}

Status TlsStream::set_up() {
  auto failed = [](int code) {
    return Status::Error("E_IO", std::string("TLS cannot be set up: ") + gnutls_strerror(code));
  };
  int code = gnutls_init(&session_,
                         GNUTLS_SERVER | GNUTLS_NONBLOCK | GNUTLS_NO_SIGNAL | GNUTLS_NO_TICKETS);
  if (code < 0) {
    session_ = nullptr;
    return failed(code);
  }
  const bool keys = credentials_->keys_ != nullptr;
  code = gnutls_priority_set_direct(session_, keys ? kKeyPriority : kPriority, nullptr);
  if (code < 0) return failed(code);
  if (credentials_->certificates_ != nullptr) {
    code = gnutls_credentials_set(session_, GNUTLS_CRD_CERTIFICATE, credentials_->certificates_);
    if (code < 0) return failed(code);
    if (credentials_->verify_peer_) {
      static gnutls_typed_vdata_st purpose = {
          // the session keeps the pointer
          GNUTLS_DT_KEY_PURPOSE_OID,
          reinterpret_cast<unsigned char*>(const_cast<char*>(GNUTLS_KP_TLS_WWW_CLIENT)), 0};
      gnutls_certificate_server_set_request(session_, GNUTLS_CERT_REQUIRE);
      gnutls_session_set_verify_cert2(session_, &purpose, 1, 0);
    }
  }
  if (keys) {
    code = gnutls_credentials_set(session_, GNUTLS_CRD_PSK, credentials_->keys_);
    if (code < 0) return failed(code);
  }
  const int flags = ::fcntl(socket_, F_GETFL);
  if (flags < 0 || ::fcntl(socket_, F_SETFL, flags | O_NONBLOCK) < 0) {
    return Status::Errno("E_IO", "make a socket non-blocking");
  }
  gnutls_transport_set_int(session_, socket_);
  gnutls_handshake_set_timeout(session_, 0);  // there is a deadline
  return Status::Ok();
}

TlsStream::~TlsStream() {
  if (session_ != nullptr) gnutls_deinit(session_);
}

Status TlsStream::handshake(uint64_t deadline_ms) {
  int code = gnutls_handshake(session_);
  // What is not fatal may come without end: the deadline holds for that too.
  while (code != GNUTLS_E_SUCCESS && gnutls_error_is_fatal(code) == 0) {
    const bool again = code == GNUTLS_E_AGAIN;
    const short events = gnutls_record_get_direction(session_) == 0 ? POLLIN : POLLOUT;
    if (again ? !wait_until(socket_, events, deadline_ms) : now_ms() >= deadline_ms) {
      return Status::Error("E_TIMEOUT", "the TLS handshake was not finished in time");
    }
    code = gnutls_handshake(session_);
  }
  if (code == GNUTLS_E_SUCCESS) return Status::Ok();
  std::string why = gnutls_strerror(code);
  if (code == GNUTLS_E_CERTIFICATE_VERIFICATION_ERROR) {
    gnutls_datum_t text = {};
    const auto status = gnutls_session_get_verify_cert_status(session_);
    if (gnutls_certificate_verification_status_print(status, GNUTLS_CRT_X509, &text, 0) >= 0) {
      why += std::string(" ") + reinterpret_cast<char*>(text.data);
      gnutls_free(text.data);
    }
  }
  // The client learns why; if it does not read, it is not waited for.
  gnutls_alert_send_appropriate(session_, code);
  return Status::Error("E_PEER_AUTH", why);
}

ssize_t TlsStream::receive(void* out, size_t bytes) {
  for (;;) {
    const ssize_t n = gnutls_record_recv(session_, out, bytes);
    if (n >= 0) return n;
    if (n == GNUTLS_E_INTERRUPTED) continue;
    // A connection that is cut ends like one that is closed: a request is carried out only when
    // all of it has come.
    if (n == GNUTLS_E_PREMATURE_TERMINATION) return 0;
    errno = n == GNUTLS_E_AGAIN ? EAGAIN : ECONNRESET;
    return -1;
  }
}

ssize_t TlsStream::sent(ssize_t result, size_t bytes) {
  if (result >= 0) {
    unsent_ = 0;
    return result;
  }
  if (result == GNUTLS_E_AGAIN || result == GNUTLS_E_INTERRUPTED) {
    unsent_ = bytes;
    errno = EAGAIN;
  } else {
    errno = ECONNRESET;
  }
  return -1;
}

ssize_t TlsStream::send(const iovec* parts, size_t count) {
  // The same bytes still stand at the head of `parts`: the caller keeps what was not answered for.
  if (unsent_ > 0) return sent(gnutls_record_send(session_, nullptr, 0), unsent_);
  while (count > 0 && parts->iov_len == 0) {
    parts++;
    count--;
  }
  if (count == 0) return 0;
  if (parts->iov_len >= kRecordBytes || count == 1) {
    const size_t n = std::min(parts->iov_len, kRecordBytes);
    return sent(gnutls_record_send(session_, parts->iov_base, n), n);
  }
  gathered_.clear();
  for (; count > 0 && gathered_.size() < kRecordBytes; parts++, count--) {
    const auto* from = static_cast<const uint8_t*>(parts->iov_base);
    gathered_.insert(gathered_.end(), from,
                     from + std::min(parts->iov_len, kRecordBytes - gathered_.size()));
  }
  return sent(gnutls_record_send(session_, gathered_.data(), gathered_.size()), gathered_.size());
}

void TlsStream::goodbye() { gnutls_bye(session_, GNUTLS_SHUT_WR); }

}  // namespace sf::nbd
