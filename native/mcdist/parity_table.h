// The parities a client holds, by block, until they repair what it lost. No I/O, no clock, no
// thread: the client and the simulator drive it. Not thread-safe.
//
// A row is one parity: its cover, its index, its bytes. Rows of several covers may be held for one
// block (a server that goes on to another cover, two servers in one group, packets out of order).
// With `missing` the symbols that are not held here, a row of cover C speaks of the unknowns
// C & missing. Rows that speak of the same unknowns are one *system*, whatever their covers: their
// coefficients depend on symbol and index alone. A system can be solved once it has as many rows
// with different indices as unknowns.
//
// Invariants:
//  - No two rows of a block have the same cover (sender, id, symbols) and index.
//  - A block's rows are all cut into the same number of fragments; a row cut otherwise drops them.
//  - A block holds at most as many rows as it has symbols (the oldest goes), the table at most
//    `max_blocks` blocks and about `max_bytes` bytes (the block longest without a new row goes).
//  - Nothing is read beyond `size`, and nothing is handed out before the system is solved.
// Left out on purpose: that the bytes are right. Parities are authenticated before they come here,
// and what the caller gives as held must be the generation's bytes, not what a guest made of them.
#pragma once

#include <list>
#include <memory>
#include <unordered_map>
#include <vector>

#include "mcdist/parity.h"

namespace sf::mcdist {

struct Cover {
  uint32_t sender = 0;  // who made it; ids of different senders have nothing to do with each other
  uint8_t id = 0;       // 1..255
  uint8_t fragments = 1;
  SymbolSet symbols;
  friend bool operator==(const Cover&, const Cover&) = default;
};

// The bytes of a symbol that is held: fragment_length() of them, good until the next call.
// nullptr: it cannot be read now.
using SymbolReader = std::function<const uint8_t*(unsigned symbol)>;
// A symbol that was repaired: fragment_length() bytes, good during the call.
using SymbolWriter = std::function<void(unsigned symbol, const uint8_t* bytes, size_t size)>;

class ParityTable {
 public:
  enum class Mode : uint8_t {
    kBytes,
    kCount,  // for simulations: rows have no bytes and repair() writes none
  };
  struct Limits {
    size_t max_blocks = 1024;
    size_t max_bytes = size_t{32} << 20;
  };
  enum class Added : uint8_t {
    kHeld,
    kDuplicate,  // held already
    kNotNeeded,  // nothing of its cover is missing, or there are enough rows for it
    kBad,        // no parity: its index, its cover or its size is out of range
  };
  // For a block report: `cover_id` of the newest row of that sender (0: none is of use), and how
  // many further symbols make all wanted ones known, given the rows of that cover.
  struct Need {
    uint8_t cover_id = 0;
    unsigned symbols = 0;
  };
  enum class Repair : uint8_t {
    kNothing,     // no system has rows enough
    kRepaired,    // `repaired` was written
    kUnreadable,  // a symbol that is held could not be read: nothing was written, nothing dropped
  };

  ParityTable() : ParityTable(Limits{}) {}
  explicit ParityTable(const Limits& limits, Mode mode = Mode::kBytes)
      : limits_(limits), mode_(mode) {}

  // A parity that came. `bytes` has `size` bytes, in mode kCount neither is looked at. `missing`:
  // the symbols of the block not held here, wanted or not, in the cover's number of fragments.
  Added add(uint64_t block, const Cover& cover, unsigned index, const uint8_t* bytes, size_t size,
            const SymbolSet& missing);

  // `wanted` need not be within `missing`.
  Need need(uint64_t block, unsigned fragments, uint32_t sender, const SymbolSet& missing,
            const SymbolSet& wanted) const;

  // What repair() would give now; empty: nothing.
  SymbolSet repairable(uint64_t block, unsigned fragments, const SymbolSet& missing) const;

  // Solves one system: reads each held symbol of its covers once, in order, then calls `write` for
  // each unknown of it, in order. Rows of no more use are dropped. Call it again, with what is
  // missing then, until it gives kNothing.
  Repair repair(uint64_t block, unsigned fragments, const SymbolSet& missing,
                const SymbolReader& read, const SymbolWriter& write, SymbolSet* repaired);

  // Drops the block's rows that nothing missing is in.
  void settle(uint64_t block, unsigned fragments, const SymbolSet& missing);
  void forget(uint64_t block);

  size_t blocks() const { return blocks_.size(); }
  size_t rows(uint64_t block) const;
  size_t bytes() const { return bytes_; }
  uint64_t evicted_blocks() const { return evicted_blocks_; }

 private:
  struct Row {
    Cover cover;
    uint8_t index;
    std::unique_ptr<uint8_t[]> bytes;
  };
  struct Block {
    unsigned fragments = 0;
    std::vector<Row> rows;  // the oldest first
    std::list<uint64_t>::iterator order;
  };
  struct System {
    SymbolSet unknowns;
    std::vector<const Row*> rows;  // of different indices; no more than unknowns
  };
  const Block* find(uint64_t block, unsigned fragments) const;
  static System system_of(const Block& block, const SymbolSet& unknowns, const SymbolSet& missing);
  static bool solvable(const Block& block, const SymbolSet& missing, System* out);
  bool reduce(const System& system, const SymbolSet& missing, unsigned fragments,
              const SymbolReader& read);
  void solve(const System& system, unsigned fragments, const SymbolWriter& write);
  size_t row_bytes(unsigned fragments) const;

  const Limits limits_;
  const Mode mode_;
  std::unordered_map<uint64_t, Block> blocks_;
  std::list<uint64_t> order_;  // blocks, longest without a new row first
  size_t bytes_ = 0;
  uint64_t evicted_blocks_ = 0;
  std::vector<uint8_t> work_;  // what the system's rows say of its unknowns alone
  std::vector<uint8_t> symbol_;
};

}  // namespace sf::mcdist
