// Reading option objects that come from JavaScript: what is missing or of the wrong type is
// E_ARGUMENT and names the property.
#pragma once

#include <cmath>
#include <functional>
#include <string>

#include "common/js.h"
#include "mcdist/socket.h"
#include "mcdist/wire.h"

namespace sf::mcdist {

inline Napi::Error bad_option(Napi::Env env, const char* name, const char* expected) {
  return js_error(env, Status::Error("E_ARGUMENT", std::string(name) + ": expected " + expected));
}

inline Napi::Object object_of(const Napi::Value& value, const char* name) {
  if (!value.IsObject()) throw bad_option(value.Env(), name, "an object");
  return value.As<Napi::Object>();
}

inline bool has(const Napi::Object& object, const char* name) {
  return object.Has(name) && !object.Get(name).IsUndefined();
}

inline std::string string_of(const Napi::Object& object, const char* name) {
  const Napi::Value value = object.Get(name);
  if (!value.IsString()) throw bad_option(object.Env(), name, "a string");
  return value.As<Napi::String>();
}

inline double number_of(const Napi::Value& value, const char* name) {
  const double number = value.IsNumber() ? value.As<Napi::Number>().DoubleValue() : NAN;
  if (!std::isfinite(number)) throw bad_option(value.Env(), name, "a finite number");
  return number;
}
inline double number_of(const Napi::Object& object, const char* name, double missing) {
  return has(object, name) ? number_of(object.Get(name), name) : missing;
}

// A whole number from 0 to 2^53.
inline uint64_t whole_of(const Napi::Value& value, const char* name) {
  const double number = number_of(value, name);
  if (number < 0 || number > 9007199254740992.0 || number != std::floor(number)) {
    throw bad_option(value.Env(), name, "a whole number, not negative");
  }
  return static_cast<uint64_t>(number);
}
inline uint64_t whole_of(const Napi::Object& object, const char* name, uint64_t missing) {
  return has(object, name) ? whole_of(object.Get(name), name) : missing;
}

inline GenerationId generation_of(const Napi::Value& value) {
  GenerationId id;
  if (!value.IsString() || !parse_generation(value.As<Napi::String>(), &id)) {
    throw bad_option(value.Env(), "generation", "32 lower-case hex characters");
  }
  return id;
}

inline Key key_of(const Napi::Object& object) {
  const Napi::Value value = object.Get("key");
  if (!value.IsBuffer() || value.As<Napi::Buffer<uint8_t>>().Length() != kKeyBytes) {
    throw bad_option(object.Env(), "key", "a Buffer of 32 bytes");
  }
  Key key;
  std::memcpy(key.data(), value.As<Napi::Buffer<uint8_t>>().Data(), kKeyBytes);
  return key;
}

inline sockaddr_in address_of(const Napi::Object& object, const char* address, const char* port) {
  sockaddr_in out;
  throw_if(object.Env(), parse_address(string_of(object, address),
                                       static_cast<int64_t>(whole_of(object, port, 0)), &out));
  return out;
}

inline sockaddr_in group_of(const Napi::Object& object) {
  sockaddr_in out;
  throw_if(object.Env(), parse_group(string_of(object, "group"),
                                     static_cast<int64_t>(whole_of(object, "groupPort", 0)), &out));
  return out;
}

inline in_addr interface_of(const Napi::Object& object) {
  sockaddr_in out;
  throw_if(object.Env(), parse_address(string_of(object, "interfaceAddress"), 0, &out));
  return out.sin_addr;
}

// Snake case in C++, camel case in JavaScript.
inline std::string camel(const char* name) {
  std::string out;
  for (bool up = false; *name != 0; name++) {
    if (*name == '_') {
      up = true;
    } else {
      out += up ? static_cast<char>(*name - 'a' + 'A') : *name;
      up = false;
    }
  }
  return out;
}

inline void set_number(Napi::Object object, const char* name, uint64_t value) {
  object.Set(camel(name), static_cast<double>(value));
}

// Runs `work` off the JavaScript thread; the promise resolves to what `result` makes when it has
// returned, or to undefined.
class Background final : public Napi::AsyncWorker {
 public:
  static Napi::Value Run(Napi::Env env, std::function<void()> work,
                         std::function<Napi::Value(Napi::Env)> result = {}) {
    auto* worker = new Background(env, std::move(work));
    worker->result_ = std::move(result);
    auto promise = worker->deferred_.Promise();
    worker->Queue();
    return promise;
  }

 private:
  Background(Napi::Env env, std::function<void()> work)
      : Napi::AsyncWorker(env),
        deferred_(Napi::Promise::Deferred::New(env)),
        work_(std::move(work)) {}
  void Execute() override { work_(); }
  void OnOK() override { deferred_.Resolve(result_ ? result_(Env()) : Env().Undefined()); }
  void OnError(const Napi::Error& error) override { deferred_.Reject(error.Value()); }

  Napi::Promise::Deferred deferred_;
  std::function<void()> work_;
  std::function<Napi::Value(Napi::Env)> result_;
};

}  // namespace sf::mcdist
