// JavaScript's view of the mcdist server and, for tests and the simulator, of its policy.
#include "mcdist/js_common.h"
#include "mcdist/server.h"

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

}  // namespace

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
  config.loss_min_pages =
      static_cast<uint32_t>(rate(options, "lossMinPages", config.loss_min_pages, 1));
  config.loss_interval = milliseconds(options, "lossIntervalMs", config.loss_interval);
  config.lockstep_window = milliseconds(options, "lockstepWindowMs", config.lockstep_window);
  config.lockstep_requests =
      static_cast<uint32_t>(rate(options, "lockstepRequests", config.lockstep_requests, 0));
  config.retry_window = milliseconds(options, "retryWindowMs", config.retry_window);
  config.queue_pages = static_cast<uint32_t>(rate(options, "queuePages", config.queue_pages, 1));
  config.peer_pages = static_cast<uint32_t>(rate(options, "peerPages", config.peer_pages, 1));
  if (config.min_rate > config.max_rate) {
    throw bad_option(options.Env(), "minRateBytesPerS", "at most maxRateBytesPerS");
  }
  return config;
}

namespace {

class ServerJs : public Napi::ObjectWrap<ServerJs> {
 public:
  static void Init(Napi::Env env, Napi::Object exports) {
    exports.Set("McdistServer", DefineClass(env, "McdistServer",
                                            {
                                                InstanceAccessor("port", &ServerJs::Port, nullptr),
                                                InstanceMethod("serve", &ServerJs::Serve),
                                                InstanceMethod("unserve", &ServerJs::Unserve),
                                                InstanceMethod("stats", &ServerJs::Stats),
                                                InstanceMethod("close", &ServerJs::Close),
                                            }));
  }

  explicit ServerJs(const Napi::CallbackInfo& info) : Napi::ObjectWrap<ServerJs>(info) {
    const Napi::Object given = object_of(info[0], "options");
    Server::Options options;
    options.bind = address_of(given, "bindAddress", "port");
    options.interface_address = interface_of(given);
    options.mtu_bytes = whole_of(given, "mtuBytes", options.mtu_bytes);
    options.ttl = static_cast<int>(std::min<uint64_t>(whole_of(given, "ttl", 1), 255));
    throw_if(info.Env(), Server::Open(options, &server_));
    port_ = server_->port();
  }

 private:
  Server& open(Napi::Env env) {
    if (closed_) throw js_error(env, Status::Error("E_CLOSED", "the mcdist server is closed"));
    return *server_;
  }
  Napi::Value Port(const Napi::CallbackInfo& info) { return Napi::Number::New(info.Env(), port_); }
  void Serve(const Napi::CallbackInfo& info) {
    Server& server = open(info.Env());
    const Napi::Object given = object_of(info[0], "options");
    Server::Generation generation;
    generation.id = generation_of(given.Get("generation"));
    generation.key = key_of(given);
    generation.provider = unwrap_provider(given.Get("provider"));
    generation.group = group_of(given);
    generation.policy = policy_of(given.Get("policy"));
    throw_if(info.Env(), server.serve(std::move(generation)));
  }
  Napi::Value Unserve(const Napi::CallbackInfo& info) {
    const GenerationId id = generation_of(info[0]);
    return Background::Run(info.Env(), [server = server_, id] { server->unserve(id); });
  }
  Napi::Value Close(const Napi::CallbackInfo& info) {
    closed_ = true;
    return Background::Run(info.Env(), [server = server_] { server->close(); });
  }
  Napi::Value Stats(const Napi::CallbackInfo& info) {
    Server& server = open(info.Env());
    std::vector<std::shared_ptr<const ServerStats>> all;
    if (info[0].IsUndefined()) {
      all = server.all_stats();
    } else {
      auto one = server.stats(generation_of(info[0]));
      if (one == nullptr) {
        throw js_error(info.Env(), Status::Error("E_NOT_FOUND", "the generation is not served"));
      }
      all.push_back(one);
    }
    auto out = Napi::Object::New(info.Env());
    const auto sum = [&](const char* name, auto get) {
      uint64_t total = 0;
      for (const auto& stats : all) total += get(*stats).load(std::memory_order_relaxed);
      set_number(out, name, total);
    };
#define SF_COUNTER(name) \
  sum(                   \
      #name, [](const ServerStats& s) -> auto& { return s.counters.name; });
    SF_MCDIST_SERVER_COUNTERS(SF_COUNTER)
#undef SF_COUNTER
    sum(
        "queued_pages", [](const ServerStats& s) -> auto& { return s.queued; });
    sum(
        "peers", [](const ServerStats& s) -> auto& { return s.peers; });
    sum(
        "rate_limit_bytes_per_s", [](const ServerStats& s) -> auto& { return s.rate; });
    sum(
        "mean_receive_rate_bytes_per_s",
        [](const ServerStats& s) -> auto& { return s.mean_receive_rate; });
    sum(
        "rate_cuts", [](const ServerStats& s) -> auto& { return s.rate_cuts; });
    set_number(out, "generations", all.size());
    set_number(out, "wrong_generation", server.stray().wrong_generation);
    set_number(out, "stray_packets", server.stray().bad_packets);
    return out;
  }

  std::shared_ptr<Server> server_;
  uint16_t port_ = 0;
  bool closed_ = false;
};

// The policy with virtual time: what a test or simulator drives.
class PolicyJs : public Napi::ObjectWrap<PolicyJs> {
 public:
  static void Init(Napi::Env env, Napi::Object exports) {
    exports.Set("McdistPolicy", DefineClass(env, "McdistPolicy",
                                            {
                                                InstanceMethod("request", &PolicyJs::Request),
                                                InstanceMethod("report", &PolicyJs::Report),
                                                InstanceMethod("next", &PolicyJs::Next),
                                                InstanceMethod("state", &PolicyJs::State),
                                            }));
  }
  explicit PolicyJs(const Napi::CallbackInfo& info)
      : Napi::ObjectWrap<PolicyJs>(info), policy_(policy_of(info[0])) {}

 private:
  static TimeNs time(const Napi::Value& ms) {
    return static_cast<TimeNs>(number_of(ms, "nowMs") * 1e6);
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
  void Report(const Napi::CallbackInfo& info) {  // (peer, bytesPerS, nowMs)
    policy_.report(static_cast<uint32_t>(whole_of(info[0], "peer")),
                   number_of(info[1], "bytesPerS"), time(info[2]));
  }
  // (nowMs, wireBytes) -> {page, fragments, urgent}, which counts as sent, or null
  Napi::Value Next(const Napi::CallbackInfo& info) {
    Policy::Item item;
    if (!policy_.next(time(info[0]), &item)) return info.Env().Null();
    policy_.sent(item, whole_of(info[1], "wireBytes"), time(info[0]));
    auto out = Napi::Object::New(info.Env());
    out.Set("page", static_cast<double>(item.page));
    out.Set("fragments", item.fragments);
    out.Set("urgent", item.urgency == Urgency::kFault);
    return out;
  }
  Napi::Value State(const Napi::CallbackInfo& info) {  // (nowMs)
    auto out = Napi::Object::New(info.Env());
    const TimeNs ready = policy_.ready_at(time(info[0]));
    out.Set("queued", static_cast<double>(policy_.queued()));
    out.Set("rateBytesPerS", policy_.rate());
    out.Set("meanReceiveRateBytesPerS", policy_.mean_receive_rate(time(info[0])));
    out.Set("readyAtMs", ready == kNever ? INFINITY : static_cast<double>(ready) / 1e6);
    out.Set("cuts", static_cast<double>(policy_.cuts()));
    return out;
  }

  Policy policy_;
};

Exports exports_of_server(&ServerJs::Init);
Exports exports_of_policy(&PolicyJs::Init);

}  // namespace
}  // namespace sf::mcdist
