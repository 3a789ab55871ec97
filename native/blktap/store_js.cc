// JavaScript's view of a store and of its views. What is said here of threads: a chain is resolved
// (nodes are found or made, nothing is read) before a call returns, in the order of the calls;
// files are opened and maps read on a thread of the pool.
#include <algorithm>
#include <cmath>

#include "blktap/disk_js.h"
#include "blktap/server_js.h"
#include "blktap/slice_check.h"
#include "blktap/task.h"
#include "blktap/view.h"

namespace sf {
namespace {

struct ChainArgument {
  uint64_t size_bytes = 0;
  std::vector<SliceRef> slices;
  Store::OpenBase open_base;
};

ChainArgument chain_argument(Napi::Env env, const Napi::Value& value, const Napi::Value& handle,
                             const std::shared_ptr<FileErrors>& errors) {
  if (!value.IsObject() || !value.As<Napi::Object>().Get("base").IsObject()) {
    throw js_error(env, Status::Error("E_ARGUMENT", "a chain of slices and a base expected"));
  }
  const auto object = value.As<Napi::Object>();
  const auto base = object.Get("base").As<Napi::Object>();
  ChainArgument chain;
  chain.size_bytes = number(object, "sizeBytes");
  chain.slices = slice_refs(object.Get("slices"));
  const std::string kind = text(base, "kind");
  if (kind == "image") {
    const uint64_t bytes = std::min(number(base, "imageBytes"), chain.size_bytes);
    chain.open_base = [path = text(base, "path"), bytes, errors](std::shared_ptr<Base>* out) {
      return open_image_base(path, bytes, errors, out);
    };
  } else if (kind == "replica") {
    auto replica = unwrap_replica(handle);
    if (replica->generation() != text(base, "generation") ||
        replica->pages() != pages_of(chain.size_bytes)) {
      throw js_error(env, Status::Error("E_REPLICA_MISMATCH",
                                        "the replica given is not the base of the chain"));
    }
    chain.open_base = [replica](std::shared_ptr<Base>* out) {
      return open_replica_base(replica, out);
    };
  } else if (kind == "none") {
    chain.open_base = [](std::shared_ptr<Base>* out) {
      *out = make_zero_base();
      return Status::Ok();
    };
  } else {
    throw js_error(env, Status::Error("E_ARGUMENT", "unknown kind of base: " + kind));
  }
  return chain;
}

class ViewJs : public Napi::ObjectWrap<ViewJs> {
 public:
  static Napi::FunctionReference& constructor() {
    static auto* reference = new Napi::FunctionReference();
    return *reference;
  }
  static void Init(Napi::Env env) {
    constructor() = Napi::Persistent(DefineClass(env, "NativeView",
                                                 {
                                                     InstanceMethod("provider", &ViewJs::Provider),
                                                     InstanceMethod("device", &ViewJs::Device),
                                                     InstanceMethod("close", &ViewJs::Close),
                                                 }));
  }
  explicit ViewJs(const Napi::CallbackInfo& info) : Napi::ObjectWrap<ViewJs>(info) {}
  static Napi::Value Wrap(std::shared_ptr<View> view) {
    const Napi::Object made = constructor().New({});
    ViewJs::Unwrap(made)->view_ = std::move(view);
    return made;
  }

 private:
  const std::shared_ptr<View>& open(Napi::Env env) {
    if (view_ == nullptr) throw js_error(env, Status::Error("E_CLOSED", "the view is closed"));
    return view_;
  }
  Napi::Value Provider(const Napi::CallbackInfo& info) {
    return wrap_provider(info.Env(), open(info.Env()));
  }
  Napi::Value Device(const Napi::CallbackInfo& info) {
    return wrap_device(info.Env(), open(info.Env()));
  }
  void Close(const Napi::CallbackInfo&) { view_.reset(); }

  std::shared_ptr<View> view_;
};

class StoreJs : public Napi::ObjectWrap<StoreJs> {
 public:
  static Napi::FunctionReference& constructor() {
    static auto* reference = new Napi::FunctionReference();
    return *reference;
  }
  static void Init(Napi::Env env) {
    constructor() =
        Napi::Persistent(DefineClass(env, "NativeStore",
                                     {
                                         InstanceMethod("openDisk", &StoreJs::OpenDisk),
                                         InstanceMethod("openView", &StoreJs::OpenView),
                                         InstanceMethod("mergeBegin", &StoreJs::MergeBegin),
                                         InstanceMethod("punchBegin", &StoreJs::PunchBegin),
                                         InstanceMethod("removeSlices", &StoreJs::RemoveSlices),
                                         InstanceMethod("inUse", &StoreJs::InUse),
                                         InstanceMethod("sliceInfo", &StoreJs::SliceInfo),
                                         InstanceMethod("close", &StoreJs::Close),
                                     }));
  }
  explicit StoreJs(const Napi::CallbackInfo& info) : Napi::ObjectWrap<StoreJs>(info) {}

  // openStore(directory)
  static Napi::Value Open(const Napi::CallbackInfo& info) {
    const std::string directory = info[0].ToString();
    auto store = std::make_shared<std::shared_ptr<Store>>();
    return Task::Run(
        info.Env(), [=] { return Store::Open(directory, store.get()); },
        [=](Napi::Env) {
          const Napi::Object made = constructor().New({});
          *StoreJs::Unwrap(made)->held_ = std::move(*store);
          return made;
        });
  }

 private:
  const std::shared_ptr<Store>& open(Napi::Env env) {
    if (*held_ == nullptr) throw js_error(env, Status::Error("E_CLOSED", "the store is closed"));
    return *held_;
  }

  Napi::Value OpenDisk(const Napi::CallbackInfo& info) {
    Napi::Env env = info.Env();
    const ChainArgument chain = chain_argument(env, info[0], info[1], open(env)->file_errors());
    const std::string spare = text(info[0].As<Napi::Object>(), "spare");
    auto node = std::make_shared<NodePtr>();
    throw_if(env, open(info.Env())->resolve(chain.slices, chain.size_bytes, true, node.get()));
    auto disk = std::make_shared<std::shared_ptr<Disk>>();
    return Task::Run(
        env,
        [=, open_base = chain.open_base] {
          return Disk::Open(std::move(*node), spare, open_base, disk.get());
        },
        [=](Napi::Env env) { return wrap_disk(env, std::move(*disk)); });
  }

  Napi::Value OpenView(const Napi::CallbackInfo& info) {
    Napi::Env env = info.Env();
    const ChainArgument chain = chain_argument(env, info[0], info[1], open(env)->file_errors());
    auto node = std::make_shared<NodePtr>();
    throw_if(env, open(info.Env())->resolve(chain.slices, chain.size_bytes, false, node.get()));
    if (auto alive = open(info.Env())->view_if_alive(*node)) {
      return resolved(env, ViewJs::Wrap(std::move(alive)));
    }
    auto view = std::make_shared<std::shared_ptr<View>>();
    return Task::Run(
        env,
        [=, store = open(info.Env()), open_base = chain.open_base] {
          Status status = store->view(*node, open_base, view.get());
          node->reset();
          return status;
        },
        [=](Napi::Env) { return ViewJs::Wrap(std::move(*view)); });
  }

  Napi::Value MergeBegin(const Napi::CallbackInfo& info) {
    return begin_merge(info.Env(), open(info.Env()), info[0]);
  }
  Napi::Value PunchBegin(const Napi::CallbackInfo& info) {
    return begin_punch(info.Env(), open(info.Env()), info[0]);
  }

  Napi::Value InUse(const Napi::CallbackInfo& info) {
    return Napi::Boolean::New(info.Env(), open(info.Env())->in_use(info[0].ToString()));
  }

  // removeSlices(ids): those that were
  Napi::Value RemoveSlices(const Napi::CallbackInfo& info) {
    std::vector<std::string> ids;
    if (info[0].IsArray()) {
      const auto array = info[0].As<Napi::Array>();
      for (uint32_t i = 0; i < array.Length(); i++) ids.push_back(array.Get(i).ToString());
    }
    auto removed = std::make_shared<std::vector<std::string>>();
    return Task::Run(
        info.Env(),
        [store = open(info.Env()), ids, removed] {
          return store->remove_slices(ids, removed.get());
        },
        [removed](Napi::Env env) {
          auto out = Napi::Array::New(env, removed->size());
          for (uint32_t i = 0; i < removed->size(); i++) {
            out.Set(i, Napi::String::New(env, (*removed)[i]));
          }
          return out;
        });
  }

  // sliceInfo(id, map)
  Napi::Value SliceInfo(const Napi::CallbackInfo& info) {
    SliceRef ref;
    ref.id = info[0].ToString();
    ref.map = info[1].ToNumber().Uint32Value();
    struct Numbers {
      uint64_t pages = 0, zeros = 0, allocated = 0;
    };
    auto found = std::make_shared<Numbers>();
    return Task::Run(
        info.Env(),
        [=, store = open(info.Env())] {
          return store->slice_info(ref, &found->pages, &found->zeros, &found->allocated);
        },
        [=](Napi::Env env) {
          auto out = Napi::Object::New(env);
          out.Set("pages", static_cast<double>(found->pages));
          out.Set("zeroPages", static_cast<double>(found->zeros));
          out.Set("allocatedBytes", static_cast<double>(found->allocated));
          return out;
        });
  }

  Napi::Value Close(const Napi::CallbackInfo& info) {
    if (*held_ == nullptr) return Task::Run(info.Env(), [] { return Status::Ok(); });
    return Task::Run(
        info.Env(), [store = *held_] { return store->close(); },
        [held = held_](Napi::Env env) {
          held->reset();
          return env.Undefined();
        });
  }

  const std::shared_ptr<std::shared_ptr<Store>> held_ = std::make_shared<std::shared_ptr<Store>>();
};

// createSlice(directory, id, sizeBytes, spare)
Napi::Value CreateSlice(const Napi::CallbackInfo& info) {
  const std::string directory = info[0].ToString();
  const std::string id = info[1].ToString();
  const auto size = static_cast<uint64_t>(info[2].ToNumber().Int64Value());
  const SliceState state = info[3].ToBoolean() ? SliceState::kSpare : SliceState::kOpen;
  return Task::Run(info.Env(), [=] { return Slice::Create(directory, id, size, state); });
}

// removeSpare(directory, id, sizeBytes)
Napi::Value RemoveSpare(const Napi::CallbackInfo& info) {
  const std::string directory = info[0].ToString();
  const std::string id = info[1].ToString();
  const auto size = static_cast<uint64_t>(info[2].ToNumber().Int64Value());
  auto removed = std::make_shared<bool>(false);
  return Task::Run(
      info.Env(), [=] { return Slice::RemoveSpare(directory, id, size, removed.get()); },
      [=](Napi::Env env) { return Napi::Boolean::New(env, *removed); });
}

struct CheckArgument {
  std::string directory;
  SliceRef ref;
  uint64_t size_bytes = 0;
};

CheckArgument check_argument(const Napi::CallbackInfo& info) {
  CheckArgument from;
  from.ref = slice_ref(info[0]);
  from.directory = text(info[0].As<Napi::Object>(), "directory");
  from.size_bytes = number(info[0].As<Napi::Object>(), "sizeBytes");
  return from;
}

Napi::Value CheckSlice(const Napi::CallbackInfo& info) {
  const CheckArgument from = check_argument(info);
  auto found = std::make_shared<SliceCheck>();
  return Task::Run(
      info.Env(),
      [=] {
        return check_slice(from.directory, from.ref.id, from.ref.map, from.size_bytes, found.get());
      },
      [=](Napi::Env env) {
        auto out = Napi::Object::New(env);
        out.Set("state", found->state.empty()
                             ? env.Null()
                             : Napi::String::New(env, found->state).As<Napi::Value>());
        out.Set("pages", static_cast<double>(found->pages));
        out.Set("zeroPages", static_cast<double>(found->zero_pages));
        out.Set("dataBytes", static_cast<double>(found->data_bytes));
        out.Set("leakedBytes", static_cast<double>(found->leaked_bytes));
        out.Set("holes", static_cast<double>(found->holes));
        auto errors = Napi::Array::New(env);
        uint32_t i = 0;
        for (const auto& error : found->errors) errors.Set(i++, error);
        out.Set("errors", errors);
        return out;
      });
}

Napi::Value TrimSlice(const Napi::CallbackInfo& info) {
  const CheckArgument from = check_argument(info);
  auto bytes = std::make_shared<uint64_t>(0);
  return Task::Run(
      info.Env(),
      [=] {
        return trim_slice(from.directory, from.ref.id, from.ref.map, from.size_bytes, bytes.get());
      },
      [=](Napi::Env env) { return Napi::Number::New(env, static_cast<double>(*bytes)); });
}

void Init(Napi::Env env, Napi::Object exports) {
  ViewJs::Init(env);
  StoreJs::Init(env);
  exports.Set("openStore", Napi::Function::New(env, &StoreJs::Open));
  exports.Set("createSlice", Napi::Function::New(env, &CreateSlice));
  exports.Set("removeSpare", Napi::Function::New(env, &RemoveSpare));
  exports.Set("checkSlice", Napi::Function::New(env, &CheckSlice));
  exports.Set("trimSlice", Napi::Function::New(env, &TrimSlice));
}

Exports exports_of_store(&Init);

}  // namespace

SliceRef slice_ref(const Napi::Value& value) {
  SliceRef ref;
  if (value.IsObject()) {
    const auto object = value.As<Napi::Object>();
    ref.id = text(object, "id");
    const uint64_t map = number(object, "map");
    ref.map = static_cast<uint32_t>(map);
    ref.shared = object.Get("shared").ToBoolean();
    if (is_hex_id(ref.id) && map < UINT32_MAX) return ref;
  }
  throw js_error(value.Env(), Status::Error("E_ARGUMENT", "expected a slice's id and map"));
}

std::vector<SliceRef> slice_refs(const Napi::Value& value) {
  if (!value.IsArray()) {
    throw js_error(value.Env(), Status::Error("E_ARGUMENT", "expected an array of slices"));
  }
  const auto array = value.As<Napi::Array>();
  std::vector<SliceRef> refs;
  for (uint32_t i = 0; i < array.Length(); i++) refs.push_back(slice_ref(array.Get(i)));
  return refs;
}

}  // namespace sf
