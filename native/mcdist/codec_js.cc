// The parity code and packed pages for tests: no data path leads here.
#include <random>

#include "mcdist/js_common.h"
#include "mcdist/pack.h"
#include "mcdist/parity_table.h"

namespace sf::mcdist {
namespace {

constexpr size_t kBlockBytes = kBlockPages * kPageBytes;
using Bytes = Napi::Buffer<uint8_t>;

Bytes buffer_of(const Napi::Value& value, const char* name) {
  if (!value.IsBuffer()) throw bad_option(value.Env(), name, "a Buffer");
  return value.As<Bytes>();
}

Bytes buffer_of(const Napi::Value& value, const char* name, size_t size) {
  if (!value.IsBuffer() || value.As<Bytes>().Length() != size) {
    const std::string expected = "a Buffer of " + std::to_string(size) + " bytes";
    throw bad_option(value.Env(), name, expected.c_str());
  }
  return value.As<Bytes>();
}

SymbolSet set_of(const Napi::Value& value, const char* name) {
  return SymbolSet::Decode(buffer_of(value, name, SymbolSet::kWireBytes).Data());
}

Napi::Value to_js(Napi::Env env, const SymbolSet& set) {
  auto out = Bytes::New(env, SymbolSet::kWireBytes);
  set.encode(out.Data());
  return out;
}

unsigned small_of(const Napi::Value& value, const char* name) {
  return static_cast<unsigned>(std::min<uint64_t>(whole_of(value, name), 1u << 16));
}

// kernels(): [{name, supported}], the one in use first among those supported
Napi::Value Kernels(const Napi::CallbackInfo& info) {
  auto out = Napi::Array::New(info.Env());
  for (const auto& each : gf256::kernels()) {
    auto kernel = Napi::Object::New(info.Env());
    kernel.Set("name", each.name);
    kernel.Set("supported", each.supported());
    out.Set(out.Length(), kernel);
  }
  return out;
}

// multiplyAdd(kernel, dst, src, c): of a kernel that is supported
void MultiplyAdd(const Napi::CallbackInfo& info) {
  const std::string name = info[0].ToString();
  const auto dst = buffer_of(info[1], "dst");
  const auto src = buffer_of(info[2], "src", dst.Length());
  for (const auto& each : gf256::kernels()) {
    if (name != each.name || !each.supported()) continue;
    each.multiply_add(dst.Data(), src.Data(), static_cast<uint8_t>(small_of(info[3], "c")),
                      dst.Length());
    return;
  }
  throw bad_option(info.Env(), "kernel", "one that is supported here");
}

// kernelFaults(kernel, rounds, seed): rows on which it differs from the portable one, of any
// length, alignment and factor; or changes a byte outside of the row
Napi::Value KernelFaults(const Napi::CallbackInfo& info) {
  const std::string name = info[0].ToString();
  const uint64_t rounds = whole_of(info[1], "rounds");
  std::mt19937_64 random(whole_of(info[2], "seed"));
  const auto& portable = gf256::kernels().back();
  uint64_t faults = 0;
  for (const auto& each : gf256::kernels()) {
    if (name != each.name || !each.supported()) continue;
    for (uint64_t i = 0; i < rounds; i++) {
      uint8_t src[kPageBytes + 64], dst[kPageBytes + 64], wanted[kPageBytes + 64];
      for (auto& byte : src) byte = static_cast<uint8_t>(random());
      for (auto& byte : dst) byte = static_cast<uint8_t>(random());
      std::memcpy(wanted, dst, sizeof dst);
      const size_t to = random() % 64;
      const size_t from = random() % 64;
      const size_t size = random() % 2 == 0 ? random() % 200 : random() % (kPageBytes + 1);
      const auto c = static_cast<uint8_t>(random() % 8 == 0 ? random() % 2 : random());
      each.multiply_add(dst + to, src + from, c, size);
      portable.multiply_add(wanted + to, src + from, c, size);
      if (std::memcmp(dst, wanted, sizeof dst) != 0) faults++;
    }
    return Napi::Number::New(info.Env(), static_cast<double>(faults));
  }
  throw bad_option(info.Env(), "kernel", "one that is supported here");
}

// encode(block, fragments, cover, first, count, unreadable page or undefined): the parities, or
// null
Napi::Value Encode(const Napi::CallbackInfo& info) {
  const auto block = buffer_of(info[0], "block", kBlockBytes);
  const unsigned fragments = small_of(info[1], "fragments");
  const SymbolSet cover = set_of(info[2], "cover");
  const unsigned count = small_of(info[4], "count");
  const unsigned unreadable = info[5].IsNumber() ? small_of(info[5], "page") : kBlockPages;
  // For arguments that are refused too: they are refused before anything is written.
  std::vector<uint8_t> out(kMaxParities * kPageBytes);
  const bool encoded = encode_parity(
      fragments, cover, small_of(info[3], "first"), count,
      [&](unsigned page) {
        return page == unreadable ? nullptr : block.Data() + page * kPageBytes;
      },
      out.data());
  if (!encoded) return info.Env().Null();
  return Bytes::Copy(info.Env(), out.data(), count * symbol_bytes(fragments));
}

class ParityTableJs : public Napi::ObjectWrap<ParityTableJs> {
 public:
  static Napi::Function Init(Napi::Env env) {
    return DefineClass(env, "ParityTable",
                       {
                           InstanceMethod("add", &ParityTableJs::Add),
                           InstanceMethod("need", &ParityTableJs::Need),
                           InstanceMethod("repairable", &ParityTableJs::Repairable),
                           InstanceMethod("repair", &ParityTableJs::Repair),
                           InstanceMethod("settle", &ParityTableJs::Settle),
                           InstanceMethod("forget", &ParityTableJs::Forget),
                           InstanceMethod("state", &ParityTableJs::State),
                       });
  }
  // new ParityTable({maxBlocks, maxBytes, count})
  explicit ParityTableJs(const Napi::CallbackInfo& info)
      : Napi::ObjectWrap<ParityTableJs>(info),
        table_(limits(object_of(info[0], "options")), has(object_of(info[0], "options"), "count")
                                                          ? ParityTable::Mode::kCount
                                                          : ParityTable::Mode::kBytes) {}

 private:
  static ParityTable::Limits limits(const Napi::Object& options) {
    ParityTable::Limits out;
    out.max_blocks = whole_of(options, "maxBlocks", out.max_blocks);
    out.max_bytes = whole_of(options, "maxBytes", out.max_bytes);
    return out;
  }

  // add(block, {sender, id, fragments, symbols}, index, bytes, missing)
  Napi::Value Add(const Napi::CallbackInfo& info) {
    const Napi::Object given = object_of(info[1], "cover");
    Cover cover;
    cover.sender = static_cast<uint32_t>(whole_of(given, "sender", 0));
    cover.id = static_cast<uint8_t>(whole_of(given, "id", 0));
    cover.fragments = static_cast<uint8_t>(whole_of(given, "fragments", 0));
    cover.symbols = set_of(given.Get("symbols"), "symbols");
    const auto bytes = buffer_of(info[3], "bytes");
    const auto added = table_.add(whole_of(info[0], "block"), cover, small_of(info[2], "index"),
                                  bytes.Data(), bytes.Length(), set_of(info[4], "missing"));
    constexpr const char* kNames[] = {"held", "duplicate", "not-needed", "bad"};
    return Napi::String::New(info.Env(), kNames[static_cast<size_t>(added)]);
  }
  // need(block, fragments, sender, missing, wanted): [cover id, symbols]
  Napi::Value Need(const Napi::CallbackInfo& info) {
    const auto need = table_.need(whole_of(info[0], "block"), small_of(info[1], "fragments"),
                                  static_cast<uint32_t>(whole_of(info[2], "sender")),
                                  set_of(info[3], "missing"), set_of(info[4], "wanted"));
    auto out = Napi::Array::New(info.Env(), 2);
    out.Set(0u, need.cover_id);
    out.Set(1u, need.symbols);
    return out;
  }
  Napi::Value Repairable(const Napi::CallbackInfo& info) {
    return to_js(info.Env(),
                 table_.repairable(whole_of(info[0], "block"), small_of(info[1], "fragments"),
                                   set_of(info[2], "missing")));
  }
  // repair(block, fragments, missing, pages, unreadable symbol or undefined): the symbols repaired,
  // which are written into `pages`, or null; 'unreadable'
  Napi::Value Repair(const Napi::CallbackInfo& info) {
    const unsigned fragments = small_of(info[1], "fragments");
    const SymbolSet missing = set_of(info[2], "missing");
    auto pages = buffer_of(info[3], "pages", kBlockBytes);
    const unsigned unreadable = info[4].IsNumber() ? small_of(info[4], "symbol") : kMaxSymbols;
    const auto at = [&](unsigned symbol) {
      return pages.Data() + symbol / fragments * kPageBytes +
             fragment_offset(symbol % fragments, fragments);
    };
    unsigned next = 0;
    SymbolSet repaired;
    switch (table_.repair(
        whole_of(info[0], "block"), fragments, missing,
        [&](unsigned symbol) -> const uint8_t* {
          if (symbol < next || missing.has(symbol)) {
            throw js_error(info.Env(), Status::Error("E_INTERNAL", "a symbol read out of turn"));
          }
          next = symbol + 1;
          return symbol == unreadable ? nullptr : at(symbol);
        },
        [&](unsigned symbol, const uint8_t* bytes, size_t size) {
          std::memcpy(at(symbol), bytes, size);
        },
        &repaired)) {
      case ParityTable::Repair::kNothing:
        return info.Env().Null();
      case ParityTable::Repair::kUnreadable:
        return Napi::String::New(info.Env(), "unreadable");
      case ParityTable::Repair::kRepaired:
        return to_js(info.Env(), repaired);
    }
    return info.Env().Undefined();
  }
  void Settle(const Napi::CallbackInfo& info) {
    table_.settle(whole_of(info[0], "block"), small_of(info[1], "fragments"),
                  set_of(info[2], "missing"));
  }
  void Forget(const Napi::CallbackInfo& info) { table_.forget(whole_of(info[0], "block")); }
  // state(block): {rows, blocks, bytes, evictedBlocks}
  Napi::Value State(const Napi::CallbackInfo& info) {
    auto out = Napi::Object::New(info.Env());
    set_number(out, "rows", table_.rows(whole_of(info[0], "block")));
    set_number(out, "blocks", table_.blocks());
    set_number(out, "bytes", table_.bytes());
    set_number(out, "evicted_blocks", table_.evicted_blocks());
    return out;
  }

  ParityTable table_;
};

// pack(page, limit): the packed page, or null
Napi::Value Pack(const Napi::CallbackInfo& info) {
  const auto page = buffer_of(info[0], "page", kPageBytes);
  uint8_t out[kPageBytes];
  const size_t limit = std::min<uint64_t>(whole_of(info[1], "limit"), sizeof out);
  const size_t size = Packer().pack(page.Data(), out, limit);
  return size == 0 ? info.Env().Null() : Bytes::Copy(info.Env(), out, size);
}

// unpack(bytes): the page, or null
Napi::Value Unpack(const Napi::CallbackInfo& info) {
  const auto data = buffer_of(info[0], "bytes");
  uint8_t out[kPageBytes];
  if (!unpack_page(data.Data(), data.Length(), out)) return info.Env().Null();
  return Bytes::Copy(info.Env(), out, sizeof out);
}

void Init(Napi::Env env, Napi::Object exports) {
  auto codec = Napi::Object::New(env);
  codec.Set("kernels", Napi::Function::New(env, Kernels));
  codec.Set("multiplyAdd", Napi::Function::New(env, MultiplyAdd));
  codec.Set("kernelFaults", Napi::Function::New(env, KernelFaults));
  codec.Set("encode", Napi::Function::New(env, Encode));
  codec.Set("ParityTable", ParityTableJs::Init(env));
  codec.Set("pack", Napi::Function::New(env, Pack));
  codec.Set("unpack", Napi::Function::New(env, Unpack));
  exports.Set("mcdistCodec", codec);
}

Exports exports_of_codec(&Init);

}  // namespace
}  // namespace sf::mcdist
