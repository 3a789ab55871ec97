// Numbers of the NBD protocol (doc/proto.md of NetworkBlockDevice/nbd), and big-endian fields.
#pragma once

#include <endian.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace sf::nbd {

constexpr uint64_t kMagic = 0x4e42444d41474943;     // "NBDMAGIC"
constexpr uint64_t kOptMagic = 0x49484156454f5054;  // "IHAVEOPT"
constexpr uint64_t kOptReplyMagic = 0x0003e889045565a9;
constexpr uint32_t kRequestMagic = 0x25609513;
constexpr uint32_t kSimpleReplyMagic = 0x67446698;
constexpr uint32_t kStructuredReplyMagic = 0x668e33ef;

constexpr uint16_t kFixedNewstyle = 1, kNoZeroes = 2;  // handshake flags, both directions

enum Option : uint32_t {
  kOptExportName = 1,
  kOptAbort = 2,
  kOptList = 3,
  kOptStartTls = 5,
  kOptInfo = 6,
  kOptGo = 7,
  kOptStructuredReply = 8,
  kOptListMetaContext = 9,
  kOptSetMetaContext = 10,
};

enum OptionReply : uint32_t {
  kRepAck = 1,
  kRepServer = 2,
  kRepInfo = 3,
  kRepMetaContext = 4,
  kRepErrUnsup = 0x80000001,
  kRepErrPolicy = 0x80000002,
  kRepErrInvalid = 0x80000003,
  kRepErrTlsReqd = 0x80000005,
  kRepErrUnknown = 0x80000006,
  kRepErrTooBig = 0x80000009,
};

enum Info : uint16_t { kInfoExport = 0, kInfoName = 1, kInfoDescription = 2, kInfoBlockSize = 3 };

// Transmission flags.
constexpr uint16_t kHasFlags = 1, kReadOnly = 2, kSendFlush = 4, kSendFua = 8, kSendTrim = 32,
                   kSendWriteZeroes = 64, kSendDf = 128, kCanMultiConn = 256, kSendCache = 1024,
                   kSendFastZero = 2048;

enum Command : uint16_t {
  kRead = 0,
  kWrite = 1,
  kDisconnect = 2,
  kFlush = 3,
  kTrim = 4,
  kCache = 5,
  kWriteZeroes = 6,
  kBlockStatus = 7,
};

// Command flags.
constexpr uint16_t kFlagFua = 1, kFlagNoHole = 2, kFlagDf = 4, kFlagReqOne = 8, kFlagFastZero = 16;

constexpr uint16_t kChunkDone = 1;  // structured reply flag
enum Chunk : uint16_t {
  kChunkNone = 0,
  kChunkData = 1,
  kChunkHole = 2,
  kChunkBlockStatus = 5,
  kChunkError = 0x8001,
};

constexpr uint32_t kStateHole = 1, kStateZero = 2;  // base:allocation

// Metadata contexts: bits of a set, and the ids we give them.
constexpr uint8_t kContextAllocation = 1, kContextDepth = 2;
struct ContextName {
  uint8_t context;
  const char* space;  // with its colon
  const char* leaf;
};
constexpr ContextName kContexts[] = {{kContextAllocation, "base:", "allocation"},
                                     {kContextDepth, "qemu:", "allocation-depth"}};

constexpr size_t kRequestBytes = 28;
constexpr size_t kSimpleReplyBytes = 16;
constexpr size_t kChunkHeaderBytes = 20;
constexpr uint32_t kMaxRequestBytes = 32u << 20;
constexpr size_t kMaxString = 4096;  // names, descriptions, queries

struct Request {
  uint16_t flags = 0;
  uint16_t type = 0;
  uint64_t cookie = 0;
  uint64_t offset = 0;
  uint32_t length = 0;
};

inline uint16_t get16(const uint8_t* p) {
  uint16_t v;
  std::memcpy(&v, p, sizeof v);
  return be16toh(v);
}
inline uint32_t get32(const uint8_t* p) {
  uint32_t v;
  std::memcpy(&v, p, sizeof v);
  return be32toh(v);
}
inline uint64_t get64(const uint8_t* p) {
  uint64_t v;
  std::memcpy(&v, p, sizeof v);
  return be64toh(v);
}
inline void put16(uint8_t* p, uint16_t v) {
  v = htobe16(v);
  std::memcpy(p, &v, sizeof v);
}
inline void put32(uint8_t* p, uint32_t v) {
  v = htobe32(v);
  std::memcpy(p, &v, sizeof v);
}
inline void put64(uint8_t* p, uint64_t v) {
  v = htobe64(v);
  std::memcpy(p, &v, sizeof v);
}

// False if the magic is wrong: the stream has lost its place.
inline bool parse_request(const uint8_t* p, Request* out) {
  if (get32(p) != kRequestMagic) return false;
  out->flags = get16(p + 4);
  out->type = get16(p + 6);
  out->cookie = get64(p + 8);
  out->offset = get64(p + 16);
  out->length = get32(p + 24);
  return true;
}

inline void put_simple_reply(uint8_t* p, uint64_t cookie, uint32_t error) {
  put32(p, kSimpleReplyMagic);
  put32(p + 4, error);
  put64(p + 8, cookie);
}

inline void put_chunk(uint8_t* p, uint16_t flags, uint16_t type, uint64_t cookie, uint32_t length) {
  put32(p, kStructuredReplyMagic);
  put16(p + 4, flags);
  put16(p + 6, type);
  put64(p + 8, cookie);
  put32(p + 16, length);
}

}  // namespace sf::nbd
