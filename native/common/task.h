// Runs work that may block on a thread of the pool and settles a promise with its end.
#pragma once

#include <functional>

#include "common/js.h"

namespace sf {

class StatusTask final : public Napi::AsyncWorker {
 public:
  static Napi::Value Run(Napi::Env env, std::function<Status()> work) {
    auto* task = new StatusTask(env, std::move(work));
    const Napi::Value promise = task->deferred_.Promise();
    task->Queue();
    return promise;
  }

 private:
  StatusTask(Napi::Env env, std::function<Status()> work)
      : Napi::AsyncWorker(env), deferred_(env), work_(std::move(work)) {}
  void Execute() override { status_ = work_(); }
  void OnOK() override {
    Napi::HandleScope scope(Env());
    work_ = nullptr;  // what it holds may be a file's last owner: it goes before whoever awaits
    if (status_.ok()) {
      deferred_.Resolve(Env().Undefined());
    } else {
      deferred_.Reject(js_error(Env(), status_).Value());
    }
  }

  Napi::Promise::Deferred deferred_;
  std::function<Status()> work_;
  Status status_;
};

}  // namespace sf
