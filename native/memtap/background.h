// Long native calls for JavaScript: each runs on a thread of its own and settles a promise; events
// come the same way. Not libuv's pool: a fork's commit must not wait behind someone's file reads
// while a VM is paused.
#pragma once

#include <napi.h>

#include <functional>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#include "common/js.h"

namespace sf {

class Background : public std::enable_shared_from_this<Background> {
 public:
  using OnJs = std::function<void(Napi::Env)>;

  explicit Background(Napi::Env env)
      : function_(Napi::ThreadSafeFunction::New(
            env, Napi::Function::New(env, [](const Napi::CallbackInfo&) {}), "memtap", 0, 1)) {}

  // From any thread: runs `work` on the JavaScript thread later. Dropped when JavaScript is gone.
  void post(OnJs work) {
    std::lock_guard lock(mutex_);
    if (released_) return;
    auto* boxed = new OnJs(std::move(work));
    const napi_status status =
        function_.NonBlockingCall(boxed, [](Napi::Env env, Napi::Function, OnJs* call) {
          std::unique_ptr<OnJs> owned(call);
          if (static_cast<napi_env>(env) == nullptr) return;
          Napi::HandleScope scope(env);
          (*owned)(env);
        });
    if (status == napi_ok) return;
    delete boxed;
    // JavaScript is ending; this object has given up its share of the function by that answer.
    if (status == napi_closing) released_ = true;
  }

  // JavaScript may end; calls under way settle nothing any more once release() was called and
  // the last of them is done.
  void release() {
    std::lock_guard lock(mutex_);
    closing_ = true;
    release_if_idle();
  }

  // `work` runs on a new thread; `result` makes the promise's value on the JavaScript thread.
  template <typename Result>
  Napi::Value run(Napi::Env env, std::function<Status(Result*)> work,
                  std::function<Napi::Value(Napi::Env, const Result&)> result) {
    auto deferred = std::make_shared<Napi::Promise::Deferred>(env);
    Napi::Promise promise = deferred->Promise();
    {
      std::lock_guard lock(mutex_);
      if (closing_) throw js_error(env, Status::Error("E_CLOSED", "the memtap server is closed"));
      running_++;
    }
    auto settle = [deferred, result](Napi::Env on, const Status& status, const Result& value) {
      if (status.ok()) {
        deferred->Resolve(result(on, value));
      } else {
        deferred->Reject(js_error(on, status).Value());
      }
    };
    try {
      std::thread([self = shared_from_this(), work, settle] {
        auto value = std::make_shared<Result>();
        const Status status = work(value.get());
        self->post([settle, status, value](Napi::Env on) { settle(on, status, *value); });
        self->done();
      }).detach();
    } catch (const std::system_error& error) {
      done();
      deferred->Reject(js_error(env, Status::Error("E_INTERNAL", error.what())).Value());
    }
    return promise;
  }

 private:
  void done() {
    std::lock_guard lock(mutex_);
    running_--;
    release_if_idle();
  }
  void release_if_idle() {
    if (!closing_ || running_ > 0 || released_) return;
    released_ = true;
    function_.Release();
  }

  Napi::ThreadSafeFunction function_;
  std::mutex mutex_;
  int running_ = 0;
  bool closing_ = false;
  bool released_ = false;
};

}  // namespace sf
