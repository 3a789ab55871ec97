// JavaScript's view of NBD servers: start, exports that come and go, counters, close. Requests
// never pass here.
#include "blktap/server_js.h"

#include <set>

#include "blktap/nbd_server.h"
#include "blktap/task.h"

namespace sf {
namespace {

constexpr napi_type_tag kDeviceTag = {0x5f0e9c1d4b7a4f11, 0xa1d26c3f90e84b03};
using DeviceHandle = Napi::External<std::weak_ptr<Device>>;

// Servers that run: stopped before the environment goes, as their threads use the addon's code.
std::set<nbd::Server*>& running() {
  static std::set<nbd::Server*> servers;
  return servers;
}

void stop_all(void*) {
  for (auto* server : running()) server->stop();
  running().clear();
}

// Sets `*out` if the member is there; what is no number becomes 0, which is refused further on.
void limit(const Napi::Object& object, const char* name, size_t* out) {
  if (!object.Get(name).IsUndefined()) *out = number(object, name);
}

std::string maybe_text(const Napi::Object& object, const char* name) {
  return object.Get(name).IsUndefined() ? std::string() : text(object, name);
}

Napi::Object section(const Napi::Object& object, const char* name) {
  if (object.Get(name).IsObject()) return object.Get(name).As<Napi::Object>();
  throw js_error(object.Env(),
                 Status::Error("E_ARGUMENT", std::string(name) + " must be an object"));
}

// listen: { host, port, tls?: { directory?, pskFile?, verifyPeer? }, plaintext? }
nbd::TcpPlace tcp_place(const Napi::Object& listen) {
  nbd::TcpPlace place;
  place.host = text(listen, "host");
  const double port = number(listen, "port");
  if (!(port >= 0 && port <= 65535)) {
    throw js_error(listen.Env(), Status::Error("E_ARGUMENT", "a port is 0 to 65535"));
  }
  place.port = static_cast<uint16_t>(port);
  place.plaintext = listen.Get("plaintext").ToBoolean();
  if (listen.Get("tls").IsUndefined()) return place;
  const auto tls = section(listen, "tls");
  place.tls.emplace();
  place.tls->directory = maybe_text(tls, "directory");
  place.tls->psk_file = maybe_text(tls, "pskFile");
  // Only a plain `false` lets everybody in.
  const Napi::Value verify = tls.Get("verifyPeer");
  place.tls->verify_peer = !verify.IsBoolean() || verify.ToBoolean();
  return place;
}

class ServerJs : public Napi::ObjectWrap<ServerJs> {
 public:
  static Napi::FunctionReference& constructor() {
    static auto* reference = new Napi::FunctionReference();
    return *reference;
  }
  static void Init(Napi::Env env) {
    constructor() =
        Napi::Persistent(DefineClass(env, "NbdServer",
                                     {
                                         InstanceMethod("addExport", &ServerJs::AddExport),
                                         InstanceMethod("removeExport", &ServerJs::RemoveExport),
                                         InstanceMethod("close", &ServerJs::Close),
                                         InstanceMethod("stats", &ServerJs::Stats),
                                     }));
    env.AddCleanupHook(&stop_all, static_cast<void*>(nullptr));
  }
  explicit ServerJs(const Napi::CallbackInfo& info) : Napi::ObjectWrap<ServerJs>(info) {}
  ~ServerJs() override {
    if (server_ != nullptr) running().erase(server_.get());
  }

  // startNbdServer({ socketPath?, uid?, gid?, mode?, listen?, maxConnections?, maxHandshakes?,
  //   handshakeTimeoutMs? })
  static Napi::Value Start(const Napi::CallbackInfo& info) {
    Napi::Env env = info.Env();
    const auto object = options(info[0]);
    nbd::Server::Config config;
    config.socket_path = maybe_text(object, "socketPath");
    if (!object.Get("listen").IsUndefined()) config.tcp = tcp_place(section(object, "listen"));
    if (object.Get("uid").IsNumber()) config.uid = object.Get("uid").ToNumber().Uint32Value();
    if (object.Get("gid").IsNumber()) config.gid = object.Get("gid").ToNumber().Uint32Value();
    if (object.Get("mode").IsNumber()) config.mode = object.Get("mode").ToNumber().Uint32Value();
    limit(object, "maxConnections", &config.max_connections);
    limit(object, "maxHandshakes", &config.max_handshakes);
    limit(object, "handshakeTimeoutMs", &config.handshake_ms);
    std::unique_ptr<nbd::Server> server;
    throw_if(env, nbd::Server::Start(std::move(config), &server));
    const Napi::Object made = constructor().New({});
    ServerJs* self = ServerJs::Unwrap(made);
    self->server_ = std::move(server);
    running().insert(self->server_.get());
    return made;
  }

 private:
  static Napi::Object options(const Napi::Value& value) {
    if (value.IsObject()) return value.As<Napi::Object>();
    throw js_error(value.Env(), Status::Error("E_ARGUMENT", "an NBD server: options expected"));
  }
  const std::shared_ptr<nbd::Server>& open(Napi::Env env) {
    if (server_ == nullptr) throw js_error(env, Status::Error("E_CLOSED", "the server is closed"));
    return server_;
  }

  // addExport(device, { exportName?, description?, isDefault?, maxConnections? })
  void AddExport(const Napi::CallbackInfo& info) {
    const auto object = options(info[1]);
    nbd::ExportInfo exported;
    exported.name = text(object, "exportName");
    exported.description = text(object, "description");
    exported.is_default = object.Get("isDefault").ToBoolean();
    limit(object, "maxConnections", &exported.max_connections);
    throw_if(info.Env(), open(info.Env())->add_export(std::move(exported), unwrap_device(info[0])));
  }

  // removeExport(name): done when its connections have ended and the device is at rest.
  Napi::Value RemoveExport(const Napi::CallbackInfo& info) {
    const std::string name = info[0].ToString();
    return Task::Run(info.Env(),
                     [server = open(info.Env()), name] { return server->remove_export(name); });
  }

  Napi::Value Close(const Napi::CallbackInfo& info) {
    if (server_ == nullptr) return Task::Run(info.Env(), [] { return Status::Ok(); });
    running().erase(server_.get());
    return Task::Run(info.Env(), [server = std::move(server_)] {
      server->stop();
      return Status::Ok();
    });
  }

  Napi::Value Stats(const Napi::CallbackInfo& info) {
    auto stats = Napi::Object::New(info.Env());
    auto set = [](Napi::Object object, const char* name, uint64_t value) {
      object.Set(name, static_cast<double>(value));
    };
    set(stats, "connections", server_ ? server_->connections() : 0);
    set(stats, "accepted", server_ ? server_->accepted() : 0);
    set(stats, "refused", server_ ? server_->refused() : 0);
    set(stats, "port", server_ ? server_->port() : 0);
    const auto tls = server_ ? server_->tls() : nbd::TlsGate::Stats();
    auto handshakes = Napi::Object::New(info.Env());
    set(handshakes, "accepted", tls.accepted);
    set(handshakes, "failed", tls.failed);
    set(handshakes, "dropped", server_ ? server_->dropped() : 0);
    handshakes.Set("lastError", tls.last_error);
    stats.Set("tls", handshakes);
    auto list = Napi::Array::New(info.Env());
    uint32_t i = 0;
    if (server_ != nullptr) {
      for (const auto& exported : server_->exports()) {
        const nbd::ExportStats counters = exported->stats();
        auto entry = Napi::Object::New(info.Env());
        entry.Set("exportName", exported->info().name);
        entry.Set("description", exported->info().description);
        entry.Set("isDefault", exported->info().is_default);
        entry.Set("readOnly", !exported->info().writable);
        set(entry, "sizeBytes", exported->info().size);
        set(entry, "connections", counters.connections);
        set(entry, "accepted", counters.accepted);
        set(entry, "requests", counters.requests);
        list.Set(i++, entry);
      }
    }
    stats.Set("exports", list);
    return stats;
  }

  std::shared_ptr<nbd::Server> server_;
};

void Init(Napi::Env env, Napi::Object exports) {
  ServerJs::Init(env);
  exports.Set("startNbdServer", Napi::Function::New(env, &ServerJs::Start));
}

Exports exports_of_nbd_server(&Init);

}  // namespace

Napi::Value wrap_device(Napi::Env env, const std::shared_ptr<Device>& device) {
  auto external = DeviceHandle::New(env, new std::weak_ptr<Device>(device),
                                    [](Napi::Env, std::weak_ptr<Device>* held) { delete held; });
  external.TypeTag(&kDeviceTag);
  return external;
}

std::shared_ptr<Device> unwrap_device(const Napi::Value& value) {
  if (value.IsExternal()) {
    auto external = value.As<DeviceHandle>();
    if (external.CheckTypeTag(&kDeviceTag)) {
      if (auto device = external.Data()->lock()) return device;
      throw js_error(value.Env(), Status::Error("E_CLOSED", "the device is closed"));
    }
  }
  throw js_error(value.Env(), Status::Error("E_ARGUMENT", "expected a device handle"));
}

}  // namespace sf
