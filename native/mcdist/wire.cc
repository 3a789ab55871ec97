#include "mcdist/wire.h"

#include <sodium.h>

#include <algorithm>

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

// The direction is part of what is authenticated, apart from the header's own type byte: a packet
// reflected to its sender's side does not open.
struct Associated {
  uint8_t bytes[1 + kHeaderBytes];
  explicit Associated(const uint8_t* header) {
    bytes[0] = header[2] == static_cast<uint8_t>(Type::kRequest) ? 'C' : 'S';
    std::memcpy(bytes + 1, header, kHeaderBytes);
  }
};

constexpr size_t kNonceAt = 20;  // boot id and counter lie side by side: together the nonce
static_assert(crypto_aead_xchacha20poly1305_ietf_NPUBBYTES == sizeof(BootId) + sizeof(uint64_t));
static_assert(crypto_aead_xchacha20poly1305_ietf_KEYBYTES == kKeyBytes);
static_assert(crypto_aead_xchacha20poly1305_ietf_ABYTES == kTagBytes);

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
  out[1] = kVersion;
  out[2] = static_cast<uint8_t>(header.type);
  out[3] = static_cast<uint8_t>(header.fragment << 4 | header.fragments);
  std::memcpy(out + 4, header.generation.data(), 16);
  std::memcpy(out + kNonceAt, header.boot.data(), 16);
  put(out + 36, header.counter, 8);
  put(out + 44, header.page, 8);
}

bool decode_header(const uint8_t* data, size_t size, Header* out) {
  if (size < kOverheadBytes || data[0] != kMagic || data[1] != kVersion) return false;
  if (data[2] < static_cast<uint8_t>(Type::kRequest) ||
      data[2] > static_cast<uint8_t>(Type::kNegative)) {
    return false;
  }
  out->type = static_cast<Type>(data[2]);
  out->fragment = data[3] >> 4;
  out->fragments = data[3] & 0xf;
  std::memcpy(out->generation.data(), data + 4, 16);
  std::memcpy(out->boot.data(), data + kNonceAt, 16);
  out->counter = get(data + 36, 8);
  out->page = get(data + 44, 8);
  if (out->type != Type::kPage) return data[3] == 0;
  return out->fragments >= 1 && out->fragments <= kMaxFragments && out->fragment < out->fragments &&
         size - kOverheadBytes == fragment_length(out->fragment, out->fragments);
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
  append(out, request.runs.size(), 2);
  append(out, 0, 2);
  encode_runs(request.runs, out);
  if (out->size() < kMinRequestBody) out->resize(kMinRequestBody, 0);
}

bool decode_request(const uint8_t* data, size_t size, uint64_t pages, Request* out) {
  if (size < kMinRequestBody) return false;
  out->cookie = get(data, 8);
  out->receive_kbps = static_cast<uint32_t>(get(data + 8, 4));
  const size_t bytes = get(data + 12, 2) * kRunBytes;
  if (get(data + 14, 2) != 0) return false;
  if (size != std::max(kMinRequestBody, kRequestFixed + bytes)) return false;
  return decode_runs(data + kRequestFixed, bytes, pages, &out->runs);
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

size_t max_request_runs(size_t mtu_bytes) {
  return (mtu_bytes - kUdpIpBytes - kOverheadBytes - kRequestFixed) / kRunBytes;
}

size_t max_answer_runs(size_t mtu_bytes) {
  return (mtu_bytes - kUdpIpBytes - kOverheadBytes) / kRunBytes;
}

unsigned fragments_for(size_t mtu_bytes) {
  const size_t room = mtu_bytes - kUdpIpBytes - kOverheadBytes;
  return static_cast<unsigned>((kPageBytes + room - 1) / room);
}

Sealer::~Sealer() { sodium_memzero(key_.data(), key_.size()); }

size_t Sealer::seal(Header* header, const uint8_t* body, size_t size, uint8_t* out) {
  header->generation = generation_;
  header->boot = boot_;
  header->counter = next_.fetch_add(1, std::memory_order_relaxed);
  encode_header(*header, out);
  const Associated associated(out);
  crypto_aead_xchacha20poly1305_ietf_encrypt(out + kHeaderBytes, nullptr, body, size,
                                             associated.bytes, sizeof associated.bytes, nullptr,
                                             out + kNonceAt, key_.data());
  return size + kOverheadBytes;
}

bool unseal(const Key& key, const uint8_t* data, size_t size, uint8_t* out) {
  if (size < kOverheadBytes) return false;
  const Associated associated(data);
  return crypto_aead_xchacha20poly1305_ietf_decrypt(
             out, nullptr, nullptr, data + kHeaderBytes, size - kHeaderBytes, associated.bytes,
             sizeof associated.bytes, data + kNonceAt, key.data()) == 0;
}

}  // namespace sf::mcdist
