// JavaScript's view of the mcdist client.
#include <arpa/inet.h>

#include "mcdist/client.h"
#include "mcdist/js_common.h"

namespace sf::mcdist {
namespace {

// Carries the end of a fetch from any thread to the JavaScript thread; one per environment. The
// replica may hold a waiter longer than the environment lives: `gone` is then set, and the end is
// dropped.
class Arrivals : public std::enable_shared_from_this<Arrivals> {
 public:
  static std::shared_ptr<Arrivals> Of(Napi::Env env) {
    static thread_local std::shared_ptr<Arrivals> arrivals;
    if (arrivals == nullptr || arrivals->gone_) {
      arrivals = std::make_shared<Arrivals>();
      arrivals->function_ = Napi::ThreadSafeFunction::New(env, Napi::Function(), "mcdist fetch", 0,
                                                          1, [self = arrivals](Napi::Env) {
                                                            std::lock_guard lock(self->mutex_);
                                                            self->gone_ = true;
                                                          });
      arrivals->function_.Unref(env);
    }
    return arrivals;
  }

  Napi::Value fetch(Napi::Env env, Replica& replica, PageIndex page) {
    auto* fetch = new Fetch{Napi::Promise::Deferred::New(env), {}, shared_from_this()};
    const Napi::Value promise = fetch->deferred.Promise();
    if (outstanding_++ == 0) function_.Ref(env);  // the process stays while somebody awaits
    replica.want(page, [self = shared_from_this(), fetch](const Status& status) {
      fetch->status = status;
      std::lock_guard lock(self->mutex_);
      if (!self->gone_) self->function_.NonBlockingCall(fetch, &Settle);
    });
    return promise;
  }

 private:
  struct Fetch {
    Napi::Promise::Deferred deferred;
    Status status;
    std::shared_ptr<Arrivals> arrivals;
  };
  static void Settle(Napi::Env env, Napi::Function, Fetch* fetch) {
    const std::unique_ptr<Fetch> owned(fetch);
    if (static_cast<napi_env>(env) == nullptr) return;  // the environment is being torn down
    Napi::HandleScope scope(env);
    if (--fetch->arrivals->outstanding_ == 0) fetch->arrivals->function_.Unref(env);
    if (fetch->status.ok()) {
      fetch->deferred.Resolve(env.Undefined());
    } else {
      fetch->deferred.Reject(js_error(env, fetch->status).Value());
    }
  }

  std::mutex mutex_;
  bool gone_ = false;
  size_t outstanding_ = 0;  // of the JavaScript thread
  Napi::ThreadSafeFunction function_;
};

class ClientJs : public Napi::ObjectWrap<ClientJs> {
 public:
  static void Init(Napi::Env env, Napi::Object exports) {
    exports.Set("McdistClient", DefineClass(env, "McdistClient",
                                            {
                                                InstanceMethod("fetch", &ClientJs::Fetch),
                                                InstanceMethod("prefetch", &ClientJs::Prefetch),
                                                InstanceMethod("subscribe", &ClientJs::Subscribe),
                                                InstanceMethod("setServer", &ClientJs::SetServer),
                                                InstanceMethod("stats", &ClientJs::Stats),
                                                InstanceMethod("close", &ClientJs::Close),
                                            }));
  }

  explicit ClientJs(const Napi::CallbackInfo& info) : Napi::ObjectWrap<ClientJs>(info) {
    const Napi::Object given = object_of(info[0], "options");
    Client::Options options;
    options.generation = generation_of(given.Get("generation"));
    options.key = key_of(given);
    options.server = server_of(given.Get("server"));
    options.group = group_of(given);
    options.interface_address = interface_of(given);
    options.mtu_bytes = whole_of(given, "mtuBytes", options.mtu_bytes);
    options.history = has(given, "history") && given.Get("history").ToBoolean();
    const double timeout_ms =
        number_of(given, "sourceTimeoutMs", static_cast<double>(options.source_timeout) / 1e6);
    if (timeout_ms < 1 || timeout_ms > 1e9) {
      throw bad_option(info.Env(), "sourceTimeoutMs", "1 to 1000000000 ms");
    }
    options.source_timeout = static_cast<TimeNs>(timeout_ms * 1e6);
    options.requester.rto_min = static_cast<TimeNs>(
        number_of(given, "minRetryMs", static_cast<double>(options.requester.rto_min) / 1e6) * 1e6);
    if (options.requester.rto_min < kMicrosecond ||
        options.requester.rto_min > options.requester.rto_max) {
      throw bad_option(info.Env(), "minRetryMs", "0.001 to 250 ms");
    }
    auto& begin_wait = options.requester.subscription.begin_wait;
    const double wait_ms = number_of(given, "pushWaitMs", static_cast<double>(begin_wait) / 1e6);
    if (wait_ms < 0 || wait_ms > 1e6) throw bad_option(info.Env(), "pushWaitMs", "0 to 1000000 ms");
    begin_wait = static_cast<TimeNs>(wait_ms * 1e6);
    auto replica = unwrap_replica(given.Get("replica"));
    GenerationId held;
    if (!parse_generation(replica->generation(), &held) || held != options.generation) {
      throw js_error(info.Env(),
                     Status::Error("E_REPLICA_MISMATCH",
                                   "the replica is of generation " + replica->generation()));
    }
    throw_if(info.Env(), Client::Open(options, std::move(replica), &client_));
  }

 private:
  Client& open(Napi::Env env) {
    if (closed_) throw js_error(env, Status::Error("E_CLOSED", "the mcdist client is closed"));
    return *client_;
  }
  static sockaddr_in server_of(const Napi::Value& value) {
    const sockaddr_in server = address_of(object_of(value, "server"), "address", "port");
    if (server.sin_port == 0) throw bad_option(value.Env(), "server.port", "1 to 65535");
    return server;
  }
  static std::string address_text(const sockaddr_in& address) {
    char text[INET_ADDRSTRLEN] = "";
    ::inet_ntop(AF_INET, &address.sin_addr, text, sizeof text);
    return text;
  }
  Napi::Value Fetch(const Napi::CallbackInfo& info) {
    Client& client = open(info.Env());
    return Arrivals::Of(info.Env())
        ->fetch(info.Env(), *client.replica(), whole_of(info[0], "page"));
  }
  void Prefetch(const Napi::CallbackInfo& info) {
    open(info.Env())
        .prefetch(whole_of(info[0], "first"),
                  info[1].IsUndefined() ? 1 : whole_of(info[1], "count"));
  }
  void Subscribe(const Napi::CallbackInfo& info) {
    open(info.Env()).subscribe(info[0].IsUndefined() || info[0].ToBoolean());
  }
  void SetServer(const Napi::CallbackInfo& info) {
    std::vector<sockaddr_in> others;
    if (!info[1].IsUndefined()) {
      if (!info[1].IsArray()) throw bad_option(info.Env(), "others", "an array");
      const auto given = info[1].As<Napi::Array>();
      for (uint32_t i = 0; i < given.Length(); i++) others.push_back(server_of(given.Get(i)));
    }
    open(info.Env()).set_server(server_of(info[0]), others);
  }
  Napi::Value Close(const Napi::CallbackInfo& info) {
    closed_ = true;
    return Background::Run(info.Env(), [client = client_] { client->close(); });
  }
  Napi::Value Stats(const Napi::CallbackInfo& info) {
    const Client& client = open(info.Env());
    auto out = Napi::Object::New(info.Env());
    const ClientCounters& counters = client.counters();
#define SF_COUNTER(name) set_number(out, #name, counters.name.load(std::memory_order_relaxed));
    SF_MCDIST_CLIENT_COUNTERS(SF_COUNTER)
#undef SF_COUNTER
    const Client::Gauges gauges = client.gauges();
    set_number(out, "pages_under_way", gauges.under_way);
    set_number(out, "prefetch_window", gauges.window);
    set_number(out, "receive_rate_bytes_per_s", gauges.receive_rate);
    out.Set("faultRttMs", static_cast<double>(gauges.fault_rtt) / 1e6);
    out.Set("prefetchRttMs", static_cast<double>(gauges.prefetch_rtt) / 1e6);
    out.Set("faultTimeoutMs", static_cast<double>(gauges.fault_timeout) / 1e6);
    set_number(out, "servers_known", gauges.servers);
    set_number(out, "blocks_lacking", gauges.reported_blocks);
    set_number(out, "loss_permille", gauges.loss_permille);
    out.Set("serverAddress", address_text(gauges.server));
    out.Set("serverPort", ntohs(gauges.server.sin_port));
    out.Set("subscribed", gauges.subscribed);
    out.Set("unicastOnly", gauges.unicast_only);
    out.Set("welcomed", gauges.welcomed);
    out.Set("lost", gauges.lost);
    return out;
  }

  std::shared_ptr<Client> client_;
  bool closed_ = false;
};

Exports exports_of_client(&ClientJs::Init);

}  // namespace
}  // namespace sf::mcdist
