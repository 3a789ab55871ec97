// The option phase of an NBD connection (fixed newstyle), up to transmission.
//
// The client is hostile until proven otherwise: the whole phase has one deadline, options and their
// lengths are counted, and nothing is kept of what it sends but what it negotiated.
//
// nbd_handshake.cc has the phase and its bytes, nbd_options.cc what each option is answered.
// Where a gate stands (nbd_tls_gate.h) it is proto.md's FORCEDTLS: before TLS nothing is answered
// but STARTTLS and ABORT, and nothing negotiated. Elsewhere TLS is refused.
// Left out on purpose: EXTENDED_HEADERS.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "blktap/byte_stream.h"
#include "blktap/nbd_exports.h"
#include "blktap/nbd_tls_gate.h"

namespace sf::nbd {

struct Negotiated {
  bool structured = false;
  uint8_t contexts = 0;  // kContextAllocation, ...
};

// How clients of a listener come in.
struct Entrance {
  uint64_t timeout_ms = 30'000;         // of the whole option phase
  TlsGate* gate = nullptr;              // null: no TLS
  std::function<bool()> authenticated;  // behind the gate; false: there is no room
};

class Handshake {
 public:
  // `owner` is admitted to the export that the client chooses.
  Handshake(ByteStream& stream, Exports& exports, std::shared_ptr<Connection> owner,
            const Entrance& entrance)
      : stream_(&stream), exports_(exports), owner_(std::move(owner)), entrance_(entrance) {}
  // True when the client enters transmission; false: close the socket.
  bool run(Negotiated* out);
  // What the owner was admitted to and has to leave, also after false. Null: nothing.
  const std::shared_ptr<Export>& exported() const { return exported_; }
  // What carries the connection from now on; null: the stream it was made with.
  std::unique_ptr<ByteStream> take_tls() { return std::move(tls_); }

 private:
  enum class Next : uint8_t { kOption, kTransmission, kClose };
  using Data = std::vector<uint8_t>;
  Next option(uint32_t option, const Data& data);
  bool tls_missing() const { return entrance_.gate != nullptr && tls_ == nullptr; }
  Next start_tls(const Data& data);
  Next export_name(const Data& data);
  Next list(const Data& data);
  Next info(uint32_t option, const Data& data);
  Next send_info(uint32_t option, const Export& exported, const std::vector<uint16_t>& wanted);
  Next meta_context(uint32_t option, const Data& data);
  Export::Admission enter(const std::shared_ptr<Export>& exported);
  uint16_t transmission_flags(const ExportInfo& info) const;

  // No default for `bytes`: a text in quotes must become a string.
  Next reply(uint32_t option, uint32_t type, const void* data, size_t bytes);
  Next reply(uint32_t option, uint32_t type, const std::string& text = {}) {
    return reply(option, type, text.data(), text.size());
  }
  bool receive(void* out, size_t bytes);
  bool skip(size_t bytes);
  bool send(const void* data, size_t bytes);

  ByteStream* stream_;
  std::unique_ptr<ByteStream> tls_;
  Exports& exports_;
  std::shared_ptr<Connection> owner_;
  const Entrance& entrance_;
  std::shared_ptr<Export> exported_;
  Negotiated state_;
  std::shared_ptr<Export> contexts_of_;  // the export that state_.contexts were selected for
  bool no_zeroes_ = false;
  uint64_t deadline_ms_ = 0;
};

}  // namespace sf::nbd
