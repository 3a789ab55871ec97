// Helpers of blktap's JavaScript border: work on a thread of the pool, members of options.
#pragma once

#include <functional>
#include <string>
#include <utility>

#include "common/js.h"

namespace sf {

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

inline std::string text(const Napi::Object& object, const char* name) {
  const Napi::Value value = object.Get(name);
  return value.IsString() ? value.As<Napi::String>().Utf8Value() : std::string();
}

inline uint64_t number(const Napi::Object& object, const char* name) {
  const Napi::Value value = object.Get(name);
  const double n = value.IsNumber() ? value.As<Napi::Number>().DoubleValue() : 0;
  return n > 0 && n <= 9007199254740991.0 ? static_cast<uint64_t>(n) : 0;
}

}  // namespace sf
