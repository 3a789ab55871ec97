// The option phase of an NBD connection (fixed newstyle), up to transmission.
//
// The client is hostile until proven otherwise: the whole phase has one deadline, options and their
// lengths are counted, and nothing is kept of what it sends.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "blktap/nbd_proto.h"

namespace sf::nbd {

struct ExportInfo {
  std::string name;  // a client may also ask for the empty name, the default export
  std::string description;
  uint64_t size = 0;
  bool writable = false;
};

struct Negotiated {
  bool structured = false;
  bool base_allocation = false;
};

class Handshake {
 public:
  Handshake(int socket, const ExportInfo& info) : socket_(socket), info_(info) {}
  // True when the client enters transmission; false: close the socket.
  bool run(Negotiated* out);

 private:
  enum class Next : uint8_t { kOption, kTransmission, kClose };
  Next option(uint32_t option, const std::vector<uint8_t>& data);
  Next export_name(const std::vector<uint8_t>& data);
  Next info(uint32_t option, const std::vector<uint8_t>& data);
  Next meta_context(uint32_t option, const std::vector<uint8_t>& data);
  bool known(const std::string& name) const { return name.empty() || name == info_.name; }
  uint16_t transmission_flags() const;
  Next reply(uint32_t option, uint32_t type, const void* data = nullptr, size_t bytes = 0);
  Next reply(uint32_t option, uint32_t type, const std::string& text) {
    return reply(option, type, text.data(), text.size());
  }
  bool receive(void* out, size_t bytes);
  bool skip(size_t bytes);
  bool send(const void* data, size_t bytes);
  bool wait(short events);

  int socket_;
  const ExportInfo& info_;
  Negotiated state_;
  bool no_zeroes_ = false;
  uint64_t deadline_ms_ = 0;
};

}  // namespace sf::nbd
