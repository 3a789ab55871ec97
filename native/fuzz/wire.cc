// Fuzzes mcdist's packets (native/mcdist/wire.h) and what the server decides on them
// (native/mcdist/policy.h): an input is datagrams that came, opened already, as of a member that
// lies. Sealing is tried apart: a packet that was altered opens never.
//
// What is decoded is what would be encoded, bit by bit: nothing that the document forbids passes.
// Whatever clients ask, the server's queues stay within their bounds, it sends pages and covers of
// the generation only, and comes to rest.
#include "mcdist/wire.h"

#include <sodium.h>

#include <algorithm>
#include <cstring>

#include "fuzz/support.h"
#include "mcdist/policy.h"

namespace sf::fuzz {
namespace {

using namespace sf::mcdist;

using Bytes = std::vector<uint8_t>;

void header_of(const Bytes& data) {
  Header header;
  if (!decode_header(data.data(), data.size(), &header)) return;
  expect(header.bytes() + kTagBytes <= data.size(), "a header is longer than its packet");
  Bytes back(header.bytes());
  encode_header(header, back.data());
  expect(std::equal(back.begin(), back.end(), data.begin()), "a header is encoded otherwise");
  if (header.type != Type::kParity) return;
  Parity parity;
  const size_t bytes = data.size() - kOverheadBytes;
  const Bytes body(data.begin() + kHeaderBytes, data.begin() + kHeaderBytes + bytes);
  if (!decode_parity(header, body.data(), body.size(), &parity)) return;
  uint8_t prefix[kParityFixed];
  encode_parity(parity, prefix);
  expect(std::equal(prefix, prefix + kParityFixed, body.begin()), "a parity is encoded otherwise");
}

void answers_of(const Bytes& body, uint64_t pages) {
  Bytes back;
  if (std::vector<Run> runs; decode_runs(body.data(), body.size(), pages, &runs)) {
    encode_runs(runs, &back);
    expect(back == body, "runs are encoded otherwise");
    for (const Run& run : runs) expect(run.first + run.count <= pages, "a run beyond the end");
  }
  if (Welcome welcome; decode_welcome(body.data(), body.size(), &welcome)) {
    encode_welcome(welcome, &back);
    expect(back == body, "a welcome is encoded otherwise");
  }
  if (Announce announce; decode_announce(body.data(), body.size(), pages, &announce)) {
    encode_announce(announce, &back);
    expect(back == body, "an announce is encoded otherwise");
    expect(announce.held <= pages && announce.position <= pages, "more than the generation");
  }
}

// A server without sockets, as Server::handle() and Server::pump() drive the policy.
class Host {
 public:
  explicit Host(FuzzedDataProvider* in)
      : in_(*in),
        pages_(in_.ConsumeIntegralInRange<uint64_t>(1, 300)),
        config_(config()),
        policy_(config_, pages_) {}

  void run() {
    for (int i = 0; i < 40 && in_.remaining_bytes() > 0; i++) {
      now_ += in_.ConsumeIntegralInRange<TimeNs>(0, 200) * kMillisecond;
      receive();
      if (in_.ConsumeBool()) send(in_.ConsumeIntegralInRange<size_t>(0, 64));
    }
    // Nobody speaks any more: all that is queued goes out, or is given up, in bounded time.
    for (int i = 0; i < 2000 && policy_.queued() > 0; i++) {
      now_ += 50 * kMillisecond;
      send(4096);
    }
    expect(policy_.queued() == 0, "the queue never empties");
  }

 private:
  PolicyConfig config() {
    PolicyConfig config;
    config.queue_pages = 64;
    config.peer_pages = 32;
    config.parity = in_.ConsumeBool();
    config.push = in_.PickValueInArray({PushMode::kOff, PushMode::kSubscribers, PushMode::kBehind});
    return config;
  }

  void receive() {
    const auto size = in_.ConsumeIntegralInRange<size_t>(0, 400);
    Bytes body = in_.ConsumeBytes<uint8_t>(size);
    if (in_.ConsumeBool()) fit(&body);
    answers_of(body, pages_);
    Request request;
    if (!decode_request(body.data(), body.size(), pages_, &request)) return;
    Bytes back;
    encode_request(request, &back);
    const size_t used =
        kRequestFixed + request.runs.size() * kRunBytes + request.reports.size() * kReportBytes;
    expect(back.size() == body.size() &&
               std::equal(back.begin(), back.begin() + static_cast<ptrdiff_t>(used), body.begin()),
           "a request is encoded otherwise");
    const auto peer = in_.ConsumeIntegralInRange<uint32_t>(1, 6);
    policy_.heard(peer,
                  {request.receive_kbps * 1000.0, request.unicast_only, request.subscribe,
                   request.history, request.room * kRoomUnit},
                  now_);
    for (const Run& run : request.runs) {
      for (uint32_t i = 0; i < run.count; i++) {
        policy_.request(peer, run.first + i, run.urgent ? Urgency::kFault : Urgency::kPrefetch,
                        run.retry, run.fragments & 7, now_);
      }
    }
    for (const BlockReport& report : request.reports) {
      if (report.fragments == 3) policy_.report(peer, report, now_);
    }
    expect(policy_.queued() <= 2 * size_t{config_.queue_pages} + 64, "the queue has no bound");
  }

  // Counts that fit the size, flags that exist: or hardly an input would be a request.
  void fit(Bytes* body) {
    if (body->size() < kMinRequestBody) body->resize(kMinRequestBody);
    const size_t room = body->size() - kRequestFixed;
    const auto reports = in_.ConsumeIntegralInRange<size_t>(0, room / kReportBytes);
    const size_t runs = std::min<size_t>((room - reports * kReportBytes) / kRunBytes, 255);
    Bytes& b = *body;
    b[12] &= 7;
    b[13] = b[14] = b[16] = b[18] = b[19] = b[22] = b[23] = 0;
    b[15] = static_cast<uint8_t>(runs);
    b[17] = static_cast<uint8_t>(reports);
    b.resize(std::max(kMinRequestBody, kRequestFixed + runs * kRunBytes + reports * kReportBytes));
    for (size_t i = 0; i < runs; i++) {
      uint8_t* run = &b[kRequestFixed + i * kRunBytes];
      run[0] &= 3;          // urgent, retry
      run[1] = run[2] = 0;  // one page, all of it
      run[3] = run[4] = run[5] = 0;
      run[6] = run[7] & 1;
      run[2] = 0;
    }
    for (size_t i = 0; i < reports; i++) {
      uint8_t* report = &b[kRequestFixed + runs * kRunBytes + i * kReportBytes];
      std::memset(report, 0, 7);
      report[7] %= (pages_ + kBlockPages - 1) / kBlockPages;
      report[8] = 3;
      report[9] %= 97;
      report[11] = 0;
    }
  }

  void send(size_t most) {
    Policy::Item item;
    for (size_t i = 0; i < most && policy_.next(now_, &item); i++) {
      if (item.kind != Policy::Item::Kind::kAnnounce) {
        expect(item.page < pages_, "a page beyond the end is sent");
      }
      if (item.kind == Policy::Item::Kind::kParity) {
        expect(!item.parity.cover.empty() && item.parity.cover.within(SymbolSet::Block(3)) &&
                   item.parity.index + item.parities <= 127 && item.parity.cover_id != 0,
               "a parity that cannot be one");
      }
      const auto outcome = in_.PickValueInArray(
          {Policy::Outcome::kData, Policy::Outcome::kZero, Policy::Outcome::kRefused});
      policy_.sent(item,
                   item.kind == Policy::Item::Kind::kAnnounce ? Policy::Outcome::kData : outcome,
                   4300, now_);
    }
  }

  FuzzedDataProvider& in_;
  const uint64_t pages_;
  const PolicyConfig config_;
  Policy policy_;
  TimeNs now_ = kSecond;
};

// What was sealed opens, and not once any of its bits is another one.
void seal_and_alter(FuzzedDataProvider* in) {
  GenerationId generation{};
  BootId boot{};
  in->ConsumeData(generation.data(), generation.size());
  in->ConsumeData(boot.data(), boot.size());
  const Key key{};
  Sealer sealer(generation, key, boot, Side::kServer);
  SenderKey opener(generation, key, boot, Side::kServer);
  const Bytes body = in->ConsumeBytes<uint8_t>(in->ConsumeIntegralInRange<size_t>(1, 1400));
  if (body.empty()) return;
  Header header;
  header.type = in->ConsumeBool() ? Type::kZero : Type::kAnnounce;
  Bytes packet(kLongOverheadBytes + body.size());
  packet.resize(sealer.seal(&header, body.data(), body.size(), packet.data()));
  Bytes clear(body.size());
  expect(opener.open(packet.data(), packet.size(), clear.data()) && clear == body,
         "a packet does not open");
  const auto bit = in->ConsumeIntegralInRange<size_t>(16, 8 * packet.size() - 1);
  packet[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
  expect(!opener.open(packet.data(), packet.size(), clear.data()), "an altered packet opens");
}

}  // namespace
}  // namespace sf::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace sf;
  static const bool ready = ::sodium_init() >= 0;
  fuzz::expect(ready, "libsodium does not initialize");
  if (size < 2) return 0;
  // Of its very size, so that AddressSanitizer sees a byte too far.
  const std::vector<uint8_t> rest(data + 1, data + size);
  FuzzedDataProvider in(rest.data(), rest.size());
  switch (data[0] % 4) {
    case 0:
      fuzz::header_of(rest);
      break;
    case 1:
      fuzz::seal_and_alter(&in);
      break;
    default:
      fuzz::Host(&in).run();
      break;
  }
  return 0;
}
