// Loads the netback filter (kernel/netback), attaches it and keeps its maps.
//
// The kernel holds everything: the filter on the uplink holds the maps, the maps name the taps. A
// process that dies leaves a working filter; the next one finds the maps through the uplink's
// filter, loads its own programs on them and puts these in the place of the old ones, one by one
// and without a moment in which none is there.
//
// Invariants:
//   - an interface gets the programs before it gets an identity: without one all is dropped;
//   - two interfaces never have the same wire MAC, no interface has two: an identity is claimed in
//     sf_by_wire first, where the kernel lets only one claim be (BPF_NOEXIST), then used by
//     sf_ports, and given up in the other order, so that one who dies between leaves a claim and no
//     user;
//   - sf_ports is the truth; claims that it does not know are nobody's, and Attach() removes them;
//   - one process at a time changes anything in a network namespace (lock.h).
//
// Works in the network namespace of the calling thread. Not thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "common/status.h"
#include "kernel/netback/netback.h"

struct bpf_object;
struct bpf_program;

namespace sf {

struct Vm {
  std::string interface;
  uint64_t wire_mac = 0;
  uint64_t guest_mac = 0;
  uint32_t ip = 0;  // host order
  // The identity that the interface has now and that this one takes the place of; 0: none.
  uint64_t replaces = 0;
};

struct TestRun {
  uint32_t verdict = 0;  // TC_ACT_*
  uint32_t mean_ns = 0;
  std::vector<uint8_t> frame;  // as the last repetition left it
};

class NetbackFilter {
 public:
  // `object` is the compiled kernel/netback. E_BPF, E_NETWORK, E_NOT_FOUND (no such interface),
  // E_IN_USE (somebody else's filter in our place).
  static Status Attach(const std::string& object, const std::string& uplink,
                       std::unique_ptr<NetbackFilter>* out);
  // Opens what is attached, for AddVm, RemoveVm, Vms, Stats and Detach, and changes nothing yet.
  // E_NOT_FOUND: no such interface, or no filter on it.
  static Status Open(const std::string& object, const std::string& uplink,
                     std::unique_ptr<NetbackFilter>* out);
  ~NetbackFilter();
  NetbackFilter(const NetbackFilter&) = delete;
  NetbackFilter& operator=(const NetbackFilter&) = delete;

  // Also sets the interface up. Again for an interface that is this VM's already: nothing changes
  // but the guest's MAC.
  // E_EXISTS: the wire MAC belongs to another interface, or the interface to another VM (but for
  // the one named as `replaces`) or another uplink's filter, if that uplink is still there.
  // E_IN_USE, E_NOT_FOUND, E_ARGUMENT.
  Status AddVm(const Vm& vm);
  // By name, which works after the interface has gone too; if it is there it is set down.
  // E_NOT_FOUND.
  Status RemoveVm(const std::string& interface);
  Status Vms(std::vector<Vm>* out) const;
  // Where gateways are: bits of NETBACK_GATEWAY_MODE. Holds until it is changed or Detach().
  Status SetGatewayMode(uint32_t mode);
  Status GatewayMode(uint32_t* out) const;
  // One sum over all CPUs for each reason of kernel/netback/reasons.h.
  Status Stats(std::vector<uint64_t>* out) const;
  // Removes all of it from all interfaces; those of VMs are set down.
  Status Detach();

  // Puts identities into the maps without an interface: for measuring with many known VMs.
  Status PutIdentity(uint32_t ifindex, const Vm& vm);
  // BPF_PROG_TEST_RUN of from_guest, from_wire or to_guest.
  Status Run(const std::string& program, const std::vector<uint8_t>& frame, uint32_t ifindex,
             uint32_t mark, uint32_t repeat, TestRun* out) const;
  // The same once for each of many frames, which lie one behind the other in `frames`; `lengths`
  // and `ifindexes` have one number a frame. A frame's result takes the place of the frame, and its
  // length too; the filter makes no frame longer. Stops at the first that the kernel refuses.
  Status RunMany(const std::string& program, const std::vector<uint32_t>& ifindexes, uint32_t mark,
                 uint8_t* frames, uint32_t* lengths, uint32_t* verdicts) const;

 private:
  NetbackFilter() = default;
  Status Load(const std::string& object, const std::string& uplink, uint32_t* before);
  Status AttachUplink(const std::string& object, const std::string& uplink);
  Status TakeOver(uint32_t program_id);
  Status Repair();
  Status AttachTap(uint32_t ifindex, const std::string& name);
  Status CheckPlace(uint32_t ifindex, const Vm& vm);
  Status CheckPrograms(uint32_t ifindex, const std::string& name) const;
  Status Ports(std::vector<netback_port>* out) const;
  Status DropPort(const netback_port& port);

  bpf_object* object_ = nullptr;
  int ports_ = -1;  // map descriptors, owned by object_
  int by_wire_ = -1;
  int config_ = -1;
  int stats_ = -1;
  uint32_t uplink_ = 0;
};

}  // namespace sf
