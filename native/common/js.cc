#include "common/js.h"

#include <vector>

namespace sf {
namespace {

std::vector<Exports::Init>& inits() {
  static std::vector<Exports::Init> all;
  return all;
}

constexpr napi_type_tag kProviderTag = {0x5f0e9c1d4b7a4f11, 0xa1d26c3f90e84b01};
constexpr napi_type_tag kReplicaTag = {0x5f0e9c1d4b7a4f11, 0xa1d26c3f90e84b02};

template <typename T>
Napi::Value wrap(Napi::Env env, std::shared_ptr<T> object, const napi_type_tag& tag) {
  auto external = Napi::External<std::shared_ptr<T>>::New(
      env, new std::shared_ptr<T>(std::move(object)),
      [](Napi::Env, std::shared_ptr<T>* held) { delete held; });
  external.TypeTag(&tag);
  return external;
}

template <typename T>
std::shared_ptr<T> unwrap(const Napi::Value& value, const napi_type_tag& tag, const char* what) {
  if (value.IsExternal()) {
    auto external = value.As<Napi::External<std::shared_ptr<T>>>();
    if (external.CheckTypeTag(&tag)) return *external.Data();
  }
  throw js_error(value.Env(), Status::Error("E_ARGUMENT", std::string("expected ") + what));
}

Napi::Object init_all(Napi::Env env, Napi::Object exports) {
  for (auto init : inits()) init(env, exports);
  return exports;
}

}  // namespace

Exports::Exports(Init init) { inits().push_back(init); }

Napi::Value wrap_provider(Napi::Env env, std::shared_ptr<PageProvider> provider) {
  return wrap(env, std::move(provider), kProviderTag);
}
std::shared_ptr<PageProvider> unwrap_provider(const Napi::Value& value) {
  return unwrap<PageProvider>(value, kProviderTag, "a page provider");
}
Napi::Value wrap_replica(Napi::Env env, std::shared_ptr<Replica> replica) {
  return wrap(env, std::move(replica), kReplicaTag);
}
std::shared_ptr<Replica> unwrap_replica(const Napi::Value& value) {
  return unwrap<Replica>(value, kReplicaTag, "a replica handle");
}

NODE_API_MODULE(NODE_GYP_MODULE_NAME, init_all)

}  // namespace sf
