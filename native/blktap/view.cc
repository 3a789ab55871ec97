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
  const DataFile& file = chain_.slices->at(entry).data();
  if (file.read(page * kPageBytes, kPageBytes, out, ReadMode::kBlock) != 0 || !current()) {
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

uint32_t View::depth(PageIndex page) const {
  std::shared_lock shape(chain_.slices->shape());
  return chain_depth(chain_, node_->height, index_->get(page));
}

}  // namespace sf
