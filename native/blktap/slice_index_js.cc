// The slice index for tests and benches: no data path leads here.
#include <time.h>

#include <random>

#include "blktap/slice_index.h"
#include "blktap/slice_index_race.h"
#include "common/js.h"

namespace sf {
namespace {

uint64_t whole(const Napi::Value& value) {
  const double n = value.ToNumber().DoubleValue();
  if (!(n >= 0) || n > 9007199254740991.0) {
    throw js_error(value.Env(), Status::Error("E_ARGUMENT", "a whole number expected"));
  }
  return static_cast<uint64_t>(n);
}

double now_ns() {
  timespec ts = {};
  ::clock_gettime(CLOCK_MONOTONIC, &ts);
  return static_cast<double>(ts.tv_sec) * 1e9 + static_cast<double>(ts.tv_nsec);
}

class SliceIndexJs : public Napi::ObjectWrap<SliceIndexJs> {
 public:
  static Napi::FunctionReference& constructor() {
    static auto* reference = new Napi::FunctionReference();
    return *reference;
  }
  static Napi::Function Init(Napi::Env env) {
    const Napi::Function made = DefineClass(env, "SliceIndex",
                                            {
                                                InstanceMethod("set", &SliceIndexJs::Set),
                                                InstanceMethod("get", &SliceIndexJs::Get),
                                                InstanceMethod("entries", &SliceIndexJs::Entries),
                                                InstanceMethod("run", &SliceIndexJs::Run),
                                                InstanceMethod("baseRun", &SliceIndexJs::BaseRun),
                                                InstanceMethod("copy", &SliceIndexJs::Copy),
                                                InstanceMethod("drop", &SliceIndexJs::Drop),
                                                InstanceMethod("bytes", &SliceIndexJs::Bytes),
                                                InstanceMethod("scatter", &SliceIndexJs::Scatter),
                                                InstanceMethod("lookupNs", &SliceIndexJs::LookupNs),
                                                StaticMethod("race", &SliceIndexJs::Race),
                                            });
    constructor() = Napi::Persistent(made);
    return made;
  }
  // new SliceIndex(pages)
  explicit SliceIndexJs(const Napi::CallbackInfo& info)
      : Napi::ObjectWrap<SliceIndexJs>(info), index_(std::max<uint64_t>(1, whole(info[0]))) {}

 private:
  // A range of pages within the disk, from arguments `at` and `at + 1`.
  std::pair<PageIndex, uint64_t> range(const Napi::CallbackInfo& info, size_t at) {
    const PageIndex page = whole(info[at]);
    const uint64_t count = whole(info[at + 1]);
    if (page >= index_.pages() || count > index_.pages() - page) {
      throw js_error(info.Env(), Status::Error("E_ARGUMENT", "pages beyond the end"));
    }
    return {page, count};
  }
  PageIndex page(const Napi::CallbackInfo& info) {
    const PageIndex page = whole(info[0]);
    if (page >= index_.pages()) {
      throw js_error(info.Env(), Status::Error("E_ARGUMENT", "page beyond the end"));
    }
    return page;
  }

  // set(page, count, entry)
  void Set(const Napi::CallbackInfo& info) {
    const auto [page, count] = range(info, 0);
    index_.set(page, count, info[2].ToNumber().Uint32Value());
  }
  Napi::Value Get(const Napi::CallbackInfo& info) {
    return Napi::Number::New(info.Env(), index_.get(page(info)));
  }
  // entries(page, count): of one leaf
  Napi::Value Entries(const Napi::CallbackInfo& info) {
    const auto [page, count] = range(info, 0);
    if (page % SliceIndex::kLeafPages + count > SliceIndex::kLeafPages) {
      throw js_error(info.Env(), Status::Error("E_ARGUMENT", "pages of two leaves"));
    }
    SliceIndex::Entry entries[SliceIndex::kLeafPages];
    index_.get(page, count, entries);
    auto out = Napi::Array::New(info.Env(), count);
    for (uint32_t i = 0; i < count; i++) out.Set(i, static_cast<double>(entries[i]));
    return out;
  }
  // run(page): [entry, pages]
  Napi::Value Run(const Napi::CallbackInfo& info) {
    uint64_t count = 0;
    auto out = Napi::Array::New(info.Env(), 2);
    out.Set(0u, static_cast<double>(index_.run(page(info), &count)));
    out.Set(1u, static_cast<double>(count));
    return out;
  }
  Napi::Value BaseRun(const Napi::CallbackInfo& info) {
    return Napi::Number::New(info.Env(), static_cast<double>(index_.base_run(page(info))));
  }
  Napi::Value Copy(const Napi::CallbackInfo& info) {
    const Napi::Object made = constructor().New({Napi::Number::New(info.Env(), 1)});
    SliceIndexJs::Unwrap(made)->index_ = index_;
    return made;
  }
  // Gives up the nodes now, not when JavaScript collects the object. Still counts its old copies.
  void Drop(const Napi::CallbackInfo& info) { index_.set(0, index_.pages(), SliceIndex::kBase); }
  Napi::Value Bytes(const Napi::CallbackInfo& info) {
    return Napi::Number::New(info.Env(), static_cast<double>(index_.bytes()));
  }
  // scatter(writes, slices, seed): single pages anywhere, by slices 1 to `slices` in turn of age
  void Scatter(const Napi::CallbackInfo& info) {
    const uint64_t writes = whole(info[0]);
    const uint64_t slices = whole(info[1]);
    std::mt19937_64 random(whole(info[2]));
    for (uint64_t i = 0; i < writes; i++) {
      index_.set(random() % index_.pages(), 1,
                 static_cast<SliceIndex::Entry>(1 + i * slices / writes));
    }
  }
  // lookupNs(run, seed): time of one look-up of `run` aligned pages anywhere, of a million
  Napi::Value LookupNs(const Napi::CallbackInfo& info) {
    constexpr size_t kLookups = 1 << 20;
    const uint64_t run = std::clamp<uint64_t>(whole(info[0]), 1, SliceIndex::kLeafPages);
    std::mt19937_64 random(whole(info[1]));
    std::vector<PageIndex> pages(kLookups);
    for (auto& page : pages) page = random() % (index_.pages() / run) * run;
    uint64_t sum = 0;
    SliceIndex::Entry entries[SliceIndex::kLeafPages];
    const double start = now_ns();
    for (const PageIndex page : pages) {
      if (run == 1) {
        sum += index_.get(page);
      } else {
        index_.get(page, std::min(run, SliceIndex::kLeafPages - page % SliceIndex::kLeafPages),
                   entries);
        sum += entries[0];
      }
    }
    const double took = now_ns() - start;
    volatile uint64_t used = sum;
    (void)used;
    return Napi::Number::New(info.Env(), took / static_cast<double>(kLookups));
  }
  // race(pages, readers, copies, seed): how many wrong answers there were
  static Napi::Value Race(const Napi::CallbackInfo& info) {
    const uint64_t wrong = race_slice_index(whole(info[0]), static_cast<unsigned>(whole(info[1])),
                                            static_cast<unsigned>(whole(info[2])),
                                            static_cast<uint32_t>(whole(info[3])));
    return Napi::Number::New(info.Env(), static_cast<double>(wrong));
  }

  SliceIndex index_;
};

void Init(Napi::Env env, Napi::Object exports) {
  exports.Set("SliceIndex", SliceIndexJs::Init(env));
}

Exports exports_of_slice_index(&Init);

}  // namespace
}  // namespace sf
