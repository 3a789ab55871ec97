// JavaScript's view of the mcdist server.
#include "mcdist/js_common.h"
#include "mcdist/policy_js.h"
#include "mcdist/server.h"

namespace sf::mcdist {
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
                                                InstanceMethod("history", &ServerJs::Record),
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
  Napi::Value Record(const Napi::CallbackInfo& info) {
    const GenerationId id = generation_of(info[0]);
    auto entries = std::make_shared<std::vector<HistoryEntry>>();
    return Background::Run(
        info.Env(), [server = server_, id, entries] { *entries = server->history(id); },
        [entries](Napi::Env env) { return history_value(env, *entries); });
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
    sum(
        "rate_cuts_undone", [](const ServerStats& s) -> auto& { return s.rate_cuts_undone; });
    sum(
        "noise_ppm", [](const ServerStats& s) -> auto& { return s.noise_ppm; });
    sum(
        "subscribers", [](const ServerStats& s) -> auto& { return s.subscribers; });
    sum(
        "push_position", [](const ServerStats& s) -> auto& { return s.push_position; });
    sum(
        "pushing", [](const ServerStats& s) -> auto& { return s.pushing; });
    sum(
        "history_pages", [](const ServerStats& s) -> auto& { return s.history_pages; });
    set_number(out, "generations", all.size());
    set_number(out, "wrong_generation", server.stray().wrong_generation);
    set_number(out, "stray_packets", server.stray().bad_packets);
    return out;
  }

  std::shared_ptr<Server> server_;
  uint16_t port_ = 0;
  bool closed_ = false;
};

Exports exports_of_server(&ServerJs::Init);

}  // namespace
}  // namespace sf::mcdist
