// The image of one generation. It stays readable, unchanged, while disks go on, slices are merged
// and after its store is closed. read() of a page that a replica base has not got yet is kAbsent.
#pragma once

#include <errno.h>

#include "blktap/chain.h"
#include "blktap/store.h"

namespace sf {

class View final : public PageProvider, public Device {
 public:
  View(Chain chain, NodePtr node, ImagePtr index)
      : chain_(std::move(chain)), node_(std::move(node)), index_(std::move(index)) {}

  uint64_t pages() const override { return pages_of(chain_.size); }
  ReadResult read(PageIndex page, uint8_t* out) override;

  uint64_t size() const override { return chain_.size; }
  bool writable() const override { return false; }
  int read(uint64_t off, size_t len, uint8_t* out, ReadMode mode, bool* zero) override;
  int plan_read(uint64_t off, size_t len, uint8_t* out, ReadPlan* plan) override;
  int carried_out(int error) override { return error == 0 && !current() ? ESHUTDOWN : error; }
  int write(uint64_t, size_t, const uint8_t*, ReadMode) override { return EPERM; }
  int zero(uint64_t, uint64_t, Zero, bool) override { return EPERM; }
  int flush() override { return 0; }
  void missing(uint64_t off, uint64_t len, Access access,
               std::vector<PageIndex>* out) const override {
    chain_missing(chain_, *index_, off, len, access, out);
  }
  void want(PageIndex page, std::function<void(const Status&)> done) override {
    chain_.base->want(page, std::move(done));
  }
  Extent extent(uint64_t off,
                uint64_t limit) const override;  // depth 1: the generation's own slice
  void cache(uint64_t off, uint64_t len) override;

 private:
  bool current() const { return node_->store->lock().holds(); }

  const Chain chain_;
  const NodePtr node_;
  const ImagePtr index_;
};

}  // namespace sf
