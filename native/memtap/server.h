// The Unix socket at which the agents in the VMs' processes hand over their memory.
//
// One thread accepts connections and speaks the handshake (agent/protocol.h) with all of them, each
// bounded in time and number; a connection that is accepted goes to its VM's pager. Who may attach:
// a process that knows the VM's token. Which process that is, the kernel says (SO_PEERCRED).
//
// A hostile peer can send anything: packets have one exact size, strings are terminated here,
// descriptors are checked to be userfaultfds, surplus ones are closed.
#pragma once

#include <chrono>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "agent/protocol.h"
#include "memtap/vm.h"

namespace sf {

struct ServerOptions {
  std::string socket_path;
  uint32_t socket_mode = 0660;
  int64_t socket_uid = -1;  // -1: unchanged
  int64_t socket_gid = -1;
  bool populate = false;  // as on kernels that cannot protect unpopulated anonymous memory
  uint32_t save_wait_ms = 1000;
};

class MemtapServer : public std::enable_shared_from_this<MemtapServer> {
 public:
  // Listens. A stale socket file is replaced; one that is served is E_IN_USE.
  static Status Open(const ServerOptions& options, EventSink sink,
                     std::shared_ptr<MemtapServer>* out);
  ~MemtapServer();

  Status expect(VmOptions options);                                    // E_EXISTS
  Status find(const std::string& id, std::shared_ptr<Vm>* out) const;  // E_NOT_FOUND
  Status remove(const std::string& id);                                // E_NOT_FOUND
  void close();  // VMs run on; their faults wait for the next server

 private:
  enum class Stage : uint8_t { kHello, kAttach };
  struct Peer {
    Fd socket;
    Stage stage = Stage::kHello;
    std::chrono::steady_clock::time_point deadline;
    std::shared_ptr<Vm> vm;
    bool resume = false;
    uint64_t nonce = 0;
    GuestProcess process;
  };
  enum class Next : uint8_t { kWait, kDone };

  MemtapServer() = default;
  void run();
  void accept_peers();
  Next on_readable(Peer& peer);
  Next on_hello(Peer& peer, const memtap_hello& hello);
  Next on_attach(Peer& peer, const memtap_attach& attach, Fd uffd);
  Next refuse(Peer& peer, const Status& status);
  Status admit(Peer& peer, const memtap_hello& hello, memtap_offer* offer, Fd* replica);

  ServerOptions options_;
  EventSink sink_;
  Kernel kernel_;
  Fd listener_;
  Fd wakeup_;
  std::list<Peer> peers_;  // of the thread

  mutable std::mutex mutex_;
  std::map<std::string, std::shared_ptr<Vm>> vms_;
  bool closed_ = false;
};

}  // namespace sf
