// JavaScript's view of a prefetcher: start, pause, progress, close.
#include "common/js.h"
#include "common/notifier.h"
#include "pagestore/prefetcher.h"

namespace sf {
namespace {

const char* name_of(Prefetcher::State state) {
  switch (state) {
    case Prefetcher::State::kIdle:
      return "idle";
    case Prefetcher::State::kRunning:
      return "running";
    case Prefetcher::State::kPaused:
      return "paused";
    case Prefetcher::State::kDone:
      return "done";
    case Prefetcher::State::kFailed:
      return "failed";
    case Prefetcher::State::kClosed:
      break;
  }
  return "closed";
}

class PrefetcherJs : public Napi::ObjectWrap<PrefetcherJs> {
 public:
  static void Init(Napi::Env env, Napi::Object exports) {
    exports.Set("Prefetcher", DefineClass(env, "Prefetcher",
                                          {
                                              InstanceMethod("start", &PrefetcherJs::Start),
                                              InstanceMethod("pause", &PrefetcherJs::Pause),
                                              InstanceMethod("resume", &PrefetcherJs::Resume),
                                              InstanceMethod("progress", &PrefetcherJs::Progress),
                                              InstanceMethod("close", &PrefetcherJs::Close),
                                          }));
  }

  // new Prefetcher(replicaHandle, onEnd)
  explicit PrefetcherJs(const Napi::CallbackInfo& info) : Napi::ObjectWrap<PrefetcherJs>(info) {
    auto replica = unwrap_replica(info[0]);
    if (!info[1].IsFunction()) {
      throw js_error(info.Env(), Status::Error("E_ARGUMENT", "onEnd: expected a function"));
    }
    notifier_ = Notifier::Make(info.Env(), info[1].As<Napi::Function>(), "prefetch end");
    prefetcher_ = Prefetcher::Make(std::move(replica), [n = notifier_] { n->call(); });
  }
  // The environment may be going: the notifier knows.
  ~PrefetcherJs() override {
    if (prefetcher_ != nullptr) prefetcher_->close();
  }

 private:
  Prefetcher& open(Napi::Env env) {
    if (prefetcher_ == nullptr)
      throw js_error(env, Status::Error("E_CLOSED", "prefetch is closed"));
    return *prefetcher_;
  }
  void Start(const Napi::CallbackInfo& info) {
    const double rate = info[0].IsNumber() ? info[0].As<Napi::Number>().DoubleValue() : -1;
    if (!(rate >= 0 && rate <= 9007199254740991.0)) {
      throw js_error(info.Env(), Status::Error("E_ARGUMENT", "rate: expected bytes a second"));
    }
    open(info.Env()).start(static_cast<uint64_t>(rate));
  }
  void Pause(const Napi::CallbackInfo& info) { open(info.Env()).pause(); }
  void Resume(const Napi::CallbackInfo& info) { open(info.Env()).resume(); }
  void Close(const Napi::CallbackInfo&) {
    if (prefetcher_ == nullptr) return;
    prefetcher_->close();
    notifier_->close();
    prefetcher_.reset();
  }
  Napi::Value Progress(const Napi::CallbackInfo& info) {
    const Prefetcher::Progress progress = open(info.Env()).progress();
    auto out = Napi::Object::New(info.Env());
    auto set = [&](const char* name, uint64_t value) { out.Set(name, static_cast<double>(value)); };
    out.Set("state", name_of(progress.state));
    set("total", progress.total);
    set("present", progress.present);
    set("skipped", progress.skipped);
    set("rateBytesPerS", progress.rate);
    set("burstBytes", progress.burst_bytes);
    set("askedBytes", progress.asked_bytes);
    set("pages", progress.pages);
    set("failedPages", progress.failed_pages);
    set("yields", progress.yields);
    set("underWay", progress.under_way);
    out.Set("elapsedMs", progress.elapsed_ms);
    out.Set("bytesPerS", progress.bytes_per_s);
    out.Set("error", progress.error.ok()
                         ? info.Env().Null()
                         : js_error(info.Env(), progress.error).Value().As<Napi::Value>());
    return out;
  }

  std::shared_ptr<Notifier> notifier_;
  std::shared_ptr<Prefetcher> prefetcher_;
};

Exports exports_of_prefetcher(&PrefetcherJs::Init);

}  // namespace
}  // namespace sf
