#include "memtap/kernel.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "common/page.h"

#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

namespace sf {
namespace {

// Documentation/admin-guide/mm/pagemap.rst
constexpr uint64_t kFrameBits = (uint64_t{1} << 55) - 1;
constexpr uint64_t kFile = uint64_t{1} << 61;
constexpr uint64_t kSwap = uint64_t{1} << 62;
constexpr uint64_t kPresent = uint64_t{1} << 63;

Status new_uffd(const Kernel& kernel, uint64_t features, Fd* out, uint64_t* supported) {
  Fd device;
  Status status = kernel.open_device(&device);
  if (!status.ok()) return status;
  Fd fd(::ioctl(device.get(), USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK));
  if (!fd.valid()) return Status::Errno("E_USERFAULTFD", "USERFAULTFD_IOC_NEW");
  uffdio_api api = {};
  api.api = UFFD_API;
  api.features = features;
  if (::ioctl(fd.get(), UFFDIO_API, &api) != 0) return Status::Errno("E_USERFAULTFD", "UFFDIO_API");
  *supported = api.features;
  *out = std::move(fd);
  return Status::Ok();
}

Status own_pagemap_entry(const void* address, uint64_t* out) {
  Fd fd(::open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
  const auto offset = static_cast<off_t>(reinterpret_cast<uintptr_t>(address) / kPageBytes * 8);
  if (!fd.valid() || ::pread(fd.get(), out, sizeof *out, offset) != sizeof *out) {
    return Status::Errno("E_USERFAULTFD", "read /proc/self/pagemap");
  }
  return Status::Ok();
}

// Protects a page nobody ever touched, as forkBegin will, and sees how pagemap shows it.
Status learn_marker(const Kernel& kernel, uint64_t* out) {
  Fd file(::memfd_create("memtap-probe", MFD_CLOEXEC));
  if (!file.valid() || ::ftruncate(file.get(), kPageBytes) != 0) {
    return Status::Errno("E_USERFAULTFD", "probe file");
  }
  void* page = ::mmap(nullptr, kPageBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, file.get(), 0);
  if (page == MAP_FAILED) return Status::Errno("E_USERFAULTFD", "map the probe file");
  Fd uffd;
  uint64_t ignored = 0;
  uint64_t entry = 0;
  Status status = new_uffd(kernel, UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
                           &uffd, &ignored);
  uffdio_range range = {reinterpret_cast<uint64_t>(page), kPageBytes};
  uffdio_register reg = {range, UFFDIO_REGISTER_MODE_WP, 0};
  uffdio_writeprotect protect = {range, UFFDIO_WRITEPROTECT_MODE_WP};
  if (status.ok() && (::ioctl(uffd.get(), UFFDIO_REGISTER, &reg) != 0 ||
                      ::ioctl(uffd.get(), UFFDIO_WRITEPROTECT, &protect) != 0)) {
    status = Status::Errno("E_USERFAULTFD", "write-protect a private file mapping");
  }
  if (status.ok()) status = own_pagemap_entry(page, &entry);
  ::munmap(page, kPageBytes);
  if (status.ok() && ((entry & kPresent) != 0 || (entry & kSwap) == 0)) {
    status = Status::Error("E_USERFAULTFD", "this kernel does not protect unpopulated file pages");
  }
  *out = entry & (kSwap | kFrameBits);
  return status;
}

Status learn_zero_frame(uint64_t* out) {
  void* page =
      ::mmap(nullptr, kPageBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (page == MAP_FAILED) return Status::Errno("E_USERFAULTFD", "map a probe page");
  static_cast<void>(*static_cast<volatile uint8_t*>(page));
  uint64_t entry = 0;
  Status status = own_pagemap_entry(page, &entry);
  ::munmap(page, kPageBytes);
  *out = (entry & kPresent) != 0 ? entry & kFrameBits : 0;
  return status;
}

}  // namespace

Status Kernel::open_device(Fd* out) const {
  Fd fd(::open("/dev/userfaultfd", O_RDWR | O_CLOEXEC));
  if (!fd.valid()) return Status::Errno("E_USERFAULTFD", "open /dev/userfaultfd");
  *out = std::move(fd);
  return Status::Ok();
}

Status Kernel::Probe(Kernel* out) {
  Kernel kernel;
  Fd uffd;
  Status status = new_uffd(kernel, 0, &uffd, &kernel.features_);
  if (!status.ok()) return status;
  constexpr uint64_t kNeeded =
      UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_MISSING_SHMEM | UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
  if ((kernel.features_ & kNeeded) != kNeeded) {
    return Status::Error("E_USERFAULTFD", "this kernel's userfaultfd lacks write protection");
  }
  status = learn_marker(kernel, &kernel.marker_entry_);
  if (status.ok()) status = learn_zero_frame(&kernel.zero_frame_);
  if (status.ok()) *out = kernel;
  return status;
}

Residence Kernel::classify(uint64_t entry) const {
  if ((entry & kPresent) != 0) {
    if ((entry & kFile) != 0) return Residence::kReplica;
    const bool zero = zero_frame_ != 0 && (entry & kFrameBits) == zero_frame_;
    return zero ? Residence::kZeroPage : Residence::kPrivate;
  }
  if ((entry & kSwap) == 0) return Residence::kNone;
  if ((entry & (kSwap | kFrameBits)) == marker_entry_) return Residence::kNone;
  return (entry & kFile) != 0 ? Residence::kReplica : Residence::kPrivate;
}

}  // namespace sf
