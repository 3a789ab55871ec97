// What every addon class needs at the JavaScript border: errors with stable codes, registration of
// each component's exports, and handles by which one component passes a C++ object to another
// through JavaScript without JavaScript being able to forge or mix them up.
#pragma once

#include <napi.h>

#include <memory>
#include <string>

#include "common/page.h"
#include "common/status.h"

namespace sf {

// An Error with a `code` property; src/native.ts turns it into a SnowflockError.
inline Napi::Error js_error(Napi::Env env, const Status& status) {
  Napi::Error error = Napi::Error::New(env, status.message);
  error.Set("code", Napi::String::New(env, status.code));
  return error;
}

inline void throw_if(Napi::Env env, const Status& status) {
  if (!status.ok()) throw js_error(env, status);
}

// A component adds its exports with `static sf::Exports exports_of_x(&init);` at file scope.
class Exports {
 public:
  using Init = void (*)(Napi::Env, Napi::Object);
  explicit Exports(Init init);
};

class Replica;

// The `provider` property of Replica, ParentMemory and Disk objects; taken by the mcdist server.
Napi::Value wrap_provider(Napi::Env env, std::shared_ptr<PageProvider> provider);
std::shared_ptr<PageProvider> unwrap_provider(const Napi::Value& value);  // throws E_ARGUMENT

// The `handle` property of Replica objects; taken by memtap, blktap and the mcdist client.
Napi::Value wrap_replica(Napi::Env env, std::shared_ptr<Replica> replica);
std::shared_ptr<Replica> unwrap_replica(const Napi::Value& value);  // throws E_ARGUMENT

}  // namespace sf
