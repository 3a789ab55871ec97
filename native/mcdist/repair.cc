#include "mcdist/repair.h"

#include <algorithm>

namespace sf::mcdist {

Repair::Block* Repair::admit(uint64_t number) {
  auto found = blocks_.find(number);
  if (found != blocks_.end()) {
    order_.splice(order_.end(), order_, found->second.place);
    return &found->second;
  }
  if (blocks_.size() >= kBlocks) {
    auto oldest = blocks_.find(order_.front());
    if (oldest->second.gathering) return nullptr;
    blocks_.erase(oldest);
    order_.pop_front();
  }
  order_.push_back(number);
  Block& block = blocks_[number];
  block.place = std::prev(order_.end());
  return &block;
}

bool Repair::on_its_way(const Block& block, const BlockReport& report, const SymbolSet& asked,
                        TimeNs now) const {
  if (block.gathering || block.answered == 0 || now - block.answered >= config_.retry_window) {
    return false;
  }
  if (asked.within(block.plain)) return true;
  if (block.cover_id == 0 || !asked.within(block.cover)) return false;
  const unsigned lacks = (report.missing & block.cover).count();
  if (report.cover != block.cover_id) return block.used >= lacks;
  const unsigned held = lacks > report.need ? lacks - report.need : 0;
  return block.used >= held + report.need;
}

Repair::Verdict Repair::report(const BlockReport& report, bool at_once, TimeNs now) {
  const SymbolSet asked = report.missing & SymbolSet::Pages(report.wanted, report.fragments);
  if (asked.empty()) return Verdict::kNothing;
  Block* block = admit(report.block);
  if (block == nullptr) return Verdict::kFull;
  if (block->fragments != report.fragments) {  // all of one server's are the same
    const uint8_t cover_id = block->cover_id;
    const auto place = block->place;
    if (block->gathering) return Verdict::kFull;
    *block = Block{};
    block->cover_id = cover_id;
    block->place = place;
    block->fragments = report.fragments;
  }
  if (on_its_way(*block, report, asked, now)) return Verdict::kOnItsWay;
  if (!block->gathering) {
    block->gathering = true;
    block->asked = {};
    block->reporters.clear();
    gathering_.emplace_back(report.block, at_once ? now : now + config_.repair_gather);
  }
  block->asked |= asked;
  const Reporter reporter{report.missing, report.need,
                          report.cover != 0 && report.cover == block->cover_id};
  if (block->reporters.size() < kReporters) {
    block->reporters.push_back(reporter);
  } else {
    Reporter& rest = block->reporters.back();
    rest.missing |= reporter.missing;
    rest.matched = rest.matched && reporter.matched;
    rest.need = std::max(rest.need, reporter.need);
  }
  return Verdict::kTaken;
}

bool Repair::next(TimeNs now, Order* out) {
  if (gathering_.empty() || gathering_.front().second > now) return false;
  const uint64_t number = gathering_.front().first;
  gathering_.pop_front();
  Block& block = blocks_.find(number)->second;
  block.gathering = false;
  block.answered = now;
  // How many parities a new cover takes, and how many more of the one there is.
  unsigned fresh = 0;
  unsigned more = 0;
  for (const Reporter& reporter : block.reporters) {
    fresh = std::max(fresh, (reporter.missing & block.asked).count());
    more = std::max<unsigned>(
        more, reporter.matched ? reporter.need : (reporter.missing & block.cover).count());
  }
  const bool goes_on = block.cover_id != 0 && block.asked.within(block.cover) && more > 0 &&
                       more <= fresh && block.used + more <= kIndices;
  *out = Order{};
  out->block = number;
  out->fragments = block.fragments;
  const unsigned least = goes_on ? more : fresh;
  if (!config_.parity || least >= block.asked.count() || fresh > kIndices) {
    out->symbols = block.plain = block.asked;
    return true;
  }
  block.plain = {};
  if (!goes_on) {
    // Over all blocks one after the other: an id is not given to a block twice before 255 others.
    last_cover_ = last_cover_ == 255 ? 1 : last_cover_ + 1;
    if (last_cover_ == block.cover_id) last_cover_ = last_cover_ == 255 ? 1 : last_cover_ + 1;
    block.cover_id = last_cover_;
    block.cover = block.asked;
    block.used = 0;
  }
  out->parity = true;
  out->symbols = block.cover;
  out->cover_id = block.cover_id;
  out->first = block.used;
  out->count = static_cast<uint8_t>(least);
  block.used = static_cast<uint8_t>(block.used + least);
  return true;
}

}  // namespace sf::mcdist
