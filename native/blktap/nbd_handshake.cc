#include "blktap/nbd_handshake.h"

#include <errno.h>

#include <algorithm>

namespace sf::nbd {
namespace {

constexpr int kMaxOptions = 256;
constexpr uint32_t kMaxOptionBytes = 16 * 1024;  // kept; a name or query has at most 4096
constexpr uint32_t kMaxSkippedBytes = 1 << 20;

}  // namespace

bool Handshake::receive(void* out, size_t bytes) {
  auto* p = static_cast<uint8_t*>(out);
  while (bytes > 0) {
    const ssize_t n = stream_->receive(p, bytes);
    if (n > 0) {
      p += n;
      bytes -= static_cast<size_t>(n);
    } else if (n == 0 || (errno != EAGAIN && errno != EINTR) ||
               !wait_until(stream_->fd(), stream_->waits_for(true), deadline_ms_)) {
      return false;
    }
  }
  return true;
}

bool Handshake::skip(size_t bytes) {
  uint8_t buffer[4096];
  while (bytes > 0) {
    const size_t n = std::min(bytes, sizeof buffer);
    if (!receive(buffer, n)) return false;
    bytes -= n;
  }
  return true;
}

bool Handshake::send(const void* data, size_t bytes) {
  auto* p = static_cast<uint8_t*>(const_cast<void*>(data));
  while (bytes > 0) {
    const iovec part = {p, bytes};
    const ssize_t n = stream_->send(&part, 1);
    if (n >= 0) {
      p += n;
      bytes -= static_cast<size_t>(n);
    } else if ((errno != EAGAIN && errno != EINTR) ||
               !wait_until(stream_->fd(), stream_->waits_for(false), deadline_ms_)) {
      return false;
    }
  }
  return true;
}

Handshake::Next Handshake::reply(uint32_t option, uint32_t type, const void* data, size_t bytes) {
  std::vector<uint8_t> out(20 + bytes);
  put64(out.data(), kOptReplyMagic);
  put32(out.data() + 8, option);
  put32(out.data() + 12, type);
  put32(out.data() + 16, static_cast<uint32_t>(bytes));
  if (bytes > 0) std::memcpy(out.data() + 20, data, bytes);
  return send(out.data(), out.size()) ? Next::kOption : Next::kClose;
}

bool Handshake::run(Negotiated* out) {
  deadline_ms_ = now_ms() + entrance_.timeout_ms;
  uint8_t hello[18];
  put64(hello, kMagic);
  put64(hello + 8, kOptMagic);
  put16(hello + 16, kFixedNewstyle | kNoZeroes);
  uint8_t flags[4];
  if (!send(hello, sizeof hello) || !receive(flags, sizeof flags)) return false;
  const uint32_t client = get32(flags);
  if ((client & ~uint32_t{kFixedNewstyle | kNoZeroes}) != 0) return false;
  // STARTTLS needs fixed newstyle.
  if (entrance_.gate != nullptr && (client & kFixedNewstyle) == 0) return false;
  no_zeroes_ = (client & kNoZeroes) != 0;
  for (int i = 0; i < kMaxOptions; i++) {
    uint8_t header[16];
    if (!receive(header, sizeof header) || get64(header) != kOptMagic) return false;
    const uint32_t number = get32(header + 8);
    const uint32_t bytes = get32(header + 12);
    Next next = Next::kOption;
    if (bytes > kMaxOptionBytes) {
      if (bytes > kMaxSkippedBytes || number == kOptExportName || !skip(bytes)) return false;
      // An abort is one with any data; this is more than any other option can need.
      next = number == kOptAbort || tls_missing()
                 ? option(number, {})
                 : reply(number, kRepErrTooBig, "more data than any option takes");
    } else {
      Data data(bytes);
      if (!receive(data.data(), bytes)) return false;
      next = option(number, data);
    }
    if (next == Next::kClose) return false;
    if (next == Next::kTransmission) {
      *out = state_;
      return true;
    }
  }
  return false;
}

}  // namespace sf::nbd
