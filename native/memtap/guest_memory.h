// The RAM of one running VM process: its userfaultfd and the ways to look at it from outside.
//
// All access is bound to the memory (mm) that was attached, never to a process number:
// /proc/PID/mem and /proc/PID/pagemap keep the mm they were opened on, the userfaultfd likewise. If
// the process ends, every call fails; a reused pid is never read.
//
// read() goes through /proc/PID/mem on purpose: unlike process_vm_readv() it cannot wait in a
// userfaultfd fault (the kernel refuses instead), so no reader can wait for the pager or the
// network.
#pragma once

#include <sys/types.h>

#include <vector>

#include "common/fd.h"
#include "common/page.h"
#include "common/status.h"
#include "memtap/kernel.h"

namespace sf {

// The process behind a connection. Opened when it first speaks; that it answers once more after
// that shows that these are its files and not those of a later process of the same number.
struct GuestProcess {
  pid_t pid = -1;
  Fd pidfd;
  Fd mem;
  Fd pagemap;
  Fd stat;

  static Status Open(pid_t pid, GuestProcess* out);
};

class GuestMemory {
 public:
  GuestMemory(const Kernel& kernel, GuestProcess process, Fd uffd, uint64_t base, uint64_t pages)
      : kernel_(kernel),
        process_(std::move(process)),
        uffd_(std::move(uffd)),
        base_(base),
        pages_(pages) {}

  pid_t pid() const { return process_.pid; }
  int pidfd() const { return process_.pidfd.get(); }
  int uffd() const { return uffd_.get(); }
  uint64_t base() const { return base_; }
  uint64_t pages() const { return pages_; }

  // E_ARGUMENT if the descriptor does not serve this range.
  Status check();
  // E_STATE if the VM is gone.
  Status protect(PageIndex first, uint64_t count);
  Status unprotect(PageIndex first, uint64_t count);  // wakes who waits there
  void wake(PageIndex first, uint64_t count);
  // Answers a MISSING fault with zeros, in the VM's private mapping only. Keeps write protection.
  void zero(PageIndex page);
  // Copies a page that is kPrivate; false if the VM is gone.
  bool read(PageIndex page, uint8_t* out);
  // False if the VM is gone.
  bool residence(PageIndex first, uint64_t count, std::vector<Residence>* out);
  // Maps the zero page where nothing is mapped yet: kernels before 6.4 cannot protect anonymous
  // memory that is not populated.
  Status populate(PageIndex first, uint64_t count);
  // True once the process was told to die. The kernel may discard its pages from then on (the OOM
  // reaper, process_mrelease), so kNone says nothing any more.
  bool dying();

 private:
  Status write_protect(PageIndex first, uint64_t count, bool on);

  Kernel kernel_;
  GuestProcess process_;
  Fd uffd_;
  uint64_t base_;
  uint64_t pages_;
};

}  // namespace sf
