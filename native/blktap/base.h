// What lies below a chain's oldest slice: nothing (zeros), a raw image, or a replica that fills on
// demand. A base is never written.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "blktap/data_file.h"
#include "blktap/read_plan.h"
#include "common/page.h"
#include "common/status.h"
#include "pagestore/replica.h"

namespace sf {

class Base {
 public:
  virtual ~Base() = default;

  // 0, EAGAIN (only kNowait), ENODATA (a page is absent: want() it), or an errno. `*zero` becomes
  // false unless all bytes are known to be zeros; `out` is filled in either case.
  virtual int read(uint64_t off, size_t len, uint8_t* out, ReadMode mode, bool* zero) const = 0;
  // As Device::plan_read().
  virtual int plan_read(uint64_t off, size_t len, uint8_t* out, ReadPlan* plan) const = 0;
  virtual ReadResult read_page(PageIndex page, uint8_t* out) const = 0;

  // The number of bytes from `off`, at most `limit`, that share one allocation state.
  virtual uint64_t extent(uint64_t off, uint64_t limit, bool* zero) const = 0;

  // Asks the kernel to read ahead; does not wait.
  virtual void cache(uint64_t, uint64_t) const {}

  virtual bool all_zero() const { return false; }
  virtual bool fills() const { return false; }  // may have absent pages
  virtual bool absent(PageIndex) const { return false; }
  virtual void want(PageIndex, std::function<void(const Status&)>) {}
  virtual void add_user(std::weak_ptr<const PageUser>) {}  // a prefetch asks it what is needed
};

std::shared_ptr<Base> make_zero_base();
// `image_bytes` is the image's size when the disk was created; a file shorter than that is
// E_CORRUPT. Beyond it the disk is zeros. Of a disk smaller than the image give the disk's size.
// What goes wrong with it later is told to `errors`, which may be null.
Status open_image_base(const std::string& path, uint64_t image_bytes,
                       std::shared_ptr<FileErrors> errors, std::shared_ptr<Base>* out);
Status open_replica_base(std::shared_ptr<Replica> replica, std::shared_ptr<Base>* out);

// True if all 4096 bytes are zero.
bool is_zero_page(const uint8_t* page);

}  // namespace sf
