// The policy's options, and for tests the policy itself with virtual time.
#include "mcdist/policy_js.h"

#include "mcdist/policy.h"

namespace sf::mcdist {
namespace {

TimeNs milliseconds(const Napi::Object& options, const char* name, TimeNs missing) {
  const double ms = number_of(options, name, static_cast<double>(missing) / 1e6);
  if (ms < 0 || ms > 1e9) throw bad_option(options.Env(), name, "a number of milliseconds");
  return static_cast<TimeNs>(ms * 1e6);
}

double rate(const Napi::Object& options, const char* name, double missing, double least) {
  const double value = number_of(options, name, missing);
  if (value < least) throw bad_option(options.Env(), name, "a larger number");
  return value;
}

uint32_t count_of(const Napi::Object& options, const char* name, uint32_t missing, uint32_t least,
                  uint32_t most = UINT32_MAX) {
  const uint64_t value = whole_of(options, name, missing);
  if (value < least || value > most) {
    throw bad_option(options.Env(), name, value < least ? "a larger number" : "a smaller number");
  }
  return static_cast<uint32_t>(value);
}

constexpr unsigned kHistoryAgeShift = 56;
constexpr uint64_t kHistoryPage = (uint64_t{1} << kHistoryAgeShift) - 1;

bool flag(const Napi::Object& options, const char* name, bool missing) {
  return has(options, name) ? options.Get(name).ToBoolean()
                            : Napi::Boolean::New(options.Env(), missing);
}

PushMode push_of(const Napi::Object& options, PushMode missing) {
  if (!has(options, "push")) return missing;
  const std::string name = string_of(options, "push");
  if (name == "off") return PushMode::kOff;
  if (name == "subscribers") return PushMode::kSubscribers;
  if (name == "behind") return PushMode::kBehind;
  throw bad_option(options.Env(), "push", "'off', 'subscribers' or 'behind'");
}

std::vector<PageRange> ranges_of(const Napi::Object& options) {
  std::vector<PageRange> ranges;
  if (!has(options, "disjoint")) return ranges;
  if (!options.Get("disjoint").IsArray()) throw bad_option(options.Env(), "disjoint", "an array");
  const auto array = options.Get("disjoint").As<Napi::Array>();
  for (uint32_t i = 0; i < array.Length(); i++) {
    const Napi::Object range = object_of(array.Get(i), "disjoint");
    ranges.push_back({whole_of(range, "first", 0), whole_of(range, "count", 0)});
  }
  return ranges;
}

// As history_value() makes it.
std::vector<HistoryEntry> history_of(const Napi::Object& options) {
  std::vector<HistoryEntry> entries;
  if (!has(options, "history")) return entries;
  const Napi::Value value = options.Get("history");
  if (!value.IsBuffer() || value.As<Napi::Buffer<uint8_t>>().Length() % sizeof(uint64_t) != 0) {
    throw bad_option(options.Env(), "history", "a record that history() gave");
  }
  const auto bytes = value.As<Napi::Buffer<uint8_t>>();
  for (size_t at = 0; at < bytes.Length(); at += sizeof(uint64_t)) {
    uint64_t word;
    std::memcpy(&word, bytes.Data() + at, sizeof word);
    entries.push_back({word & kHistoryPage, static_cast<uint8_t>(word >> kHistoryAgeShift)});
  }
  return entries;
}

}  // namespace

Napi::Value history_value(Napi::Env env, const std::vector<HistoryEntry>& entries) {
  auto out = Napi::Buffer<uint8_t>::New(env, entries.size() * sizeof(uint64_t));
  for (size_t i = 0; i < entries.size(); i++) {
    const uint64_t word = (entries[i].page & kHistoryPage) | uint64_t{entries[i].age}
                                                                 << kHistoryAgeShift;
    std::memcpy(out.Data() + i * sizeof word, &word, sizeof word);
  }
  return out;
}

PolicyConfig policy_of(const Napi::Value& value) {
  PolicyConfig config;
  if (value.IsUndefined()) return config;
  const Napi::Object options = object_of(value, "policy");
  // Below 10 KB/s a page takes longer than any time-out.
  config.start_rate = rate(options, "startRateBytesPerS", config.start_rate, 1e4);
  config.min_rate = rate(options, "minRateBytesPerS", config.min_rate, 1e4);
  config.max_rate = rate(options, "maxRateBytesPerS", config.max_rate, 1e4);
  config.increase_per_s = rate(options, "increaseBytesPerSPerS", config.increase_per_s, 0);
  config.cut = rate(options, "cut", config.cut, 0);
  config.loss_tolerance = rate(options, "lossTolerance", config.loss_tolerance, 0);
  config.recover = rate(options, "recover", config.recover, 0);
  config.learn_noise = flag(options, "learnNoise", config.learn_noise);
  config.window = milliseconds(options, "windowMs", config.window);
  config.window_symbols = count_of(options, "windowSymbols", config.window_symbols, 1);
  config.probe = rate(options, "probe", config.probe, 1);
  config.probe_windows = count_of(options, "probeWindows", config.probe_windows, 1);
  config.probe_windows_max = count_of(options, "probeWindowsMax", config.probe_windows_max, 1);
  config.lockstep_window = milliseconds(options, "lockstepWindowMs", config.lockstep_window);
  config.lockstep_requests = count_of(options, "lockstepRequests", config.lockstep_requests, 0);
  config.flight_window = milliseconds(options, "flightWindowMs", config.flight_window);
  config.retry_window = milliseconds(options, "retryWindowMs", config.retry_window);
  config.queue_pages = count_of(options, "queuePages", config.queue_pages, 1);
  config.peer_pages = count_of(options, "peerPages", config.peer_pages, 1);
  config.push = push_of(options, config.push);
  config.push_delay = milliseconds(options, "pushDelayMs", config.push_delay);
  config.subscriber_silence =
      milliseconds(options, "subscriberSilenceMs", config.subscriber_silence);
  config.push_counters = count_of(options, "pushCounters", config.push_counters, 1, 255);
  config.parity = flag(options, "parity", config.parity);
  config.repair_gather = milliseconds(options, "repairGatherMs", config.repair_gather);
  config.endgame_share = rate(options, "endgameShare", config.endgame_share, 0);
  config.endgame_silence = milliseconds(options, "endgameSilenceMs", config.endgame_silence);
  config.disjoint = ranges_of(options);
  config.pack = flag(options, "pack", config.pack);
  if (options.Has("announceMs")) {
    const TimeNs interval = milliseconds(options, "announceMs", 0);
    if (interval < kMillisecond) throw bad_option(options.Env(), "announceMs", "1 or more");
    config.announce_unheard = interval;
  }
  config.history_pages = count_of(options, "historyPages", config.history_pages, 0, 1 << 24);
  config.history = history_of(options);
  if (config.min_rate > config.max_rate) {
    throw bad_option(options.Env(), "minRateBytesPerS", "at most maxRateBytesPerS");
  }
  return config;
}

namespace {

class PolicyJs : public Napi::ObjectWrap<PolicyJs> {
 public:
  static void Init(Napi::Env env, Napi::Object exports) {
    exports.Set("McdistPolicy", DefineClass(env, "McdistPolicy",
                                            {
                                                InstanceMethod("heard", &PolicyJs::Heard),
                                                InstanceMethod("request", &PolicyJs::Request),
                                                InstanceMethod("report", &PolicyJs::Report),
                                                InstanceMethod("next", &PolicyJs::Next),
                                                InstanceMethod("state", &PolicyJs::State),
                                                InstanceMethod("history", &PolicyJs::Record),
                                            }));
  }
  // (policy, pages)
  explicit PolicyJs(const Napi::CallbackInfo& info)
      : Napi::ObjectWrap<PolicyJs>(info),
        policy_(policy_of(info[0]),
                info[1].IsUndefined() ? uint64_t{1} << 20 : whole_of(info[1], "pages")) {}

 private:
  static TimeNs time(const Napi::Value& ms) {
    return static_cast<TimeNs>(number_of(ms, "nowMs") * 1e6);
  }
  // ({peer, receiveRateBytesPerS, unicastOnly, subscribe, history, roomBytes, nowMs})
  void Heard(const Napi::CallbackInfo& info) {
    const Napi::Object given = object_of(info[0], "heard");
    PeerReport report;
    report.receive_rate = number_of(given, "receiveRateBytesPerS", 0);
    report.unicast_only = given.Get("unicastOnly").ToBoolean();
    report.subscribe = given.Get("subscribe").ToBoolean();
    report.history = given.Get("history").ToBoolean();
    report.room_bytes = whole_of(given, "roomBytes", 0);
    policy_.heard(static_cast<uint32_t>(whole_of(given, "peer", 1)), report,
                  time(given.Get("nowMs")));
  }
  // ({peer, page, urgent, retry, fragments, nowMs}) -> verdict
  Napi::Value Request(const Napi::CallbackInfo& info) {
    const Napi::Object given = object_of(info[0], "request");
    static const char* const kNames[] = {"queued", "merged", "lockstep", "queue-full", "peer-full"};
    const auto verdict = policy_.request(
        static_cast<uint32_t>(whole_of(given, "peer", 1)), whole_of(given, "page", 0),
        given.Get("urgent").ToBoolean() ? Urgency::kFault : Urgency::kPrefetch,
        given.Get("retry").ToBoolean(), static_cast<uint8_t>(whole_of(given, "fragments", 0) & 0xf),
        time(given.Get("nowMs")));
    return Napi::String::New(info.Env(), kNames[static_cast<size_t>(verdict)]);
  }
  // ({peer, block, fragments, need, cover, wanted, missing: symbols, nowMs}) -> verdict
  Napi::Value Report(const Napi::CallbackInfo& info) {
    const Napi::Object given = object_of(info[0], "report");
    static const char* const kNames[] = {"taken", "on-its-way", "nothing", "full"};
    BlockReport report;
    report.block = whole_of(given, "block", 0);
    report.fragments = static_cast<uint8_t>(whole_of(given, "fragments", 3));
    report.cover = static_cast<uint8_t>(whole_of(given, "cover", 0));
    report.wanted = static_cast<uint32_t>(whole_of(given, "wanted", UINT32_MAX));
    const auto missing = given.Get("missing").As<Napi::Array>();
    for (uint32_t i = 0; i < missing.Length(); i++) {
      report.missing.add(static_cast<unsigned>(whole_of(missing.Get(i), "missing") % 128));
    }
    report.need = static_cast<uint8_t>(whole_of(given, "need", report.missing.count()));
    const auto verdict = policy_.report(static_cast<uint32_t>(whole_of(given, "peer", 1)), report,
                                        time(given.Get("nowMs")));
    return Napi::String::New(info.Env(), kNames[static_cast<size_t>(verdict)]);
  }
  // (nowMs, wireBytes, outcome) -> what is sent, which counts as done, or null
  Napi::Value Next(const Napi::CallbackInfo& info) {
    Policy::Item item;
    if (!policy_.next(time(info[0]), &item)) return info.Env().Null();
    Policy::Outcome outcome = Policy::Outcome::kData;
    if (info[2].IsString()) {
      outcome = info[2].As<Napi::String>().Utf8Value() == "zero" ? Policy::Outcome::kZero
                                                                 : Policy::Outcome::kRefused;
    }
    policy_.sent(item, outcome, whole_of(info[1], "wireBytes"), time(info[0]));
    static const char* const kKinds[] = {"page", "parity", "announce"};
    auto out = Napi::Object::New(info.Env());
    out.Set("kind", kKinds[static_cast<size_t>(item.kind)]);
    out.Set("page", static_cast<double>(item.page));
    out.Set("fragments", item.fragments);
    out.Set("peer", item.peer);
    out.Set("urgent", item.urgency == Urgency::kFault);
    out.Set("repair", item.repair);
    out.Set("pushed", item.pushed);
    out.Set("replayed", item.replayed);
    out.Set("cursor", item.cursor);
    out.Set("position", static_cast<double>(item.position));
    out.Set("coverId", item.parity.cover_id);
    out.Set("coverSymbols", item.parity.cover.count());
    out.Set("parityFirst", item.parity.index);
    out.Set("parities", item.parities);
    return out;
  }
  Napi::Value Record(const Napi::CallbackInfo& info) {
    return history_value(info.Env(), policy_.history());
  }
  Napi::Value State(const Napi::CallbackInfo& info) {  // (nowMs)
    auto out = Napi::Object::New(info.Env());
    const TimeNs ready = policy_.ready_at(time(info[0]));
    out.Set("queued", static_cast<double>(policy_.queued()));
    out.Set("subscribers", static_cast<double>(policy_.subscribers()));
    out.Set("rateBytesPerS", policy_.rate());
    out.Set("noise", policy_.noise());
    out.Set("meanReceiveRateBytesPerS", policy_.mean_receive_rate(time(info[0])));
    out.Set("readyAtMs", ready == kNever ? INFINITY : static_cast<double>(ready) / 1e6);
    out.Set("cuts", static_cast<double>(policy_.cuts()));
    out.Set("cutsUndone", static_cast<double>(policy_.cuts_undone()));
    out.Set("pushing", policy_.pushing());
    out.Set("historyPages", static_cast<double>(policy_.history_pages()));
    return out;
  }

  Policy policy_;
};

Exports exports_of_policy(&PolicyJs::Init);

}  // namespace
}  // namespace sf::mcdist
