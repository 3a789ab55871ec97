// mcdist's packets: layout, bounds, sealing. docs/mcdist.md is the specification; this is its code.
//
// Every packet is a 52-byte header in clear (authenticated as associated data), a body encrypted
// with XChaCha20-Poly1305-IETF, and a 16-byte tag. Nothing here keeps state but a sender's counter.
// Decoders take hostile input: they return false and touch nothing beyond `size`.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "common/page.h"

namespace sf::mcdist {

constexpr uint8_t kMagic = 0x5f;
constexpr uint8_t kVersion = 1;
constexpr size_t kHeaderBytes = 52;
constexpr size_t kTagBytes = 16;
constexpr size_t kKeyBytes = 32;
constexpr size_t kOverheadBytes = kHeaderBytes + kTagBytes;
constexpr size_t kUdpIpBytes = 28;  // IPv4 without options + UDP
constexpr size_t kMinMtuBytes = 1280;
constexpr size_t kMaxMtuBytes = 9216;
constexpr unsigned kMaxFragments = 4;  // a page at the smallest MTU
constexpr uint64_t kMaxRunPages = 4096;
// A request is never smaller than the welcome it may provoke: nobody is amplified.
constexpr size_t kMinRequestBody = 40;
constexpr size_t kWelcomeBody = 40;
constexpr size_t kRequestFixed = 16;

enum class Type : uint8_t {
  kRequest = 1,   // client -> server, unicast
  kWelcome = 2,   // server -> one client, unicast: the cookie its requests must carry
  kPage = 3,      // server -> group: one fragment of a page
  kZero = 4,      // server -> group: runs of pages that are all zeros
  kNegative = 5,  // server -> group: runs of pages that the server cannot give
};

using GenerationId = std::array<uint8_t, 16>;
using BootId = std::array<uint8_t, 16>;
using Key = std::array<uint8_t, kKeyBytes>;

// Ids are random or checked by an AEAD before they are used as map keys, so their bytes will do.
struct IdHash {
  size_t operator()(const std::array<uint8_t, 16>& id) const {
    size_t hash;
    std::memcpy(&hash, id.data(), sizeof hash);
    return hash;
  }
};

// 32 lower-case hex characters.
bool parse_generation(const std::string& text, GenerationId* out);

struct Header {
  Type type = Type::kRequest;
  uint8_t fragment = 0;   // kPage: which, of
  uint8_t fragments = 0;  // kPage: how many; otherwise 0
  GenerationId generation{};
  BootId boot{};  // of the sender; with `counter` the nonce
  uint64_t counter = 0;
  PageIndex page = 0;  // kPage: the page; otherwise of the first run, or 0
};

// Consecutive pages that share flags; 8 bytes on the wire.
struct Run {
  PageIndex first = 0;
  uint32_t count = 1;     // 1..kMaxRunPages
  uint8_t fragments = 0;  // request of one page: bit mask of fragments missing; 0: all
  bool urgent = false;
  bool retry = false;
  bool error = false;  // negative answers: held but unreadable (otherwise: not held)
};
constexpr size_t kRunBytes = 8;

struct Request {
  uint64_t cookie = 0;
  uint32_t receive_kbps = 0;  // kilobytes a second the client receives now
  std::vector<Run> runs;
};

struct Welcome {
  uint64_t cookie = 0;
  BootId client{};
  uint64_t echo = 0;  // counter of the request that is answered
  uint64_t pages = 0;
};

void encode_header(const Header& header, uint8_t* out);
bool decode_header(const uint8_t* data, size_t size, Header* out);

void encode_runs(const std::vector<Run>& runs, std::vector<uint8_t>* out);
// False unless all runs are well formed and end within `pages`.
bool decode_runs(const uint8_t* data, size_t size, uint64_t pages, std::vector<Run>* out);

void encode_request(const Request& request, std::vector<uint8_t>* out);
bool decode_request(const uint8_t* data, size_t size, uint64_t pages, Request* out);
void encode_welcome(const Welcome& welcome, std::vector<uint8_t>* out);
bool decode_welcome(const uint8_t* data, size_t size, Welcome* out);

// How many runs fit in one packet of this MTU.
size_t max_request_runs(size_t mtu_bytes);
size_t max_answer_runs(size_t mtu_bytes);

// A page is cut into the fewest equal fragments that fit.
unsigned fragments_for(size_t mtu_bytes);
inline size_t fragment_size(unsigned fragments) { return (kPageBytes + fragments - 1) / fragments; }
inline size_t fragment_offset(unsigned index, unsigned fragments) {
  return index * fragment_size(fragments);
}
inline size_t fragment_length(unsigned index, unsigned fragments) {
  const size_t offset = fragment_offset(index, fragments);
  const size_t size = fragment_size(fragments);
  return offset + size <= kPageBytes ? size : kPageBytes - offset;
}

// Seals packets of one sender: a random boot id and a counter make nonces that never repeat, not
// even after a restart with the same key. Thread-safe.
class Sealer {
 public:
  Sealer(const GenerationId& generation, const Key& key, const BootId& boot)
      : generation_(generation), key_(key), boot_(boot) {}
  ~Sealer();
  Sealer(const Sealer&) = delete;
  Sealer& operator=(const Sealer&) = delete;

  const BootId& boot() const { return boot_; }
  const Key& key() const { return key_; }
  // Writes size + kOverheadBytes bytes to `out` and returns that number. Fills generation, boot and
  // counter of `header`. `out` must not overlap `body`.
  size_t seal(Header* header, const uint8_t* body, size_t size, uint8_t* out);

 private:
  const GenerationId generation_;
  Key key_;
  const BootId boot_;
  std::atomic<uint64_t> next_{1};
};

// Checks and decrypts a packet whose header was decoded. `out` needs size - kOverheadBytes bytes.
bool unseal(const Key& key, const uint8_t* data, size_t size, uint8_t* out);

// The last 64 counters of one sender: each is good once. For what must not be replayed.
class ReplayWindow {
 public:
  bool accept(uint64_t counter) {
    if (counter > top_) {
      const uint64_t shift = counter - top_;
      seen_ = shift >= 64 ? 0 : seen_ << shift;
      seen_ |= 1;
      top_ = counter;
      return true;
    }
    const uint64_t age = top_ - counter;
    if (age >= 64 || ((seen_ >> age) & 1) != 0) return false;
    seen_ |= uint64_t{1} << age;
    return true;
  }

 private:
  uint64_t top_ = 0;
  uint64_t seen_ = 1;  // counter 0 is never sent
};

}  // namespace sf::mcdist
