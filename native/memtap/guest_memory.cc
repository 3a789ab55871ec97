#include "memtap/guest_memory.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <cstdio>

namespace sf {
namespace {

// The kernel answers EAGAIN while the mapping changes. It does so for an instant; the bound is
// there so that a VM process gone wrong cannot hold a thread.
constexpr int kAgainLimit = 10'000;

template <typename Argument>
int uffd_ioctl(int fd, unsigned long request, Argument* argument) {
  for (int i = 0; i < kAgainLimit; i++) {
    if (::ioctl(fd, request, argument) == 0) return 0;
    if (errno != EAGAIN && errno != EINTR) return errno;
    ::sched_yield();
  }
  return EAGAIN;
}

}  // namespace

Status GuestProcess::Open(pid_t pid, GuestProcess* out) {
  const std::string folder = "/proc/" + std::to_string(pid) + "/";
  GuestProcess p;
  p.pid = pid;
  p.pidfd = Fd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
  p.mem = Fd(::open((folder + "mem").c_str(), O_RDONLY | O_CLOEXEC));
  p.pagemap = Fd(::open((folder + "pagemap").c_str(), O_RDONLY | O_CLOEXEC));
  p.stat = Fd(::open((folder + "stat").c_str(), O_RDONLY | O_CLOEXEC));
  if (!p.pidfd.valid() || !p.mem.valid() || !p.pagemap.valid() || !p.stat.valid()) {
    return Status::Errno("E_STATE", "open the memory of process " + std::to_string(pid));
  }
  *out = std::move(p);
  return Status::Ok();
}

Status GuestMemory::check() {
  uffdio_range range = {base_, pages_ * kPageBytes};
  if (uffd_ioctl(uffd_.get(), UFFDIO_WAKE, &range) == 0) return Status::Ok();
  return Status::Error("E_ARGUMENT", "the descriptor handed over is no usable userfaultfd");
}

Status GuestMemory::write_protect(PageIndex first, uint64_t count, bool on) {
  uffdio_writeprotect wp = {};
  wp.range = {base_ + first * kPageBytes, count * kPageBytes};
  wp.mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : 0;
  const int error = uffd_ioctl(uffd_.get(), UFFDIO_WRITEPROTECT, &wp);
  if (error == 0) return Status::Ok();
  return Status::Errno("E_STATE", "write protection of process " + std::to_string(pid()), error);
}

Status GuestMemory::protect(PageIndex first, uint64_t count) {
  return write_protect(first, count, true);
}

Status GuestMemory::unprotect(PageIndex first, uint64_t count) {
  return write_protect(first, count, false);
}

void GuestMemory::wake(PageIndex first, uint64_t count) {
  uffdio_range range = {base_ + first * kPageBytes, count * kPageBytes};
  uffd_ioctl(uffd_.get(), UFFDIO_WAKE, &range);  // fails only if nobody is left to wake
}

void GuestMemory::zero(PageIndex page) {
  uffdio_zeropage zero = {};
  zero.range = {base_ + page * kPageBytes, kPageBytes};
  if (uffd_ioctl(uffd_.get(), UFFDIO_ZEROPAGE, &zero) != EEXIST) return;
  // Either the page is there by now, or it was write-protected before it was ever touched and its
  // protection marker is in the way. Only UFFDIO_COPY replaces a marker.
  alignas(kPageBytes) static const std::array<uint8_t, kPageBytes> kZeros = {};
  uffdio_copy copy = {};
  copy.dst = base_ + page * kPageBytes;
  copy.src = reinterpret_cast<uint64_t>(kZeros.data());
  copy.len = kPageBytes;
  copy.mode = UFFDIO_COPY_MODE_WP;
  if (uffd_ioctl(uffd_.get(), UFFDIO_COPY, &copy) == EEXIST) wake(page, 1);
}

bool GuestMemory::read(PageIndex page, uint8_t* out) {
  size_t done = 0;
  while (done < kPageBytes) {
    const ssize_t n = ::pread(process_.mem.get(), out + done, kPageBytes - done,
                              static_cast<off_t>(base_ + page * kPageBytes + done));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    done += static_cast<size_t>(n);
  }
  return true;
}

bool GuestMemory::residence(PageIndex first, uint64_t count, std::vector<Residence>* out) {
  out->clear();
  out->reserve(count);
  std::array<uint64_t, 512> entries;
  const uint64_t base_page = base_ / kPageBytes;
  while (count > 0) {
    const size_t want = std::min<uint64_t>(count, entries.size()) * sizeof(uint64_t);
    const ssize_t n = ::pread(process_.pagemap.get(), entries.data(), want,
                              static_cast<off_t>((base_page + first) * sizeof(uint64_t)));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0 || n % static_cast<ssize_t>(sizeof(uint64_t)) != 0) return false;
    const uint64_t got = static_cast<uint64_t>(n) / sizeof(uint64_t);
    for (uint64_t i = 0; i < got; i++) out->push_back(kernel_.classify(entries[i]));
    first += got;
    count -= got;
  }
  return true;
}

Status GuestMemory::populate(PageIndex first, uint64_t count) {
  std::vector<Residence> where;
  if (!residence(first, count, &where)) return Status::Error("E_STATE", "the VM is gone");
  constexpr size_t kBatch = 512;
  std::array<uint8_t, kBatch> sink;
  std::vector<iovec> remote;
  const auto flush = [&] {
    // A read of one byte maps the zero page. What it returns is not used: whether every page is
    // populated is looked up afterwards, by the caller.
    iovec local = {sink.data(), remote.size()};
    ::process_vm_readv(pid(), &local, 1, remote.data(), remote.size(), 0);
    remote.clear();
  };
  for (uint64_t i = 0; i < count; i++) {
    if (where[i] != Residence::kNone) continue;
    remote.push_back({reinterpret_cast<void*>(base_ + (first + i) * kPageBytes), 1});
    if (remote.size() == kBatch) flush();
  }
  if (!remote.empty()) flush();
  return Status::Ok();
}

bool GuestMemory::dying() {
  pollfd ended = {pidfd(), POLLIN, 0};
  if (::poll(&ended, 1, 0) != 0) return true;
  std::array<char, 1024> text;
  const ssize_t n = ::pread(process_.stat.get(), text.data(), text.size() - 1, 0);
  if (n <= 0) return true;
  text[static_cast<size_t>(n)] = '\0';
  // proc(5): "pid (comm) state ... flags(9) ... signal(31)"; comm may hold anything, so from the
  // last ')' on.
  const std::string line(text.data());
  const size_t end = line.rfind(')');
  if (end == std::string::npos) return true;
  char state = 0;
  unsigned long flags = 0;
  unsigned long pending = 0;
  const int fields = std::sscanf(
      line.c_str() + end + 1,
      " %c %*d %*d %*d %*d %*d %lu %*u %*u %*u %*u %*u %*u %*d %*d %*d %*d %*d %*d %*u %*u %*d "
      "%*u %*u %*u %*u %*u %*u %lu",
      &state, &flags, &pending);
  constexpr unsigned long kExiting = 0x4;     // PF_EXITING
  constexpr unsigned long kSignaled = 0x400;  // PF_SIGNALED
  constexpr unsigned long kKill = 1ul << 8;   // SIGKILL, pending
  return fields != 3 || state == 'Z' || state == 'X' || (flags & (kExiting | kSignaled)) != 0 ||
         (pending & kKill) != 0;
}

}  // namespace sf
