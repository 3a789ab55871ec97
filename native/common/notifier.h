// Calls a JavaScript function, without arguments, from any thread. Calls that come before the
// function ran are one call. Does not keep the process alive, and does nothing once the environment
// is gone.
#pragma once

#include <napi.h>

#include <memory>
#include <mutex>

namespace sf {

class Notifier {
 public:
  static std::shared_ptr<Notifier> Make(Napi::Env env, const Napi::Function& function,
                                        const char* name) {
    auto made = std::make_shared<Notifier>();
    made->self_ = made;
    made->function_ =
        Napi::ThreadSafeFunction::New(env, function, name, 0, 1, [self = made](Napi::Env) {
          std::lock_guard lock(self->mutex_);
          self->gone_ = true;
        });
    made->function_.Unref(env);
    return made;
  }

  void call() {
    std::lock_guard lock(mutex_);
    if (gone_ || pending_) return;
    pending_ = true;
    auto* self = new std::weak_ptr<Notifier>(self_);
    function_.NonBlockingCall(
        self, [](Napi::Env env, Napi::Function function, std::weak_ptr<Notifier>* weak) {
          const std::unique_ptr<std::weak_ptr<Notifier>> owned(weak);
          const auto notifier = weak->lock();
          if (notifier == nullptr) return;
          {
            std::lock_guard inner(notifier->mutex_);
            notifier->pending_ = false;
            if (notifier->gone_ || static_cast<napi_env>(env) == nullptr) return;
          }
          function.Call({});
        });
  }

  // No call comes after it. On the JavaScript thread.
  void close() {
    std::lock_guard lock(mutex_);
    if (gone_) return;
    gone_ = true;
    function_.Release();
  }

 private:
  std::mutex mutex_;
  bool gone_ = false;
  bool pending_ = false;
  std::weak_ptr<Notifier> self_;
  Napi::ThreadSafeFunction function_;
};

}  // namespace sf
