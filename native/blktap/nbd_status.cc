#include "blktap/nbd_status.h"

#include <algorithm>
#include <utility>

namespace sf::nbd {
namespace {

constexpr size_t kMaxExtents = 4096;
constexpr uint64_t kMaxLook = uint64_t{1} << 30;

struct List {
  uint8_t context = 0;
  bool full = false;
  std::vector<std::pair<uint32_t, uint32_t>> extents;  // bytes, state

  void add(uint32_t bytes, uint32_t state, size_t most) {
    if (full) return;
    if (!extents.empty() && extents.back().second == state) {
      extents.back().first += bytes;
    } else if (extents.size() == most) {
      full = true;
    } else {
      extents.emplace_back(bytes, state);
    }
  }
};

uint32_t state_of(uint8_t context, const Device::Extent& extent) {
  if (context == kContextDepth) return extent.depth;
  return extent.hole ? kStateHole | kStateZero : 0;
}

}  // namespace

void block_status(const Device& device, Job* job) {
  const Request& request = job->request;
  const uint64_t end = request.offset + std::min<uint64_t>(request.length, kMaxLook);
  const size_t most = (request.flags & kFlagReqOne) != 0 ? 1 : kMaxExtents;
  std::vector<List> lists;
  for (const ContextName& name : kContexts) {
    if ((job->contexts & name.context) != 0) lists.push_back({name.context, false, {}});
  }
  auto full = [](const List& list) { return list.full; };
  for (uint64_t off = request.offset; off < end && !std::ranges::all_of(lists, full);) {
    const Device::Extent extent = device.extent(off, end - off);
    for (List& list : lists) {
      list.add(static_cast<uint32_t>(extent.bytes), state_of(list.context, extent), most);
    }
    off += extent.bytes;
  }
  for (const List& list : lists)
    job->reply_bytes += kChunkHeaderBytes + 4 + list.extents.size() * 8;
  job->reply = std::make_unique<uint8_t[]>(job->reply_bytes);
  uint8_t* p = job->reply.get();
  for (const List& list : lists) {
    const bool last = &list == &lists.back();
    put_chunk(p, last ? kChunkDone : 0, kChunkBlockStatus, request.cookie,
              static_cast<uint32_t>(4 + list.extents.size() * 8));
    p += kChunkHeaderBytes;
    put32(p, list.context);
    p += 4;
    for (const auto& [bytes, state] : list.extents) {
      put32(p, bytes);
      put32(p + 4, state);
      p += 8;
    }
  }
}

}  // namespace sf::nbd
