// Flattening: a disk gets its own copy of all it reads from below, and is cut loose.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <unordered_set>

#include "blktap/disk.h"
#include "blktap/merge.h"

namespace sf {

// Goes over the disk once, stretch by stretch, each under the locks of a guest's write. A page is
// copied if its entry is a lower slice, or the base and the base does not know it to be zeros. A
// page once done stays done: it is the top's for good, or zeros whatever lies below.
class Pull final : public Step {
 public:
  explicit Pull(std::shared_ptr<Disk> disk);

  uint64_t total_bytes() const override { return total_bytes_; }
  // Pages of a replica that are not here are asked for, up to 256 at a time, and waited for a fifth
  // of a second at most: a step may come back with nothing done. Done also if the disk was forked.
  Status step(uint64_t most, uint64_t* bytes, bool* done) override;
  void abort() override;
  // After the last step. What was copied is made durable; then the disk's chain is its top alone,
  // if it was not forked since the pull began.
  Status detach(bool* forked);

 private:
  struct Arrivals {
    std::mutex mutex;
    std::condition_variable changed;
    std::unordered_set<PageIndex> wanted;
    Status failed;
  };
  bool forked() const;
  void end();
  Status pull_stretch(Stretch* stretch, uint64_t* bytes, bool* absent);
  int copy_run(const Stretch& stretch, PageIndex first, uint64_t count);
  bool needed(const Stretch& stretch, PageIndex page) const;
  Status wait_for(const Stretch& stretch);

  // Both let go at the end, whenever the object itself goes.
  std::shared_ptr<Disk> disk_;
  NodePtr top_;  // as it was when the pull began
  const std::shared_ptr<Arrivals> arrivals_ = std::make_shared<Arrivals>();
  uint64_t total_bytes_ = 0;
  std::mutex mutex_;
  PageIndex cursor_ = 0;
  bool copied_ = false;
  bool ended_ = false;
};

}  // namespace sf
