// What this kernel's userfaultfd and pagemap can do, found out by doing it once.
#pragma once

#include <cstdint>

#include "common/fd.h"
#include "common/status.h"

// Newer than Debian 12's headers (Linux 6.1).
#ifndef UFFD_FEATURE_WP_UNPOPULATED
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13)
#endif

namespace sf {

// Where the bytes of one page of a VM's private mapping are, from its /proc/PID/pagemap entry.
enum class Residence : uint8_t {
  kNone,      // not mapped, never written: zero (booted VM) or the replica's page (clone)
  kReplica,   // mapped, still the replica's own page
  kZeroPage,  // the kernel's shared page of zeros
  kPrivate,   // the VM's own page, in memory or in swap
};

class Kernel {
 public:
  // E_USERFAULTFD if what memtap needs is not there.
  static Status Probe(Kernel* out);

  bool protects_unpopulated() const { return (features_ & UFFD_FEATURE_WP_UNPOPULATED) != 0; }
  Residence classify(uint64_t pagemap_entry) const;
  // A descriptor of /dev/userfaultfd, by which a process without privilege may make one.
  Status open_device(Fd* out) const;

 private:
  uint64_t features_ = 0;
  uint64_t marker_entry_ = 0;  // how pagemap shows a protected page that was never populated
  uint64_t zero_frame_ = 0;    // 0: not visible to this process, then kZeroPage is never reported
};

}  // namespace sf
