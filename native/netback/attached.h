// Programs that are attached to interfaces, and the maps they use: whose they are.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "common/status.h"

namespace sf {

// By name, the kernel's numbers of a program's maps. E_BPF.
Status MapsOfProgram(uint32_t program, std::map<std::string, uint32_t>* out);

// Where the uplink of another filter has gone (driver loaded anew, bond made again), or is
// `uplink`, whose filter is ours now, that filter lives on by its taps' programs alone, and nobody
// can find it to take an interface from it. `ingress` is a program on the tap `ifindex`: if it is
// of such a filter, that forgets the tap, so that none of its other taps sends there any more, and
// `left` is true; `stats` is the number of its sf_stats then. `owner` names the uplink of a filter
// that is alive, or is empty. E_BPF.
struct Orphan {
  bool left = false;
  uint32_t stats = 0;
  std::string owner;
};
Status LeaveOrphan(uint32_t ingress, uint32_t ifindex, uint32_t uplink, Orphan* out);

}  // namespace sf
