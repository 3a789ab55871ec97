#include "netback/attached.h"

#include <bpf/bpf.h>
#include <linux/bpf.h>
#include <net/if.h>

#include <array>
#include <cerrno>

#include "common/fd.h"
#include "kernel/netback/netback.h"

namespace sf {
namespace {

Status Failed(const char* what, int error) {
  return Status::Errno("E_BPF", what, error < 0 ? -error : error);
}

// Not valid if there is no map of that name and shape.
Status OpenMap(const std::map<std::string, uint32_t>& maps, const char* name, uint32_t key_size,
               uint32_t value_size, Fd* out) {
  const auto found = maps.find(name);
  if (found == maps.end()) return Status::Ok();
  Fd map(bpf_map_get_fd_by_id(found->second));
  if (!map.valid()) return Failed("open a map of an interface's program", errno);
  bpf_map_info info = {};
  uint32_t size = sizeof info;
  const int error = bpf_obj_get_info_by_fd(map.get(), &info, &size);
  if (error != 0) return Failed("look at a map of an interface's program", error);
  if (info.key_size == key_size && info.value_size == value_size) *out = std::move(map);
  return Status::Ok();
}

}  // namespace

Status MapsOfProgram(uint32_t program, std::map<std::string, uint32_t>* out) {
  out->clear();
  Fd opened(bpf_prog_get_fd_by_id(program));
  if (!opened.valid()) return Failed("open the program of an interface", errno);
  std::array<uint32_t, 16> ids = {};
  bpf_prog_info info = {};
  info.nr_map_ids = ids.size();
  info.map_ids = reinterpret_cast<uint64_t>(ids.data());
  uint32_t size = sizeof info;
  int error = bpf_obj_get_info_by_fd(opened.get(), &info, &size);
  if (error != 0) return Failed("look at the program of an interface", error);
  for (uint32_t i = 0; i < info.nr_map_ids && i < ids.size(); ++i) {
    Fd map(bpf_map_get_fd_by_id(ids[i]));
    if (!map.valid()) return Failed("open a map of an interface's program", errno);
    bpf_map_info shape = {};
    size = sizeof shape;
    error = bpf_obj_get_info_by_fd(map.get(), &shape, &size);
    if (error != 0) return Failed("look at a map of an interface's program", error);
    (*out)[shape.name] = ids[i];
  }
  return Status::Ok();
}

Status LeaveOrphan(uint32_t ingress, uint32_t ifindex, uint32_t uplink, Orphan* out) {
  *out = Orphan();
  std::map<std::string, uint32_t> maps;
  Status status = MapsOfProgram(ingress, &maps);
  if (!status.ok()) return status;
  Fd config_map;
  Fd ports;
  Fd by_wire;
  status = OpenMap(maps, "sf_config", 4, sizeof(netback_config), &config_map);
  if (status.ok()) status = OpenMap(maps, "sf_ports", 4, sizeof(netback_port), &ports);
  if (status.ok()) status = OpenMap(maps, "sf_by_wire", 8, sizeof(netback_port), &by_wire);
  if (!status.ok()) return status;
  const auto stats = maps.find("sf_stats");
  if (!config_map.valid() || !ports.valid() || !by_wire.valid() || stats == maps.end()) {
    return Status::Ok();  // somebody else's program
  }
  const uint32_t zero = 0;
  netback_config config = {};
  int error = bpf_map_lookup_elem(config_map.get(), &zero, &config);
  if (error != 0) return Failed("read the map sf_config of another filter", error);
  char name[IF_NAMESIZE];
  if (config.uplink != uplink && if_indextoname(config.uplink, name) != nullptr) {
    out->owner = name;
    return Status::Ok();
  }
  netback_port port = {};
  if (bpf_map_lookup_elem(ports.get(), &ifindex, &port) == 0) {
    error = bpf_map_delete_elem(ports.get(), &ifindex);
    if (error == 0 || error == -ENOENT) {
      error = bpf_map_delete_elem(by_wire.get(), &port.wire_mac);
    }
    if (error != 0 && error != -ENOENT) return Failed("change another filter's maps", error);
  }
  out->left = true;
  out->stats = stats->second;
  return Status::Ok();
}

}  // namespace sf
