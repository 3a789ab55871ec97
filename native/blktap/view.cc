#include "blktap/view.h"

#include <errno.h>

#include <cstring>
#include <shared_mutex>

namespace sf {

ReadResult View::read(PageIndex page, uint8_t* out) {
  if (page >= pages()) return ReadResult::kError;
  const SliceIndex::Entry entry = index_->get(page);
  if (entry == SliceIndex::kZero) return ReadResult::kZero;
  if (entry == SliceIndex::kBase) {
    const ReadResult result = chain_.base->read_page(page, out);
    // A clone's disk serves its own clones: what it does not hold yet is fetched from its source,
    // and whoever asked asks again.
    if (result == ReadResult::kAbsent) chain_.base->want(page, [](const Status&) {});
    // Only a replica's last page can hold something beyond the disk's end.
    if (result == ReadResult::kData && (page + 1) * kPageBytes > chain_.size) {
      const size_t used = chain_.size - page * kPageBytes;
      std::memset(out + used, 0, kPageBytes - used);
    }
    return result;
  }
  ReadGate::Section section(chain_.slices->readers());
  if (read_slice(chain_, entry, page * kPageBytes, kPageBytes, out, ReadMode::kBlock) != 0 ||
      !current()) {
    return ReadResult::kError;
  }
  return is_zero_page(out) ? ReadResult::kZero : ReadResult::kData;
}

int View::read(uint64_t off, size_t len, uint8_t* out, ReadMode mode, bool* zero) {
  *zero = true;
  const int error = read_chain(
      chain_, [&](Stretch* s) { index_->get(s->first, s->count, s->entries.data()); }, off, len,
      out, mode, zero);
  return error == 0 && !current() ? ESHUTDOWN : error;
}

int View::plan_read(uint64_t off, size_t len, uint8_t* out, ReadPlan* plan) {
  return plan_chain(
      chain_, [&](Stretch* s) { index_->get(s->first, s->count, s->entries.data()); }, off, len,
      out, plan);
}

Device::Extent View::extent(uint64_t off, uint64_t limit) const {
  ReadGate::Section section(chain_.slices->readers());
  std::shared_lock shape(chain_.slices->shape());
  return chain_extent(chain_, *index_, node_->height, off, limit);
}

void View::cache(uint64_t off, uint64_t len) {
  ReadGate::Section section(chain_.slices->readers());
  chain_cache(chain_, *index_, off, len);
}

}  // namespace sf
