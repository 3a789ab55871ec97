// A disk's base that can be let go while the disk is read: when the disk has a copy of all it needs
// of it. From then on it is nothing (zeros).
//
// Readers call in a section of the table's read gate; clear() gives the old base to the caller, who
// keeps it until the reads under way are over.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <utility>

#include "blktap/base.h"

namespace sf {

class SwitchBase final : public Base {
 public:
  explicit SwitchBase(std::shared_ptr<Base> base) : owned_(std::move(base)), now_(owned_.get()) {}

  std::shared_ptr<Base> clear() {
    std::lock_guard lock(mutex_);
    auto old = std::exchange(owned_, make_zero_base());
    now_.store(owned_.get());
    return old;
  }
  std::shared_ptr<Base> held() {
    std::lock_guard lock(mutex_);
    return owned_;
  }

  int read(uint64_t off, size_t len, uint8_t* out, ReadMode mode, bool* zero) const override {
    return now()->read(off, len, out, mode, zero);
  }
  int plan_read(uint64_t off, size_t len, uint8_t* out, ReadPlan* plan) const override {
    return now()->plan_read(off, len, out, plan);
  }
  ReadResult read_page(PageIndex page, uint8_t* out) const override {
    return now()->read_page(page, out);
  }
  uint64_t extent(uint64_t off, uint64_t limit, bool* zero) const override {
    return now()->extent(off, limit, zero);
  }
  void cache(uint64_t off, uint64_t len) const override { now()->cache(off, len); }
  bool all_zero() const override { return now()->all_zero(); }
  bool fills() const override { return now()->fills(); }
  bool absent(PageIndex page) const override { return now()->absent(page); }
  void want(PageIndex page, std::function<void(const Status&)> done) override {
    auto base = held();
    // Nobody wants pages of nothing: it was let go in between, and so the page is here.
    if (!base->fills()) return done(Status::Ok());
    base->want(page, std::move(done));
  }
  void add_user(std::weak_ptr<const PageUser> user) override { held()->add_user(std::move(user)); }

 private:
  Base* now() const { return now_.load(); }
  std::mutex mutex_;
  std::shared_ptr<Base> owned_;  // mutex_
  std::atomic<Base*> now_;
};

}  // namespace sf
