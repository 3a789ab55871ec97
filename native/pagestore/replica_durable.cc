// What of a replica on a disk survives a power cut.
#include <fcntl.h>

#include <cstring>

#include "blktap/files.h"
#include "pagestore/replica.h"
#include "pagestore/replica_map.h"

namespace sf {

// Under another boot the bitmaps as they were then say nothing: the kernel may have written a bit
// and not its page. Those of the last sync() take their place.
Status Replica::check_boot() {
  std::string boot;
  Status status = boot_id(&boot);
  if (!status.ok()) return status;
  auto* header = reinterpret_cast<MapHeader*>(map_base_);
  if (std::strncmp(header->boot, boot.c_str(), sizeof header->boot) == 0) return Status::Ok();
  const size_t bytes = (map_bytes_ - kPageBytes) / 2;
  std::memcpy(map_base_ + kPageBytes, map_base_ + kPageBytes + bytes, bytes);
  std::atomic_thread_fence(std::memory_order_release);
  std::memset(header->boot, 0, sizeof header->boot);
  std::memcpy(header->boot, boot.c_str(), boot.size() + 1);  // last: ended here, it is done again
  return Status::Ok();
}

Status Replica::sync() {
  if (medium_ == Medium::kMemory) return Status::Ok();
  std::lock_guard lock(sync_mutex_);
  const uint64_t known = present_.load() + zero_.load();
  if (known == synced_ && known != 0) return Status::Ok();
  const size_t bytes = (map_bytes_ - kPageBytes) / 2;
  const auto* now = reinterpret_cast<const std::atomic<uint64_t>*>(map_base_ + kPageBytes);
  // Taken before the data is synced: pages that come meanwhile are left to the next sync().
  std::vector<uint64_t> words(bytes / sizeof(uint64_t));
  for (size_t i = 0; i < words.size(); i++) words[i] = now[i].load(std::memory_order_acquire);
  if (::fdatasync(data_.get()) != 0) return file_error("sync " + path_);
  std::memcpy(map_base_ + kPageBytes + bytes, words.data(), bytes);
  if (::fdatasync(map_.get()) != 0) return file_error("sync " + path_ + ".map");
  const size_t slash = path_.rfind('/');
  Status status = sync_directory(slash == std::string::npos ? "." : path_.substr(0, slash + 1));
  if (status.ok()) synced_ = known;
  return status;
}

}  // namespace sf
