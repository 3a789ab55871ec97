// What the simulator's network is made of: virtual time, seeded randomness, links, and who holds
// what. No I/O, no clock, no threads; the same seed gives the same run.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <queue>
#include <unordered_map>
#include <utility>
#include <vector>

#include "common/page.h"
#include "mcdist/policy.h"
#include "mcdist/wire.h"

namespace sf::mcdist {

// splitmix64 (Steele, Lea, Flood 2014): one step of it is also a good hash.
inline uint64_t mix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}
inline double unit_of(uint64_t hash) { return static_cast<double>(hash >> 11) * 0x1.0p-53; }

class SimRandom {
 public:
  explicit SimRandom(uint64_t seed) : state_(mix64(seed)) {}
  uint64_t next() { return mix64(state_++ * 0x9e3779b97f4a7c15); }
  double unit() { return unit_of(next()); }  // [0, 1)

 private:
  uint64_t state_;
};

struct SimEvent {
  enum class Kind : uint8_t { kStart, kRun, kTimer, kRequest, kServer, kDelivery, kChange, kCheck };
  TimeNs at = 0;
  uint64_t order = 0;  // first scheduled, first run, at the same time
  Kind kind = Kind::kRun;
  uint32_t subject = 0;  // client, slot or index, by kind
};

class SimEvents {
 public:
  void at(TimeNs at, SimEvent::Kind kind, uint32_t subject) {
    heap_.push({at, order_++, kind, subject});
  }
  bool empty() const { return heap_.empty(); }
  SimEvent pop() {
    const SimEvent event = heap_.top();
    heap_.pop();
    return event;
  }
  uint64_t scheduled() const { return order_; }

 private:
  struct Later {
    bool operator()(const SimEvent& a, const SimEvent& b) const {
      return a.at != b.at ? a.at > b.at : a.order > b.order;
    }
  };
  std::priority_queue<SimEvent, std::vector<SimEvent>, Later> heap_;
  uint64_t order_ = 0;
};

// Serializes packets at a rate, in order; what does not fit the queue is dropped at its tail.
class SimLink {
 public:
  double bytes_per_s = 0;  // 0: no limit
  TimeNs delay = 0;        // added after the last bit left
  uint64_t queue_bytes = UINT64_MAX;

  uint64_t backlog_bytes(TimeNs now) const {
    if (bytes_per_s <= 0 || free_at_ <= now) return 0;
    return static_cast<uint64_t>(static_cast<double>(free_at_ - now) * bytes_per_s / 1e9);
  }
  // When the backlog is at most `bytes`.
  TimeNs drained_to(uint64_t bytes) const {
    return free_at_ - static_cast<TimeNs>(static_cast<double>(bytes) / bytes_per_s * 1e9);
  }
  // When the last bit arrives; kNever: dropped.
  TimeNs send(uint64_t bytes, TimeNs now) {
    if (bytes_per_s <= 0) return now + delay;
    if (backlog_bytes(now) + bytes > queue_bytes) return kNever;
    free_at_ = std::max(free_at_, now) +
               static_cast<TimeNs>(std::ceil(static_cast<double>(bytes) / bytes_per_s * 1e9));
    return free_at_ + delay;
  }

 private:
  TimeNs free_at_ = 0;
};

// A client that lost some packets of an answer: which (bit i: fragment i).
using SimLoss = std::pair<uint32_t, uint8_t>;

// Each packet is lost by each of the clients first..end-1 with probability `loss`, independently.
// Costs as much as there are losses: the distance to the next one is drawn (geometric).
inline void draw_losses(SimRandom* random, double loss, uint8_t packets, uint32_t first,
                        uint32_t end, std::vector<SimLoss>* out) {
  out->clear();
  if (loss <= 0) return;
  const double scale = 1 / std::log1p(-loss);
  for (unsigned i = 0; i < 8; i++) {
    if (((packets >> i) & 1) == 0) continue;
    double at = first;
    for (;;) {
      at += std::floor(std::log(1 - random->unit()) * scale);
      if (at >= end) break;
      out->emplace_back(static_cast<uint32_t>(at), static_cast<uint8_t>(1 << i));
      at += 1;
    }
  }
  std::sort(out->begin(), out->end());
  size_t kept = 0;  // one entry for each client
  for (const SimLoss& each : *out) {
    if (kept > 0 && (*out)[kept - 1].first == each.first) {
      (*out)[kept - 1].second |= each.second;
    } else {
      (*out)[kept++] = each;
    }
  }
  out->resize(kept);
}

// A set of clients.
class SimSet {
 public:
  explicit SimSet(size_t clients) : words_((clients + 63) / 64) {}
  bool has(uint32_t client) const { return (words_[client / 64] >> (client % 64) & 1) != 0; }
  void set(uint32_t client, bool in) {
    const uint64_t bit = uint64_t{1} << (client % 64);
    words_[client / 64] = in ? words_[client / 64] | bit : words_[client / 64] & ~bit;
  }
  uint64_t word(size_t i) const { return words_[i]; }
  uint64_t& word(size_t i) { return words_[i]; }
  size_t words() const { return words_.size(); }

 private:
  std::vector<uint64_t> words_;
};

// Which client holds which page: a row of bits for each page, so that an answer that reaches
// thousands of clients costs a few hundred words. Pages received in part are a sparse table.
class SimImage {
 public:
  SimImage(uint64_t pages, uint32_t clients, unsigned fragments)
      : clients_(clients),
        fragments_(fragments),
        all_(static_cast<uint8_t>((1 << fragments) - 1)),
        rows_(pages) {}

  bool has(uint32_t client, PageIndex page) const {
    const Row& row = rows_[page];
    return row.everybody || (row.bits != nullptr && row.bits->has(client));
  }
  // Fragments not received; 0: none was received (as Requester asks).
  uint8_t missing(uint32_t client, PageIndex page) const {
    if (partial_.empty()) return 0;
    auto found = partial_.find(key(client, page));
    return found == partial_.end() ? 0 : all_ & ~found->second;
  }
  // `fragments` of a page come to those of `up` within first..end-1, but for
  // what `losses` (in order) says.
  void deliver(PageIndex page, uint8_t fragments, uint32_t first, uint32_t end, const SimSet& up,
               const std::vector<SimLoss>& losses) {
    Row& row = rows_[page];
    if (row.everybody) return;
    if (row.bits == nullptr) row.bits = std::make_unique<SimSet>(clients_);
    size_t next = 0;
    uint64_t absent = 0;
    for (size_t w = first / 64; w * 64 < end; w++) {
      uint64_t here = up.word(w);
      if (end - w * 64 < 64) here &= (uint64_t{1} << (end - w * 64)) - 1;
      if (w * 64 < first) here &= ~uint64_t{0} << (first % 64);
      uint64_t lost = 0;
      for (size_t i = next; i < losses.size() && losses[i].first / 64 == w; i++) {
        lost |= uint64_t{1} << (losses[i].first % 64);
      }
      const bool whole = fragments == all_;
      uint64_t apart = (whole ? lost : ~uint64_t{0}) & here & ~row.bits->word(w);
      if (whole) row.bits->word(w) |= here & ~lost;
      while (apart != 0) {
        const auto client = static_cast<uint32_t>(w * 64 + __builtin_ctzll(apart));
        apart &= apart - 1;
        size_t i = next;
        while (i < losses.size() && losses[i].first < client) i++;
        const uint8_t lost = i < losses.size() && losses[i].first == client ? losses[i].second : 0;
        gain(row, page, client, fragments & ~lost);
      }
      while (next < losses.size() && losses[next].first / 64 == w) next++;
      absent |= ~row.bits->word(w);
    }
    if (absent == 0 && full(row)) {
      row.everybody = true;
      row.bits.reset();
    }
  }

  // What a client lacks of a block, as Client::look(): all absent pages are wanted.
  void look(uint32_t client, BlockReport* report) const {
    const PageIndex first = report->block * kBlockPages;
    report->fragments = static_cast<uint8_t>(fragments_);
    for (unsigned i = 0; i < kBlockPages && first + i < rows_.size(); i++) {
      if (has(client, first + i)) continue;
      report->wanted |= 1U << i;
      const uint8_t some = missing(client, first + i);
      for (unsigned f = 0; f < fragments_; f++) {
        if (some == 0 || ((some >> f) & 1) != 0) report->missing.add(i * fragments_ + f);
      }
    }
    const Held held = parities(client, report->block);
    unsigned need = report->missing.count();
    if (held.cover_id != 0) {
      report->cover = held.cover_id;
      const unsigned open = (report->missing & held.cover).count();
      need = (need - open) + (open > held.count ? open - held.count : 0);
    }
    report->need = static_cast<uint8_t>(need);
  }
  // Adds those of first..end-1 within `up` that lack the page.
  void lacking(PageIndex page, uint32_t first, uint32_t end, const SimSet& up, SimSet* out) const {
    const Row& row = rows_[page];
    if (row.everybody) return;
    for (size_t w = first / 64; w * 64 < end; w++) {
      out->word(w) |= up.word(w) & ~(row.bits == nullptr ? 0 : row.bits->word(w));
    }
  }
  // Parity symbols of a block come to a client; any n of one cover repair n symbols. Returns how
  // many pages that completed.
  unsigned parity(uint32_t client, PageIndex first, const Parity& parity, unsigned count) {
    Held& held = held_[first / kBlockPages][client];
    if (held.cover_id != parity.cover_id) held = Held{parity.cover_id, 0, parity.cover};
    held.count += count;
    return settle(client, first);
  }
  // Those that hold parities of the page's block: what else came of it may do for them now.
  std::vector<uint32_t> holders(PageIndex page) const {
    std::vector<uint32_t> out;
    auto found = held_.find(page / kBlockPages);
    if (found == held_.end()) return out;
    for (const auto& [client, held] : found->second) out.push_back(client);
    std::sort(out.begin(), out.end());
    return out;
  }
  unsigned settle(uint32_t client, PageIndex first) {
    const Held held = parities(client, first / kBlockPages);
    BlockReport report;
    report.block = first / kBlockPages;
    look(client, &report);
    if (report.missing.empty()) return 0;
    const SymbolSet open = report.missing & held.cover;
    if (open.empty() || open.count() > held.count) return 0;
    unsigned whole = 0;
    for (unsigned i = 0; i < kBlockPages; i++) {
      uint8_t mask = 0;
      for (unsigned f = 0; f < fragments_; f++) {
        if (open.has(i * fragments_ + f)) mask |= static_cast<uint8_t>(1 << f);
      }
      if (mask == 0) continue;
      Row& row = rows_[first + i];
      if (row.bits == nullptr) row.bits = std::make_unique<SimSet>(clients_);
      gain(row, first + i, client, mask);
      whole += row.bits->has(client) ? 1 : 0;
    }
    held_[report.block].erase(client);
    return whole;
  }

 private:
  struct Held {
    uint8_t cover_id = 0;
    unsigned count = 0;
    SymbolSet cover;
  };
  Held parities(uint32_t client, uint64_t block) const {
    auto found = held_.find(block);
    if (found == held_.end()) return {};
    auto mine = found->second.find(client);
    return mine == found->second.end() ? Held{} : mine->second;
  }
  struct Row {
    bool everybody = false;
    std::unique_ptr<SimSet> bits;
  };
  static uint64_t key(uint32_t client, PageIndex page) { return page << 24 | client; }
  void gain(Row& row, PageIndex page, uint32_t client, uint8_t fragments) {
    if (fragments == all_) return row.bits->set(client, true);
    if (fragments == 0) return;
    auto [at, fresh] = partial_.try_emplace(key(client, page), uint8_t{0});
    at->second |= fragments;
    if (at->second != all_) return;
    partial_.erase(at);
    row.bits->set(client, true);
  }
  bool full(const Row& row) const {
    for (size_t w = 0; w < row.bits->words(); w++) {
      const uint64_t last =
          clients_ - w * 64 < 64 ? (uint64_t{1} << (clients_ % 64)) - 1 : ~uint64_t{0};
      if ((row.bits->word(w) & last) != last) return false;
    }
    return true;
  }

  const uint32_t clients_;
  const unsigned fragments_;
  const uint8_t all_;
  std::vector<Row> rows_;
  // Fragments held; entries of pages that came whole later stay, and are not looked at.
  std::unordered_map<uint64_t, uint8_t> partial_;
  std::unordered_map<uint64_t, std::unordered_map<uint32_t, Held>> held_;  // by block, client
};

}  // namespace sf::mcdist
