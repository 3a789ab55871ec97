// How the JavaScript classes of this component make each other's objects.
#pragma once

#include <memory>

#include "blktap/disk.h"
#include "common/js.h"

namespace sf {

Napi::Value wrap_disk(Napi::Env env, std::shared_ptr<Disk> disk);
// An NBD server with one export; `options` as of ServeOptions in src/cow-disk/native.ts.
Napi::Value serve_device(Napi::Env env, const Napi::Value& options, std::shared_ptr<Device> device);

// mergeBegin(), punchBegin() and pullBegin() of src/cow-disk/native.ts.
Napi::Value begin_merge(Napi::Env env, std::shared_ptr<Store> store, const Napi::Value& options);
Napi::Value begin_punch(Napi::Env env, std::shared_ptr<Store> store, const Napi::Value& options);
Napi::Value wrap_pull(Napi::Env env, std::shared_ptr<Disk> disk);

SliceRef slice_ref(const Napi::Value& value);  // throws E_ARGUMENT
std::vector<SliceRef> slice_refs(const Napi::Value& value);

}  // namespace sf
