// JavaScript's view of disks: open, fork, settle, serve. Requests never pass here.
#include "blktap/disk.h"
#include "blktap/js_task.h"
#include "blktap/server_js.h"
#include "common/js.h"

namespace sf {
namespace {

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
                                         InstanceMethod("device", &DiskJs::Device),
                                         InstanceMethod("viewDevice", &DiskJs::ViewDevice),
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

  Napi::Value Device(const Napi::CallbackInfo& info) {
    return wrap_device(info.Env(), open(info.Env()));
  }
  Napi::Value ViewDevice(const Napi::CallbackInfo& info) {
    return wrap_device(info.Env(), view(info.Env(), info[0]));
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
  DiskJs::Init(env);
  exports.Set("openDisk", Napi::Function::New(env, &DiskJs::Open));
  exports.Set("createSlice", Napi::Function::New(env, &DiskJs::CreateSlice));
  exports.Set("removeSpare", Napi::Function::New(env, &DiskJs::RemoveSpare));
  exports.Set("readPage", Napi::Function::New(env, &ReadPage));
}

Exports exports_of_blktap(&Init);

}  // namespace
}  // namespace sf
