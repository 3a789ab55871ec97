#include "netback/filter.h"

#include <bpf/bpf.h>
#include <bpf/libbpf.h>
#include <linux/bpf.h>
#include <net/if.h>

#include <array>
#include <cstdio>
#include <map>

#include "common/fd.h"
#include "kernel/netback/reasons.h"
#include "netback/attached.h"
#include "netback/link.h"
#include "netback/lock.h"

namespace sf {
namespace {

constexpr std::array kMaps = {"sf_ports", "sf_by_wire", "sf_config", "sf_stats"};

// The last lines libbpf printed: its return codes alone do not say what was wrong.
thread_local std::string libbpf_said;

int Remember(enum libbpf_print_level level, const char* format, va_list arguments) {
  if (level == LIBBPF_DEBUG || libbpf_said.size() > 2000) return 0;
  char line[512];
  std::vsnprintf(line, sizeof line, format, arguments);
  libbpf_said += line;
  return 0;
}

Status BpfError(const std::string& what, int error) {
  Status status = Status::Errno("E_BPF", what, error < 0 ? -error : error);
  if (!libbpf_said.empty()) status.message += " (" + libbpf_said + ")";
  libbpf_said.clear();
  return status;
}

bpf_tc_hook Hook(uint32_t ifindex, int point) {
  bpf_tc_hook hook = {};
  hook.sz = sizeof hook;
  hook.ifindex = static_cast<int>(ifindex);
  hook.attach_point = static_cast<bpf_tc_attach_point>(point);
  return hook;
}

bpf_tc_opts Place() {
  bpf_tc_opts opts = {};
  opts.sz = sizeof opts;
  opts.handle = NETBACK_TC_HANDLE;
  opts.priority = NETBACK_TC_PRIORITY;
  return opts;
}

// `made` says whether the clsact qdisc is new.
Status MakeQdisc(uint32_t ifindex, const std::string& name, bool* made) {
  libbpf_said.clear();
  bpf_tc_hook hook = Hook(ifindex, BPF_TC_INGRESS);
  const int error = bpf_tc_hook_create(&hook);
  *made = error == 0;
  return error == 0 || error == -EEXIST ? Status::Ok() : BpfError("make clsact on " + name, error);
}

void RemoveQdisc(uint32_t ifindex) {
  bpf_tc_hook hook = Hook(ifindex, BPF_TC_INGRESS | BPF_TC_EGRESS);
  bpf_tc_hook_destroy(&hook);  // fails only if it has gone already, with the interface or alone
}

Status AttachProgram(uint32_t ifindex, const std::string& name, bpf_tc_attach_point point,
                     const bpf_program* program) {
  libbpf_said.clear();
  bpf_tc_hook hook = Hook(ifindex, point);
  bpf_tc_opts opts = Place();
  opts.prog_fd = bpf_program__fd(program);
  opts.flags = BPF_TC_F_REPLACE;
  const int error = bpf_tc_attach(&hook, &opts);
  if (error == 0) return Status::Ok();
  return BpfError(std::string("attach ") + bpf_program__name(program) + " to " + name, error);
}

// 0 if there is none.
uint32_t AttachedProgram(uint32_t ifindex, bpf_tc_attach_point point) {
  bpf_tc_hook hook = Hook(ifindex, point);
  bpf_tc_opts opts = Place();
  const int error = bpf_tc_query(&hook, &opts);
  libbpf_said.clear();
  return error == 0 ? opts.prog_id : 0;
}

std::string NameOf(uint32_t ifindex) {
  char name[IF_NAMESIZE];
  return if_indextoname(ifindex, name) == nullptr ? "" : name;
}

std::string PortName(const netback_port& port) {
  return std::string(port.name, strnlen(port.name, sizeof port.name));
}

// For messages.
std::string PlaceText(uint64_t wire_mac) {
  const std::string family = " of family " + std::to_string(wire_mac >> 16 & 0xffffff);
  const uint64_t vmid = wire_mac & 0xffff;
  return (vmid == NETBACK_VMID_GATEWAY ? "the gateway" : "VM " + std::to_string(vmid)) + family;
}

bool IsThere(const netback_port& port) { return NameOf(port.ifindex) == PortName(port); }

// Takes the programs off. Down first: between a guest and the host's stack there is nothing else.
Status Bare(const netback_port& port) {
  if (!IsThere(port)) return Status::Ok();
  Status status = SetLinkFlags(PortName(port), IFF_UP, false);
  if (!status.ok() && IsThere(port)) return status;
  RemoveQdisc(port.ifindex);
  return Status::Ok();
}

// Undoes what the filter changed on the uplink, if that is still there.
Status Release(const netback_config& config) {
  const std::string name = NameOf(config.uplink);
  if (name.empty()) return Status::Ok();
  if ((config.flags & NETBACK_OWNS_QDISC) != 0) RemoveQdisc(config.uplink);
  return (config.flags & NETBACK_OWNS_PROMISC) == 0 ? Status::Ok()
                                                    : SetLinkFlags(name, IFF_PROMISC, false);
}

Status UpdateFailed(const char* map, int error) {
  libbpf_said.clear();
  return BpfError(std::string("change map ") + map, error);
}

}  // namespace

NetbackFilter::~NetbackFilter() {
  if (object_ != nullptr) bpf_object__close(object_);
}

Status NetbackFilter::Attach(const std::string& object, const std::string& uplink,
                             std::unique_ptr<NetbackFilter>* out) {
  libbpf_set_print(Remember);
  NetbackLock lock;
  Status status = lock.Take();
  if (!status.ok()) return status;
  std::unique_ptr<NetbackFilter> filter(new NetbackFilter());
  status = filter->AttachUplink(object, uplink);
  if (status.ok()) *out = std::move(filter);
  return status;
}

Status NetbackFilter::Open(const std::string& object, const std::string& uplink,
                           std::unique_ptr<NetbackFilter>* out) {
  libbpf_set_print(Remember);
  std::unique_ptr<NetbackFilter> filter(new NetbackFilter());
  uint32_t before = 0;
  Status status = filter->Load(object, uplink, &before);
  if (!status.ok()) return status;
  if (before == 0) return Status::Error("E_NOT_FOUND", "no netback filter on " + uplink);
  *out = std::move(filter);
  return status;
}

// Loads the programs, on the maps of those that are attached if there are any: `before`, or 0.
Status NetbackFilter::Load(const std::string& object, const std::string& uplink, uint32_t* before) {
  uint64_t mac = 0;
  Status status = LinkAddress(uplink, &uplink_, &mac);
  if (!status.ok()) return status;
  if (mac >> 40 == NETBACK_WIRE_PREFIX) {
    return Status::Error("E_NETWORK", "the MAC address of " + uplink +
                                          " begins with 5e, which is reserved for VMs; give it "
                                          "another (ip link set dev ... address ...)");
  }
  libbpf_said.clear();
  object_ = bpf_object__open_file(object.c_str(), nullptr);
  if (object_ == nullptr) return BpfError("open " + object, errno);

  *before = AttachedProgram(uplink_, BPF_TC_INGRESS);
  if (*before != 0) status = TakeOver(*before);
  if (!status.ok()) return status;
  libbpf_said.clear();
  const int error = bpf_object__load(object_);
  if (error != 0) return BpfError("load " + object, error);
  int* const descriptors[] = {&ports_, &by_wire_, &config_, &stats_};
  for (size_t i = 0; i < kMaps.size(); ++i) {
    *descriptors[i] = bpf_object__find_map_fd_by_name(object_, kMaps[i]);
    if (*descriptors[i] < 0) return BpfError(std::string("find map ") + kMaps[i], *descriptors[i]);
  }
  return Status::Ok();
}

Status NetbackFilter::AttachUplink(const std::string& object, const std::string& uplink) {
  uint32_t before = 0;
  Status status = Load(object, uplink, &before);
  if (!status.ok()) return status;
  // The uplink's program keeps all maps alive and leads to them, those it does not use itself too.
  const bpf_program* from_wire = bpf_object__find_program_by_name(object_, "from_wire");
  for (const int map : {ports_, by_wire_, config_, stats_}) {
    const int bound = bpf_prog_bind_map(bpf_program__fd(from_wire), map, nullptr);
    if (bound != 0) return BpfError("bind the maps to from_wire", bound);
  }

  const uint32_t zero = 0;
  netback_config config = {};
  if (before != 0) bpf_map_lookup_elem(config_, &zero, &config);
  config.uplink = uplink_;
  bool made = false;
  status = MakeQdisc(uplink_, uplink, &made);
  if (made) config.flags |= NETBACK_OWNS_QDISC;
  if (status.ok()) {
    // A network card passes on only what is for its own address, and wire MACs are not.
    bool changed = false;
    status = SetLinkFlags(uplink, IFF_PROMISC, true, &changed);
    if (changed) config.flags |= NETBACK_OWNS_PROMISC;
  }
  if (status.ok()) {
    const int error = bpf_map_update_elem(config_, &zero, &config, BPF_ANY);
    if (error != 0) status = UpdateFailed("sf_config", error);
  }
  if (status.ok()) status = AttachProgram(uplink_, uplink, BPF_TC_INGRESS, from_wire);
  if (!status.ok()) {
    if (before == 0) Release(config);
    return status;
  }
  return Repair();
}

// Makes the opened, not yet loaded object use the maps of the program that is attached.
Status NetbackFilter::TakeOver(uint32_t program_id) {
  Fd program(bpf_prog_get_fd_by_id(program_id));
  if (!program.valid()) return BpfError("open the attached filter", errno);
  std::array<uint32_t, 16> ids = {};
  bpf_prog_info info = {};
  info.nr_map_ids = ids.size();
  info.map_ids = reinterpret_cast<uint64_t>(ids.data());
  uint32_t size = sizeof info;
  int error = bpf_obj_get_info_by_fd(program.get(), &info, &size);
  if (error != 0) return BpfError("look at the attached filter", error);

  size_t found = 0;
  for (uint32_t i = 0; i < info.nr_map_ids && i < ids.size(); ++i) {
    Fd map(bpf_map_get_fd_by_id(ids[i]));
    if (!map.valid()) return BpfError("open a map of the attached filter", errno);
    bpf_map_info shape = {};
    size = sizeof shape;
    error = bpf_obj_get_info_by_fd(map.get(), &shape, &size);
    if (error != 0) return BpfError("look at a map of the attached filter", error);
    bpf_map* ours = bpf_object__find_map_by_name(object_, shape.name);
    if (ours == nullptr) continue;
    if (bpf_map__type(ours) != shape.type || bpf_map__key_size(ours) != shape.key_size ||
        bpf_map__value_size(ours) != shape.value_size ||
        bpf_map__max_entries(ours) != shape.max_entries) {
      return Status::Error("E_BPF", std::string("the attached filter is of another version (map ") +
                                        shape.name + "); detach it first");
    }
    libbpf_said.clear();
    error = bpf_map__reuse_fd(ours, map.get());
    if (error != 0) return BpfError(std::string("use the attached map ") + shape.name, error);
    ++found;
  }
  if (found == kMaps.size()) return Status::Ok();
  return Status::Error("E_IN_USE", std::string("another tc filter (") + info.name +
                                       ") has the netback filter's place on the uplink");
}

// After a take-over: identities of interfaces that have gone are removed, the rest get this
// object's programs, and sf_by_wire says what sf_ports says.
Status NetbackFilter::Repair() {
  std::vector<netback_port> ports;
  Status status = Ports(&ports);
  if (!status.ok()) return status;
  std::map<uint64_t, uint32_t> wanted;
  for (const netback_port& port : ports) {
    if (!IsThere(port)) {
      status = DropPort(port);
      if (!status.ok()) return status;
      continue;
    }
    status = AttachTap(port.ifindex, PortName(port));
    if (!status.ok()) return status;
    const int error = bpf_map_update_elem(by_wire_, &port.wire_mac, &port, BPF_ANY);
    if (error != 0) return UpdateFailed("sf_by_wire", error);
    wanted[port.wire_mac] = port.ifindex;
  }
  std::vector<uint64_t> stale;
  uint64_t key = 0;
  for (const uint64_t* at = nullptr; bpf_map_get_next_key(by_wire_, at, &key) == 0; at = &key) {
    if (!wanted.contains(key)) stale.push_back(key);
  }
  for (uint64_t wire : stale) bpf_map_delete_elem(by_wire_, &wire);
  return Status::Ok();
}

Status NetbackFilter::AttachTap(uint32_t ifindex, const std::string& name) {
  bool made = false;
  Status status = MakeQdisc(ifindex, name, &made);
  if (status.ok()) {
    status = AttachProgram(ifindex, name, BPF_TC_INGRESS,
                           bpf_object__find_program_by_name(object_, "from_guest"));
  }
  if (status.ok()) {
    status = AttachProgram(ifindex, name, BPF_TC_EGRESS,
                           bpf_object__find_program_by_name(object_, "to_guest"));
  }
  return status;
}

Status NetbackFilter::AddVm(const Vm& vm) {
  NetbackLock lock;
  Status status = lock.Take();
  if (!status.ok()) return status;
  const uint32_t ifindex = if_nametoindex(vm.interface.c_str());
  if (ifindex == 0) return Status::Error("E_NOT_FOUND", "no interface " + vm.interface);
  if (ifindex == uplink_) {
    return Status::Error("E_ARGUMENT", vm.interface + " is the uplink, no VM's interface");
  }
  status = CheckPlace(ifindex, vm);
  if (status.ok()) status = AttachTap(ifindex, vm.interface);
  if (status.ok()) status = PutIdentity(ifindex, vm);
  return status.ok() ? SetLinkFlags(vm.interface, IFF_UP, true) : status;
}

// Under the lock: that neither the interface nor the identity is anybody else's. What interfaces
// that have gone left behind is removed.
Status NetbackFilter::CheckPlace(uint32_t ifindex, const Vm& vm) {
  netback_port holder;
  if (bpf_map_lookup_elem(ports_, &ifindex, &holder) == 0) {
    if (!IsThere(holder)) {
      Status status = DropPort(holder);
      if (!status.ok()) return status;
    } else if (holder.wire_mac != vm.wire_mac && holder.wire_mac != vm.replaces) {
      return Status::Error("E_EXISTS", vm.interface + " is " + PlaceText(holder.wire_mac) +
                                           " already; take that away first");
    }
  }
  if (bpf_map_lookup_elem(by_wire_, &vm.wire_mac, &holder) == 0 && holder.ifindex != ifindex) {
    netback_port owner;
    const bool owned =
        bpf_map_lookup_elem(ports_, &holder.ifindex, &owner) == 0 && owner.wire_mac == vm.wire_mac;
    if (owned && IsThere(holder)) {
      return Status::Error("E_EXISTS", "the identity for " + vm.interface + ", " +
                                           PlaceText(vm.wire_mac) + ", belongs to " +
                                           PortName(holder) + " already");
    }
    Status status = owned ? DropPort(holder) : Status::Ok();
    if (!status.ok()) return status;
    // A claim of one who died before it had the interface; else it has gone already.
    bpf_map_delete_elem(by_wire_, &vm.wire_mac);
  }
  return CheckPrograms(ifindex, vm.interface);
}

// That no program of anybody else's is in the filter's places on an interface.
Status NetbackFilter::CheckPrograms(uint32_t ifindex, const std::string& name) const {
  bpf_map_info stats = {};
  uint32_t size = sizeof stats;
  const int error = bpf_obj_get_info_by_fd(stats_, &stats, &size);
  if (error != 0) return BpfError("look at map sf_stats", error);
  Orphan orphan;
  for (const bpf_tc_attach_point point : {BPF_TC_INGRESS, BPF_TC_EGRESS}) {
    const uint32_t program = AttachedProgram(ifindex, point);
    if (program == 0) continue;
    // All programs of a filter count in its sf_stats.
    std::map<std::string, uint32_t> maps;
    Status status = MapsOfProgram(program, &maps);
    if (!status.ok()) return status;
    const auto found = maps.find("sf_stats");
    const uint32_t id = found == maps.end() ? 0 : found->second;
    if (id == stats.id || (orphan.left && id == orphan.stats)) continue;
    if (point == BPF_TC_INGRESS) {
      status = LeaveOrphan(program, ifindex, uplink_, &orphan);
      if (!status.ok()) return status;
      if (orphan.left) continue;
    }
    if (!orphan.owner.empty()) {
      return Status::Error("E_EXISTS", name + " belongs to the filter of " + orphan.owner +
                                           "; take it away there first (snowflock net rm " +
                                           orphan.owner + " " + name + ")");
    }
    return Status::Error("E_EXISTS", "another tc program has the filter's place on " + name +
                                         "; see what it is (tc filter show dev " + name +
                                         " ingress, and egress) and take it away");
  }
  return Status::Ok();
}

Status NetbackFilter::PutIdentity(uint32_t ifindex, const Vm& vm) {
  if (vm.interface.empty() || vm.interface.size() >= sizeof netback_port::name) {
    return Status::Error("E_ARGUMENT", "an interface name has 1 to 15 bytes");
  }
  netback_port port = {};
  port.wire_mac = vm.wire_mac;
  port.guest_mac = vm.guest_mac;
  port.ip = vm.ip;
  port.ifindex = ifindex;
  vm.interface.copy(port.name, sizeof port.name - 1);
  netback_port before;
  const bool has = bpf_map_lookup_elem(ports_, &ifindex, &before) == 0;
  const bool same = has && before.wire_mac == port.wire_mac;
  // Frames from and for the old identity end before those of the new one begin.
  if (has && !same) {
    Status status = DropPort(before);
    if (!status.ok()) return status;
  }
  // The kernel refuses a second claim, whatever anybody believed before.
  const uint64_t flags = same ? BPF_ANY : BPF_NOEXIST;
  int error = bpf_map_update_elem(by_wire_, &port.wire_mac, &port, flags);
  if (error == -EEXIST) {
    return Status::Error("E_EXISTS", "the identity for " + vm.interface + ", " +
                                         PlaceText(port.wire_mac) + ", is in use already");
  }
  if (error != 0) return UpdateFailed("sf_by_wire", error);
  error = bpf_map_update_elem(ports_, &ifindex, &port, flags);
  if (error == 0) return Status::Ok();
  if (!same) bpf_map_delete_elem(by_wire_, &port.wire_mac);
  if (error == -EEXIST) return Status::Error("E_EXISTS", vm.interface + " has an identity already");
  return UpdateFailed("sf_ports", error);
}

Status NetbackFilter::SetGatewayMode(uint32_t mode) {
  const uint32_t zero = 0;
  netback_config config = {};
  int error = bpf_map_lookup_elem(config_, &zero, &config);
  if (error != 0) return BpfError("read map sf_config", error);
  config.flags = (config.flags & ~NETBACK_GATEWAY_MODE) | (mode & NETBACK_GATEWAY_MODE);
  error = bpf_map_update_elem(config_, &zero, &config, BPF_ANY);
  return error == 0 ? Status::Ok() : UpdateFailed("sf_config", error);
}

Status NetbackFilter::GatewayMode(uint32_t* out) const {
  const uint32_t zero = 0;
  netback_config config = {};
  const int error = bpf_map_lookup_elem(config_, &zero, &config);
  *out = config.flags & NETBACK_GATEWAY_MODE;
  return error == 0 ? Status::Ok() : BpfError("read map sf_config", error);
}

// sf_ports first: an identity that nobody else may claim yet can be left over, one that two
// interfaces send with cannot.
Status NetbackFilter::DropPort(const netback_port& port) {
  const int error = bpf_map_delete_elem(ports_, &port.ifindex);
  if (error != 0 && error != -ENOENT) return UpdateFailed("sf_ports", error);
  netback_port holder;
  if (bpf_map_lookup_elem(by_wire_, &port.wire_mac, &holder) == 0 &&
      holder.ifindex == port.ifindex) {
    bpf_map_delete_elem(by_wire_, &port.wire_mac);
  }
  return Status::Ok();
}

Status NetbackFilter::RemoveVm(const std::string& interface) {
  NetbackLock lock;
  Status status = lock.Take();
  if (!status.ok()) return status;
  std::vector<netback_port> ports;
  status = Ports(&ports);
  if (!status.ok()) return status;
  bool found = false;
  for (const netback_port& port : ports) {
    if (PortName(port) != interface) continue;
    found = true;
    status = DropPort(port);
    if (!status.ok()) return status;
    status = Bare(port);
    if (!status.ok()) return status;
  }
  if (!found) return Status::Error("E_NOT_FOUND", "no VM on interface " + interface);
  return Status::Ok();
}

Status NetbackFilter::Ports(std::vector<netback_port>* out) const {
  out->clear();
  uint32_t key = 0;
  std::vector<uint32_t> keys;
  for (const uint32_t* at = nullptr; bpf_map_get_next_key(ports_, at, &key) == 0; at = &key) {
    keys.push_back(key);
    if (keys.size() > NETBACK_PORTS) break;  // changed under us and started over
  }
  for (uint32_t ifindex : keys) {
    netback_port port;
    const int error = bpf_map_lookup_elem(ports_, &ifindex, &port);
    if (error == -ENOENT) continue;
    if (error != 0) return BpfError("read map sf_ports", error);
    out->push_back(port);
  }
  return Status::Ok();
}

Status NetbackFilter::Vms(std::vector<Vm>* out) const {
  std::vector<netback_port> ports;
  Status status = Ports(&ports);
  out->clear();
  for (const netback_port& port : ports) {
    out->push_back({PortName(port), port.wire_mac, port.guest_mac, port.ip});
  }
  return status;
}

Status NetbackFilter::Stats(std::vector<uint64_t>* out) const {
  const int cpus = libbpf_num_possible_cpus();
  if (cpus <= 0) return BpfError("count the CPUs", cpus);
  std::vector<uint64_t> values(static_cast<size_t>(cpus));
  out->assign(NETBACK_REASON_COUNT, 0);
  for (uint32_t reason = 0; reason < NETBACK_REASON_COUNT; ++reason) {
    const int error = bpf_map_lookup_elem(stats_, &reason, values.data());
    if (error != 0) return BpfError("read map sf_stats", error);
    for (uint64_t value : values) (*out)[reason] += value;
  }
  return Status::Ok();
}

Status NetbackFilter::Detach() {
  NetbackLock lock;
  Status status = lock.Take();
  if (!status.ok()) return status;
  std::vector<netback_port> ports;
  status = Ports(&ports);
  if (!status.ok()) return status;
  for (const netback_port& port : ports) {
    status = DropPort(port);
    if (!status.ok()) return status;
    status = Bare(port);
    if (!status.ok()) return status;
  }
  const uint32_t zero = 0;
  netback_config config = {};
  bpf_map_lookup_elem(config_, &zero, &config);
  libbpf_said.clear();
  bpf_tc_hook hook = Hook(uplink_, BPF_TC_INGRESS);
  bpf_tc_opts opts = Place();
  const int error = bpf_tc_detach(&hook, &opts);
  if (error != 0 && !NameOf(uplink_).empty() && AttachedProgram(uplink_, BPF_TC_INGRESS) != 0) {
    return BpfError("detach from the uplink", error);
  }
  return Release(config);
}

Status NetbackFilter::Run(const std::string& program, const std::vector<uint8_t>& frame,
                          uint32_t ifindex, uint32_t mark, uint32_t repeat, TestRun* out) const {
  const bpf_program* found = bpf_object__find_program_by_name(object_, program.c_str());
  if (found == nullptr) return Status::Error("E_ARGUMENT", "no program " + program);
  out->frame.assign(frame.size() + 256, 0);
  __sk_buff context = {};
  context.ifindex = ifindex;
  context.mark = mark;
  bpf_test_run_opts opts = {};
  opts.sz = sizeof opts;
  opts.data_in = frame.data();
  opts.data_size_in = static_cast<uint32_t>(frame.size());
  opts.data_out = out->frame.data();
  opts.data_size_out = static_cast<uint32_t>(out->frame.size());
  opts.ctx_in = &context;
  opts.ctx_size_in = sizeof context;
  opts.repeat = static_cast<int>(repeat);
  const int error = bpf_prog_test_run_opts(bpf_program__fd(found), &opts);
  if (error != 0) return BpfError("run " + program, error);
  out->verdict = opts.retval;
  out->mean_ns = opts.duration;
  out->frame.resize(opts.data_size_out);
  return Status::Ok();
}

Status NetbackFilter::RunMany(const std::string& program, const std::vector<uint32_t>& ifindexes,
                              uint32_t mark, uint8_t* frames, uint32_t* lengths,
                              uint32_t* verdicts) const {
  const bpf_program* found = bpf_object__find_program_by_name(object_, program.c_str());
  if (found == nullptr) return Status::Error("E_ARGUMENT", "no program " + program);
  const int fd = bpf_program__fd(found);
  for (size_t i = 0; i < ifindexes.size(); i++) {
    __sk_buff context = {};
    context.ifindex = ifindexes[i];
    context.mark = mark;
    bpf_test_run_opts opts = {};
    opts.sz = sizeof opts;
    opts.data_in = frames;
    opts.data_size_in = lengths[i];
    opts.data_out = frames;
    opts.data_size_out = lengths[i];
    opts.ctx_in = &context;
    opts.ctx_size_in = sizeof context;
    opts.repeat = 1;
    const int error = bpf_prog_test_run_opts(fd, &opts);
    if (error != 0) return BpfError("run " + program + " on frame " + std::to_string(i), error);
    frames += lengths[i];
    lengths[i] = opts.data_size_out;
    verdicts[i] = opts.retval;
  }
  return Status::Ok();
}

}  // namespace sf
