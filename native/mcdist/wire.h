// mcdist's packets: layout, bounds, sealing. docs/mcdist.md is the specification; this is its code.
//
// Every packet is a header in clear (authenticated as associated data), a body encrypted with
// AES-256-GCM, and a 16-byte tag. What is sent often has a short header that names generation and
// sender by the first 4 bytes of their ids; request, welcome and announce carry the sender's whole
// boot id, from which its key is derived. Nothing here keeps state but a sender's counter.
// Decoders take hostile input: they return false and touch nothing beyond `size`.
#pragma once

#include <netinet/in.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "common/page.h"
#include "mcdist/symbols.h"

namespace sf::mcdist {

constexpr uint8_t kMagic = 0x5f;
constexpr uint8_t kVersion = 2;
constexpr size_t kHeaderBytes = 24;
constexpr size_t kLongHeaderBytes = 40;  // with the boot id
constexpr size_t kTagBytes = 16;
constexpr size_t kKeyBytes = 32;
constexpr size_t kOverheadBytes = kHeaderBytes + kTagBytes;
constexpr size_t kLongOverheadBytes = kLongHeaderBytes + kTagBytes;
constexpr size_t kUdpIpBytes = 28;  // IPv4 without options + UDP
constexpr size_t kMinMtuBytes = 1280;
constexpr size_t kMaxMtuBytes = 9216;
constexpr uint64_t kMaxRunPages = 4096;
// A request is never smaller than the welcome it may provoke: nobody is amplified.
constexpr size_t kMinRequestBody = 40;
constexpr size_t kWelcomeBody = 40;
constexpr size_t kRequestFixed = 24;
constexpr size_t kAnnounceBody = 32;
constexpr size_t kReportBytes = 32;
constexpr size_t kParityFixed = 18;

enum class Type : uint8_t {
  kRequest = 1,   // client -> server, unicast
  kWelcome = 2,   // server -> one client, unicast: the cookie its requests must carry
  kAnnounce = 3,  // server -> group: who serves, what it holds, how far its push is
  kPage = 4,      // server -> group or peer: one fragment (symbol) of a page
  kZero = 5,      // likewise: runs of pages that are all zeros
  kNegative = 6,  // likewise: runs of pages that the server cannot give
  kParity = 7,    // likewise: a sum of symbols of one block that repairs any one of them
  kPacked = 8,    // likewise: a whole page, compressed
};
constexpr bool has_long_header(Type type) { return type <= Type::kAnnounce; }

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

// The first 4 bytes of an id, as short headers name it.
template <size_t N>
uint32_t tag_of(const std::array<uint8_t, N>& id) {
  return uint32_t{id[0]} << 24 | uint32_t{id[1]} << 16 | uint32_t{id[2]} << 8 | uint32_t{id[3]};
}

struct Header {
  Type type = Type::kRequest;
  uint8_t fragment = 0;     // kPage: which, of
  uint8_t fragments = 0;    // kPage, kParity: symbols in a page; otherwise 0
  bool pushed = false;      // sent by a push cursor, asked for by nobody
  uint8_t cursor = 0;       // of a pushed packet: which
  uint32_t generation = 0;  // tag_of() its id
  uint32_t sender = 0;      // tag_of() its boot id
  uint64_t counter = 0;     // 48 bits
  PageIndex page = 0;  // kPage: the page; kParity: first of the block; else of the first run, or 0
  BootId boot{};       // long headers only
  size_t bytes() const { return has_long_header(type) ? kLongHeaderBytes : kHeaderBytes; }
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

// What a client lacks of a block that was sent to it.
struct BlockReport {
  uint64_t block = 0;     // first page / kBlockPages
  uint8_t fragments = 0;  // symbols in a page, as the client was sent them
  uint8_t need = 0;       // further symbols wanted, given the parities held of `cover`
  uint8_t cover = 0;      // id of the cover of the parities held; 0: none
  uint32_t wanted = 0;    // bit p: page p of the block is wanted
  SymbolSet missing;      // not held here, wanted or not
};

constexpr uint64_t kRoomUnit = 65536;

struct Request {
  uint64_t cookie = 0;
  uint32_t receive_kbps = 0;   // kilobytes a second the client receives now
  uint16_t loss_permille = 0;  // of the packets sent to it lately
  // What its receive buffer has room for, in units of kRoomUnit bytes; 0: not told.
  uint16_t room = 0;
  bool unicast_only = false;  // multicast does not reach it
  bool subscribe = false;     // wants all of the generation: push to it
  bool history = false;       // first what others faulted on
  std::vector<Run> runs;
  std::vector<BlockReport> reports;
};

// Of kParity, before the symbol.
struct Parity {
  uint8_t index = 0;     // 0..126
  uint8_t cover_id = 0;  // 1..255
  SymbolSet cover;
};

struct Announce {
  in_addr address = {};  // where this server takes requests
  uint16_t port = 0;     // host order
  bool complete = false;
  bool pushing = false;
  uint8_t cursor = 0;
  uint32_t peers = 1;     // heard lately; rounded up to a power of two, 32768 at most
  uint64_t held = 0;      // pages
  uint64_t position = 0;  // the cursor's next page
  uint64_t pages = 0;
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
void encode_announce(const Announce& announce, std::vector<uint8_t>* out);
bool decode_announce(const uint8_t* data, size_t size, uint64_t pages, Announce* out);
void encode_parity(const Parity& parity, uint8_t* out);  // kParityFixed bytes
bool decode_parity(const Header& header, const uint8_t* data, size_t size, Parity* out);

// How many runs fit in one packet of this MTU.
size_t max_request_runs(size_t mtu_bytes);
size_t max_answer_runs(size_t mtu_bytes);

// A page is cut into the fewest equal symbols that fit, also with a parity packet's prefix.
unsigned fragments_for(size_t mtu_bytes);
// Who sends: requests are keyed apart from all that servers send.
enum class Side : char { kClient = 'C', kServer = 'S' };

// AES-256-GCM under the key of one sender (generation key, generation, boot id, side). Not
// thread-safe.
class SenderKey {
 public:
  SenderKey(const GenerationId& generation, const Key& key, const BootId& boot, Side side);
  ~SenderKey();
  SenderKey(const SenderKey&) = delete;
  SenderKey& operator=(const SenderKey&) = delete;

  const BootId& boot() const { return boot_; }
  // `packet` begins with an encoded header; `body` may be split in two. Writes body and tag behind
  // it and returns the packet's size. `packet` must not overlap the body.
  size_t seal(uint8_t* packet, const uint8_t* head, size_t head_bytes, const uint8_t* body,
              size_t body_bytes);
  // Checks and decrypts a packet whose header was decoded; `out` needs size - header - tag bytes.
  bool open(const uint8_t* packet, size_t size, uint8_t* out);

 private:
  const GenerationId generation_;
  const BootId boot_;
  void* cipher_ = nullptr;  // gnutls_aead_cipher_hd_t
};

// Seals packets of one sender: a random boot id and a counter make nonces that never repeat, not
// even after a restart with the same key. Not thread-safe.
class Sealer {
 public:
  Sealer(const GenerationId& generation, const Key& key, const BootId& boot, Side side)
      : generation_(generation), key_(generation, key, boot, side) {}

  const BootId& boot() const { return key_.boot(); }
  // Writes the packet to `out` and returns its size. Fills generation, sender, boot and counter of
  // `header`. `out` must not overlap the body, of which `head` (may be null) comes first.
  size_t seal(Header* header, const uint8_t* body, size_t size, uint8_t* out,
              const uint8_t* head = nullptr, size_t head_bytes = 0);

 private:
  const GenerationId generation_;
  SenderKey key_;
  uint64_t next_ = 1;
};

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
