// What each option of the handshake is answered.
#include <algorithm>

#include "blktap/nbd_handshake.h"

namespace sf::nbd {
namespace {

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
    if (bytes > kMaxString || !has(bytes)) {
      ok = false;
      return {};
    }
    at += bytes;
    return std::string(reinterpret_cast<const char*>(data.data()) + at - bytes, bytes);
  }
  bool finished() const { return ok && at == data.size(); }
};

// Whether `query` asks for a context; the wildcard (a namespace alone) lists, and selects nothing.
bool asks_for(const std::string& query, const ContextName& name, bool set) {
  return query == std::string(name.space) + name.leaf || (!set && query == name.space);
}

}  // namespace

uint16_t Handshake::transmission_flags(const ExportInfo& info) const {
  // Multi-conn: all connections share one disk, and a flush on any of them covers them all.
  uint16_t flags = kHasFlags | kSendFlush | kCanMultiConn | kSendCache;
  if (state_.structured) flags |= kSendDf;
  flags |= info.writable ? kSendFua | kSendTrim | kSendWriteZeroes | kSendFastZero : kReadOnly;
  return flags;
}

Handshake::Next Handshake::option(uint32_t option, const Data& data) {
  if (tls_missing() && option != kOptStartTls && option != kOptAbort) {
    if (option == kOptExportName) return Next::kClose;
    return reply(option, kRepErrTlsReqd, "the server wants TLS first");
  }
  switch (option) {
    case kOptExportName:
      return export_name(data);
    case kOptAbort:
      reply(option, kRepAck);
      return Next::kClose;
    case kOptList:
      return list(data);
    case kOptStartTls:
      return start_tls(data);
    case kOptInfo:
    case kOptGo:
      return info(option, data);
    case kOptStructuredReply:
      // Asked for again it is granted again: nothing forbids it, and nothing changes.
      if (!data.empty()) return reply(option, kRepErrInvalid, "the option takes no data");
      state_.structured = true;
      return reply(option, kRepAck);
    case kOptListMetaContext:
    case kOptSetMetaContext:
      return meta_context(option, data);
    default:
      return reply(option, kRepErrUnsup);
  }
}

// Credentials are read before the client is told to go ahead: afterwards no option can be answered.
Handshake::Next Handshake::start_tls(const Data& data) {
  if (entrance_.gate == nullptr) {
    return reply(kOptStartTls, kRepErrPolicy, "no TLS on this socket");
  }
  if (tls_ != nullptr) return reply(kOptStartTls, kRepErrInvalid, "TLS is in use already");
  if (!data.empty()) return reply(kOptStartTls, kRepErrInvalid, "the option takes no data");
  auto credentials = entrance_.gate->credentials();
  if (credentials == nullptr) {
    reply(kOptStartTls, kRepErrPolicy, "the server's TLS credentials cannot be used");
    return Next::kClose;
  }
  if (reply(kOptStartTls, kRepAck) == Next::kClose) return Next::kClose;
  tls_ = entrance_.gate->accept(stream_->fd(), std::move(credentials), deadline_ms_);
  if (tls_ == nullptr) return Next::kClose;
  stream_ = tls_.get();
  state_ = {};
  contexts_of_.reset();
  return entrance_.authenticated() ? Next::kOption : Next::kClose;
}

// The client has chosen. Contexts selected for another export are not for this one.
Export::Admission Handshake::enter(const std::shared_ptr<Export>& exported) {
  const Export::Admission admission = exported->admit(owner_);
  if (admission != Export::Admission::kIn) return admission;
  exported_ = exported;
  if (contexts_of_ != exported) state_.contexts = 0;
  return admission;
}

// The old way in: no error can be answered, only the door shut.
Handshake::Next Handshake::export_name(const Data& data) {
  const auto exported = exports_.find(std::string(data.begin(), data.end()));
  if (exported == nullptr || enter(exported) != Export::Admission::kIn) return Next::kClose;
  uint8_t out[10 + 124] = {};
  put64(out, exported->info().size);
  put16(out + 8, transmission_flags(exported->info()));
  return send(out, no_zeroes_ ? 10 : sizeof out) ? Next::kTransmission : Next::kClose;
}

Handshake::Next Handshake::list(const Data& data) {
  if (!data.empty()) return reply(kOptList, kRepErrInvalid, "the option takes no data");
  for (const auto& exported : exports_.list()) {
    const ExportInfo& info = exported->info();
    std::string entry(4, '\0');
    put32(reinterpret_cast<uint8_t*>(entry.data()), static_cast<uint32_t>(info.name.size()));
    entry += info.name + info.description;
    if (reply(kOptList, kRepServer, entry) == Next::kClose) return Next::kClose;
  }
  return reply(kOptList, kRepAck);
}

Handshake::Next Handshake::info(uint32_t option, const Data& data) {
  Reader in{data};
  const std::string name = in.text(in.u32());
  const uint16_t count = in.u16();
  std::vector<uint16_t> wanted;  // no more than there are bytes
  for (unsigned i = 0; i < count && in.ok; i++) wanted.push_back(in.u16());
  if (!in.finished()) return reply(option, kRepErrInvalid, "malformed option");
  const auto exported = exports_.find(name);
  if (exported == nullptr) return reply(option, kRepErrUnknown, "no such export");
  if (option == kOptInfo) return send_info(option, *exported, wanted);
  switch (enter(exported)) {
    case Export::Admission::kIn:
      return send_info(option, *exported, wanted) == Next::kClose ? Next::kClose
                                                                  : Next::kTransmission;
    case Export::Admission::kFull:
      return reply(option, kRepErrPolicy, "the export has as many connections as it may have");
    case Export::Admission::kClosed:
      break;
  }
  return reply(option, kRepErrUnknown, "no such export");
}

// Unknown requests for information are to be ignored.
Handshake::Next Handshake::send_info(uint32_t option, const Export& exported,
                                     const std::vector<uint16_t>& wanted) {
  const ExportInfo& info = exported.info();
  auto asked = [&](Info type) { return std::ranges::find(wanted, type) != wanted.end(); };
  auto text = [&](Info type, const std::string& value) {
    std::string out(2, '\0');
    put16(reinterpret_cast<uint8_t*>(out.data()), type);
    return reply(option, kRepInfo, out + value) != Next::kClose;
  };
  uint8_t main[12];
  put16(main, kInfoExport);
  put64(main + 2, info.size);
  put16(main + 10, transmission_flags(info));
  // The protocol's defaults: any alignment, pages preferred, 32 MiB at most.
  uint8_t sizes[14];
  put16(sizes, kInfoBlockSize);
  put32(sizes + 2, 1);
  put32(sizes + 6, 4096);
  put32(sizes + 10, kMaxRequestBytes);
  if (reply(option, kRepInfo, main, sizeof main) == Next::kClose ||
      (asked(kInfoName) && !text(kInfoName, info.name)) ||
      (asked(kInfoDescription) && !text(kInfoDescription, info.description)) ||
      (asked(kInfoBlockSize) && reply(option, kRepInfo, sizes, sizeof sizes) == Next::kClose)) {
    return Next::kClose;
  }
  return reply(option, kRepAck);
}

Handshake::Next Handshake::meta_context(uint32_t option, const Data& data) {
  const bool set = option == kOptSetMetaContext;
  if (set) state_.contexts = 0;  // a new set replaces the old one, also a failed one
  Reader in{data};
  const std::string name = in.text(in.u32());
  const uint32_t queries = in.u32();
  uint8_t found = 0;
  for (uint32_t i = 0; i < queries && in.ok; i++) {
    const std::string query = in.text(in.u32());
    for (const ContextName& context : kContexts) {
      if (asks_for(query, context, set)) found |= context.context;
    }
  }
  if (!in.finished()) return reply(option, kRepErrInvalid, "malformed option");
  if (set && !state_.structured) {
    return reply(option, kRepErrInvalid, "structured replies must be negotiated first");
  }
  const auto exported = exports_.find(name);
  if (exported == nullptr) return reply(option, kRepErrUnknown, "no such export");
  for (const ContextName& context : kContexts) {
    const bool all = !set && queries == 0;
    if (!all && (found & context.context) == 0) continue;
    std::string out(4, '\0');
    put32(reinterpret_cast<uint8_t*>(out.data()), set ? context.context : 0);
    out += std::string(context.space) + context.leaf;
    if (reply(option, kRepMetaContext, out) == Next::kClose) return Next::kClose;
  }
  if (set) {
    state_.contexts = found;
    contexts_of_ = exported;
  }
  return reply(option, kRepAck);
}

}  // namespace sf::nbd
