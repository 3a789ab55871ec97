#include "memtap/server.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <array>
#include <cstring>
#include <system_error>
#include <thread>
#include <vector>

namespace sf {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kMaxPeers = 64;
constexpr auto kHandshakeTime = std::chrono::seconds(10);
constexpr size_t kMaxFds = 4;

// Takes as long for a wrong token as for the right one.
bool same_token(const std::string& expected, const std::string& given) {
  unsigned difference = expected.size() == given.size() ? 0 : 1;
  for (size_t i = 0; i < expected.size(); i++) {
    const char c = i < given.size() ? given[i] : '\0';
    difference |= static_cast<unsigned char>(expected[i]) ^ static_cast<unsigned char>(c);
  }
  return difference == 0;
}

template <size_t N>
std::string text_of(const char (&field)[N]) {
  return std::string(field, ::strnlen(field, N));
}

template <size_t N>
void set_text(char (&field)[N], const std::string& text) {
  std::memset(field, 0, N);
  std::memcpy(field, text.data(), std::min(text.size(), N - 1));
}

bool is_userfaultfd(int fd) {
  char link[64];
  const ssize_t n =
      ::readlink(("/proc/self/fd/" + std::to_string(fd)).c_str(), link, sizeof link - 1);
  return n > 0 && std::string(link, static_cast<size_t>(n)) == "anon_inode:[userfaultfd]";
}

// One packet, without waiting: a peer that does not read its answer is dropped.
bool send_packet(int socket, const void* data, size_t size, const std::vector<int>& fds) {
  iovec iov = {const_cast<void*>(data), size};
  msghdr message = {};
  message.msg_iov = &iov;
  message.msg_iovlen = 1;
  alignas(cmsghdr) std::array<char, CMSG_SPACE(kMaxFds * sizeof(int))> control = {};
  if (!fds.empty()) {
    message.msg_control = control.data();
    message.msg_controllen = CMSG_SPACE(fds.size() * sizeof(int));
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
    std::memcpy(CMSG_DATA(header), fds.data(), fds.size() * sizeof(int));
  }
  return ::sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT) == static_cast<ssize_t>(size);
}

// One packet and its first descriptor. -1: nothing yet; otherwise its size, 0 at the end and for
// what no packet can be.
ssize_t receive_packet(int socket, void* data, size_t size, Fd* fd) {
  iovec iov = {data, size};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(kMaxFds * sizeof(int))> control = {};
  msghdr message = {};
  message.msg_iov = &iov;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  const ssize_t n = ::recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  if (n < 0) return errno == EAGAIN || errno == EINTR ? -1 : 0;
  for (cmsghdr* h = CMSG_FIRSTHDR(&message); h != nullptr; h = CMSG_NXTHDR(&message, h)) {
    if (h->cmsg_level != SOL_SOCKET || h->cmsg_type != SCM_RIGHTS) continue;
    const size_t count = (h->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < count; i++) {
      int received = -1;
      std::memcpy(&received, CMSG_DATA(h) + i * sizeof(int), sizeof received);
      Fd owned(received);
      if (!fd->valid()) *fd = std::move(owned);
    }
  }
  return (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0 ? 0 : n;
}

Status listen_at(const ServerOptions& options, Fd* out) {
  const std::string& path = options.socket_path;
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof address.sun_path) {
    return Status::Error("E_ARGUMENT", "socket path " + path + " is empty or too long");
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  const auto* name = reinterpret_cast<const sockaddr*>(&address);
  Fd probe(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (probe.valid() && ::connect(probe.get(), name, sizeof address) == 0) {
    return Status::Error("E_IN_USE", "another process serves " + path);
  }
  struct stat st = {};
  if (::lstat(path.c_str(), &st) == 0 && S_ISSOCK(st.st_mode)) ::unlink(path.c_str());
  Fd fd(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd.valid() || ::bind(fd.get(), name, sizeof address) != 0) {
    return Status::Errno("E_IO", "bind " + path);
  }
  if (::chown(path.c_str(), static_cast<uid_t>(options.socket_uid),
              static_cast<gid_t>(options.socket_gid)) != 0 ||
      ::chmod(path.c_str(), options.socket_mode) != 0 || ::listen(fd.get(), kMaxPeers) != 0) {
    const Status status = Status::Errno("E_IO", "listen at " + path);
    ::unlink(path.c_str());
    return status;
  }
  *out = std::move(fd);
  return Status::Ok();
}

}  // namespace

Status MemtapServer::Open(const ServerOptions& options, EventSink sink,
                          std::shared_ptr<MemtapServer>* out) {
  std::shared_ptr<MemtapServer> server(new MemtapServer());
  server->options_ = options;
  server->sink_ = std::move(sink);
  Status status = Kernel::Probe(&server->kernel_);
  if (!status.ok()) return status;
  if (!server->kernel_.protects_unpopulated()) server->options_.populate = true;
  server->wakeup_ = Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!server->wakeup_.valid()) return Status::Errno("E_INTERNAL", "eventfd");
  status = listen_at(options, &server->listener_);
  if (!status.ok()) return status;
  try {
    std::thread([server] { server->run(); }).detach();
  } catch (const std::system_error& error) {
    return Status::Error("E_INTERNAL", std::string("listener thread: ") + error.what());
  }
  *out = std::move(server);
  return Status::Ok();
}

MemtapServer::~MemtapServer() = default;

Status MemtapServer::expect(VmOptions options) {
  if (options.id.empty() || options.id.size() >= sizeof(memtap_hello::vm) ||
      options.token.empty() || options.token.size() >= sizeof(memtap_hello::token)) {
    return Status::Error("E_ARGUMENT", "VM " + options.id + ": bad id or token");
  }
  if (options.pages == 0 || options.pages > UINT32_MAX) {
    return Status::Error("E_ARGUMENT", "VM " + options.id + ": bad size of RAM");
  }
  if (options.replica != nullptr && options.replica->pages() != options.pages) {
    return Status::Error("E_REPLICA_MISMATCH",
                         "VM " + options.id + ": replica and RAM differ in size");
  }
  options.populate = options_.populate;
  options.save_wait_ms = options_.save_wait_ms;
  std::lock_guard lock(mutex_);
  if (closed_) return Status::Error("E_CLOSED", "the memtap server is closed");
  if (vms_.contains(options.id)) {
    return Status::Error("E_EXISTS", "VM " + options.id + " is known already");
  }
  const std::string id = options.id;
  vms_.emplace(id, std::make_shared<Vm>(std::move(options), sink_));
  return Status::Ok();
}

Status MemtapServer::find(const std::string& id, std::shared_ptr<Vm>* out) const {
  std::lock_guard lock(mutex_);
  if (closed_) return Status::Error("E_CLOSED", "the memtap server is closed");
  const auto found = vms_.find(id);
  if (found == vms_.end()) return Status::Error("E_NOT_FOUND", "VM " + id + " is not known");
  *out = found->second;
  return Status::Ok();
}

Status MemtapServer::remove(const std::string& id) {
  std::shared_ptr<Vm> vm;
  Status status = find(id, &vm);
  if (!status.ok()) return status;
  {
    std::lock_guard lock(mutex_);
    vms_.erase(id);
  }
  vm->stop(true);
  return Status::Ok();
}

void MemtapServer::close() {
  std::map<std::string, std::shared_ptr<Vm>> vms;
  {
    std::lock_guard lock(mutex_);
    if (closed_) return;
    closed_ = true;
    vms.swap(vms_);
  }
  ::unlink(options_.socket_path.c_str());
  const uint64_t one = 1;
  if (::write(wakeup_.get(), &one, sizeof one) < 0) {
    // Readable already, which is all that matters.
  }
  for (auto& entry : vms) entry.second->stop(false);
}

void MemtapServer::run() {
  ::prctl(PR_SET_NAME, "memtap-listen");
  std::vector<pollfd> fds;
  for (;;) {
    fds.clear();
    fds.push_back({wakeup_.get(), POLLIN, 0});
    fds.push_back({peers_.size() < kMaxPeers ? listener_.get() : -1, POLLIN, 0});
    int timeout_ms = -1;
    const auto now = Clock::now();
    for (auto& peer : peers_) {
      fds.push_back({peer.socket.get(), POLLIN, 0});
      const auto left =
          std::chrono::duration_cast<std::chrono::milliseconds>(peer.deadline - now).count();
      const int left_ms = left < 0 ? 0 : static_cast<int>(left) + 1;
      if (timeout_ms < 0 || left_ms < timeout_ms) timeout_ms = left_ms;
    }
    if (::poll(fds.data(), fds.size(), timeout_ms) < 0) continue;
    if (fds[0].revents != 0) break;
    size_t at = 2;
    for (auto peer = peers_.begin(); peer != peers_.end(); at++) {
      bool done = Clock::now() >= peer->deadline;
      if (fds[at].revents != 0) done = on_readable(*peer) == Next::kDone || done;
      peer = done ? peers_.erase(peer) : std::next(peer);
    }
    if (fds[1].revents != 0) accept_peers();
  }
  peers_.clear();
  listener_.reset();
}

void MemtapServer::accept_peers() {
  while (peers_.size() < kMaxPeers) {
    Fd fd(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!fd.valid()) return;
    Peer peer;
    peer.socket = std::move(fd);
    peer.deadline = Clock::now() + kHandshakeTime;
    peers_.push_back(std::move(peer));
  }
}

MemtapServer::Next MemtapServer::on_readable(Peer& peer) {
  union {
    memtap_hello hello;
    memtap_attach attach;
  } packet = {};
  const size_t expected = peer.stage == Stage::kHello ? sizeof packet.hello : sizeof packet.attach;
  Fd fd;
  const ssize_t n = receive_packet(peer.socket.get(), &packet, sizeof packet, &fd);
  if (n < 0) return Next::kWait;
  if (static_cast<size_t>(n) != expected) return Next::kDone;
  return peer.stage == Stage::kHello ? on_hello(peer, packet.hello)
                                     : on_attach(peer, packet.attach, std::move(fd));
}

MemtapServer::Next MemtapServer::refuse(Peer& peer, const Status& status) {
  memtap_offer offer = {};
  memtap_ack ack = {};
  offer.magic = ack.magic = MEMTAP_MAGIC;
  offer.version = ack.version = MEMTAP_VERSION;
  set_text(offer.code, status.code);
  set_text(offer.message, status.message);
  set_text(ack.code, status.code);
  set_text(ack.message, status.message);
  if (peer.stage == Stage::kHello) {
    send_packet(peer.socket.get(), &offer, sizeof offer, {});
  } else {
    send_packet(peer.socket.get(), &ack, sizeof ack, {});
  }
  return Next::kDone;
}

Status MemtapServer::admit(Peer& peer, const memtap_hello& hello, memtap_offer* offer,
                           Fd* replica) {
  if (hello.magic != MEMTAP_MAGIC || hello.version != MEMTAP_VERSION) {
    return Status::Error("E_DATAPLANE", "the agent speaks another version");
  }
  std::shared_ptr<Vm> vm;
  const bool known = find(text_of(hello.vm), &vm).ok();
  const std::string token = known ? vm->options().token : std::string(64, '\0');
  if (!same_token(token, text_of(hello.token)) || !known) {
    return Status::Error("E_NOT_FOUND", "no such VM is expected, or its token is wrong");
  }
  const VmOptions& o = vm->options();
  if (hello.ram_bytes != o.pages * kPageBytes) {
    return Status::Error("E_SHAPE", "VM " + o.id + " has " + std::to_string(hello.ram_bytes) +
                                        " bytes of RAM, not " +
                                        std::to_string(o.pages * kPageBytes));
  }
  peer.resume = (hello.flags & MEMTAP_RESUME) != 0;
  Status status = vm->may_attach(peer.resume, (hello.flags & MEMTAP_CLONE) != 0);
  if (!status.ok()) return status;
  if (o.replica != nullptr) {
    status = o.replica->open_readonly(replica);
    if (!status.ok()) return status;
    struct stat st = {};
    if (::fstat(replica->get(), &st) != 0)
      return Status::Errno("E_IO", "stat " + o.replica->path());
    // Serving it from another file would leave its faults unanswered for ever.
    if (peer.resume && (st.st_dev != hello.replica_dev || st.st_ino != hello.replica_ino)) {
      return Status::Error("E_REPLICA_MISMATCH", "VM " + o.id + " maps another replica");
    }
  }
  ucred peer_credentials = {};
  socklen_t size = sizeof peer_credentials;
  if (::getsockopt(peer.socket.get(), SOL_SOCKET, SO_PEERCRED, &peer_credentials, &size) != 0) {
    return Status::Errno("E_INTERNAL", "SO_PEERCRED");
  }
  status = GuestProcess::Open(peer_credentials.pid, &peer.process);
  if (!status.ok()) return status;
  offer->features = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
  offer->register_mode = UFFDIO_REGISTER_MODE_WP;
  if (o.replica != nullptr) {
    offer->clone = 1;
    offer->features |= UFFD_FEATURE_MISSING_SHMEM;
    offer->register_mode |= UFFDIO_REGISTER_MODE_MISSING;
  } else if (!o.populate) {
    offer->features |= UFFD_FEATURE_WP_UNPOPULATED;
  }
  peer.vm = std::move(vm);
  return Status::Ok();
}

MemtapServer::Next MemtapServer::on_hello(Peer& peer, const memtap_hello& hello) {
  memtap_offer offer = {};
  offer.magic = MEMTAP_MAGIC;
  offer.version = MEMTAP_VERSION;
  Fd replica;
  Fd device;
  Status status = admit(peer, hello, &offer, &replica);
  if (status.ok() && !peer.resume) status = kernel_.open_device(&device);
  if (status.ok() && ::getrandom(&peer.nonce, sizeof peer.nonce, 0) != sizeof peer.nonce) {
    status = Status::Errno("E_INTERNAL", "getrandom");
  }
  if (!status.ok()) return refuse(peer, status);
  offer.nonce = peer.nonce;
  std::vector<int> fds;
  if (!peer.resume) {
    fds.push_back(device.get());
    if (replica.valid()) fds.push_back(replica.get());
  }
  peer.stage = Stage::kAttach;
  return send_packet(peer.socket.get(), &offer, sizeof offer, fds) ? Next::kWait : Next::kDone;
}

MemtapServer::Next MemtapServer::on_attach(Peer& peer, const memtap_attach& attach, Fd uffd) {
  const uint64_t bytes = peer.vm->options().pages * kPageBytes;
  if (attach.magic != MEMTAP_MAGIC || attach.nonce != peer.nonce || attach.bytes != bytes ||
      attach.base % kPageBytes != 0 || attach.base > UINT64_MAX - bytes || !uffd.valid() ||
      !is_userfaultfd(uffd.get())) {
    return refuse(peer, Status::Error("E_ARGUMENT", "the memory handed over is not what was said"));
  }
  // The connection goes to the pager; the acknowledgement goes by a duplicate.
  Fd connection(::fcntl(peer.socket.get(), F_DUPFD_CLOEXEC, 0));
  if (!connection.valid()) return refuse(peer, Status::Errno("E_INTERNAL", "dup"));
  const Status status = peer.vm->attach(std::move(peer.process), kernel_, std::move(uffd),
                                        attach.base, std::move(connection), peer.resume);
  if (!status.ok()) return refuse(peer, status);
  memtap_ack ack = {};
  ack.magic = MEMTAP_MAGIC;
  ack.version = MEMTAP_VERSION;
  send_packet(peer.socket.get(), &ack, sizeof ack, {});
  return Next::kDone;
}

}  // namespace sf
