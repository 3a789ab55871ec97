#include "mcdist/parity_table.h"

#include <algorithm>
#include <cstring>

namespace sf::mcdist {
namespace {

// The inverse of the Cauchy matrix of these rows (parities, x) and columns (symbols, y): n x n,
// line k gives symbol k. With A[r][k] = 1 / (x_r + y_k), and + the same as - in this field:
//
//   B[k][r] = prod_m (x_m + y_k) * prod_m (x_r + y_m)
//             / ((x_r + y_k) * prod_{m != r} (x_m + x_r) * prod_{m != k} (y_m + y_k))
std::vector<uint8_t> invert(const std::vector<uint8_t>& x, const std::vector<uint8_t>& y) {
  const size_t n = x.size();
  std::vector<uint8_t> of_row(n, 1), of_column(n, 1);
  const auto times = [](uint8_t* product, unsigned factor) {
    *product = gf256::multiply(*product, static_cast<uint8_t>(factor));
  };
  for (size_t i = 0; i < n; i++) {
    uint8_t row_divisor = 1;
    uint8_t column_divisor = 1;
    for (size_t m = 0; m < n; m++) {
      times(&of_row[i], x[i] ^ y[m]);
      times(&of_column[i], x[m] ^ y[i]);
      if (m == i) continue;
      times(&row_divisor, x[m] ^ x[i]);
      times(&column_divisor, y[m] ^ y[i]);
    }
    times(&of_row[i], gf256::inverse(row_divisor));
    times(&of_column[i], gf256::inverse(column_divisor));
  }
  std::vector<uint8_t> out(n * n);
  for (size_t k = 0; k < n; k++) {
    for (size_t r = 0; r < n; r++) {
      uint8_t* each = &out[k * n + r];
      *each = gf256::multiply(of_row[r], of_column[k]);
      times(each, gf256::inverse(static_cast<uint8_t>(x[r] ^ y[k])));
    }
  }
  return out;
}

}  // namespace

size_t ParityTable::row_bytes(unsigned fragments) const {
  return mode_ == Mode::kBytes ? symbol_bytes(fragments) : 0;
}

const ParityTable::Block* ParityTable::find(uint64_t block, unsigned fragments) const {
  const auto found = blocks_.find(block);
  return found == blocks_.end() || found->second.fragments != fragments ? nullptr : &found->second;
}

size_t ParityTable::rows(uint64_t block) const {
  const auto found = blocks_.find(block);
  return found == blocks_.end() ? 0 : found->second.rows.size();
}

ParityTable::System ParityTable::system_of(const Block& block, const SymbolSet& unknowns,
                                           const SymbolSet& missing) {
  System system{unknowns, {}};
  const size_t wanted = unknowns.count();
  SymbolSet indices;  // kMaxParities is below 128
  for (const Row& row : block.rows) {
    if (system.rows.size() == wanted) break;
    if (indices.has(row.index) || (row.cover.symbols & missing) != unknowns) continue;
    indices.add(row.index);
    system.rows.push_back(&row);
  }
  return system;
}

bool ParityTable::solvable(const Block& block, const SymbolSet& missing, System* out) {
  SymbolSet tried;
  for (auto row = block.rows.rbegin(); row != block.rows.rend(); ++row) {
    const SymbolSet unknowns = row->cover.symbols & missing;
    if (unknowns.empty() || unknowns == tried) continue;
    tried = unknowns;
    if (unknowns.count() > block.rows.size()) continue;
    *out = system_of(block, unknowns, missing);
    if (out->rows.size() == unknowns.count()) return true;
  }
  return false;
}

ParityTable::Added ParityTable::add(uint64_t block, const Cover& cover, unsigned index,
                                    const uint8_t* bytes, size_t size, const SymbolSet& missing) {
  if (index >= kMaxParities || cover.id == 0 || !valid_cover(cover.fragments, cover.symbols) ||
      (mode_ == Mode::kBytes && size != symbol_bytes(cover.fragments))) {
    return Added::kBad;
  }
  const SymbolSet unknowns = cover.symbols & missing;
  if (unknowns.empty()) return Added::kNotNeeded;
  if (const Block* held = find(block, cover.fragments); held != nullptr) {
    for (const Row& row : held->rows) {
      if (row.index == index && row.cover == cover) return Added::kDuplicate;
    }
    if (system_of(*held, unknowns, missing).rows.size() == unknowns.count()) {
      return Added::kNotNeeded;
    }
  } else {
    forget(block);  // was cut otherwise
  }

  Row row{cover, static_cast<uint8_t>(index), nullptr};
  if (mode_ == Mode::kBytes) {
    row.bytes = std::make_unique_for_overwrite<uint8_t[]>(size);
    std::memcpy(row.bytes.get(), bytes, size);
  }
  const auto [found, fresh] = blocks_.try_emplace(block);
  Block& held = found->second;
  if (fresh) {
    held.fragments = cover.fragments;
    held.order = order_.insert(order_.end(), block);
  } else {
    order_.splice(order_.end(), order_, held.order);
  }
  if (held.rows.size() == kBlockPages * held.fragments) {
    held.rows.erase(held.rows.begin());
    bytes_ -= row_bytes(held.fragments);
  }
  held.rows.push_back(std::move(row));
  bytes_ += row_bytes(held.fragments);
  while (blocks_.size() > 1 &&
         (blocks_.size() > limits_.max_blocks || bytes_ > limits_.max_bytes)) {
    forget(order_.front());  // never this block, which is the last
    evicted_blocks_++;
  }
  return Added::kHeld;
}

ParityTable::Need ParityTable::need(uint64_t block, unsigned fragments, uint32_t sender,
                                    const SymbolSet& missing, const SymbolSet& wanted) const {
  const SymbolSet lacking = missing & wanted;
  const Block* held = find(block, fragments);
  if (held == nullptr) return {0, lacking.count()};
  for (auto newest = held->rows.rbegin(); newest != held->rows.rend(); ++newest) {
    const Cover& cover = newest->cover;
    const SymbolSet unknowns = cover.symbols & missing;
    if (cover.sender != sender || (unknowns & lacking).empty()) continue;
    const auto rows = std::count_if(held->rows.begin(), held->rows.end(),
                                    [&](const Row& row) { return row.cover == cover; });
    const unsigned further =
        unknowns.count() - std::min(static_cast<unsigned>(rows), unknowns.count());
    return {cover.id, further + (lacking - cover.symbols).count()};
  }
  return {0, lacking.count()};
}

SymbolSet ParityTable::repairable(uint64_t block, unsigned fragments,
                                  const SymbolSet& missing) const {
  const Block* held = find(block, fragments);
  System system;
  return held != nullptr && solvable(*held, missing, &system) ? system.unknowns : SymbolSet();
}

ParityTable::Repair ParityTable::repair(uint64_t block, unsigned fragments,
                                        const SymbolSet& missing, const SymbolReader& read,
                                        const SymbolWriter& write, SymbolSet* repaired) {
  const Block* held = find(block, fragments);
  System system;
  if (held == nullptr || !solvable(*held, missing, &system)) return Repair::kNothing;
  if (mode_ == Mode::kBytes) {
    if (!reduce(system, missing, fragments, read)) return Repair::kUnreadable;
    solve(system, fragments, write);
  }
  *repaired = system.unknowns;
  settle(block, fragments, missing - system.unknowns);
  return Repair::kRepaired;
}

// Takes what is held out of the system's rows: what is left in work_ is of its unknowns alone.
bool ParityTable::reduce(const System& system, const SymbolSet& missing, unsigned fragments,
                         const SymbolReader& read) {
  const size_t size = symbol_bytes(fragments);
  work_.resize(system.rows.size() * size);
  SymbolSet held;
  for (size_t r = 0; r < system.rows.size(); r++) {
    std::memcpy(work_.data() + r * size, system.rows[r]->bytes.get(), size);
    held |= system.rows[r]->cover.symbols - missing;
  }
  for (unsigned i = held.next(0); i < kMaxSymbols; i = held.next(i + 1)) {
    const uint8_t* bytes = read(i);
    if (bytes == nullptr) return false;
    for (size_t r = 0; r < system.rows.size(); r++) {
      const Row& row = *system.rows[r];
      if (!row.cover.symbols.has(i)) continue;
      gf256::multiply_add(work_.data() + r * size, bytes, parity_coefficient(i, row.index),
                          fragment_length(i % fragments, fragments));
    }
  }
  return true;
}

void ParityTable::solve(const System& system, unsigned fragments, const SymbolWriter& write) {
  const size_t size = symbol_bytes(fragments);
  const size_t n = system.rows.size();
  std::vector<uint8_t> x, y;
  for (const Row* row : system.rows) x.push_back(static_cast<uint8_t>(128 + row->index));
  system.unknowns.for_each([&](unsigned i) { y.push_back(static_cast<uint8_t>(i)); });
  const std::vector<uint8_t> inverse = invert(x, y);
  symbol_.resize(size);
  for (size_t k = 0; k < n; k++) {
    const size_t length = fragment_length(y[k] % fragments, fragments);
    std::memset(symbol_.data(), 0, length);
    for (size_t r = 0; r < n; r++) {
      gf256::multiply_add(symbol_.data(), work_.data() + r * size, inverse[k * n + r], length);
    }
    write(y[k], symbol_.data(), length);
  }
}

void ParityTable::settle(uint64_t block, unsigned fragments, const SymbolSet& missing) {
  const auto found = blocks_.find(block);
  if (found == blocks_.end() || found->second.fragments != fragments) return;
  Block& held = found->second;
  bytes_ -= row_bytes(fragments) * std::erase_if(held.rows, [&](const Row& row) {
              return (row.cover.symbols & missing).empty();
            });
  if (held.rows.empty()) forget(block);
}

void ParityTable::forget(uint64_t block) {
  const auto found = blocks_.find(block);
  if (found == blocks_.end()) return;
  bytes_ -= row_bytes(found->second.fragments) * found->second.rows.size();
  order_.erase(found->second.order);
  blocks_.erase(found);
}

}  // namespace sf::mcdist
