// The process's file cache for JavaScript: its size and its figures.
#include "blktap/file_cache.h"
#include "common/js.h"

namespace sf {
namespace {

// setFileCacheCapacity(descriptors)
void SetCapacity(const Napi::CallbackInfo& info) {
  const double n = info[0].ToNumber().DoubleValue();
  if (!(n >= 1) || n > 1048576) {
    throw js_error(info.Env(),
                   Status::Error("E_ARGUMENT", "the file cache holds 1 to 1048576 descriptors"));
  }
  FileCache::shared().set_capacity(static_cast<size_t>(n));
}

Napi::Value Stats(const Napi::CallbackInfo& info) {
  const FileCache::Stats stats = FileCache::shared().stats();
  auto out = Napi::Object::New(info.Env());
  out.Set("capacity", static_cast<double>(stats.capacity));
  out.Set("open", static_cast<double>(stats.open));
  out.Set("opened", static_cast<double>(stats.opened));
  out.Set("closed", static_cast<double>(stats.closed));
  return out;
}

void Init(Napi::Env env, Napi::Object exports) {
  exports.Set("setFileCacheCapacity", Napi::Function::New(env, &SetCapacity));
  exports.Set("fileCacheStats", Napi::Function::New(env, &Stats));
}

Exports exports_of_file_cache(&Init);

}  // namespace
}  // namespace sf
