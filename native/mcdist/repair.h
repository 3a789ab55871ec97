// What is sent again of blocks that were pushed: clients report which symbols of a block they lack,
// reports are gathered for a moment, and one answer repairs all of them: any n parity symbols over
// the union of what is missing repair any n losses of each. If somebody lacks all of the union, the
// symbols themselves do the same.
//
// States of a block: unknown -> gathering (report) -> answered (next) -> gathering (a later report)
// Invariants:
//  - A parity index is used once with one cover id; another cover, or no index left, is another id.
//  - A report that what was just sent will satisfy is ignored for `retry_window`.
//  - Bounded: kBlocks blocks, of which the one answered longest ago is forgotten (its next cover
//    begins with another id than the last one, as far as that is known), and kReporters missing
//    sets of each; what further reporters lack is taken together, which sends more, never less.
#pragma once

#include <array>
#include <deque>
#include <list>
#include <unordered_map>
#include <vector>

#include "mcdist/policy_config.h"
#include "mcdist/wire.h"

namespace sf::mcdist {

class Repair {
 public:
  static constexpr size_t kBlocks = 4096;
  static constexpr size_t kReporters = 32;
  static constexpr unsigned kIndices = 127;

  struct Order {
    uint64_t block = 0;
    uint8_t fragments = 0;
    bool parity = false;
    SymbolSet symbols;  // the cover, or the symbols to be sent again
    uint8_t cover_id = 0;
    uint8_t first = 0, count = 0;  // parity indices
  };
  enum class Verdict : uint8_t {
    kTaken,
    kOnItsWay,  // what was sent a moment ago repairs it
    kNothing,   // nothing of what is wanted is missing
    kFull,      // too many blocks are gathering
  };

  explicit Repair(const PolicyConfig& config) : config_(config) {}

  // `at_once`: nobody else is likely to report this block.
  Verdict report(const BlockReport& report, bool at_once, TimeNs now);
  bool next(TimeNs now, Order* out);
  TimeNs ready_at() const { return gathering_.empty() ? kNever : gathering_.front().second; }
  size_t waiting() const { return gathering_.size(); }

 private:
  struct Reporter {
    SymbolSet missing;
    uint8_t need = 0;      // of further parities of the block's cover
    bool matched = false;  // holds some of that cover: `need` counts
  };
  struct Block {
    bool gathering = false;
    uint8_t fragments = 0;
    SymbolSet asked;  // union of what is missing and wanted
    std::vector<Reporter> reporters;
    // Sent last.
    TimeNs answered = 0;
    SymbolSet plain;
    SymbolSet cover;
    uint8_t cover_id = 0;  // 0: none yet
    uint8_t used = 0;      // indices of it
    std::list<uint64_t>::iterator place;
  };
  Block* admit(uint64_t block);
  bool on_its_way(const Block& block, const BlockReport& report, const SymbolSet& asked,
                  TimeNs now) const;

  const PolicyConfig& config_;
  std::unordered_map<uint64_t, Block> blocks_;
  std::list<uint64_t> order_;  // used last at the end
  std::deque<std::pair<uint64_t, TimeNs>> gathering_;
  uint8_t last_cover_ = 0;
};

}  // namespace sf::mcdist
