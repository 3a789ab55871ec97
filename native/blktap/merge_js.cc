// JavaScript's view of work that is done in steps: merges, punches, and pulls of a disk.
#include "blktap/disk_js.h"
#include "blktap/disk_pull.h"
#include "blktap/merge.h"
#include "blktap/task.h"

namespace sf {
namespace {

class StepJs : public Napi::ObjectWrap<StepJs> {
 public:
  static Napi::FunctionReference& constructor() {
    static auto* reference = new Napi::FunctionReference();
    return *reference;
  }
  static void Init(Napi::Env env, Napi::Object) {
    constructor() = Napi::Persistent(DefineClass(env, "NativeStep",
                                                 {
                                                     InstanceMethod("step", &StepJs::DoStep),
                                                     InstanceMethod("abort", &StepJs::Abort),
                                                     InstanceMethod("prepare", &StepJs::Prepare),
                                                     InstanceMethod("apply", &StepJs::Apply),
                                                     InstanceMethod("leave", &StepJs::Leave),
                                                     InstanceMethod("detach", &StepJs::Detach),
                                                 }));
  }
  explicit StepJs(const Napi::CallbackInfo& info) : Napi::ObjectWrap<StepJs>(info) {}

  static Napi::Value Wrap(Napi::Env env, std::shared_ptr<Step> step, std::shared_ptr<Merge> merge,
                          std::shared_ptr<Pull> pull) {
    const Napi::Object made = constructor().New({});
    StepJs* self = StepJs::Unwrap(made);
    made.Set("totalBytes", static_cast<double>(step->total_bytes()));
    self->step_ = std::move(step);
    self->merge_ = std::move(merge);
    self->pull_ = std::move(pull);
    return made;
  }

 private:
  Napi::Value Leave(const Napi::CallbackInfo& info) {
    expect(info.Env(), merge_)->leave();
    return info.Env().Undefined();
  }
  template <typename T>
  const std::shared_ptr<T>& expect(Napi::Env env, const std::shared_ptr<T>& step) {
    if (step == nullptr) throw js_error(env, Status::Error("E_STATE", "no step of this work"));
    return step;
  }
  // step(maxBytes)
  Napi::Value DoStep(const Napi::CallbackInfo& info) {
    const double most = info[0].ToNumber().DoubleValue();
    const uint64_t bytes = most >= 1 && most <= 1e15 ? static_cast<uint64_t>(most) : 1;
    struct Result {
      uint64_t bytes = 0;
      bool done = false;
    };
    auto result = std::make_shared<Result>();
    return Task::Run(
        info.Env(),
        [=, step = expect(info.Env(), step_)] {
          return step->step(bytes, &result->bytes, &result->done);
        },
        [=](Napi::Env env) {
          auto out = Napi::Object::New(env);
          out.Set("bytes", static_cast<double>(result->bytes));
          out.Set("done", Napi::Boolean::New(env, result->done));
          return out;
        });
  }
  // What the work holds (slices, files) goes with it, not when this object is collected.
  Napi::Value Abort(const Napi::CallbackInfo& info) {
    merge_.reset();
    pull_.reset();
    return Task::Run(info.Env(), [step = std::move(step_)]() mutable {
      if (step != nullptr) step->abort();
      step.reset();
      return Status::Ok();
    });
  }
  Napi::Value Prepare(const Napi::CallbackInfo& info) {
    auto merge = expect(info.Env(), merge_);
    return Task::Run(
        info.Env(), [merge] { return merge->prepare(); },
        [merge](Napi::Env env) {
          auto out = Napi::Object::New(env);
          auto remove = Napi::Array::New(env);
          uint32_t i = 0;
          for (const auto& slice : merge->run()) {
            if (slice.id != merge->keep().id) remove.Set(i++, slice.id);
          }
          out.Set("keep", merge->keep().id);
          out.Set("map", static_cast<double>(merge->new_map()));
          out.Set("remove", remove);
          return out;
        });
  }
  Napi::Value Apply(const Napi::CallbackInfo& info) {
    auto merge = expect(info.Env(), merge_);
    return Task::Run(info.Env(), [merge] { return merge->apply(); });
  }
  Napi::Value Detach(const Napi::CallbackInfo& info) {
    auto pull = expect(info.Env(), pull_);
    auto forked = std::make_shared<bool>(false);
    return Task::Run(
        info.Env(), [=] { return pull->detach(forked.get()); },
        [=](Napi::Env env) {
          auto out = Napi::Object::New(env);
          out.Set("forked", Napi::Boolean::New(env, *forked));
          return out;
        });
  }

  std::shared_ptr<Step> step_;
  std::shared_ptr<Merge> merge_;
  std::shared_ptr<Pull> pull_;
};

Napi::Object options_of(const Napi::Value& value) {
  if (value.IsObject()) return value.As<Napi::Object>();
  throw js_error(value.Env(), Status::Error("E_ARGUMENT", "options expected"));
}

Exports exports_of_steps(&StepJs::Init);

}  // namespace

// { slices: [{ id, map }], sizeBytes }
Napi::Value begin_merge(Napi::Env env, std::shared_ptr<Store> store, const Napi::Value& options) {
  const auto object = options_of(options);
  const auto run = slice_refs(object.Get("slices"));
  const uint64_t size = number(object, "sizeBytes");
  auto merge = std::make_shared<std::shared_ptr<Merge>>();
  return Task::Run(
      env, [=] { return Merge::Begin(store, run, size, merge.get()); },
      [=](Napi::Env env) { return StepJs::Wrap(env, *merge, *merge, nullptr); });
}

// { slice: { id, map }, children: [{ id, map }], sizeBytes }
Napi::Value begin_punch(Napi::Env env, std::shared_ptr<Store> store, const Napi::Value& options) {
  const auto object = options_of(options);
  const SliceRef slice = slice_ref(object.Get("slice"));
  const auto children = slice_refs(object.Get("children"));
  const uint64_t size = number(object, "sizeBytes");
  auto punch = std::make_shared<std::shared_ptr<Punch>>();
  return Task::Run(
      env, [=] { return Punch::Begin(store, slice, children, size, punch.get()); },
      [=](Napi::Env env) { return StepJs::Wrap(env, *punch, nullptr, nullptr); });
}

Napi::Value wrap_pull(Napi::Env env, std::shared_ptr<Disk> disk) {
  auto pull = std::make_shared<std::shared_ptr<Pull>>();
  return Task::Run(
      env,
      [=] {
        *pull = std::make_shared<Pull>(disk);
        return Status::Ok();
      },
      [=](Napi::Env env) { return StepJs::Wrap(env, *pull, nullptr, *pull); });
}

}  // namespace sf
