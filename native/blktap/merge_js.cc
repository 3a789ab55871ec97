// JavaScript's view of work that is done in steps: merges, punches, and pulls of a disk.
#include "blktap/disk_js.h"
#include "blktap/task.h"

namespace sf {
Napi::Value begin_merge(Napi::Env env, std::shared_ptr<Store>, const Napi::Value&) {
  throw js_error(env, Status::Error("E_REQUIREMENT", "merging: not there yet"));
}
Napi::Value begin_punch(Napi::Env env, std::shared_ptr<Store>, const Napi::Value&) {
  throw js_error(env, Status::Error("E_REQUIREMENT", "punching: not there yet"));
}
Napi::Value wrap_pull(Napi::Env env, std::shared_ptr<Disk>) {
  throw js_error(env, Status::Error("E_REQUIREMENT", "pulling: not there yet"));
}
}  // namespace sf
