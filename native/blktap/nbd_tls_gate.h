// The TLS that a listener demands, and what became of those who tried. Any thread.
//
// Credentials are read for every client, so that renewed certificates, revocations and keys count
// from the next connection on; connections that stand go on. What cannot be read lets nobody in.
#pragma once

#include <memory>
#include <mutex>
#include <string>

#include "blktap/nbd_tls.h"

namespace sf::nbd {

class TlsGate {
 public:
  struct Stats {
    uint64_t accepted = 0;
    uint64_t failed = 0;
    std::string last_error;  // of those that failed, with the client's address
  };

  // E_CONFIG if the credentials cannot be used now.
  static Status Make(TlsConfig config, std::unique_ptr<TlsGate>* out);
  // Null: noted as a failure.
  std::unique_ptr<TlsCredentials> credentials();
  std::unique_ptr<ByteStream> accept(int socket, std::unique_ptr<TlsCredentials> credentials,
                                     uint64_t deadline_ms);
  Stats stats();

 private:
  explicit TlsGate(TlsConfig config) : config_(std::move(config)) {}
  void note(const std::string& what);

  const TlsConfig config_;
  std::mutex mutex_;  // guards what follows
  Stats stats_;
};

}  // namespace sf::nbd
