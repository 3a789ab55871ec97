#include "blktap/nbd_handshake.h"

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <time.h>

#include <algorithm>

namespace sf::nbd {
namespace {

constexpr uint64_t kDeadlineMs = 30'000;
constexpr int kMaxOptions = 256;
constexpr uint32_t kMaxOptionBytes = 16 * 1024;  // kept; a name has at most 4096
constexpr uint32_t kMaxSkippedBytes = 1 << 20;

uint64_t now_ms() {
  timespec ts = {};
  ::clock_gettime(CLOCK_MONOTONIC, &ts);
  return static_cast<uint64_t>(ts.tv_sec) * 1000 + static_cast<uint64_t>(ts.tv_nsec) / 1000000;
}

// Reads counted fields out of an option's data; `ok` stays false once something was cut short.
struct Reader {
  const std::vector<uint8_t>& data;
  size_t at = 0;
  bool ok = true;

  bool has(size_t bytes) {
    if (!ok || data.size() - at < bytes) ok = false;
    return ok;
  }
  uint16_t u16() {
    if (!has(2)) return 0;
    at += 2;
    return get16(data.data() + at - 2);
  }
  uint32_t u32() {
    if (!has(4)) return 0;
    at += 4;
    return get32(data.data() + at - 4);
  }
  std::string text(size_t bytes) {
    if (!has(bytes)) return {};
    at += bytes;
    return std::string(reinterpret_cast<const char*>(data.data()) + at - bytes, bytes);
  }
  bool finished() const { return ok && at == data.size(); }
};

}  // namespace

bool Handshake::wait(short events) {
  for (;;) {
    const uint64_t now = now_ms();
    if (now >= deadline_ms_) return false;
    pollfd fd = {socket_, events, 0};
    const int n = ::poll(&fd, 1, static_cast<int>(deadline_ms_ - now));
    if (n > 0) return true;
    if (n < 0 && errno != EINTR) return false;
  }
}

bool Handshake::receive(void* out, size_t bytes) {
  auto* p = static_cast<uint8_t*>(out);
  while (bytes > 0) {
    const ssize_t n = ::recv(socket_, p, bytes, MSG_DONTWAIT);
    if (n > 0) {
      p += n;
      bytes -= static_cast<size_t>(n);
    } else if (n == 0 || (errno != EAGAIN && errno != EINTR) || !wait(POLLIN)) {
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
  const auto* p = static_cast<const uint8_t*>(data);
  while (bytes > 0) {
    const ssize_t n = ::send(socket_, p, bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n >= 0) {
      p += n;
      bytes -= static_cast<size_t>(n);
    } else if ((errno != EAGAIN && errno != EINTR) || !wait(POLLOUT)) {
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

uint16_t Handshake::transmission_flags() const {
  // Multi-conn: all connections share one disk, and a flush on any of them covers them all.
  uint16_t flags = kHasFlags | kSendFlush | kCanMultiConn;
  if (state_.structured) flags |= kSendDf;
  flags |= info_.writable ? kSendFua | kSendTrim | kSendWriteZeroes : kReadOnly;
  return flags;
}

bool Handshake::run(Negotiated* out) {
  deadline_ms_ = now_ms() + kDeadlineMs;
  uint8_t hello[18];
  put64(hello, kMagic);
  put64(hello + 8, kOptMagic);
  put16(hello + 16, kFixedNewstyle | kNoZeroes);
  uint8_t flags[4];
  if (!send(hello, sizeof hello) || !receive(flags, sizeof flags)) return false;
  const uint32_t client = get32(flags);
  if ((client & ~uint32_t{kFixedNewstyle | kNoZeroes}) != 0) return false;
  no_zeroes_ = (client & kNoZeroes) != 0;
  for (int i = 0; i < kMaxOptions; i++) {
    uint8_t header[16];
    if (!receive(header, sizeof header) || get64(header) != kOptMagic) return false;
    const uint32_t number = get32(header + 8);
    const uint32_t bytes = get32(header + 12);
    Next next = Next::kOption;
    if (bytes > kMaxOptionBytes) {
      if (bytes > kMaxSkippedBytes || number == kOptExportName || !skip(bytes)) return false;
      next = reply(number, kRepErrTooBig);
    } else {
      std::vector<uint8_t> data(bytes);
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

Handshake::Next Handshake::option(uint32_t option, const std::vector<uint8_t>& data) {
  switch (option) {
    case kOptExportName:
      return export_name(data);
    case kOptAbort:
      reply(option, kRepAck);
      return Next::kClose;
    case kOptList: {
      if (!data.empty()) return reply(option, kRepErrInvalid);
      std::vector<uint8_t> entry(4 + info_.name.size());
      put32(entry.data(), static_cast<uint32_t>(info_.name.size()));
      std::memcpy(entry.data() + 4, info_.name.data(), info_.name.size());
      if (reply(option, kRepServer, entry.data(), entry.size()) == Next::kClose) {
        return Next::kClose;
      }
      return reply(option, kRepAck);
    }
    case kOptInfo:
    case kOptGo:
      return info(option, data);
    case kOptStructuredReply:
      if (!data.empty()) return reply(option, kRepErrInvalid);
      state_.structured = true;
      return reply(option, kRepAck);
    case kOptListMetaContext:
    case kOptSetMetaContext:
      return meta_context(option, data);
    default:
      return reply(option, kRepErrUnsup);
  }
}

// The old way in: no error can be answered, only the door shut.
Handshake::Next Handshake::export_name(const std::vector<uint8_t>& data) {
  if (!known(std::string(data.begin(), data.end()))) return Next::kClose;
  uint8_t out[10 + 124] = {};
  put64(out, info_.size);
  put16(out + 8, transmission_flags());
  return send(out, no_zeroes_ ? 10 : sizeof out) ? Next::kTransmission : Next::kClose;
}

Handshake::Next Handshake::info(uint32_t option, const std::vector<uint8_t>& data) {
  Reader in{data};
  const std::string name = in.text(in.u32());
  const uint16_t count = in.u16();
  bool want_name = false, want_description = false, want_block_size = false;
  for (unsigned i = 0; i < count && in.ok; i++) {
    switch (in.u16()) {
      case kInfoName:
        want_name = true;
        break;
      case kInfoDescription:
        want_description = true;
        break;
      case kInfoBlockSize:
        want_block_size = true;
        break;
      default:
        break;  // unknown requests are to be ignored
    }
  }
  if (!in.finished()) return reply(option, kRepErrInvalid);
  if (!known(name)) return reply(option, kRepErrUnknown, "no such export");
  auto text = [&](Info type, const std::string& value) {
    std::vector<uint8_t> out(2 + value.size());
    put16(out.data(), type);
    std::memcpy(out.data() + 2, value.data(), value.size());
    return reply(option, kRepInfo, out.data(), out.size()) != Next::kClose;
  };
  uint8_t exported[12];
  put16(exported, kInfoExport);
  put64(exported + 2, info_.size);
  put16(exported + 10, transmission_flags());
  uint8_t sizes[14];
  put16(sizes, kInfoBlockSize);
  put32(sizes + 2, 1);
  put32(sizes + 6, 4096);
  put32(sizes + 10, kMaxRequestBytes);
  if (reply(option, kRepInfo, exported, sizeof exported) == Next::kClose ||
      (want_name && !text(kInfoName, info_.name)) ||
      (want_description && !text(kInfoDescription, info_.description)) ||
      (want_block_size && reply(option, kRepInfo, sizes, sizeof sizes) == Next::kClose) ||
      reply(option, kRepAck) == Next::kClose) {
    return Next::kClose;
  }
  return option == kOptGo ? Next::kTransmission : Next::kOption;
}

Handshake::Next Handshake::meta_context(uint32_t option, const std::vector<uint8_t>& data) {
  const bool set = option == kOptSetMetaContext;
  if (set) state_.base_allocation = false;  // a new set replaces the old one, also a failed one
  Reader in{data};
  const std::string name = in.text(in.u32());
  const uint32_t queries = in.u32();
  bool wanted = !set && queries == 0;
  for (uint32_t i = 0; i < queries && in.ok; i++) {
    const std::string query = in.text(in.u32());
    if (query == kBaseAllocation || (!set && query == "base:")) wanted = true;
  }
  if (!in.finished() || (set && !state_.structured)) return reply(option, kRepErrInvalid);
  if (!known(name)) return reply(option, kRepErrUnknown, "no such export");
  if (wanted) {
    uint8_t out[4 + sizeof kBaseAllocation - 1];
    put32(out, set ? kContextId : 0);
    std::memcpy(out + 4, kBaseAllocation, sizeof kBaseAllocation - 1);
    if (reply(option, kRepMetaContext, out, sizeof out) == Next::kClose) return Next::kClose;
    if (set) state_.base_allocation = true;
  }
  return reply(option, kRepAck);
}

}  // namespace sf::nbd
