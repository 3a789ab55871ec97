// JavaScript's view of a replica: open, count, close. Page bytes never pass through here.
#include "common/js.h"
#include "common/notifier.h"
#include "common/task.h"
#include "pagestore/replica.h"

namespace sf {
namespace {

class ReplicaJs : public Napi::ObjectWrap<ReplicaJs> {
 public:
  static void Init(Napi::Env env, Napi::Object exports) {
    exports.Set("Replica",
                DefineClass(env, "Replica",
                            {
                                InstanceMethod("fillZero", &ReplicaJs::FillZero),
                                InstanceMethod("fill", &ReplicaJs::Fill),
                                InstanceMethod("read", &ReplicaJs::Read),
                                InstanceMethod("prefetch", &ReplicaJs::Prefetch),
                                InstanceMethod("fail", &ReplicaJs::Fail),
                                InstanceMethod("needAll", &ReplicaJs::NeedAll),
                                InstanceMethod("absentRuns", &ReplicaJs::AbsentRuns),
                                InstanceMethod("stats", &ReplicaJs::Stats),
                                InstanceMethod("onComplete", &ReplicaJs::OnComplete),
                                InstanceMethod("sync", &ReplicaJs::Sync),
                                InstanceMethod("close", &ReplicaJs::Close),
                                InstanceAccessor("handle", &ReplicaJs::Handle, nullptr),
                                InstanceAccessor("provider", &ReplicaJs::Provider, nullptr),
                            }));
  }

  explicit ReplicaJs(const Napi::CallbackInfo& info) : Napi::ObjectWrap<ReplicaJs>(info) {
    const std::string medium = info[3].ToString();
    const int64_t pages = info[2].ToNumber().Int64Value();
    throw_if(info.Env(),
             Replica::Open(info[0].ToString(), info[1].ToString(),
                           pages < 0 ? 0 : static_cast<uint64_t>(pages),
                           medium == "memory" ? Medium::kMemory : Medium::kDisk, &replica_));
  }

 private:
  Replica& open(Napi::Env env) {
    if (replica_ == nullptr) throw js_error(env, Status::Error("E_CLOSED", "replica is closed"));
    return *replica_;
  }
  void FillZero(const Napi::CallbackInfo& info) {
    throw_if(info.Env(), open(info.Env())
                             .fill_zero(static_cast<PageIndex>(info[0].ToNumber().Int64Value()),
                                        static_cast<uint64_t>(info[1].ToNumber().Int64Value())));
  }
  void Fill(const Napi::CallbackInfo& info) {
    auto data = info[1].As<Napi::Buffer<uint8_t>>();
    if (data.Length() != kPageBytes) {
      throw js_error(info.Env(), Status::Error("E_ARGUMENT", "a page has 4096 bytes"));
    }
    throw_if(info.Env(),
             open(info.Env())
                 .fill(static_cast<PageIndex>(info[0].ToNumber().Int64Value()), data.Data()));
  }
  // For tests and tools: the page, all zeros included, or null if absent.
  Napi::Value Read(const Napi::CallbackInfo& info) {
    auto out = Napi::Buffer<uint8_t>::New(info.Env(), kPageBytes);
    switch (open(info.Env())
                .read(static_cast<PageIndex>(info[0].ToNumber().Int64Value()), out.Data())) {
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
    throw js_error(info.Env(), Status::Error("E_IO", "cannot read " + replica_->path()));
  }
  void Prefetch(const Napi::CallbackInfo& info) {
    open(info.Env()).prefetch(static_cast<PageIndex>(info[0].ToNumber().Int64Value()));
  }
  void Fail(const Napi::CallbackInfo& info) {
    open(info.Env()).fail(Status::Error(info[0].ToString(), info[1].ToString()));
  }
  void NeedAll(const Napi::CallbackInfo& info) { open(info.Env()).need_all(info[0].ToBoolean()); }
  // (neededOnly, maxRuns) -> [first, count, ...], or null if there are more runs
  Napi::Value AbsentRuns(const Napi::CallbackInfo& info) {
    std::vector<Replica::Run> runs;
    const auto max_runs = static_cast<size_t>(info[1].ToNumber().Uint32Value());
    if (!open(info.Env()).absent_runs(info[0].ToBoolean(), max_runs, &runs)) {
      return info.Env().Null();
    }
    auto out = Napi::Array::New(info.Env(), 2 * runs.size());
    uint32_t at = 0;
    for (const auto& run : runs) {
      out.Set(at++, static_cast<double>(run.first));
      out.Set(at++, static_cast<double>(run.count));
    }
    return out;
  }
  Napi::Value Stats(const Napi::CallbackInfo& info) {
    auto& replica = open(info.Env());
    auto stats = Napi::Object::New(info.Env());
    stats.Set("pages", static_cast<double>(replica.pages()));
    stats.Set("present", static_cast<double>(replica.present_count()));
    stats.Set("zero", static_cast<double>(replica.zero_count()));
    stats.Set("waiting", static_cast<double>(replica.waiting_count()));
    stats.Set("complete", replica.complete());
    return stats;
  }
  void OnComplete(const Napi::CallbackInfo& info) {
    auto& replica = open(info.Env());
    forget_completion();
    notifier_ = Notifier::Make(info.Env(), info[0].As<Napi::Function>(), "replica complete");
    replica.on_complete([n = notifier_] { n->call(); });
  }
  Napi::Value Sync(const Napi::CallbackInfo& info) {
    open(info.Env());
    return StatusTask::Run(info.Env(), [replica = replica_] { return replica->sync(); });
  }
  void forget_completion() {
    if (notifier_ == nullptr) return;
    replica_->on_complete(nullptr);
    notifier_->close();
    notifier_.reset();
  }
  void Close(const Napi::CallbackInfo&) {
    forget_completion();
    // Handles given out live until they are collected; the files are free now.
    if (replica_ != nullptr) replica_->unlock();
    replica_.reset();
  }
  Napi::Value Handle(const Napi::CallbackInfo& info) {
    open(info.Env());
    return wrap_replica(info.Env(), replica_);
  }
  Napi::Value Provider(const Napi::CallbackInfo& info) {
    open(info.Env());
    return wrap_provider(info.Env(), replica_);
  }

  std::shared_ptr<Notifier> notifier_;
  std::shared_ptr<Replica> replica_;
};

Exports exports_of_pagestore(&ReplicaJs::Init);

}  // namespace
}  // namespace sf
