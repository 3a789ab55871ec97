// One block's pages side by side: where a push's packets are decrypted to, in place, so that pages
// that came whole go into the replica in runs, without a copy. A push comes in order, so one block
// is enough; what it is left without goes on as any page half received (reassembly.h).
//
// States of a page here: nothing held -> in part -> whole -> landed (take_run(), or forget())
// Invariants:
//  - Bytes are held only once commit() said so: what place() gave may hold anything.
//  - place() never gives room that reaches into what is held: a last fragment that is padded beyond
//    its page has none.
// Not thread-safe.
#pragma once

#include <array>
#include <cstring>
#include <memory>

#include "common/page.h"
#include "mcdist/wire.h"

namespace sf::mcdist {

class Strip {
 public:
  static constexpr uint64_t kNone = UINT64_MAX;

  uint64_t block() const { return block_; }
  unsigned fragments() const { return fragments_; }
  bool holds(PageIndex page) const { return page / kBlockPages == block_; }

  // Room for a fragment that is not held; nullptr: none, see commit().
  uint8_t* place(const Header& header) {
    if (!takes(header)) return nullptr;
    const size_t offset = fragment_offset(header.fragment, header.fragments);
    if (offset + symbol_bytes(header.fragments) > kPageBytes) return nullptr;
    return bytes_of(header.page) + offset;
  }
  bool takes(const Header& header) const {
    return holds(header.page) && header.fragments == fragments_ &&
           ((masks_[header.page % kBlockPages] >> header.fragment) & 1) == 0;
  }
  // An authentic fragment that takes() was asked of: it is where place() said, or `data` has it.
  // True: the page is whole now.
  bool commit(const Header& header, const uint8_t* data) {
    const size_t offset = fragment_offset(header.fragment, header.fragments);
    uint8_t* at = bytes_of(header.page) + offset;
    if (data != at) std::memcpy(at, data, fragment_length(header.fragment, header.fragments));
    uint8_t& mask = masks_[header.page % kBlockPages];
    mask |= static_cast<uint8_t>(1 << header.fragment);
    return whole(mask);
  }
  uint8_t held(PageIndex page) const { return holds(page) ? masks_[page % kBlockPages] : 0; }
  const uint8_t* bytes(PageIndex page) const { return bytes_->data() + offset_of(page); }
  void forget(PageIndex page) {
    if (holds(page)) masks_[page % kBlockPages] = 0;
  }
  // The next run of whole pages from `*at` (0..kBlockPages); they are not held any more, their
  // bytes stay until begin(). False: there is none.
  bool take_run(unsigned* at, PageIndex* first, unsigned* count) {
    while (*at < kBlockPages && !whole(masks_[*at])) ++*at;
    const unsigned start = *at;
    while (*at < kBlockPages && whole(masks_[*at])) masks_[(*at)++] = 0;
    *first = block_ * kBlockPages + start;
    *count = *at - start;
    return *count > 0;
  }
  // Another block: nothing of it is held.
  void begin(uint64_t block, unsigned fragments) {
    if (bytes_ == nullptr) bytes_ = std::make_unique<Bytes>();
    block_ = block;
    fragments_ = fragments;
    masks_.fill(0);
  }

 private:
  using Bytes = std::array<uint8_t, kBlockPages * kPageBytes>;
  static size_t offset_of(PageIndex page) { return page % kBlockPages * kPageBytes; }
  uint8_t* bytes_of(PageIndex page) { return bytes_->data() + offset_of(page); }
  bool whole(uint8_t mask) const { return mask == (1 << fragments_) - 1; }

  uint64_t block_ = kNone;
  unsigned fragments_ = 1;
  std::array<uint8_t, kBlockPages> masks_{};
  std::unique_ptr<Bytes> bytes_;
};

}  // namespace sf::mcdist
