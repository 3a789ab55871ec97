// A base and its slices, and reading pages out of them by a merged index. Disk and View share it.
#pragma once

#include <array>
#include <memory>
#include <utility>
#include <vector>

#include "blktap/base.h"
#include "blktap/device.h"
#include "blktap/slice.h"
#include "blktap/slice_index.h"

namespace sf {

// Slices by their number, 1 the oldest. Grows at the end only, under the owner's lock; at() needs
// none: whoever knows a number learned it after the slice was put here.
class SliceTable {
 public:
  SliceIndex::Entry add(std::shared_ptr<Slice> slice);  // 0 if full
  const Slice& at(SliceIndex::Entry number) const {
    return *(*blocks_[number / kBlock])[number % kBlock];
  }
  size_t size() const { return owned_.size(); }
  const std::vector<std::shared_ptr<Slice>>& all() const { return owned_; }

 private:
  static constexpr size_t kBlock = 256;
  std::array<std::unique_ptr<std::array<const Slice*, kBlock>>, 256> blocks_;
  std::vector<std::shared_ptr<Slice>> owned_;  // owner's lock
};

struct Chain {
  uint64_t size = 0;
  std::shared_ptr<Base> base;
  std::shared_ptr<SliceTable> slices = std::make_shared<SliceTable>();
};

// A stretch of up to 64 pages in one index leaf, with their entries.
struct Stretch {
  PageIndex first = 0;
  size_t count = 0;
  std::array<SliceIndex::Entry, SliceIndex::kLeafPages> entries;

  // The pages that [off, off + len) touches, as far as one leaf goes. `len` must not be 0.
  void cover(uint64_t off, uint64_t len) {
    first = off / kPageBytes;
    const PageIndex last = (off + len - 1) / kPageBytes;
    count = std::min(last - first + 1, SliceIndex::kLeafPages - first % SliceIndex::kLeafPages);
  }
  uint64_t end() const { return (first + count) * kPageBytes; }
  SliceIndex::Entry entry(PageIndex page) const { return entries[page - first]; }
};

// Reads [off, off + len), which lies in `stretch`.
int read_stretch(const Chain& chain, const Stretch& stretch, uint64_t off, size_t len, uint8_t* out,
                 ReadMode mode, bool* zero);

// `lookup(Stretch*)` fills in the entries of a stretch.
template <typename Lookup>
int read_chain(const Chain& chain, const Lookup& lookup, uint64_t off, size_t len, uint8_t* out,
               ReadMode mode, bool* zero) {
  Stretch stretch;
  while (len > 0) {
    stretch.cover(off, len);
    lookup(&stretch);
    const size_t n = std::min<uint64_t>(len, stretch.end() - off);
    const int error = read_stretch(chain, stretch, off, n, out, mode, zero);
    if (error != 0) return error;
    off += n;
    out += n;
    len -= n;
  }
  return 0;
}

// Device::missing() and Device::extent() over an index. Not to be changed meanwhile.
void chain_missing(const Chain& chain, const SliceIndex& index, uint64_t off, uint64_t len,
                   Device::Access access, std::vector<PageIndex>* out);
uint64_t chain_extent(const Chain& chain, const SliceIndex& index, uint64_t off, uint64_t limit,
                      bool* hole);

// Which of the 64 pages from `first` (a multiple of 64) are the base's.
uint64_t base_mask(const SliceIndex& index, PageIndex first);

// The image of one instant. It stays readable, unchanged, while the disk goes on, and after the
// disk is closed. read() of a page that a replica base has not got yet is kAbsent.
class View final : public PageProvider, public Device, public PageUser {
 public:
  View(Chain chain, SliceIndex index) : chain_(std::move(chain)), index_(std::move(index)) {}

  uint64_t pages() const override { return chain_.size / kPageBytes; }
  ReadResult read(PageIndex page, uint8_t* out) override;

  uint64_t size() const override { return chain_.size; }
  bool writable() const override { return false; }
  int read(uint64_t off, size_t len, uint8_t* out, ReadMode mode, bool* zero) override;
  int write(uint64_t, size_t, const uint8_t*, ReadMode) override { return EPERM; }
  int zero(uint64_t, uint64_t, bool) override { return EPERM; }
  int flush() override { return 0; }
  void missing(uint64_t off, uint64_t len, Access access,
               std::vector<PageIndex>* out) const override {
    chain_missing(chain_, index_, off, len, access, out);
  }
  void want(PageIndex page, std::function<void(const Status&)> done) override {
    chain_.base->want(page, std::move(done));
  }
  uint64_t extent(uint64_t off, uint64_t limit, bool* hole) const override {
    return chain_extent(chain_, index_, off, limit, hole);
  }
  uint64_t needs(PageIndex first) const override { return base_mask(index_, first); }

 private:
  const Chain chain_;
  const SliceIndex index_;
};

}  // namespace sf
