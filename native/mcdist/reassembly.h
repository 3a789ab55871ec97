// Pages of which some fragments have come. A bounded table: a page too many evicts the oldest,
// whose fragments then have to be asked for again. Takes authenticated fragments only, or a forger
// could evict honest ones. Not thread-safe.
#pragma once

#include <array>
#include <cstring>
#include <deque>
#include <memory>
#include <unordered_map>

#include "common/page.h"
#include "mcdist/wire.h"

namespace sf::mcdist {

class Reassembly {
 public:
  static constexpr size_t kMaxPages = 2048;  // 8 MiB

  // The whole page once its last fragment came (valid until the next call), else nullptr.
  const uint8_t* add(const Header& header, const uint8_t* data) {
    if (header.fragments == 1) return data;
    auto found = partial_.find(header.page);
    // Another cut: the server came back with another MTU. What was gathered does not fit it.
    if (found != partial_.end() && found->second.fragments != header.fragments) {
      partial_.erase(found);
      found = partial_.end();
    }
    if (found == partial_.end()) {
      evict();
      Partial fresh{header.fragments, 0, ++stamp_, std::make_unique<Bytes>()};
      order_.emplace_back(header.page, fresh.stamp);
      found = partial_.emplace(header.page, std::move(fresh)).first;
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

  // Mask of the fragments of `page` that have not come; 0 if none has.
  uint8_t missing(PageIndex page) const {
    auto found = partial_.find(page);
    if (found == partial_.end()) return 0;
    return static_cast<uint8_t>(((1 << found->second.fragments) - 1) & ~found->second.mask);
  }
  // Mask of the symbols that have come, if the page was cut into so many.
  uint8_t held(PageIndex page, unsigned fragments) const {
    auto found = partial_.find(page);
    return found != partial_.end() && found->second.fragments == fragments ? found->second.mask : 0;
  }
  bool has(const Header& header) const {
    auto found = partial_.find(header.page);
    return found != partial_.end() && found->second.fragments == header.fragments &&
           ((found->second.mask >> header.fragment) & 1) != 0;
  }
  void forget(PageIndex page) { partial_.erase(page); }

 private:
  using Bytes = std::array<uint8_t, kPageBytes>;
  struct Partial {
    uint8_t fragments;
    uint8_t mask;
    uint64_t stamp;
    std::unique_ptr<Bytes> bytes;
  };
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

  std::unordered_map<PageIndex, Partial> partial_;
  std::deque<std::pair<PageIndex, uint64_t>> order_;
  std::unique_ptr<Bytes> whole_;
  uint64_t stamp_ = 0;
};

}  // namespace sf::mcdist
