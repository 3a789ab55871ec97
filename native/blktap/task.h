// A native call that takes time: runs on a thread of the pool and settles a promise.
#pragma once

#include <exception>
#include <functional>
#include <string>
#include <utility>

#include "common/js.h"

namespace sf {

// Settles with `result`, or rejects with the status of `work`.
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
  void Execute() override {
    try {
      status_ = work_();
    } catch (const std::exception& error) {
      status_ = Status::Error("E_INTERNAL", std::string("native call failed: ") + error.what());
    }
  }
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

inline Napi::Value resolved(Napi::Env env, const Napi::Value& value) {
  auto deferred = Napi::Promise::Deferred::New(env);
  deferred.Resolve(value);
  return deferred.Promise();
}

// '' and 0 for what is missing or of another type.
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
