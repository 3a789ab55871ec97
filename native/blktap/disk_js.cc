// JavaScript's view of disks and their servers: open, fork, settle, serve. Requests never pass
// here.
#include <functional>
#include <set>

#include "blktap/disk.h"
#include "blktap/nbd_server.h"
#include "common/js.h"

namespace sf {
namespace {

// Runs `work` on a thread of the pool and settles a promise with `result` or the error.
class Task : public Napi::AsyncWorker {
 public:
  using Work = std::function<Status()>;
  using Result = std::function<Napi::Value(Napi::Env)>;
  static Napi::Value Run(Napi::Env env, Work work, Result result = nullptr) {
    auto* task = new Task(env, std::move(work), std::move(result));
    task->Queue();
    return task->deferred_.Promise();
  }

 protected:
  void Execute() override { status_ = work_(); }
  void OnOK() override {
    Napi::HandleScope scope(Env());
    if (!status_.ok()) {
      deferred_.Reject(js_error(Env(), status_).Value());
      return;
    }
    deferred_.Resolve(result_ ? result_(Env()) : Env().Undefined());
  }

 private:
  Task(Napi::Env env, Work work, Result result)
      : Napi::AsyncWorker(env),
        deferred_(env),
        work_(std::move(work)),
        result_(std::move(result)) {}
  Napi::Promise::Deferred deferred_;
  Work work_;
  Result result_;
  Status status_;
};

std::string text(const Napi::Object& object, const char* name) {
  const Napi::Value value = object.Get(name);
  return value.IsString() ? value.As<Napi::String>().Utf8Value() : std::string();
}

uint64_t number(const Napi::Object& object, const char* name) {
  const Napi::Value value = object.Get(name);
  const double n = value.IsNumber() ? value.As<Napi::Number>().DoubleValue() : 0;
  return n > 0 && n <= 9007199254740991.0 ? static_cast<uint64_t>(n) : 0;
}

// Servers that run: stopped before the environment goes, as their threads use the addon's code.
std::set<nbd::Server*>& running() {
  static std::set<nbd::Server*> servers;
  return servers;
}

void stop_all(void*) {
  for (auto* server : running()) server->stop();
  running().clear();
}

class ServerJs : public Napi::ObjectWrap<ServerJs> {
 public:
  static Napi::FunctionReference& constructor() {
    static auto* reference = new Napi::FunctionReference();
    return *reference;
  }
  static void Init(Napi::Env env) {
    constructor() = Napi::Persistent(DefineClass(env, "NbdServer",
                                                 {
                                                     InstanceMethod("close", &ServerJs::Close),
                                                     InstanceMethod("stats", &ServerJs::Stats),
                                                 }));
    env.AddCleanupHook(&stop_all, static_cast<void*>(nullptr));
  }
  explicit ServerJs(const Napi::CallbackInfo& info) : Napi::ObjectWrap<ServerJs>(info) {}
  ~ServerJs() override {
    if (server_ != nullptr) running().erase(server_.get());
  }

  static Napi::Value Start(Napi::Env env, const Napi::Value& options,
                           std::shared_ptr<Device> device) {
    if (!options.IsObject()) {
      throw js_error(env, Status::Error("E_ARGUMENT", "serve: options expected"));
    }
    const auto object = options.As<Napi::Object>();
    nbd::Server::Config config;
    config.socket_path = text(object, "socketPath");
    config.info.name = text(object, "exportName");
    config.info.description = text(object, "description");
    if (object.Get("uid").IsNumber()) config.uid = object.Get("uid").ToNumber().Uint32Value();
    if (object.Get("gid").IsNumber()) config.gid = object.Get("gid").ToNumber().Uint32Value();
    if (object.Get("mode").IsNumber()) config.mode = object.Get("mode").ToNumber().Uint32Value();
    std::unique_ptr<nbd::Server> server;
    throw_if(env, nbd::Server::Start(std::move(config), std::move(device), &server));
    const Napi::Object made = constructor().New({});
    ServerJs* self = ServerJs::Unwrap(made);
    self->server_ = std::move(server);
    running().insert(self->server_.get());
    return made;
  }

 private:
  Napi::Value Close(const Napi::CallbackInfo& info) {
    if (server_ == nullptr) return Task::Run(info.Env(), [] { return Status::Ok(); });
    running().erase(server_.get());
    std::shared_ptr<nbd::Server> server = std::move(server_);
    return Task::Run(info.Env(), [server] {
      server->stop();
      return Status::Ok();
    });
  }
  Napi::Value Stats(const Napi::CallbackInfo& info) {
    auto stats = Napi::Object::New(info.Env());
    stats.Set("connections", server_ ? static_cast<double>(server_->connections()) : 0);
    stats.Set("accepted", server_ ? static_cast<double>(server_->accepted()) : 0);
    return stats;
  }

  std::unique_ptr<nbd::Server> server_;
};

class DiskJs : public Napi::ObjectWrap<DiskJs> {
 public:
  static Napi::FunctionReference& constructor() {
    static auto* reference = new Napi::FunctionReference();
    return *reference;
  }
  static void Init(Napi::Env env) {
    constructor() =
        Napi::Persistent(DefineClass(env, "NativeDisk",
                                     {
                                         InstanceMethod("recovered", &DiskJs::Recovered),
                                         InstanceMethod("fork", &DiskJs::Fork),
                                         InstanceMethod("settle", &DiskJs::Settle),
                                         InstanceMethod("attachSpare", &DiskJs::AttachSpare),
                                         InstanceMethod("provider", &DiskJs::Provider),
                                         InstanceMethod("dropView", &DiskJs::DropView),
                                         InstanceMethod("info", &DiskJs::Info),
                                         InstanceMethod("stats", &DiskJs::Stats),
                                         InstanceMethod("serve", &DiskJs::Serve),
                                         InstanceMethod("serveView", &DiskJs::ServeView),
                                         InstanceMethod("close", &DiskJs::Close),
                                     }));
  }
  explicit DiskJs(const Napi::CallbackInfo& info) : Napi::ObjectWrap<DiskJs>(info) {}

  // openDisk({ directory, sizeBytes, slices: [{ id, generation, keep }], spare,
  //            base: { kind, path?, imageBytes? } }, replicaHandle?)
  static Napi::Value Open(const Napi::CallbackInfo& info) {
    Napi::Env env = info.Env();
    if (!info[0].IsObject()) {
      throw js_error(env, Status::Error("E_ARGUMENT", "openDisk: a description expected"));
    }
    const auto from = info[0].As<Napi::Object>();
    auto spec = std::make_shared<Disk::Spec>();
    spec->directory = text(from, "directory");
    spec->size_bytes = number(from, "sizeBytes");
    spec->spare = text(from, "spare");
    const auto slices = from.Get("slices").As<Napi::Array>();
    for (uint32_t i = 0; i < slices.Length(); i++) {
      const auto slice = slices.Get(i).As<Napi::Object>();
      spec->slices.push_back(
          {text(slice, "id"), text(slice, "generation"), slice.Get("keep").ToBoolean().Value()});
    }
    const auto base = from.Get("base").As<Napi::Object>();
    const std::string kind = text(base, "kind");
    const std::string path = text(base, "path");
    const uint64_t image_bytes = number(base, "imageBytes");
    std::shared_ptr<Replica> replica;
    if (kind == "replica") {
      replica = unwrap_replica(info[1]);
      if (replica->generation() != text(base, "generation") ||
          replica->pages() * kPageBytes != spec->size_bytes) {
        throw js_error(
            env, Status::Error("E_REPLICA_MISMATCH",
                               "the replica given is not the base of disk " + spec->directory));
      }
    }
    auto disk = std::make_shared<std::shared_ptr<Disk>>();
    return Task::Run(
        env,
        [=] {
          Status status = Status::Ok();
          if (kind == "image") {
            status = open_image_base(path, image_bytes, &spec->base);
          } else if (kind == "replica") {
            status = open_replica_base(replica, &spec->base);
          } else {
            spec->base = make_zero_base();
          }
          return status.ok() ? Disk::Open(std::move(*spec), disk.get()) : status;
        },
        [=](Napi::Env) {
          const Napi::Object made = constructor().New({});
          DiskJs::Unwrap(made)->disk_ = std::move(*disk);
          return made;
        });
  }

  // createSlice(directory, id, sizeBytes, spare)
  static Napi::Value CreateSlice(const Napi::CallbackInfo& info) {
    const std::string directory = info[0].ToString();
    const std::string id = info[1].ToString();
    const auto size = static_cast<uint64_t>(info[2].ToNumber().Int64Value());
    const SliceState state = info[3].ToBoolean() ? SliceState::kSpare : SliceState::kOpen;
    return Task::Run(info.Env(), [=] { return Slice::Create(directory, id, size, state); });
  }

  static Napi::Value RemoveSpare(const Napi::CallbackInfo& info) {
    const std::string directory = info[0].ToString();
    const std::string id = info[1].ToString();
    const auto size = static_cast<uint64_t>(info[2].ToNumber().Int64Value());
    return Task::Run(info.Env(), [=] { return Slice::RemoveSpare(directory, id, size); });
  }

 private:
  const std::shared_ptr<Disk>& open(Napi::Env env) {
    if (disk_ == nullptr) throw js_error(env, Status::Error("E_CLOSED", "the disk is closed"));
    return disk_;
  }

  Napi::Value Recovered(const Napi::CallbackInfo& info) {
    return Napi::String::New(info.Env(), open(info.Env())->recovered());
  }

  static Napi::Value ForkValue(Napi::Env env, const Disk::ForkResult& result) {
    auto value = Napi::Object::New(env);
    value.Set("slice", result.slice);
    value.Set("durationUs", static_cast<double>(result.duration_ns) / 1000);
    return value;
  }

  // fork(generation): done before it returns if no write is under way, which is so while the VM is
  // paused (it takes microseconds); otherwise on another thread. A result or a promise of one.
  Napi::Value Fork(const Napi::CallbackInfo& info) {
    auto disk = open(info.Env());
    const std::string generation = info[0].ToString();
    auto result = std::make_shared<Disk::ForkResult>();
    bool busy = false;
    throw_if(info.Env(), disk->fork(generation, false, &busy, result.get()));
    if (!busy) return ForkValue(info.Env(), *result);
    return Task::Run(
        info.Env(),
        [=] {
          bool ignored = false;
          return disk->fork(generation, true, &ignored, result.get());
        },
        [=](Napi::Env env) { return ForkValue(env, *result); });
  }

  Napi::Value Settle(const Napi::CallbackInfo& info) {
    return Task::Run(info.Env(), [disk = open(info.Env())] { return disk->settle(); });
  }

  Napi::Value AttachSpare(const Napi::CallbackInfo& info) {
    const std::string id = info[0].ToString();
    return Task::Run(info.Env(), [disk = open(info.Env()), id] { return disk->attach_spare(id); });
  }

  std::shared_ptr<View> view(Napi::Env env, const Napi::Value& name) {
    const std::string generation = name.ToString();
    auto view = open(env)->view(generation);
    if (view == nullptr) {
      throw js_error(env, Status::Error("E_NOT_FOUND", "the disk has no generation " + generation));
    }
    return view;
  }

  Napi::Value Provider(const Napi::CallbackInfo& info) {
    return wrap_provider(info.Env(), view(info.Env(), info[0]));
  }
  void DropView(const Napi::CallbackInfo& info) { open(info.Env())->drop_view(info[0].ToString()); }

  Napi::Value Info(const Napi::CallbackInfo& info) {
    auto& disk = open(info.Env());
    auto out = Napi::Object::New(info.Env());
    auto slices = Napi::Array::New(info.Env());
    uint32_t i = 0;
    for (const auto& slice : disk->slices()) {
      auto entry = Napi::Object::New(info.Env());
      entry.Set("id", slice.id);
      entry.Set("state", slice.state);
      entry.Set("pages", static_cast<double>(slice.pages));
      entry.Set("allocatedBytes", static_cast<double>(slice.allocated_bytes));
      slices.Set(i++, entry);
    }
    out.Set("slices", slices);
    out.Set("indexBytes", static_cast<double>(disk->index_bytes()));
    out.Set("spare", Napi::Boolean::New(info.Env(), disk->has_spare()));
    return out;
  }

  Napi::Value Stats(const Napi::CallbackInfo& info) {
    const DiskStats& stats = open(info.Env())->stats();
    auto out = Napi::Object::New(info.Env());
    auto set = [&](const char* name, const std::atomic<uint64_t>& value) {
      out.Set(name, static_cast<double>(value.load(std::memory_order_relaxed)));
    };
    set("reads", stats.reads);
    set("writes", stats.writes);
    set("zeroes", stats.zeroes);
    set("flushes", stats.flushes);
    set("bytesRead", stats.bytes_read);
    set("bytesWritten", stats.bytes_written);
    set("bytesZeroed", stats.bytes_zeroed);
    set("fetched", stats.fetched);
    set("ioErrors", stats.io_errors);
    set("noSpaceErrors", stats.no_space_errors);
    const Status last = disk_->last_error();
    out.Set("lastError", last.ok() ? info.Env().Null()
                                   : Napi::String::New(info.Env(), last.message).As<Napi::Value>());
    return out;
  }

  Napi::Value Serve(const Napi::CallbackInfo& info) {
    return ServerJs::Start(info.Env(), info[0], open(info.Env()));
  }
  Napi::Value ServeView(const Napi::CallbackInfo& info) {
    return ServerJs::Start(info.Env(), info[1], view(info.Env(), info[0]));
  }

  Napi::Value Close(const Napi::CallbackInfo& info) {
    if (disk_ == nullptr) return Task::Run(info.Env(), [] { return Status::Ok(); });
    return Task::Run(info.Env(), [disk = std::move(disk_)] { return disk->close(); });
  }

  std::shared_ptr<Disk> disk_;
};

// For tests and tools: readPage(provider, page): the page, null if absent. Throws E_IO.
Napi::Value ReadPage(const Napi::CallbackInfo& info) {
  auto provider = unwrap_provider(info[0]);
  auto out = Napi::Buffer<uint8_t>::New(info.Env(), kPageBytes);
  const double page = info[1].ToNumber().DoubleValue();
  if (!(page >= 0) || page >= static_cast<double>(provider->pages())) {
    throw js_error(info.Env(), Status::Error("E_ARGUMENT", "page beyond the end"));
  }
  switch (provider->read(static_cast<PageIndex>(page), out.Data())) {
    case ReadResult::kData:
      return out;
    case ReadResult::kZero:
      std::memset(out.Data(), 0, kPageBytes);
      return out;
    case ReadResult::kAbsent:
      return info.Env().Null();
    case ReadResult::kError:
      break;
  }
  throw js_error(info.Env(), Status::Error("E_IO", "the page cannot be read"));
}

void Init(Napi::Env env, Napi::Object exports) {
  ServerJs::Init(env);
  DiskJs::Init(env);
  exports.Set("openDisk", Napi::Function::New(env, &DiskJs::Open));
  exports.Set("createSlice", Napi::Function::New(env, &DiskJs::CreateSlice));
  exports.Set("removeSpare", Napi::Function::New(env, &DiskJs::RemoveSpare));
  exports.Set("readPage", Napi::Function::New(env, &ReadPage));
}

Exports exports_of_blktap(&Init);

}  // namespace
}  // namespace sf
