// The process's file cache for JavaScript: its size and its figures.
#include "blktap/file_cache.h"
#include "blktap/file_cache_race.h"
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

// For tests: raceFileCache(directory, files, capacity, reads, seed)
Napi::Value Race(const Napi::CallbackInfo& info) {
  FileCacheRace race;
  throw_if(info.Env(),
           race_file_cache(info[0].ToString(), info[1].ToNumber().Uint32Value(),
                           info[2].ToNumber().Uint32Value(), info[3].ToNumber().Uint32Value(),
                           info[4].ToNumber().Uint32Value(), &race));
  auto out = Napi::Object::New(info.Env());
  out.Set("reads", static_cast<double>(race.reads));
  out.Set("wrong", static_cast<double>(race.wrong));
  out.Set("stale", static_cast<double>(race.stale));
  out.Set("again", static_cast<double>(race.again));
  out.Set("most", static_cast<double>(race.most));
  out.Set("pinned", static_cast<double>(race.pinned));
  out.Set("full", race.full);
  out.Set("letGo", race.let_go);
  return out;
}

void Init(Napi::Env env, Napi::Object exports) {
  exports.Set("setFileCacheCapacity", Napi::Function::New(env, &SetCapacity));
  exports.Set("raceFileCache", Napi::Function::New(env, &Race));
  exports.Set("fileCacheStats", Napi::Function::New(env, &Stats));
}

Exports exports_of_file_cache(&Init);

}  // namespace
}  // namespace sf
