#include "blktap/nbd_tls.h"

#include <errno.h>
#include <fcntl.h>
#include <gnutls/gnutls.h>
#include <gnutls/x509.h>
#include <poll.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

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

std::unique_ptr<TlsSession> TlsSession::Make(int socket, const TlsCredentials& credentials,
                                             std::string* error) {
  std::unique_ptr<TlsSession> made(new TlsSession());
  auto failed = [&](int code) {
    *error = std::string("TLS cannot be set up: ") + gnutls_strerror(code);
    return nullptr;
  };
  int code = gnutls_init(&made->session_, GNUTLS_SERVER | GNUTLS_NONBLOCK | GNUTLS_NO_SIGNAL);
  if (code < 0) {
    made->session_ = nullptr;
    return failed(code);
  }
  code = gnutls_priority_set_direct(
      made->session_, credentials.keys_ != nullptr ? kKeyPriority : kPriority, nullptr);
  if (code < 0) return failed(code);
  if (credentials.certificates_ != nullptr) {
    code =
        gnutls_credentials_set(made->session_, GNUTLS_CRD_CERTIFICATE, credentials.certificates_);
    if (code < 0) return failed(code);
    if (credentials.verify_peer_) {
      static gnutls_typed_vdata_st purpose = {
          GNUTLS_DT_KEY_PURPOSE_OID,
          reinterpret_cast<unsigned char*>(const_cast<char*>(GNUTLS_KP_TLS_WWW_CLIENT)), 0};
      gnutls_certificate_server_set_request(made->session_, GNUTLS_CERT_REQUIRE);
      gnutls_session_set_verify_cert2(made->session_, &purpose, 1, 0);
    }
  }
  if (credentials.keys_ != nullptr) {
    code = gnutls_credentials_set(made->session_, GNUTLS_CRD_PSK, credentials.keys_);
    if (code < 0) return failed(code);
  }
  const int flags = ::fcntl(socket, F_GETFL);
  if (flags < 0 || ::fcntl(socket, F_SETFL, flags | O_NONBLOCK) < 0) {
    *error = std::string("TLS cannot be set up: ") + std::strerror(errno);
    return nullptr;
  }
  gnutls_transport_set_int(made->session_, socket);
  gnutls_handshake_set_timeout(made->session_, 0);  // the caller has a deadline
  return made;
}

TlsSession::~TlsSession() {
  if (session_ != nullptr) gnutls_deinit(session_);
}

int TlsSession::handshake(std::string* error) {
  for (;;) {
    const int code = gnutls_handshake(session_);
    if (code == GNUTLS_E_SUCCESS) return 0;
    if (code == GNUTLS_E_AGAIN) {
      return gnutls_record_get_direction(session_) == 0 ? POLLIN : POLLOUT;
    }
    if (code == GNUTLS_E_INTERRUPTED || (gnutls_error_is_fatal(code) == 0 && code != 0)) continue;
    *error = gnutls_strerror(code);
    if (code == GNUTLS_E_CERTIFICATE_VERIFICATION_ERROR) {
      gnutls_datum_t text = {};
      const auto status = gnutls_session_get_verify_cert_status(session_);
      if (gnutls_certificate_verification_status_print(status, GNUTLS_CRT_X509, &text, 0) >= 0) {
        *error += std::string(" ") + reinterpret_cast<char*>(text.data);
        gnutls_free(text.data);
      }
    }
    // The client learns why; if it does not read, it is not waited for.
    gnutls_alert_send_appropriate(session_, code);
    return -1;
  }
}

ssize_t TlsSession::receive(void* out, size_t bytes) {
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

ssize_t TlsSession::sent(ssize_t result, size_t bytes) {
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

ssize_t TlsSession::send(const iovec* parts, size_t count) {
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

bool TlsSession::pending() const { return gnutls_record_check_pending(session_) > 0; }

void TlsSession::goodbye() { gnutls_bye(session_, GNUTLS_SHUT_WR); }

}  // namespace sf::nbd
