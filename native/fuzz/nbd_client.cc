#include "fuzz/nbd_client.h"

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cstring>

#include "fuzz/support.h"

namespace sf::fuzz {
namespace {

using nbd::get16;
using nbd::get32;
using nbd::get64;
using nbd::Request;

constexpr size_t kMaxOptionReply = 64 * 1024;

bool writes(const Request& r) {
  return r.type == nbd::kWrite || r.type == nbd::kTrim || r.type == nbd::kWriteZeroes;
}
bool inside(const Request& r) {
  return r.length > 0 && r.offset <= kDiskBytes && r.length <= kDiskBytes - r.offset;
}
uint8_t byte_of(const Request& r, size_t i) {
  return static_cast<uint8_t>(r.cookie * 59 + i * 7 + i / 256);
}

}  // namespace

void Wire::turn(bool sending) {
  pollfd fd = {socket_.get(), static_cast<short>(sending ? POLLIN | POLLOUT : POLLIN), 0};
  if (ended_) fd.events = POLLOUT;
  const int n = ::poll(&fd, 1, kPatienceMs);
  if (n == 0) fail("the server neither answers, nor reads, nor hangs up");
  if (ended_ || (fd.revents & (POLLIN | POLLHUP | POLLERR)) == 0) return;
  constexpr size_t kStep = 256 * 1024;
  const size_t had = in_.size();
  in_.resize(had + kStep);
  const ssize_t got = ::recv(socket_.get(), in_.data() + had, kStep, MSG_DONTWAIT);
  in_.resize(had + static_cast<size_t>(std::max<ssize_t>(got, 0)));
  if (got == 0 || (got < 0 && errno != EAGAIN && errno != EINTR)) ended_ = true;
}

void Wire::send(const void* data, size_t bytes) {
  const auto* p = static_cast<const uint8_t*>(data);
  while (bytes > 0) {
    const ssize_t n = ::send(socket_.get(), p, bytes, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (n >= 0) {
      p += n;
      bytes -= static_cast<size_t>(n);
    } else if (errno == EAGAIN || errno == EINTR) {
      turn(true);
    } else {
      return;
    }
  }
}

void Wire::end_sending() { ::shutdown(socket_.get(), SHUT_WR); }

bool Wire::fetch(size_t bytes) {
  if (at_ > (1 << 20)) {
    in_.erase(in_.begin(), in_.begin() + static_cast<ptrdiff_t>(at_));
    at_ = 0;
  }
  while (in_.size() - at_ < bytes && !ended_) turn(false);
  return in_.size() - at_ >= bytes;
}

const uint8_t* Wire::take(size_t bytes) {
  at_ += bytes;
  return in_.data() + at_ - bytes;
}

size_t Wire::drain() {
  size_t bytes = 0;
  for (; fetch(1); at_ = in_.size()) bytes += in_.size() - at_;
  return bytes;
}

bool Client::greet(uint32_t flags) {
  if (!wire_->fetch(18)) fail("the server hangs up before its greeting");
  const uint8_t* p = wire_->take(18);
  expect(get64(p) == nbd::kMagic && get64(p + 8) == nbd::kOptMagic, "the greeting has no magic");
  uint8_t out[4];
  nbd::put32(out, flags);
  wire_->send(out, sizeof out);
  return (flags & ~uint32_t{nbd::kFixedNewstyle | nbd::kNoZeroes}) == 0;
}

// Precondition: the option was sent whole.
bool Client::option(uint32_t option, const std::vector<uint8_t>& data, OptionAnswer* out) {
  if (option == nbd::kOptSetMetaContext) contexts_.clear();
  for (;;) {
    if (!wire_->fetch(20)) return false;
    const uint8_t* p = wire_->take(20);
    expect(get64(p) == nbd::kOptReplyMagic, "an option's reply has no magic");
    expect(get32(p + 8) == option, "an option's reply is for another option");
    const uint32_t type = get32(p + 12);
    const uint32_t bytes = get32(p + 16);
    expect(bytes <= kMaxOptionReply, "an option's reply is too long");
    if (!wire_->fetch(bytes)) return false;
    p = wire_->take(bytes);
    std::vector<uint8_t> payload(p, p + bytes);
    if (type == nbd::kRepInfo && bytes >= 2 && get16(payload.data()) == nbd::kInfoExport) {
      expect(bytes == 12, "NBD_INFO_EXPORT of a wrong length");
      exported(get64(payload.data() + 2), get16(payload.data() + 10));
    }
    if (type == nbd::kRepMetaContext && option == nbd::kOptSetMetaContext) {
      expect(bytes > 4, "a metadata context without a name");
      const uint32_t id = get32(payload.data());
      contexts_.insert(id);
      context_names_[id] = std::string(payload.begin() + 4, payload.end());
    }
    if (type == nbd::kRepAck || (type & 0x80000000u) != 0) {
      out->type = type;
      break;
    }
    out->replies.emplace_back(type, std::move(payload));
    expect(out->replies.size() < 64, "an option is answered without end");
  }
  const bool done = out->type == nbd::kRepAck;
  if (!done) {
    expect(out->replies.empty(), "an option fails after it had answers");
    if (option == nbd::kOptSetMetaContext) contexts_.clear();
  }
  if (done && option == nbd::kOptStructuredReply) structured_ = true;
  if (done && option == nbd::kOptGo) transmission_ = true;
  return true;
}

bool Client::export_name(const std::vector<uint8_t>& name, bool no_zeroes) {
  const size_t bytes = no_zeroes ? 10 : 134;
  if (!wire_->fetch(bytes)) return false;
  const uint8_t* p = wire_->take(bytes);
  exported(get64(p), get16(p + 8));
  transmission_ = true;
  return true;
}

void Client::exported(uint64_t size, uint16_t flags) {
  expect(size == kDiskBytes, "the export has another size than its device");
  expect(((flags & nbd::kReadOnly) == 0) == writable_, "an export's flags lie about writing");
  expect((flags & nbd::kHasFlags) != 0, "transmission flags without NBD_FLAG_HAS_FLAGS");
  flags_ = flags;
}

Request Client::with_cookie(Request request) {
  request.cookie = (++serial_ << 32) ^ 0x9e3779b97f4a7c15ull;
  return request;
}

void Client::send_request(const Request& r) {
  uint8_t out[nbd::kRequestBytes];
  nbd::put32(out, nbd::kRequestMagic);
  nbd::put16(out + 4, r.flags);
  nbd::put16(out + 6, r.type);
  nbd::put64(out + 8, r.cookie);
  nbd::put64(out + 16, r.offset);
  nbd::put32(out + 24, r.length);
  wire_->send(out, sizeof out);
}

void Client::send_payload(const Request& r, size_t bytes) {
  std::vector<uint8_t> payload(bytes);
  for (size_t i = 0; i < bytes; i++) payload[i] = byte_of(r, i);
  wire_->send(payload.data(), payload.size());
}

// What the protocol and the flags that the server gave leave no choice about.
void Client::classify(Pending* pending) const {
  const Request& r = pending->request;
  uint16_t good = (flags_ & nbd::kSendFua) != 0 ? nbd::kFlagFua : 0;
  bool known = true;
  switch (r.type) {
    case nbd::kRead:
      if (structured_) good |= nbd::kFlagDf;
      break;
    case nbd::kWrite:
    case nbd::kTrim:
      break;
    case nbd::kWriteZeroes:
      good |= nbd::kFlagNoHole;
      break;
    case nbd::kFlush:
      pending->must_succeed = r.offset == 0 && r.length == 0 && (r.flags & ~good) == 0;
      return;
    case nbd::kBlockStatus:
      good |= nbd::kFlagReqOne;
      if (contexts_.empty()) pending->must_fail = true;
      break;
    case 5:  // CACHE: a hint, offered or not
      known = false;
      break;
    default:
      pending->must_fail = true;
      return;
  }
  if (!inside(r) || (writes(r) && !writable_)) pending->must_fail = true;
  pending->must_succeed = known && !pending->must_fail && (r.flags & ~good) == 0;
}

bool Client::settle_overlaps(const Request& r) {
  if (!inside(r)) return true;
  for (const auto& [cookie, other] : pending_) {
    const Request& o = other.request;
    if (!inside(o) || !(writes(r) || writes(o))) continue;
    if (o.offset < r.offset + r.length && r.offset < o.offset + o.length) return settle();
  }
  return true;
}

bool Client::request(Request request) {
  if (!settle_overlaps(request)) return false;
  Pending pending;
  pending.request = with_cookie(request);
  classify(&pending);
  pending_[pending.request.cookie] = pending;
  send_request(pending.request);
  if (request.type == nbd::kWrite) send_payload(pending.request, request.length);
  return true;
}

bool Client::settle() {
  while (!pending_.empty()) {
    if (!answer()) fail("the server hangs up on a client that did nothing wrong");
  }
  return true;
}

void Client::finish(bool all) {
  while (answer()) {
  }
  if (all && !pending_.empty()) fail("the stream ends, and a request is not answered");
  for (const auto& [cookie, pending] : pending_) {
    const Request& r = pending.request;
    if (writes(r) && inside(r)) model_->forget(r.offset, r.length);
  }
}

Client::PendingMap::iterator Client::find(uint64_t cookie) {
  auto found = pending_.find(cookie);
  if (found == pending_.end()) fail("an answer to nothing that is under way");
  return found;
}

bool Client::answer() {
  if (!wire_->fetch(4)) return false;
  const uint32_t magic = get32(wire_->take(4));
  if (magic == nbd::kSimpleReplyMagic) return simple_answer();
  if (magic == nbd::kStructuredReplyMagic) return chunk();
  fail("a reply has no magic");
}

bool Client::simple_answer() {
  if (!wire_->fetch(12)) return false;
  const uint8_t* p = wire_->take(12);
  const uint32_t error = get32(p);
  const auto found = find(get64(p + 4));
  Pending& pending = found->second;
  if (pending.request.type == nbd::kRead) {
    expect(!structured_, "a simple reply to a read where structured ones were negotiated");
    if (error == 0) {
      const uint32_t length = pending.request.length;
      expect(!pending.must_fail, "an impossible read succeeds");
      if (!wire_->fetch(length)) return false;
      data(&pending, pending.request.offset, wire_->take(length), length);
    }
  }
  if (error == 0 && pending.request.type == nbd::kBlockStatus) fail("BLOCK_STATUS without chunks");
  end(found, error);
  return true;
}

bool Client::chunk() {
  if (!wire_->fetch(16)) return false;
  const uint8_t* p = wire_->take(16);
  expect(structured_, "a structured reply that was not negotiated");
  const uint16_t flags = get16(p);
  const uint16_t type = get16(p + 2);
  const auto found = find(get64(p + 4));
  const uint32_t bytes = get32(p + 12);
  expect(bytes <= kDiskBytes + 8 || type == nbd::kChunkBlockStatus, "a chunk is too long");
  expect(bytes <= nbd::kMaxRequestBytes, "a chunk is longer than any request may be");
  if (!wire_->fetch(bytes)) return false;
  p = wire_->take(bytes);
  const std::vector<uint8_t> payload(p, p + bytes);
  Pending& pending = found->second;
  uint32_t error = 0;
  switch (type) {
    case nbd::kChunkNone:
      expect(bytes == 0, "an empty chunk with bytes");
      break;
    case nbd::kChunkData:
      expect(bytes > 8, "a data chunk without data");
      data(&pending, get64(payload.data()), payload.data() + 8, bytes - 8);
      break;
    case nbd::kChunkHole:
      expect(bytes == 12, "a hole of a wrong length");
      hole(&pending, get64(payload.data()), get32(payload.data() + 8));
      break;
    case nbd::kChunkBlockStatus:
      status(&pending, payload);
      break;
    case nbd::kChunkError:
      expect(bytes >= 6 && get16(payload.data() + 4) == bytes - 6, "an error of a wrong length");
      error = get32(payload.data());
      expect(error != 0, "an error chunk that says success");
      break;
    default:
      fail("a chunk of an unknown type");
  }
  if ((flags & nbd::kChunkDone) != 0) {
    end(found, error);
  } else if (error != 0) {
    pending.failed = true;
  }
  return true;
}

void Client::data(Pending* pending, uint64_t off, const uint8_t* bytes, uint32_t len) {
  const Request& r = pending->request;
  expect(r.type == nbd::kRead && off >= r.offset && off + len <= r.offset + r.length,
         "data that was not asked for");
  expect(inside(r), "data from outside the disk");
  pending->got += len;
  expect(model_->agrees(off, bytes, len), "a read gives other bytes than were written");
}

void Client::hole(Pending* pending, uint64_t off, uint32_t len) {
  const Request& r = pending->request;
  expect(r.type == nbd::kRead && len > 0 && off >= r.offset && off + len <= r.offset + r.length,
         "a hole that was not asked for");
  pending->got += len;
  expect(model_->zeros(off, len), "a read gives zeros where something was written");
}

void Client::status(Pending* pending, const std::vector<uint8_t>& payload) {
  const Request& r = pending->request;
  expect(r.type == nbd::kBlockStatus, "extents that were not asked for");
  expect(payload.size() >= 12 && payload.size() % 8 == 4, "extents of a wrong length");
  const uint32_t context = get32(payload.data());
  expect(contexts_.contains(context), "extents of a context that was not negotiated");
  expect(pending->contexts.insert(context).second, "extents of one context twice");
  if ((r.flags & nbd::kFlagReqOne) != 0) expect(payload.size() == 12, "more than one extent");
  const bool allocation = context_names_[context] == "base:allocation";
  uint64_t off = r.offset;
  for (size_t at = 4; at < payload.size(); at += 8) {
    const uint32_t len = get32(payload.data() + at);
    expect(len > 0 && len <= r.offset + r.length - off, "extents beyond the request");
    if (allocation && (get32(payload.data() + at + 4) & nbd::kStateZero) != 0) {
      expect(model_->zeros(off, len), "an extent said to be zeros is not");
    }
    off += len;
  }
}

void Client::end(PendingMap::iterator found, uint32_t error) {
  const Pending& pending = found->second;
  const Request& r = pending.request;
  const bool failed = error != 0 || pending.failed;
  if (failed && pending.must_succeed) {
    fail("a request in order (type " + std::to_string(r.type) + ") fails with " +
         std::to_string(error));
  }
  if (!failed) {
    if (pending.must_fail) {
      fail("an impossible request (type " + std::to_string(r.type) + ") succeeds");
    }
    if (r.type == nbd::kRead) expect(pending.got == r.length, "a read is answered in part");
    if (r.type == nbd::kBlockStatus) {
      expect(pending.contexts == contexts_, "extents of a context are missing");
    }
    if (r.type == nbd::kWrite) {
      std::vector<uint8_t> payload(r.length);
      for (size_t i = 0; i < payload.size(); i++) payload[i] = byte_of(r, i);
      model_->write(r.offset, payload.data(), payload.size());
    }
    if (r.type == nbd::kWriteZeroes) model_->zero(r.offset, r.length);
    if (r.type == nbd::kTrim) model_->trim(r.offset, r.length);
  }
  pending_.erase(found);
}

}  // namespace sf::fuzz
