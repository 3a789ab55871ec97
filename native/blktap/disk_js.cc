// JavaScript's view of disks: fork, settle, serve. Requests never pass here.
#include "blktap/disk_js.h"

#include <cstring>

#include "blktap/server_js.h"
#include "blktap/task.h"

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
                                         InstanceMethod("pullBegin", &DiskJs::PullBegin),
                                         InstanceMethod("info", &DiskJs::Info),
                                         InstanceMethod("stats", &DiskJs::Stats),
                                         InstanceMethod("device", &DiskJs::Device),
                                         InstanceMethod("close", &DiskJs::Close),
                                     }));
  }
  explicit DiskJs(const Napi::CallbackInfo& info) : Napi::ObjectWrap<DiskJs>(info) {}
  static Napi::Value Wrap(std::shared_ptr<Disk> disk) {
    const Napi::Object made = constructor().New({});
    DiskJs::Unwrap(made)->disk_ = std::move(disk);
    return made;
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

  Napi::Value PullBegin(const Napi::CallbackInfo& info) {
    return wrap_pull(info.Env(), open(info.Env()));
  }

  Napi::Value Info(const Napi::CallbackInfo& info) {
    auto& disk = open(info.Env());
    auto out = Napi::Object::New(info.Env());
    const Disk::Info now = disk->info();
    out.Set("top", now.top);
    out.Set("depth", static_cast<double>(now.depth));
    out.Set("indexBytes", static_cast<double>(now.index_bytes));
    out.Set("spare", Napi::Boolean::New(info.Env(), now.spare));
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
  exports.Set("readPage", Napi::Function::New(env, &ReadPage));
}

Exports exports_of_blktap(&Init);

}  // namespace

Napi::Value wrap_disk(Napi::Env, std::shared_ptr<Disk> disk) {
  return DiskJs::Wrap(std::move(disk));
}

}  // namespace sf
