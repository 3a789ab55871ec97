// mcdistSimulate(options) for JavaScript: one run on a thread of its own.
#include <algorithm>

#include "mcdist/js_common.h"
#include "mcdist/policy_js.h"
#include "mcdist/sim.h"

namespace sf::mcdist {
namespace {

TimeNs ms_of(const Napi::Object& from, const char* name, TimeNs missing) {
  return static_cast<TimeNs>(number_of(from, name, static_cast<double>(missing) / 1e6) * 1e6);
}

uint32_t u32_of(const Napi::Object& from, const char* name, uint32_t missing) {
  const uint64_t value = whole_of(from, name, missing);
  if (value > UINT32_MAX) throw bad_option(from.Env(), name, "a 32-bit number");
  return static_cast<uint32_t>(value);
}

double share_of(const Napi::Object& from, const char* name) {
  const double share = number_of(from, name, 0);
  if (share < 0 || share >= 1) throw bad_option(from.Env(), name, "a share from 0 to below 1");
  return share;
}

Napi::Array array_of(const Napi::Object& from, const char* name) {
  const Napi::Value value = from.Get(name);
  if (!value.IsArray()) throw bad_option(from.Env(), name, "an array");
  return value.As<Napi::Array>();
}

template <class Body>
void each(const Napi::Object& from, const char* name, Body body) {
  if (!has(from, name)) return;
  const Napi::Array array = array_of(from, name);
  for (uint32_t i = 0; i < array.Length(); i++) body(object_of(array[i], name));
}

std::vector<uint32_t> words_of(const Napi::Object& from, const char* name) {
  const Napi::Value value = from.Get(name);
  if (!value.IsTypedArray() || value.As<Napi::TypedArray>().TypedArrayType() != napi_uint32_array) {
    throw bad_option(from.Env(), name, "a Uint32Array");
  }
  const auto array = value.As<Napi::Uint32Array>();
  return {array.Data(), array.Data() + array.ElementLength()};
}

void read_parts(const Napi::Object& given, SimConfig* out) {
  uint64_t clients = 0;
  each(given, "segments", [&](const Napi::Object& from) {
    SimSegment segment;
    segment.clients = u32_of(from, "clients", 1);
    segment.bytes_per_s = number_of(from, "bytesPerS", 0);
    segment.delay = ms_of(from, "delayMs", segment.delay);
    segment.queue_bytes = whole_of(from, "queueBytes", segment.queue_bytes);
    segment.loss = share_of(from, "loss");
    clients += segment.clients;
    out->segments.push_back(segment);
  });
  if (clients == 0 || clients > 1 << 20 || out->segments.size() > 255) {
    throw bad_option(given.Env(), "segments", "1 to 1048576 clients in up to 255 segments");
  }
  each(given, "traces", [&](const Napi::Object& from) {
    SimTrace trace{words_of(from, "pages"), words_of(from, "computeNs")};
    if (trace.pages.size() != trace.compute_ns.size()) {
      throw bad_option(given.Env(), "traces", "as many times as pages");
    }
    for (const uint32_t page : trace.pages) {
      if (page >= out->pages) throw bad_option(given.Env(), "traces", "pages of the generation");
    }
    out->traces.push_back(std::move(trace));
  });
  if (out->traces.empty()) throw bad_option(given.Env(), "traces", "at least one");
  each(given, "joins", [&](const Napi::Object& from) {
    const uint32_t client = u32_of(from, "client", 0);
    if (client >= clients) throw bad_option(given.Env(), "joins", "clients that there are");
    out->joins.emplace_back(client, ms_of(from, "atMs", 0));
  });
  each(given, "changes", [&](const Napi::Object& from) {
    static const char* const kKinds[] = {"die", "part", "heal", "server-die", "server-restart"};
    SimChange change;
    change.at = ms_of(from, "atMs", 0);
    change.first = u32_of(from, "first", 0);
    change.count = u32_of(from, "count", 1);
    const std::string kind = string_of(from, "kind");
    const auto* found = std::find(std::begin(kKinds), std::end(kKinds), kind);
    if (found == std::end(kKinds)) throw bad_option(given.Env(), "kind", "a kind of change");
    change.kind = static_cast<SimChange::Kind>(found - std::begin(kKinds));
    out->changes.push_back(change);
  });
}

SimConfig config_of(const Napi::Object& given) {
  SimConfig out;
  out.seed = whole_of(given, "seed", out.seed);
  out.pages = whole_of(given, "pages", 0);
  if (out.pages == 0 || out.pages > uint64_t{1} << 32) {
    throw bad_option(given.Env(), "pages", "1 to 2^32");
  }
  out.fragments = u32_of(given, "fragments", out.fragments);
  if (out.fragments < 1 || out.fragments > kMaxFragments) {
    throw bad_option(given.Env(), "fragments", "1 to 4");
  }
  out.unicast = given.Get("unicast").ToBoolean();
  out.prefetch_all = given.Get("prefetchAll").ToBoolean();
  out.history = given.Get("history").ToBoolean();
  out.zero_share = share_of(given, "zeroShare");
  out.max_peers = u32_of(given, "maxPeers", out.max_peers);
  out.server_bytes_per_s = number_of(given, "serverBytesPerS", out.server_bytes_per_s);
  if (!(out.server_bytes_per_s > 0)) {
    throw bad_option(given.Env(), "serverBytesPerS", "more than 0");
  }
  out.jitter_pages = u32_of(given, "jitterPages", out.jitter_pages);
  if (out.jitter_pages > 256) throw bad_option(given.Env(), "jitterPages", "up to 256");
  out.private_share = share_of(given, "privateShare");
  out.speed_spread = share_of(given, "speedSpread");
  out.skip_share = share_of(given, "skipShare");
  out.join_spread = ms_of(given, "joinSpreadMs", 0);
  out.request_cpu = ms_of(given, "requestCpuMs", out.request_cpu);
  out.page_cpu = ms_of(given, "pageCpuMs", out.page_cpu);
  out.source_timeout = ms_of(given, "sourceTimeoutMs", out.source_timeout);
  out.max_wait = ms_of(given, "maxWaitMs", out.max_wait);
  out.max_time = ms_of(given, "maxTimeMs", out.max_time);
  out.max_bytes_ratio = number_of(given, "maxBytesRatio", 0);
  out.check_interval =
      std::max<TimeNs>(kMillisecond, ms_of(given, "checkIntervalMs", out.check_interval));
  if (has(given, "policy")) out.policy = policy_of(given.Get("policy"));
  read_parts(given, &out);
  return out;
}

Napi::Value times(Napi::Env env, const std::vector<TimeNs>& from) {
  auto out = Napi::Float64Array::New(env, from.size());
  for (size_t i = 0; i < from.size(); i++) {
    out[i] = from[i] == kNever ? INFINITY : static_cast<double>(from[i]) / 1e6;
  }
  return out;
}

Napi::Object to_js(Napi::Env env, const SimResult& result) {
  auto out = Napi::Object::New(env);
  out.Set("endMs", static_cast<double>(result.end) / 1e6);
  out.Set("maxWaitMs", static_cast<double>(result.max_wait) / 1e6);
#define SF_NUMBER(name) set_number(out, #name, result.name);
  SF_NUMBER(events)
  SF_NUMBER(sent_bytes)
  SF_NUMBER(sent_packets)
  SF_NUMBER(received_bytes)
  SF_NUMBER(pages_served)
  SF_NUMBER(zero_pages_served)
  SF_NUMBER(distinct_pages)
  SF_NUMBER(requests)
  SF_NUMBER(request_bytes)
  SF_NUMBER(pages_requested)
  SF_NUMBER(retries)
  SF_NUMBER(requests_dropped)
  SF_NUMBER(dropped_bytes)
  SF_NUMBER(lockstep_ignored)
  SF_NUMBER(merged)
  SF_NUMBER(queue_dropped)
  SF_NUMBER(welcomes)
  SF_NUMBER(evicted_peers)
  SF_NUMBER(refused_peers)
  SF_NUMBER(cuts)
  SF_NUMBER(cuts_undone)
  SF_NUMBER(pages_pushed)
  SF_NUMBER(unicast_answers)
  SF_NUMBER(reports)
  SF_NUMBER(repair_symbols)
  SF_NUMBER(parity_symbols)
  SF_NUMBER(pages_repaired)
  SF_NUMBER(announces)
  SF_NUMBER(max_queued)
#undef SF_NUMBER
  out.Set("startMs", times(env, result.start));
  out.Set("firstPageMs", times(env, result.first_page));
  out.Set("atSpeedMs", times(env, result.at_speed));
  out.Set("finishedMs", times(env, result.finished));
  out.Set("waitedMs", times(env, result.waited));
  auto faults = Napi::Float64Array::New(env, result.faults.size());
  for (size_t i = 0; i < result.faults.size(); i++)
    faults[i] = static_cast<double>(result.faults[i]);
  out.Set("faults", faults);
  auto outcome = Napi::Uint8Array::New(env, result.outcome.size());
  std::copy(result.outcome.begin(), result.outcome.end(), outcome.Data());
  out.Set("outcome", outcome);
  auto samples = Napi::Array::New(env, result.samples.size());
  for (uint32_t i = 0; i < result.samples.size(); i++) {
    const SimSample& from = result.samples[i];
    auto sample = Napi::Object::New(env);
    sample.Set("atMs", static_cast<double>(from.at) / 1e6);
    sample.Set("rateBytesPerS", from.rate);
    set_number(sample, "sent_bytes", from.sent_bytes);
    set_number(sample, "dropped_bytes", from.dropped_bytes);
    set_number(sample, "queued_pages", from.queued);
    set_number(sample, "done", from.done);
    samples[i] = sample;
  }
  out.Set("samples", samples);
  return out;
}

class SimulationRun final : public Napi::AsyncWorker {
 public:
  SimulationRun(Napi::Env env, SimConfig config)
      : Napi::AsyncWorker(env),
        deferred_(Napi::Promise::Deferred::New(env)),
        config_(std::move(config)),
        stop_(std::make_shared<std::atomic<bool>>(false)) {}
  Napi::Object Start() {
    auto out = Napi::Object::New(Env());
    out.Set("result", deferred_.Promise());
    out.Set("stop", Napi::Function::New(
                        Env(), [stop = stop_](const Napi::CallbackInfo&) { stop->store(true); }));
    Queue();
    return out;
  }

 private:
  void Execute() override { status_ = simulate(config_, *stop_, &result_); }
  void OnOK() override {
    if (!status_.ok()) return deferred_.Reject(js_error(Env(), status_).Value());
    deferred_.Resolve(to_js(Env(), result_));
  }
  void OnError(const Napi::Error& error) override { deferred_.Reject(error.Value()); }

  Napi::Promise::Deferred deferred_;
  const SimConfig config_;
  const std::shared_ptr<std::atomic<bool>> stop_;
  SimResult result_;
  Status status_;
};

// (options) -> {result: Promise, stop()}
Napi::Value Simulate(const Napi::CallbackInfo& info) {
  auto* run = new SimulationRun(info.Env(), config_of(object_of(info[0], "options")));
  return run->Start();
}

void Init(Napi::Env env, Napi::Object exports) {
  exports.Set("mcdistSimulate", Napi::Function::New(env, Simulate));
}

Exports exports_of_simulator(&Init);

}  // namespace
}  // namespace sf::mcdist
