// Pages of which some fragments have come. A bounded table: a page too many evicts the oldest,
// whose fragments then have to be asked for again. Takes authenticated fragments only, or a forger
// could evict honest ones. The block a push is at has a place of its own (strip.h), whose whole
// pages wait for take_run(). Not thread-safe.
#pragma once

#include <array>
#include <cstring>
#include <deque>
#include <memory>
#include <unordered_map>

#include "common/page.h"
#include "mcdist/strip.h"
#include "mcdist/wire.h"

namespace sf::mcdist {

class Reassembly {
 public:
  static constexpr size_t kMaxPages = 2048;  // 8 MiB

  // The whole page once its last fragment came (valid until the next call), else nullptr; also if
  // it waits for take_run() now.
  const uint8_t* add(const Header& header, const uint8_t* data) {
    if (strip_.takes(header)) {
      landed_ += strip_.commit(header, data) ? 1 : 0;
      return nullptr;
    }
    if (header.fragments == 1) return data;
    auto found = partial_.find(header.page);
    // Another cut: the server came back with another MTU. What was gathered does not fit it.
    if (found != partial_.end() && found->second.fragments != header.fragments) {
      partial_.erase(found);
      found = partial_.end();
    }
    if (found == partial_.end()) {
      found = admit(header.page, header.fragments);
    }
    Partial& partial = found->second;
    std::memcpy(partial.bytes->data() + fragment_offset(header.fragment, header.fragments), data,
                fragment_length(header.fragment, header.fragments));
    partial.mask |= static_cast<uint8_t>(1 << header.fragment);
    if (partial.mask != (1 << header.fragments) - 1) return nullptr;
    whole_ = std::move(partial.bytes);
    partial_.erase(found);
    return whole_->data();
  }

  // Where a fragment that is not held may be decrypted to, then given to add(); nullptr: anywhere.
  uint8_t* place(const Header& header) { return strip_.place(header); }
  // Is the packet of the push for which the strip is, but of another block than it? Then
  // begin_block(), once take_run() has taken all.
  bool leaves_block(const Header& header) const {
    return header.pushed && header.cursor == 0 &&
           (!strip_.holds(header.page) || header.fragments != strip_.fragments());
  }
  void begin_block(const Header& header) {
    for (unsigned i = 0; strip_.block() != Strip::kNone && i < kBlockPages; i++) {
      const PageIndex page = strip_.block() * kBlockPages + i;
      if (strip_.held(page) == 0) continue;
      const auto fragments = static_cast<uint8_t>(strip_.fragments());
      Partial& partial = admit(page, fragments)->second;
      partial.mask = strip_.held(page);
      std::memcpy(partial.bytes->data(), strip_.bytes(page), kPageBytes);
    }
    const uint64_t block = header.page / kBlockPages;
    strip_.begin(block, header.fragments);
    landed_ = 0;
    // What came of it before, out of order.
    for (unsigned i = 0; i < kBlockPages; i++) {
      auto found = partial_.find(block * kBlockPages + i);
      if (found == partial_.end()) continue;
      Header part;
      part.page = found->first;
      part.fragments = found->second.fragments;
      if (part.fragments != header.fragments) continue;
      for (; part.fragment < part.fragments; part.fragment++) {
        if (((found->second.mask >> part.fragment) & 1) == 0) continue;
        strip_.commit(part,
                      found->second.bytes->data() + fragment_offset(part.fragment, part.fragments));
      }
      partial_.erase(found);
    }
  }
  // The strip's whole pages, as runs: see Strip.
  bool landed() const { return landed_ > 0; }
  bool take_run(unsigned* at, PageIndex* first, unsigned* count) {
    const bool found = strip_.take_run(at, first, count);
    if (!found) landed_ = 0;
    return found;
  }

  const uint8_t* landed_bytes(PageIndex first) const { return strip_.bytes(first); }

  // Mask of the fragments of `page` that have not come; 0 if none has, or it is whole.
  uint8_t missing(PageIndex page) const {
    unsigned fragments = strip_.fragments();
    uint8_t mask = strip_.held(page);
    if (mask == 0) {
      auto found = partial_.find(page);
      if (found == partial_.end()) return 0;
      fragments = found->second.fragments;
      mask = found->second.mask;
    }
    return static_cast<uint8_t>(((1 << fragments) - 1) & ~mask);
  }
  // Mask of the symbols that have come, if the page was cut into so many.
  uint8_t held(PageIndex page, unsigned fragments) const {
    if (const uint8_t mask = strip_.held(page); mask != 0) {
      return strip_.fragments() == fragments ? mask : 0;
    }
    auto found = partial_.find(page);
    return found != partial_.end() && found->second.fragments == fragments ? found->second.mask : 0;
  }
  // The bytes of a page of which some have come; which, held() tells. nullptr: none have.
  const uint8_t* bytes(PageIndex page) const {
    if (strip_.held(page) != 0) return strip_.bytes(page);
    auto found = partial_.find(page);
    return found == partial_.end() ? nullptr : found->second.bytes->data();
  }
  bool has(const Header& header) const {
    return ((held(header.page, header.fragments) >> header.fragment) & 1) != 0;
  }
  void forget(PageIndex page) {
    strip_.forget(page);
    partial_.erase(page);
  }

 private:
  using Bytes = std::array<uint8_t, kPageBytes>;
  struct Partial {
    uint8_t fragments;
    uint8_t mask;
    uint64_t stamp;
    std::unique_ptr<Bytes> bytes;
  };
  using Pages = std::unordered_map<PageIndex, Partial>;
  Pages::iterator admit(PageIndex page, uint8_t fragments) {
    evict();
    order_.emplace_back(page, ++stamp_);
    // Not set to zeros: only what is held of it is looked at.
    return partial_
        .insert_or_assign(page,
                          Partial{fragments, 0, stamp_, std::make_unique_for_overwrite<Bytes>()})
        .first;
  }
  void evict() {
    // The order also lists pages completed since; so its length is bounded too.
    while (!order_.empty() && (partial_.size() >= kMaxPages || order_.size() >= 4 * kMaxPages ||
                               !current(order_.front()))) {
      if (current(order_.front())) partial_.erase(order_.front().first);
      order_.pop_front();
    }
  }
  bool current(const std::pair<PageIndex, uint64_t>& entry) const {
    auto found = partial_.find(entry.first);
    return found != partial_.end() && found->second.stamp == entry.second;
  }

  Pages partial_;
  std::deque<std::pair<PageIndex, uint64_t>> order_;
  std::unique_ptr<Bytes> whole_;
  uint64_t stamp_ = 0;
  Strip strip_;
  unsigned landed_ = 0;  // whole pages in it
};

}  // namespace sf::mcdist
