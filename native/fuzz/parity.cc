// Fuzzes the table of parities (native/mcdist/parity_table.h): parities of any cover, index and
// size, symbols that come and are lost, in any order.
//
// A table that counts goes beside one with bytes, and they agree. What is refused or held is what
// the bounds say. While all parities are honest, whatever is repaired has the generation's bytes,
// and as many parities over one cover as it has unknowns always repair them.
#include <algorithm>
#include <cstring>

#include "fuzz/support.h"
#include "mcdist/parity_table.h"

namespace sf::fuzz {
namespace {

using mcdist::Cover;
using mcdist::encode_parity;
using mcdist::kBlockPages;
using mcdist::kMaxFragments;
using mcdist::kMaxParities;
using mcdist::kMaxSymbols;
using mcdist::ParityTable;
using mcdist::SymbolSet;

constexpr uint64_t kBlocks = 3;

const uint8_t* generation() {
  static const auto* bytes = [] {
    auto* made = new std::vector<uint8_t>(kBlocks * kBlockPages * kPageBytes);
    uint32_t state = 1;
    for (auto& byte : *made) {
      state = state * 1664525 + 1013904223;
      byte = static_cast<uint8_t>(state >> 24);
    }
    return made;
  }();
  return bytes->data();
}

class Table {
 public:
  Table(const uint8_t* data, size_t size)
      : in_(data, size),
        limits_{in_.ConsumeIntegralInRange<size_t>(0, 4),
                in_.ConsumeIntegralInRange<size_t>(0, 64) * kPageBytes},
        table_(limits_),
        counting_({limits_.max_blocks, SIZE_MAX}, ParityTable::Mode::kCount) {
    for (auto& each : missing_) each = set();
  }

  void run() {
    for (int i = 0; i < 200 && in_.remaining_bytes() > 0; i++) {
      block_ = in_.ConsumeIntegralInRange<uint64_t>(0, kBlocks - 1);
      switch (in_.ConsumeIntegralInRange<int>(0, 7)) {
        case 0:
          missing_[block_] |= set();
          break;
        case 1:
          missing_[block_] = missing_[block_] - set();
          break;
        case 2:
          lie();
          break;
        case 3:
          table_.forget(block_);
          counting_.forget(block_);
          break;
        case 4:
          table_.settle(block_, fragments_, missing_[block_]);
          counting_.settle(block_, fragments_, missing_[block_]);
          break;
        default:
          send();
          break;
      }
      ask();
      if (in_.ConsumeIntegralInRange<int>(0, 3) != 0) repair();
    }
  }

 private:
  SymbolSet set() {
    if (in_.ConsumeBool()) {
      uint8_t bytes[SymbolSet::kWireBytes] = {};
      in_.ConsumeData(bytes, sizeof bytes);
      return SymbolSet::Decode(bytes);
    }
    SymbolSet few;
    for (int i = in_.ConsumeIntegralInRange<int>(0, 4); i > 0; i--) {
      few.add(in_.ConsumeIntegralInRange<unsigned>(0, kMaxSymbols - 1));
    }
    return few;
  }
  Cover cover() {
    Cover out;
    out.sender = in_.ConsumeIntegralInRange<uint32_t>(0, 1);
    out.id = in_.ConsumeIntegralInRange<uint8_t>(1, 3);
    if (in_.ConsumeIntegralInRange<int>(0, 15) == 0) {
      fragments_ = in_.ConsumeIntegralInRange<unsigned>(1, kMaxFragments);
    }
    out.fragments = static_cast<uint8_t>(fragments_);
    out.symbols = set() & SymbolSet::Block(fragments_);
    return out;
  }
  const uint8_t* page(unsigned number) const {
    return generation() + (block_ * kBlockPages + number) * kPageBytes;
  }
  const uint8_t* symbol(unsigned number) const {
    return page(number / fragments_) + mcdist::fragment_offset(number % fragments_, fragments_);
  }

  // One to four parities that are what they say.
  void send() {
    const Cover made = cover();
    const auto count = in_.ConsumeIntegralInRange<unsigned>(1, 4);
    const auto first = in_.ConsumeIntegralInRange<unsigned>(0, kMaxParities - 4);
    const size_t size = mcdist::symbol_bytes(fragments_);
    std::vector<uint8_t> out(count * size);
    const bool encoded = encode_parity(
        fragments_, made.symbols, first, count, [&](unsigned number) { return page(number); },
        out.data());
    expect(encoded == !made.symbols.empty(),
           "a cover is encoded that is empty, or not if it is not");
    for (unsigned i = 0; encoded && i < count; i++) {
      const auto added = add(made, first + i, out.data() + i * size, size);
      expect(added != ParityTable::Added::kBad, "a parity as it should be is refused");
    }
  }

  // One that may have anything.
  void lie() {
    Cover made = cover();
    const auto about = in_.ConsumeIntegralInRange<int>(0, 5);
    if (about == 1) made.id = 0;
    if (about == 2) made.fragments = in_.ConsumeIntegral<uint8_t>();
    if (about == 3) made.symbols |= set();
    const auto index = in_.ConsumeIntegralInRange<unsigned>(0, about == 4 ? 300 : 8);
    const size_t size = made.fragments == 0 ? 0 : mcdist::symbol_bytes(made.fragments);
    const std::vector<uint8_t> bytes(about == 5 ? in_.ConsumeIntegralInRange<size_t>(0, 5000)
                                                : size);
    const bool good = index < kMaxParities && made.id != 0 &&
                      mcdist::valid_cover(made.fragments, made.symbols) &&
                      bytes.size() == mcdist::symbol_bytes(made.fragments);
    const auto before = table_.rows(block_);
    // The table that counts looks at no size.
    if (!good) {
      expect(table_.add(block_, made, index, bytes.data(), bytes.size(), missing_[block_]) ==
                 ParityTable::Added::kBad,
             "a parity that cannot be one is taken");
      expect(table_.rows(block_) == before, "a parity that was refused changed something");
      return;
    }
    fragments_ = made.fragments;
    honest_ = false;
    add(made, index, bytes.data(), bytes.size());
  }

  ParityTable::Added add(const Cover& made, unsigned index, const uint8_t* bytes, size_t size) {
    const auto added = table_.add(block_, made, index, bytes, size, missing_[block_]);
    const auto counted = counting_.add(block_, made, index, nullptr, 0, missing_[block_]);
    // Without bytes there is no bound on them: from the first eviction by bytes on they differ.
    if (table_.evicted_blocks() != counting_.evicted_blocks()) same_ = false;
    expect(!same_ || added == counted, "a table that counts takes other parities");
    expect(table_.blocks() <= std::max<size_t>(1, limits_.max_blocks), "too many blocks");
    expect(table_.blocks() <= 1 || table_.bytes() <= limits_.max_bytes, "too many bytes");
    expect(table_.rows(block_) <= kBlockPages * kMaxFragments, "too many rows");
    if (added == ParityTable::Added::kHeld) {
      expect(table_.rows(block_) > 0, "what was held is not there");
    }
    return added;
  }

  void ask() {
    const SymbolSet wanted = set();
    const SymbolSet lacking = wanted & missing_[block_];
    const auto need = table_.need(block_, fragments_, 0, missing_[block_], wanted);
    expect(need.symbols <= missing_[block_].count(), "more is needed than is missing");
    expect((need.symbols == 0) <= (lacking.empty() || need.cover_id != 0), "nothing is needed");
    if (need.symbols == 0 && need.cover_id != 0) {
      expect(!table_.repairable(block_, fragments_, missing_[block_]).empty(),
             "nothing is needed, and nothing can be repaired");
    }
    if (!same_) return;
    const auto counted = counting_.need(block_, fragments_, 0, missing_[block_], wanted);
    expect(counted.cover_id == need.cover_id && counted.symbols == need.symbols,
           "a table that counts needs something else");
  }

  void repair() {
    const SymbolSet missing = missing_[block_];
    const SymbolSet expected = table_.repairable(block_, fragments_, missing);
    const unsigned unreadable =
        in_.ConsumeBool() ? kMaxSymbols : in_.ConsumeIntegralInRange<unsigned>(0, kMaxSymbols);
    SymbolSet written, repaired;
    bool refused = false;
    const auto result = table_.repair(
        block_, fragments_, missing,
        [&](unsigned number) {
          expect(number < kBlockPages * fragments_ && !missing.has(number),
                 "a symbol is read that is not held");
          refused |= number == unreadable;
          return number == unreadable ? nullptr : symbol(number);
        },
        [&](unsigned number, const uint8_t* bytes, size_t size) {
          expect(size == mcdist::fragment_length(number % fragments_, fragments_),
                 "a symbol of another size");
          expect(!honest_ || std::memcmp(bytes, symbol(number), size) == 0,
                 "a symbol is repaired to other bytes");
          written.add(number);
        },
        &repaired);
    expect((result == ParityTable::Repair::kUnreadable) == refused, "what cannot be read is used");
    if (result != ParityTable::Repair::kRepaired) {
      expect(written.empty(), "something is written that was not repaired");
      expect(refused || expected.empty(), "what can be repaired is not");
      return;
    }
    expect(written == expected && repaired == expected && !expected.empty() &&
               expected.within(missing),
           "other symbols are repaired than can be");
    missing_[block_] = missing - repaired;
    if (!same_) return;
    expect(counting_.repair(block_, fragments_, missing, {}, {}, &repaired) ==
                   ParityTable::Repair::kRepaired &&
               repaired == written,
           "a table that counts repairs other symbols");
  }

  FuzzedDataProvider in_;
  const ParityTable::Limits limits_;
  ParityTable table_;
  ParityTable counting_;
  SymbolSet missing_[kBlocks];
  uint64_t block_ = 0;
  unsigned fragments_ = 3;
  bool honest_ = true;
  bool same_ = true;
};

}  // namespace
}  // namespace sf::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  sf::fuzz::Table(data, size).run();
  return 0;
}
