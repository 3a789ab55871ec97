// JavaScript's view of memtap: register VMs, fork, drop, count. No page passes through here, but
// for readPages(), by which tests and tools look at a generation.
#include <array>

#include "common/js.h"
#include "memtap/background.h"
#include "memtap/local_source.h"
#include "memtap/server.h"

namespace sf {
namespace {

const char* name_of(VmEvent::Kind kind) {
  switch (kind) {
    case VmEvent::Kind::kAttached:
      return "attached";
    case VmEvent::Kind::kDetached:
      return "detached";
    case VmEvent::Kind::kLost:
      return "lost";
    case VmEvent::Kind::kGenerationFailed:
      break;
  }
  return "generation-failed";
}

Napi::Object to_js(Napi::Env env, const VmEvent& event) {
  auto object = Napi::Object::New(env);
  object.Set("type", name_of(event.kind));
  object.Set("vm", event.vm);
  if (event.pid >= 0) object.Set("pid", static_cast<double>(event.pid));
  if (!event.generation.empty()) object.Set("generation", event.generation);
  if (!event.status.ok()) {
    object.Set("code", event.status.code);
    object.Set("message", event.status.message);
  }
  return object;
}

std::string text(const Napi::Value& value, const char* what) {
  if (value.IsString()) return value.As<Napi::String>();
  throw js_error(value.Env(), Status::Error("E_ARGUMENT", std::string(what) + " must be a string"));
}

double number(const Napi::Value& value, const char* what) {
  if (value.IsNumber() && value.As<Napi::Number>().DoubleValue() >= 0) {
    return value.As<Napi::Number>().DoubleValue();
  }
  throw js_error(value.Env(), Status::Error("E_ARGUMENT", std::string(what) + " must be a number"));
}

class MemtapServerJs : public Napi::ObjectWrap<MemtapServerJs> {
 public:
  static void Init(Napi::Env env, Napi::Object exports) {
    using Self = MemtapServerJs;
    exports.Set(
        "MemtapServer",
        DefineClass(
            env, "MemtapServer",
            {InstanceMethod("expect", &Self::Expect), InstanceMethod("pid", &Self::Pid),
             InstanceMethod("forkBegin", &Self::ForkBegin),
             InstanceMethod("forkCommit", &Self::ForkCommit),
             InstanceMethod("forkAbort", &Self::ForkAbort),
             InstanceMethod("dropGeneration", &Self::DropGeneration),
             InstanceMethod("adoptGeneration", &Self::AdoptGeneration),
             InstanceMethod("provider", &Self::Provider), InstanceMethod("remove", &Self::Remove),
             InstanceMethod("stats", &Self::Stats), InstanceMethod("close", &Self::Close)}));
  }

  explicit MemtapServerJs(const Napi::CallbackInfo& info)
      : Napi::ObjectWrap<MemtapServerJs>(info), background_(nullptr) {
    const Napi::Env env = info.Env();
    auto given = info[0].As<Napi::Object>();
    ServerOptions options;
    options.socket_path = text(given.Get("socketPath"), "socketPath");
    options.socket_mode = static_cast<uint32_t>(number(given.Get("socketMode"), "socketMode"));
    options.socket_uid = given.Get("socketUid").ToNumber().Int64Value();
    options.socket_gid = given.Get("socketGid").ToNumber().Int64Value();
    options.populate = given.Get("populate").ToBoolean();
    options.save_wait_ms = static_cast<uint32_t>(number(given.Get("saveWaitMs"), "saveWaitMs"));
    auto background = std::make_shared<Background>(env);
    auto emit =
        std::make_shared<Napi::FunctionReference>(Napi::Persistent(info[1].As<Napi::Function>()));
    // The reference is used and let go on the JavaScript thread only: by this object.
    emit_ = emit;
    std::weak_ptr<Napi::FunctionReference> weak = emit;
    const Status status = MemtapServer::Open(
        options,
        [background, weak](const VmEvent& event) {
          background->post([weak, event](Napi::Env on) {
            if (auto to = weak.lock()) to->Call({to_js(on, event)});
          });
        },
        &server_);
    if (!status.ok()) {
      background->release();
      throw js_error(env, status);
    }
    background_ = std::move(background);
  }

  ~MemtapServerJs() override { close(); }

 private:
  std::shared_ptr<Vm> vm(const Napi::CallbackInfo& info) {
    std::shared_ptr<Vm> found;
    throw_if(info.Env(), server_->find(text(info[0], "id"), &found));
    return found;
  }
  void close() {
    if (server_ == nullptr) return;
    server_->close();
    if (background_ != nullptr) background_->release();
  }

  void Expect(const Napi::CallbackInfo& info) {
    VmOptions options;
    options.id = text(info[0], "id");
    options.token = text(info[1], "token");
    const double bytes = number(info[2], "ramBytes");
    options.pages = static_cast<uint64_t>(bytes) / kPageBytes;
    if (static_cast<double>(options.pages * kPageBytes) != bytes) {
      throw js_error(info.Env(),
                     Status::Error("E_ARGUMENT", "ramBytes must be a multiple of 4096"));
    }
    if (!info[3].IsUndefined()) options.replica = unwrap_replica(info[3]);
    throw_if(info.Env(), server_->expect(std::move(options)));
  }
  Napi::Value Pid(const Napi::CallbackInfo& info) {
    return Napi::Number::New(info.Env(), vm(info)->pid());
  }

  // The calls that take their time, without a result.
  template <typename Work>
  Napi::Value in_background(const Napi::CallbackInfo& info, Work work) {
    return background_->run<int>(
        info.Env(), [work](int*) { return work(); },
        [](Napi::Env env, const int&) { return env.Undefined(); });
  }
  Napi::Value ForkBegin(const Napi::CallbackInfo& info) {
    return in_background(info, [v = vm(info), generation = text(info[1], "generation"),
                                directory = text(info[2], "directory")] {
      return v->fork_begin(generation, directory);
    });
  }
  Napi::Value ForkAbort(const Napi::CallbackInfo& info) {
    return in_background(info, [v = vm(info), generation = text(info[1], "generation")] {
      return v->fork_abort(generation);
    });
  }
  Napi::Value DropGeneration(const Napi::CallbackInfo& info) {
    return in_background(info, [v = vm(info), generation = text(info[1], "generation")] {
      return v->drop(generation);
    });
  }
  Napi::Value ForkCommit(const Napi::CallbackInfo& info) {
    return background_->run<CommitResult>(
        info.Env(),
        [v = vm(info), generation = text(info[1], "generation")](CommitResult* out) {
          return v->fork_commit(generation, out);
        },
        [](Napi::Env env, const CommitResult& commit) -> Napi::Value {
          auto runs = Napi::Uint32Array::New(env, commit.zero_runs.size());
          std::copy(commit.zero_runs.begin(), commit.zero_runs.end(), runs.Data());
          auto object = Napi::Object::New(env);
          object.Set("dirtyPages", static_cast<double>(commit.dirty_pages));
          object.Set("zeroRuns", runs);
          object.Set("durationUs", static_cast<double>(commit.duration_us));
          return object;
        });
  }
  void AdoptGeneration(const Napi::CallbackInfo& info) {
    throw_if(info.Env(), vm(info)->adopt(text(info[1], "generation"), text(info[2], "directory")));
  }
  Napi::Value Provider(const Napi::CallbackInfo& info) {
    std::shared_ptr<PageProvider> provider;
    throw_if(info.Env(), vm(info)->provider(text(info[1], "generation"), &provider));
    return wrap_provider(info.Env(), std::move(provider));
  }
  void Remove(const Napi::CallbackInfo& info) {
    throw_if(info.Env(), server_->remove(text(info[0], "id")));
  }
  Napi::Value Stats(const Napi::CallbackInfo& info) {
    auto v = vm(info);
    const VmStats& s = v->stats();
    auto object = Napi::Object::New(info.Env());
    const auto set = [&object](const char* name, uint64_t value) {
      object.Set(name, static_cast<double>(value));
    };
    set("missingFaults", s.missing_faults);
    set("wpFaults", s.wp_faults);
    set("pagesFetched", s.pages_fetched);
    set("zeroPages", s.zero_pages);
    set("savedPages", s.saved_pages);
    set("spuriousFaults", s.spurious_faults);
    set("dirtiedPages", s.dirtied_pages);
    set("movedPages", s.moved_pages);
    set("liveReads", s.live_reads);
    set("generations", v->open_generations());
    return object;
  }
  void Close(const Napi::CallbackInfo&) { close(); }

  std::shared_ptr<Background> background_;
  std::shared_ptr<Napi::FunctionReference> emit_;
  std::shared_ptr<MemtapServer> server_;
};

class LocalSourceJs : public Napi::ObjectWrap<LocalSourceJs> {
 public:
  static void Init(Napi::Env env, Napi::Object exports) {
    exports.Set("LocalSource", DefineClass(env, "LocalSource",
                                           {InstanceMethod("served", &LocalSourceJs::Served),
                                            InstanceMethod("close", &LocalSourceJs::Close)}));
  }
  explicit LocalSourceJs(const Napi::CallbackInfo& info) : Napi::ObjectWrap<LocalSourceJs>(info) {
    const auto patience =
        std::chrono::milliseconds(static_cast<int64_t>(number(info[2], "patienceMs")));
    throw_if(info.Env(), LocalSource::Open(unwrap_replica(info[0]), unwrap_provider(info[1]),
                                           patience, &source_));
  }

 private:
  Napi::Value Served(const Napi::CallbackInfo& info) {
    if (source_ != nullptr) served_ = source_->served();
    return Napi::Number::New(info.Env(), static_cast<double>(served_));
  }
  void Close(const Napi::CallbackInfo&) {
    if (source_ != nullptr) served_ = source_->served();
    source_.reset();
  }

  std::unique_ptr<LocalSource> source_;
  uint64_t served_ = 0;
};

// readPages(provider, first, count): Promise<Buffer>. E_STATE if a page is not there (yet),
// E_SOURCE_LOST if it cannot be read.
Napi::Value ReadPages(const Napi::CallbackInfo& info) {
  auto provider = unwrap_provider(info[0]);
  const auto first = static_cast<PageIndex>(number(info[1], "first"));
  const auto count = static_cast<uint64_t>(number(info[2], "count"));
  if (first > provider->pages() || count > provider->pages() - first) {
    throw js_error(info.Env(), Status::Error("E_ARGUMENT", "pages beyond the generation's end"));
  }
  using Bytes = std::vector<uint8_t>;
  auto background = std::make_shared<Background>(info.Env());
  Napi::Value promise = background->run<Bytes>(
      info.Env(),
      [provider, first, count](Bytes* out) {
        out->resize(count * kPageBytes);
        for (uint64_t i = 0; i < count; i++) {
          switch (provider->read(first + i, out->data() + i * kPageBytes)) {
            case ReadResult::kData:
            case ReadResult::kZero:
              break;
            case ReadResult::kAbsent:
              return Status::Error("E_STATE", "page " + std::to_string(first + i) + " is not here");
            case ReadResult::kError:
              return Status::Error("E_SOURCE_LOST",
                                   "page " + std::to_string(first + i) + " cannot be read");
          }
        }
        return Status::Ok();
      },
      [](Napi::Env env, const Bytes& bytes) -> Napi::Value {
        return Napi::Buffer<uint8_t>::Copy(env, bytes.data(), bytes.size());
      });
  background->release();
  return promise;
}

void init(Napi::Env env, Napi::Object exports) {
  MemtapServerJs::Init(env, exports);
  LocalSourceJs::Init(env, exports);
  exports.Set("readPages", Napi::Function::New(env, ReadPages));
}

Exports exports_of_memtap(&init);

}  // namespace
}  // namespace sf
