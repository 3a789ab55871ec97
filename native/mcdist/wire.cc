#include "mcdist/wire.h"

#include <gnutls/crypto.h>
#include <gnutls/gnutls.h>
#include <sodium.h>
#include <sys/uio.h>

#include <algorithm>
#include <bit>

namespace sf::mcdist {
namespace {

void put(uint8_t* out, uint64_t value, size_t bytes) {
  for (size_t i = 0; i < bytes; i++) out[i] = static_cast<uint8_t>(value >> (8 * (bytes - 1 - i)));
}

uint64_t get(const uint8_t* data, size_t bytes) {
  uint64_t value = 0;
  for (size_t i = 0; i < bytes; i++) value = value << 8 | data[i];
  return value;
}

void append(std::vector<uint8_t>* out, uint64_t value, size_t bytes) {
  const size_t at = out->size();
  out->resize(at + bytes);
  put(out->data() + at, value, bytes);
}

constexpr unsigned kCountShift = 40;
constexpr unsigned kMaskShift = 52;
constexpr uint64_t kUrgent = uint64_t{1} << 56;
constexpr uint64_t kRetry = uint64_t{1} << 57;
constexpr uint64_t kError = uint64_t{1} << 58;
constexpr uint64_t kUnused = ~((uint64_t{1} << 59) - 1);

constexpr uint8_t kPushedFlag = 1;
constexpr uint8_t kUnicastOnlyFlag = 1, kSubscribeFlag = 2, kHistoryFlag = 4;
constexpr uint8_t kCompleteFlag = 1, kPushingFlag = 2;
constexpr unsigned kPeersShift = 4, kMaxPeersLog = 15;
constexpr size_t kNonceBytes = 12;
constexpr size_t kCounterAt = 12;
constexpr size_t kCounterBytes = 6;

void nonce_of(const uint8_t* header, uint8_t* nonce) {
  std::memset(nonce, 0, kNonceBytes - kCounterBytes);
  std::memcpy(nonce + kNonceBytes - kCounterBytes, header + kCounterAt, kCounterBytes);
}

size_t header_bytes_of(const uint8_t* packet) {
  return has_long_header(static_cast<Type>(packet[1] & 0xf)) ? kLongHeaderBytes : kHeaderBytes;
}

}  // namespace

bool parse_generation(const std::string& text, GenerationId* out) {
  if (text.size() != 32) return false;
  const auto digit = [](char c) {
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
  };
  for (size_t i = 0; i < 16; i++) {
    const int high = digit(text[2 * i]);
    const int low = digit(text[2 * i + 1]);
    if (high < 0 || low < 0) return false;
    (*out)[i] = static_cast<uint8_t>(high << 4 | low);
  }
  return true;
}

void encode_header(const Header& header, uint8_t* out) {
  out[0] = kMagic;
  out[1] = static_cast<uint8_t>(kVersion << 4 | static_cast<uint8_t>(header.type));
  out[2] = static_cast<uint8_t>(header.fragment << 4 | header.fragments);
  out[3] = header.pushed ? kPushedFlag : 0;
  put(out + 4, header.generation, 4);
  put(out + 8, header.sender, 4);
  put(out + kCounterAt, header.counter, kCounterBytes);
  put(out + 18, header.page, 5);
  out[23] = header.cursor;
  if (has_long_header(header.type)) std::memcpy(out + kHeaderBytes, header.boot.data(), 16);
}

bool decode_header(const uint8_t* data, size_t size, Header* out) {
  if (size < kOverheadBytes || data[0] != kMagic || data[1] >> 4 != kVersion) return false;
  const uint8_t type = data[1] & 0xf;
  if (type < static_cast<uint8_t>(Type::kRequest) || type > static_cast<uint8_t>(Type::kPacked)) {
    return false;
  }
  out->type = static_cast<Type>(type);
  if (has_long_header(out->type)) {
    if (size < kLongOverheadBytes) return false;
    std::memcpy(out->boot.data(), data + kHeaderBytes, 16);
  }
  out->fragment = data[2] >> 4;
  out->fragments = data[2] & 0xf;
  out->pushed = (data[3] & kPushedFlag) != 0;
  out->generation = static_cast<uint32_t>(get(data + 4, 4));
  out->sender = static_cast<uint32_t>(get(data + 8, 4));
  out->counter = get(data + kCounterAt, kCounterBytes);
  out->page = get(data + 18, 5);
  out->cursor = data[23];
  if ((data[3] & ~kPushedFlag) != 0 || (!out->pushed && out->cursor != 0)) return false;
  if (has_long_header(out->type) && (out->pushed || out->sender != tag_of(out->boot))) return false;
  if (out->type != Type::kPage && out->type != Type::kParity) return data[2] == 0;
  if (out->fragments < 1 || out->fragments > kMaxFragments) return false;
  const size_t body = size - kOverheadBytes;
  if (out->type == Type::kPage) {
    return out->fragment < out->fragments && body == symbol_bytes(out->fragments);
  }
  return out->fragment == 0 && out->page % kBlockPages == 0 &&
         body == kParityFixed + symbol_bytes(out->fragments);
}

void encode_runs(const std::vector<Run>& runs, std::vector<uint8_t>* out) {
  for (const Run& run : runs) {
    append(out,
           run.first | uint64_t{run.count - 1} << kCountShift |
               uint64_t{run.fragments} << kMaskShift | (run.urgent ? kUrgent : 0) |
               (run.retry ? kRetry : 0) | (run.error ? kError : 0),
           kRunBytes);
  }
}

bool decode_runs(const uint8_t* data, size_t size, uint64_t pages, std::vector<Run>* out) {
  if (size % kRunBytes != 0) return false;
  out->clear();
  for (size_t at = 0; at < size; at += kRunBytes) {
    const uint64_t word = get(data + at, kRunBytes);
    Run run;
    run.first = word & ((uint64_t{1} << kCountShift) - 1);
    run.count = static_cast<uint32_t>(word >> kCountShift & (kMaxRunPages - 1)) + 1;
    run.fragments = static_cast<uint8_t>(word >> kMaskShift & 0xf);
    run.urgent = (word & kUrgent) != 0;
    run.retry = (word & kRetry) != 0;
    run.error = (word & kError) != 0;
    if ((word & kUnused) != 0 || run.first >= pages || run.count > pages - run.first) return false;
    if (run.fragments != 0 && run.count != 1) return false;
    out->push_back(run);
  }
  return true;
}

void encode_request(const Request& request, std::vector<uint8_t>* out) {
  out->clear();
  append(out, request.cookie, 8);
  append(out, request.receive_kbps, 4);
  append(out,
         (request.unicast_only ? kUnicastOnlyFlag : 0) | (request.subscribe ? kSubscribeFlag : 0) |
             (request.history ? kHistoryFlag : 0),
         1);
  append(out, 0, 1);
  append(out, request.runs.size(), 2);
  append(out, request.reports.size(), 2);
  append(out, 0, 2);
  append(out, request.loss_permille, 2);
  append(out, request.room, 2);
  encode_runs(request.runs, out);
  for (const BlockReport& report : request.reports) {
    append(out, report.block, 8);
    append(out, report.fragments, 1);
    append(out, report.need, 1);
    append(out, report.cover, 1);
    append(out, 0, 1);
    append(out, report.wanted, 4);
    out->resize(out->size() + 16);
    report.missing.encode(out->data() + out->size() - 16);
  }
  if (out->size() < kMinRequestBody) out->resize(kMinRequestBody, 0);
}

bool decode_request(const uint8_t* data, size_t size, uint64_t pages, Request* out) {
  if (size < kMinRequestBody) return false;
  out->cookie = get(data, 8);
  out->receive_kbps = static_cast<uint32_t>(get(data + 8, 4));
  const uint8_t flags = data[12];
  if ((flags & ~(kUnicastOnlyFlag | kSubscribeFlag | kHistoryFlag)) != 0) return false;
  out->unicast_only = (flags & kUnicastOnlyFlag) != 0;
  out->subscribe = (flags & kSubscribeFlag) != 0;
  out->history = (flags & kHistoryFlag) != 0;
  const size_t run_bytes = get(data + 14, 2) * kRunBytes;
  const size_t reports = get(data + 16, 2);
  out->loss_permille = static_cast<uint16_t>(get(data + 20, 2));
  out->room = static_cast<uint16_t>(get(data + 22, 2));
  if (data[13] != 0 || get(data + 18, 2) != 0) return false;
  const size_t bytes = kRequestFixed + run_bytes + reports * kReportBytes;
  if (size != std::max(kMinRequestBody, bytes)) return false;
  if (!decode_runs(data + kRequestFixed, run_bytes, pages, &out->runs)) return false;
  out->reports.clear();
  for (size_t i = 0; i < reports; i++) {
    const uint8_t* at = data + kRequestFixed + run_bytes + i * kReportBytes;
    BlockReport report;
    report.block = get(at, 8);
    report.fragments = at[8];
    report.need = at[9];
    report.cover = at[10];
    report.wanted = static_cast<uint32_t>(get(at + 12, 4));
    report.missing = SymbolSet::Decode(at + 16);
    if (at[11] != 0 || report.fragments < 1 || report.fragments > kMaxFragments) return false;
    if (report.block >= (pages + kBlockPages - 1) / kBlockPages) return false;
    if (report.need > kBlockPages * report.fragments ||
        !report.missing.within(SymbolSet::Block(report.fragments)))
      return false;
    const uint64_t left = pages - report.block * kBlockPages;
    if (left < kBlockPages && report.wanted >> left != 0) return false;
    out->reports.push_back(report);
  }
  return true;
}

void encode_welcome(const Welcome& welcome, std::vector<uint8_t>* out) {
  out->clear();
  append(out, welcome.cookie, 8);
  out->insert(out->end(), welcome.client.begin(), welcome.client.end());
  append(out, welcome.echo, 8);
  append(out, welcome.pages, 8);
}

bool decode_welcome(const uint8_t* data, size_t size, Welcome* out) {
  if (size != kWelcomeBody) return false;
  out->cookie = get(data, 8);
  std::memcpy(out->client.data(), data + 8, 16);
  out->echo = get(data + 24, 8);
  out->pages = get(data + 32, 8);
  return true;
}

void encode_announce(const Announce& announce, std::vector<uint8_t>* out) {
  out->clear();
  append(out, ntohl(announce.address.s_addr), 4);
  append(out, announce.port, 2);
  const unsigned log = announce.peers <= 1 ? 0 : std::bit_width(announce.peers - 1);
  append(out,
         (announce.complete ? kCompleteFlag : 0) | (announce.pushing ? kPushingFlag : 0) |
             std::min(log, kMaxPeersLog) << kPeersShift,
         1);
  append(out, announce.cursor, 1);
  append(out, announce.held, 8);
  append(out, announce.position, 8);
  append(out, announce.pages, 8);
}

bool decode_announce(const uint8_t* data, size_t size, uint64_t pages, Announce* out) {
  constexpr uint8_t kFlags = kCompleteFlag | kPushingFlag | kMaxPeersLog << kPeersShift;
  if (size != kAnnounceBody || (data[6] & ~kFlags) != 0) return false;
  out->peers = 1U << (data[6] >> kPeersShift);
  out->address.s_addr = htonl(static_cast<uint32_t>(get(data, 4)));
  out->port = static_cast<uint16_t>(get(data + 4, 2));
  out->complete = (data[6] & kCompleteFlag) != 0;
  out->pushing = (data[6] & kPushingFlag) != 0;
  out->cursor = data[7];
  out->held = get(data + 8, 8);
  out->position = get(data + 16, 8);
  out->pages = get(data + 24, 8);
  // Requests go there: one host's address, not a group's or everybody's.
  const uint8_t first = data[0];
  if (first == 0 || first >= 224) return false;
  return out->pages == pages && out->held <= pages && out->position <= pages && out->port != 0;
}

void encode_parity(const Parity& parity, uint8_t* out) {
  out[0] = parity.index;
  out[1] = parity.cover_id;
  parity.cover.encode(out + 2);
}

bool decode_parity(const Header& header, const uint8_t* data, size_t size, Parity* out) {
  if (size != kParityFixed + symbol_bytes(header.fragments)) return false;
  out->index = data[0];
  out->cover_id = data[1];
  out->cover = SymbolSet::Decode(data + 2);
  return out->index < 127 && out->cover_id != 0 && !out->cover.empty() &&
         out->cover.within(SymbolSet::Block(header.fragments));
}

size_t max_request_runs(size_t mtu_bytes) {
  return (mtu_bytes - kUdpIpBytes - kLongOverheadBytes - kRequestFixed) / kRunBytes;
}

size_t max_answer_runs(size_t mtu_bytes) {
  return (mtu_bytes - kUdpIpBytes - kOverheadBytes) / kRunBytes;
}

unsigned fragments_for(size_t mtu_bytes) {
  const size_t room = mtu_bytes - kUdpIpBytes - kOverheadBytes - kParityFixed;
  return static_cast<unsigned>((kPageBytes + room - 1) / room);
}

SenderKey::SenderKey(const GenerationId& generation, const Key& key, const BootId& boot, Side side)
    : generation_(generation), boot_(boot) {
  static constexpr char kPurpose[] = "snowflock mcdist 2";
  uint8_t text[sizeof kPurpose - 1 + 1 + 16 + 16];
  uint8_t* at = text;
  at = std::copy_n(reinterpret_cast<const uint8_t*>(kPurpose), sizeof kPurpose - 1, at);
  *at++ = static_cast<uint8_t>(side);
  at = std::copy(generation.begin(), generation.end(), at);
  std::copy(boot.begin(), boot.end(), at);
  uint8_t derived[kKeyBytes];
  crypto_generichash(derived, sizeof derived, text, sizeof text, key.data(), key.size());
  const gnutls_datum_t datum = {derived, sizeof derived};
  gnutls_aead_cipher_hd_t cipher = nullptr;
  // Fails only for want of memory; then nothing is sealed, and nothing opens.
  if (gnutls_aead_cipher_init(&cipher, GNUTLS_CIPHER_AES_256_GCM, &datum) == 0) cipher_ = cipher;
  sodium_memzero(derived, sizeof derived);
}

SenderKey::~SenderKey() {
  if (cipher_ != nullptr) gnutls_aead_cipher_deinit(static_cast<gnutls_aead_cipher_hd_t>(cipher_));
}

size_t SenderKey::seal(uint8_t* packet, const uint8_t* head, size_t head_bytes, const uint8_t* body,
                       size_t body_bytes) {
  const size_t header = header_bytes_of(packet);
  uint8_t nonce[kNonceBytes];
  nonce_of(packet, nonce);
  const giovec_t associated[] = {{const_cast<uint8_t*>(generation_.data()), generation_.size()},
                                 {packet, header}};
  // GnuTLS encrypts in place here: it goes a vector's entries one by one.
  if (head_bytes > 0) std::memcpy(packet + header, head, head_bytes);
  std::memcpy(packet + header + head_bytes, body, body_bytes);
  const size_t bytes = head_bytes + body_bytes;
  const giovec_t text = {packet + header, bytes};
  size_t tag_bytes = kTagBytes;
  if (cipher_ == nullptr ||
      gnutls_aead_cipher_encryptv2(static_cast<gnutls_aead_cipher_hd_t>(cipher_), nonce,
                                   sizeof nonce, associated, 2, &text, 1, packet + header + bytes,
                                   &tag_bytes) != 0) {
    return 0;
  }
  return header + bytes + kTagBytes;
}

bool SenderKey::open(const uint8_t* packet, size_t size, uint8_t* out) {
  const size_t header = header_bytes_of(packet);
  if (cipher_ == nullptr || size < header + kTagBytes) return false;
  const size_t bytes = size - header - kTagBytes;
  uint8_t nonce[kNonceBytes];
  nonce_of(packet, nonce);
  const giovec_t associated[] = {{const_cast<uint8_t*>(generation_.data()), generation_.size()},
                                 {const_cast<uint8_t*>(packet), header}};
  std::memcpy(out, packet + header, bytes);
  const giovec_t text = {out, bytes};
  return gnutls_aead_cipher_decryptv2(
             static_cast<gnutls_aead_cipher_hd_t>(cipher_), nonce, sizeof nonce, associated, 2,
             &text, 1, const_cast<uint8_t*>(packet) + header + bytes, kTagBytes) == 0;
}

size_t Sealer::seal(Header* header, const uint8_t* body, size_t size, uint8_t* out,
                    const uint8_t* head, size_t head_bytes) {
  header->generation = tag_of(generation_);
  header->boot = boot();
  header->sender = tag_of(boot());
  header->counter = next_++;
  encode_header(*header, out);
  return key_.seal(out, head, head_bytes, body, size);
}

}  // namespace sf::mcdist
