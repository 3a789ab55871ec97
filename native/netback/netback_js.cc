// JavaScript's view of the filter, of taps and of namespaces. src/netback-filter/native.ts has the
// types.
#include "common/js.h"
#include "kernel/netback/reasons.h"
#include "netback/filter.h"
#include "netback/link.h"
#include "netback/netns.h"

namespace sf {
namespace {

using FilterHolder = std::unique_ptr<NetbackFilter>;

// 48 bits fit a double exactly.
uint64_t Mac(const Napi::Value& value) {
  return static_cast<uint64_t>(value.ToNumber().Int64Value()) & 0xffffffffffffULL;
}

Vm VmOf(const Napi::Value& value) {
  const Napi::Object from = value.ToObject();
  Vm vm;
  vm.interface = from.Get("tap").ToString();
  vm.wire_mac = Mac(from.Get("wireMac"));
  vm.guest_mac = Mac(from.Get("guestMac"));
  vm.ip = from.Get("ip").ToNumber().Uint32Value();
  if (from.Has("replaces")) vm.replaces = Mac(from.Get("replaces"));
  return vm;
}

class Netback : public Napi::ObjectWrap<Netback> {
 public:
  static void Init(Napi::Env env, Napi::Object exports) {
    Napi::Function constructor =
        DefineClass(env, "Netback",
                    {
                        InstanceMethod("addVm", &Netback::AddVm),
                        InstanceMethod("removeVm", &Netback::RemoveVm),
                        InstanceMethod("vms", &Netback::Vms),
                        InstanceMethod("setGatewayMode", &Netback::SetGatewayMode),
                        InstanceMethod("gatewayMode", &Netback::GatewayMode),
                        InstanceMethod("stats", &Netback::Stats),
                        InstanceMethod("detach", &Netback::Detach),
                        InstanceMethod("close", &Netback::Close),
                        InstanceMethod("putIdentity", &Netback::PutIdentity),
                        InstanceMethod("run", &Netback::Run),
                        InstanceMethod("runMany", &Netback::RunMany),
                    });
    env.SetInstanceData(new Napi::FunctionReference(Napi::Persistent(constructor)));
    exports.Set("attach", Napi::Function::New(env, &Netback::Attach));
  }

  explicit Netback(const Napi::CallbackInfo& info) : Napi::ObjectWrap<Netback>(info) {
    if (!info[0].IsExternal()) {
      throw js_error(info.Env(), Status::Error("E_ARGUMENT", "use attach()"));
    }
    filter_ = std::move(*info[0].As<Napi::External<FilterHolder>>().Data());
  }

 private:
  class Attacher : public Napi::AsyncWorker {
   public:
    Attacher(Napi::Env env, std::string object, std::string uplink, bool existing, Fd netns)
        : AsyncWorker(env),
          deferred(Napi::Promise::Deferred::New(env)),
          object_(std::move(object)),
          uplink_(std::move(uplink)),
          existing_(existing),
          netns_(std::move(netns)) {}

    void Execute() override {
      NetnsScope scope;
      status_ = scope.Enter(netns_.get());
      if (!status_.ok()) return;
      status_ = existing_ ? NetbackFilter::Open(object_, uplink_, &filter_)
                          : NetbackFilter::Attach(object_, uplink_, &filter_);
    }
    void OnOK() override {
      if (!status_.ok()) return deferred.Reject(js_error(Env(), status_).Value());
      Napi::FunctionReference* constructor = Env().GetInstanceData<Napi::FunctionReference>();
      deferred.Resolve(constructor->New({Napi::External<FilterHolder>::New(Env(), &filter_)}));
    }

    Napi::Promise::Deferred deferred;

   private:
    std::string object_;
    std::string uplink_;
    bool existing_;
    Fd netns_;
    FilterHolder filter_;
    Status status_;
  };

  // Loading and verifying takes tens of milliseconds, so it runs on a worker thread, which has to
  // enter the namespace the caller is in.
  static Napi::Value Attach(const Napi::CallbackInfo& info) {
    Fd netns;
    throw_if(info.Env(), OpenNetns(kThreadNetns, &netns));
    auto* attacher = new Attacher(info.Env(), info[0].ToString(), info[1].ToString(),
                                  info[2].ToBoolean(), std::move(netns));
    Napi::Promise promise = attacher->deferred.Promise();
    attacher->Queue();
    return promise;
  }

  NetbackFilter& filter(Napi::Env env) {
    if (filter_ == nullptr) throw js_error(env, Status::Error("E_CLOSED", "filter is closed"));
    return *filter_;
  }

  void AddVm(const Napi::CallbackInfo& info) {
    throw_if(info.Env(), filter(info.Env()).AddVm(VmOf(info[0])));
  }
  void PutIdentity(const Napi::CallbackInfo& info) {
    throw_if(info.Env(),
             filter(info.Env()).PutIdentity(info[0].ToNumber().Uint32Value(), VmOf(info[1])));
  }
  void RemoveVm(const Napi::CallbackInfo& info) {
    throw_if(info.Env(), filter(info.Env()).RemoveVm(info[0].ToString()));
  }
  Napi::Value Vms(const Napi::CallbackInfo& info) {
    std::vector<Vm> vms;
    throw_if(info.Env(), filter(info.Env()).Vms(&vms));
    Napi::Array out = Napi::Array::New(info.Env(), vms.size());
    for (uint32_t i = 0; i < vms.size(); ++i) {
      Napi::Object vm = Napi::Object::New(info.Env());
      vm.Set("tap", vms[i].interface);
      vm.Set("wireMac", static_cast<double>(vms[i].wire_mac));
      vm.Set("guestMac", static_cast<double>(vms[i].guest_mac));
      vm.Set("ip", vms[i].ip);
      out.Set(i, vm);
    }
    return out;
  }
  void SetGatewayMode(const Napi::CallbackInfo& info) {
    throw_if(info.Env(), filter(info.Env()).SetGatewayMode(info[0].ToNumber().Uint32Value()));
  }
  Napi::Value GatewayMode(const Napi::CallbackInfo& info) {
    uint32_t mode = 0;
    throw_if(info.Env(), filter(info.Env()).GatewayMode(&mode));
    return Napi::Number::New(info.Env(), mode);
  }
  Napi::Value Stats(const Napi::CallbackInfo& info) {
    std::vector<uint64_t> counts;
    throw_if(info.Env(), filter(info.Env()).Stats(&counts));
    Napi::Array out = Napi::Array::New(info.Env(), counts.size());
    for (uint32_t i = 0; i < counts.size(); ++i) out.Set(i, static_cast<double>(counts[i]));
    return out;
  }
  void Detach(const Napi::CallbackInfo& info) {
    throw_if(info.Env(), filter(info.Env()).Detach());
    filter_.reset();
  }
  void Close(const Napi::CallbackInfo&) { filter_.reset(); }

  // run(program, frame, ifindex, mark, repeat)
  Napi::Value Run(const Napi::CallbackInfo& info) {
    auto frame = info[1].As<Napi::Uint8Array>();
    TestRun run;
    throw_if(info.Env(),
             filter(info.Env())
                 .Run(info[0].ToString(), {frame.Data(), frame.Data() + frame.ByteLength()},
                      info[2].ToNumber().Uint32Value(), info[3].ToNumber().Uint32Value(),
                      info[4].ToNumber().Uint32Value(), &run));
    Napi::Object out = Napi::Object::New(info.Env());
    out.Set("verdict", run.verdict);
    out.Set("meanNs", run.mean_ns);
    out.Set("frame", Napi::Buffer<uint8_t>::Copy(info.Env(), run.frame.data(), run.frame.size()));
    return out;
  }

  // runMany(program, frames, lengths, ifindexes, mark): verdicts; frames and lengths are changed
  Napi::Value RunMany(const Napi::CallbackInfo& info) {
    auto frames = info[1].As<Napi::Uint8Array>();
    auto lengths = info[2].As<Napi::Uint32Array>();
    auto ifindexes = info[3].As<Napi::Uint32Array>();
    uint64_t bytes = 0;
    for (size_t i = 0; i < lengths.ElementLength(); i++) bytes += lengths[i];
    if (lengths.ElementLength() != ifindexes.ElementLength() || bytes > frames.ByteLength()) {
      throw_if(info.Env(), Status::Error("E_ARGUMENT", "lengths do not fit the frames"));
    }
    auto verdicts = Napi::Uint32Array::New(info.Env(), lengths.ElementLength());
    throw_if(info.Env(),
             filter(info.Env())
                 .RunMany(info[0].ToString(),
                          {ifindexes.Data(), ifindexes.Data() + ifindexes.ElementLength()},
                          info[4].ToNumber().Uint32Value(), frames.Data(), lengths.Data(),
                          verdicts.Data()));
    return verdicts;
  }

  FilterHolder filter_;
};

// openTap(name, vnetHdr, mtu): descriptor
Napi::Value OpenTapJs(const Napi::CallbackInfo& info) {
  Fd tap;
  throw_if(info.Env(), OpenTap(info[0].ToString(), info[1].ToBoolean(),
                               info[2].ToNumber().Uint32Value(), &tap));
  return Napi::Number::New(info.Env(), tap.release());
}

// openDhcpSocket(interface, relay, receiveBytes): descriptor
Napi::Value OpenDhcpSocketJs(const Napi::CallbackInfo& info) {
  Fd socket;
  throw_if(info.Env(), OpenDhcpSocket(info[0].ToString(), info[1].ToBoolean(),
                                      info[2].ToNumber().Int32Value(), &socket));
  return Napi::Number::New(info.Env(), socket.release());
}

// openTcpSocket(interface, address): descriptor
Napi::Value OpenTcpSocketJs(const Napi::CallbackInfo& info) {
  Fd socket;
  throw_if(info.Env(),
           OpenTcpSocket(info[0].ToString(), info[1].ToNumber().Uint32Value(), &socket));
  return Napi::Number::New(info.Env(), socket.release());
}

// inNetns(path, function): what the function returns. For synchronous functions only.
Napi::Value InNetns(const Napi::CallbackInfo& info) {
  Fd netns;
  throw_if(info.Env(), OpenNetns(info[0].ToString(), &netns));
  NetnsScope scope;
  throw_if(info.Env(), scope.Enter(netns.get()));
  return info[1].As<Napi::Function>().Call({});
}

Napi::Value ReasonNames(Napi::Env env) {
  Napi::Array names = Napi::Array::New(env);
#define NETBACK_REASON_NAME(number, name) names.Set(uint32_t{number}, #name);
  NETBACK_REASONS(NETBACK_REASON_NAME)
#undef NETBACK_REASON_NAME
  return names;
}

void Init(Napi::Env env, Napi::Object exports) {
  Netback::Init(env, exports);
  exports.Set("openTap", Napi::Function::New(env, OpenTapJs));
  exports.Set("openDhcpSocket", Napi::Function::New(env, OpenDhcpSocketJs));
  exports.Set("openTcpSocket", Napi::Function::New(env, OpenTcpSocketJs));
  exports.Set("inNetns", Napi::Function::New(env, InNetns));
  exports.Set("reasonNames", ReasonNames(env));
}

const Exports exports_of_netback(&Init);

}  // namespace
}  // namespace sf
