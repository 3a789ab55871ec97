// Fuzzes the NBD server: a real Server, Connection, Store and Disk behind a Unix socket.
//
// Two forms of input, by the lowest bit of the first byte:
//   raw         the rest is what the client sends, as it stands. Nobody knows what the answers
//               should be; the server must survive it, hang up, and leave old generations alone.
//   structured  the rest decides what a client does that can speak NBD: options, then requests,
//   with
//               lengths, counts, names and flags that may lie. Every answer is checked
//               (nbd_client.h), and at the end the disk against a model.
// The next bits: a generation is served, read-only; the server does without io_uring.
//
// Left out: several connections at once and replicas as bases (test/blktap has both), TLS.
#include <algorithm>
#include <array>
#include <cstdlib>

#include "fuzz/nbd_client.h"
#include "fuzz/support.h"

namespace sf::fuzz {
namespace {

using nbd::Request;
using Bytes = std::vector<uint8_t>;

constexpr int kMaxOptions = 24;
constexpr int kMaxRequests = 160;
constexpr uint32_t kMaxPayload = 192 * 1024;  // of what is really sent

void add32(Bytes* out, uint32_t value) {
  out->resize(out->size() + 4);
  nbd::put32(out->data() + out->size() - 4, value);
}
void add16(Bytes* out, uint16_t value) {
  out->resize(out->size() + 2);
  nbd::put16(out->data() + out->size() - 2, value);
}
void add_text(Bytes* out, const std::string& text) {
  out->insert(out->end(), text.begin(), text.end());
}

class Script {
 public:
  Script(const uint8_t* data, size_t size, bool old)
      : in_(data, size),
        disk_(old),
        model_(disk_.model()),
        wire_(disk_.connect()),
        client_(&wire_, &model_, disk_.writable()) {}

  void run() {
    if (options()) {
      requests();
    } else {
      wire_.end_sending();
      wire_.drain();
    }
    disk_.finish(model_);
  }

 private:
  // True once in `n` times.
  bool rarely(int n) { return in_.ConsumeIntegralInRange<int>(0, n) == n; }
  template <typename T, size_t N>
  T pick(const T (&values)[N]) {
    return in_.PickValueInArray(values);
  }

  std::string name() {
    if (!rarely(3)) return in_.ConsumeBool() ? "disk" : "";
    if (rarely(4)) return std::string(in_.ConsumeIntegralInRange<size_t>(0, 5000), 'x');
    return in_.ConsumeRandomLengthString(40);
  }
  std::string query() {
    static const std::string queries[] = {"base:allocation", "base:", "qemu:allocation-depth",
                                          "qemu:",           "",      "base:allocatio"};
    if (rarely(5)) return in_.ConsumeRandomLengthString(40);
    return queries[in_.ConsumeIntegralInRange<size_t>(0, std::size(queries) - 1)];
  }
  // A count or a length that may lie.
  uint32_t told(size_t truth) {
    if (!rarely(15)) return static_cast<uint32_t>(truth);
    if (in_.ConsumeBool()) return in_.ConsumeIntegral<uint32_t>();
    return static_cast<uint32_t>(truth + in_.ConsumeIntegralInRange<uint32_t>(0, 8) - 4);
  }

  Bytes option_data(uint32_t option) {
    Bytes out;
    switch (option) {
      case nbd::kOptExportName:
        add_text(&out, name());
        break;
      case nbd::kOptInfo:
      case nbd::kOptGo: {
        const std::string text = name();
        add32(&out, told(text.size()));
        add_text(&out, text);
        const size_t count = in_.ConsumeIntegralInRange<size_t>(0, 5);
        add16(&out, static_cast<uint16_t>(told(count)));
        for (size_t i = 0; i < count; i++) add16(&out, in_.ConsumeIntegralInRange<uint16_t>(0, 5));
        break;
      }
      case nbd::kOptListMetaContext:
      case nbd::kOptSetMetaContext: {
        const std::string text = name();
        add32(&out, told(text.size()));
        add_text(&out, text);
        const size_t count = in_.ConsumeIntegralInRange<size_t>(0, 4);
        add32(&out, told(count));
        for (size_t i = 0; i < count; i++) {
          const std::string asked = query();
          add32(&out, told(asked.size()));
          add_text(&out, asked);
        }
        break;
      }
      default:
        if (rarely(7)) out = in_.ConsumeBytes<uint8_t>(in_.ConsumeIntegralInRange<size_t>(0, 64));
    }
    if (rarely(15)) out.resize(out.size() + in_.ConsumeIntegralInRange<size_t>(1, 8));
    if (rarely(31)) out.resize(in_.ConsumeIntegralInRange<size_t>(16'000, 80'000));
    return out;
  }

  // True: the transmission phase begins.
  bool options() {
    const bool no_zeroes = in_.ConsumeBool();
    const uint32_t flags = rarely(15) ? in_.ConsumeIntegral<uint32_t>()
                                      : nbd::kFixedNewstyle + (no_zeroes ? nbd::kNoZeroes : 0);
    if (!client_.greet(flags)) return false;
    static const uint32_t kinds[] = {nbd::kOptStructuredReply,
                                     nbd::kOptSetMetaContext,
                                     nbd::kOptGo,
                                     nbd::kOptInfo,
                                     nbd::kOptList,
                                     nbd::kOptListMetaContext,
                                     nbd::kOptExportName,
                                     nbd::kOptAbort};
    for (int i = 0; i < kMaxOptions; i++) {
      // Most clients that send anything want to get in.
      uint32_t option = i > 1 && in_.ConsumeBool() ? uint32_t{nbd::kOptGo} : pick(kinds);
      if (rarely(15)) option = in_.ConsumeIntegral<uint32_t>();
      const Bytes data = option_data(option);
      const uint32_t told_bytes = told(data.size());
      uint8_t header[16];
      nbd::put64(header, rarely(63) ? in_.ConsumeIntegral<uint64_t>() : nbd::kOptMagic);
      nbd::put32(header + 8, option);
      nbd::put32(header + 12, told_bytes);
      wire_.send(header, sizeof header);
      wire_.send(data.data(), data.size());
      if (nbd::get64(header) != nbd::kOptMagic || told_bytes != data.size()) return false;
      if (option == nbd::kOptExportName) {
        // Every other way in has an answer.
        return client_.export_name(data, (flags & nbd::kNoZeroes) != 0);
      }
      OptionAnswer answer;
      if (!client_.option(option, data, &answer)) {
        fail("the server hangs up on an option that is whole");
      }
      if (option == nbd::kOptAbort) return false;
      if (client_.transmission()) return true;
    }
    return false;
  }

  uint64_t offset() {
    static const uint64_t edges[] = {
        0,          kPageBytes,        64 * kPageBytes,          kDiskBytes - 1000, kDiskBytes - 1,
        kDiskBytes, uint64_t{1} << 63, ~uint64_t{0} - kPageBytes};
    switch (in_.ConsumeIntegralInRange<int>(0, 15)) {
      case 0:
        return in_.ConsumeIntegral<uint64_t>();
      case 1:
      case 2:
        return pick(edges);
      case 3:
      case 4:
      case 5:
      case 6:
        return in_.ConsumeIntegralInRange<uint64_t>(0, kDiskBytes);
      default:
        return in_.ConsumeIntegralInRange<uint64_t>(0, 70) * kPageBytes;
    }
  }
  uint32_t length(uint64_t off) {
    const auto rest = static_cast<uint32_t>(off < kDiskBytes ? kDiskBytes - off : 0);
    switch (in_.ConsumeIntegralInRange<int>(0, 15)) {
      case 0:
        return in_.ConsumeIntegral<uint32_t>();
      case 1:
        return rest + in_.ConsumeIntegralInRange<uint32_t>(0, 2);
      case 2:
      case 3:
        return rest;
      case 4:
      case 5:
        return std::min(rest, in_.ConsumeIntegralInRange<uint32_t>(0, kMaxPayload));
      case 6:
      case 7:
      case 8:
        return std::min(rest, in_.ConsumeIntegralInRange<uint32_t>(1, 9000));
      default:
        return std::min<uint32_t>(rest, in_.ConsumeIntegralInRange<uint32_t>(1, 20) * kPageBytes);
    }
  }
  Request request() {
    static const uint16_t kinds[] = {nbd::kRead,  nbd::kRead,       nbd::kWrite,       nbd::kWrite,
                                     nbd::kWrite, nbd::kTrim,       nbd::kWriteZeroes, nbd::kFlush,
                                     5,           nbd::kBlockStatus};
    static const uint16_t flags[] = {
        0, 0, 0, nbd::kFlagFua, nbd::kFlagNoHole, nbd::kFlagDf, nbd::kFlagReqOne, 16};
    Request r;
    r.type = pick(kinds);
    if (rarely(31)) r.type = in_.ConsumeIntegral<uint16_t>();
    r.flags = rarely(31) ? in_.ConsumeIntegral<uint16_t>() : pick(flags);
    if (r.type == nbd::kFlush && !rarely(7)) return r;
    r.offset = offset();
    r.length = length(r.offset);
    if (r.type == nbd::kDisconnect) r.type = nbd::kRead;
    return r;
  }

  void requests() {
    for (int i = 0; i < kMaxRequests && in_.remaining_bytes() > 0; i++) {
      const int what = in_.ConsumeIntegralInRange<int>(0, 31);
      if (what == 31 && disk_.writable()) {
        client_.settle();
        disk_.fork(model_);
      }
      if (what == 30) client_.settle();
      const Request r = request();
      if (r.type == nbd::kWrite && r.length > kMaxPayload) return break_off(r);
      client_.request(r);
      if (what == 29) return break_off(r);
    }
    leave();
  }

  // In the middle of a request. What is under way may go unanswered; the request itself must have
  // no effect.
  void break_off(const Request& like) {
    if (in_.ConsumeBool()) client_.settle();
    Request r = client_.with_cookie(like);
    if (r.type == nbd::kWrite) {
      r.length = std::max(r.length, uint32_t{1});
      client_.send_request(r);
      client_.send_payload(
          r,
          std::min<uint32_t>(in_.ConsumeIntegralInRange<uint32_t>(0, kMaxPayload), r.length - 1));
    } else {
      Bytes bytes(in_.ConsumeIntegralInRange<size_t>(1, nbd::kRequestBytes + 30), 0x25);
      wire_.send(bytes.data(), bytes.size());
    }
    wire_.end_sending();
    client_.finish(false);
  }

  // Both ways to leave have all requests answered before the end; after the first nothing counts.
  void leave() {
    if (in_.ConsumeBool()) {
      Request r;
      r.type = nbd::kDisconnect;
      client_.send_request(client_.with_cookie(r));
      r.type = nbd::kWrite;
      r.length = 100;
      if (in_.ConsumeBool()) {
        client_.send_request(client_.with_cookie(r));
        client_.send_payload(r, r.length);
      }
    }
    wire_.end_sending();
    client_.finish(true);
  }

  FuzzedDataProvider in_;
  ServedDisk disk_;
  Model model_;
  Wire wire_;
  Client client_;
};

void raw(const uint8_t* data, size_t size, bool old) {
  ServedDisk disk(old);
  Model model = disk.model();
  Wire wire(disk.connect());
  wire.send(data, size);
  wire.end_sending();
  wire.drain();
  model.forget(0, kDiskBytes);
  disk.finish(model);
}

}  // namespace
}  // namespace sf::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 1) return 0;
  ::setenv("SNOWFLOCK_IO_URING", (data[0] & 4) != 0 ? "0" : "1", 1);  // no thread runs now
  const bool old = (data[0] & 2) != 0;
  if ((data[0] & 1) != 0) {
    sf::fuzz::raw(data + 1, size - 1, old);
  } else {
    sf::fuzz::Script(data + 1, size - 1, old).run();
  }
  return 0;
}
