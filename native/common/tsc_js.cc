// The host's time stamp counter, for guests that cannot find out its rate by themselves.

#include <time.h>
#include <x86intrin.h>

#include "common/js.h"

namespace sf {
namespace {

// {tsc: bigint, ns: bigint}: the counter and CLOCK_MONOTONIC_RAW at one instant. Of several pairs
// the one whose two counter readings are closest, so that a preemption between them is left out.
Napi::Value read_tsc(const Napi::CallbackInfo& info) {
  uint64_t best_tsc = 0, best_ns = 0, best_gap = UINT64_MAX;
  for (int i = 0; i < 16; i++) {
    timespec now;
    uint64_t before = __rdtsc();
    clock_gettime(CLOCK_MONOTONIC_RAW, &now);
    uint64_t after = __rdtsc();
    if (after - before >= best_gap) continue;
    best_gap = after - before;
    best_tsc = before + best_gap / 2;
    best_ns = static_cast<uint64_t>(now.tv_sec) * 1000000000u + static_cast<uint64_t>(now.tv_nsec);
  }
  auto pair = Napi::Object::New(info.Env());
  pair.Set("tsc", Napi::BigInt::New(info.Env(), best_tsc));
  pair.Set("ns", Napi::BigInt::New(info.Env(), best_ns));
  return pair;
}

void init(Napi::Env env, Napi::Object exports) {
  exports.Set("readTsc", Napi::Function::New(env, read_tsc, "readTsc"));
}

Exports exports_of_tsc(&init);

}  // namespace
}  // namespace sf
