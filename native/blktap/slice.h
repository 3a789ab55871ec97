// A slice: the pages written to a disk between two forks.
//
// States:  spare -> open (activate, at a fork) -> sealed (the next fork)
//   spare   made ahead of time, empty, so that a fork only has to name it the new top
//   open    the top of its chain; the only state in which pages change
//   sealed  immutable. A slice below the top is never written again, from the instant of the fork;
//           after persist() seal() writes that into its header. Until then it is not `settled`.
//
// Files of slice ID in the disk's folder:
//   ID.data         page p at offset p * 4096, sparse
//   ID.map          durable map: header, then two bits a page (0 absent, 1 data, 2 zero)
//   ID.BOOT.live    live map, same layout, until the slice is settled; BOOT is the kernel's boot id
//
// Why two maps. A bit must never be durable before its page: after a power cut it would show a hole
// (zeros) where the old page was. And the kernel writes back whatever is in the page cache in any
// order. So there are two truths for two accidents:
//  - The process dies: the page cache lives. Every write goes to .data, then its bits to .live,
//  both
//    by pwrite(), before it is acknowledged; the next process reads .live and has lost nothing.
//  - The power goes: .live is worthless and is never read, because its name has another boot's id.
//    .map changes only in persist(): (1) snapshot the changed blocks of .live, (2) fdatasync .data,
//    so every page the snapshot speaks of is on the device, (3) write the snapshot into .map and
//    fdatasync it. At any instant .map speaks only of durable pages; a page is old or new.
// A sealed header carries a checksum of the map and is written after the map is durable.
//
// Invariants:
//  - Bits are set after the page's 4096 bytes are in .data; a page never becomes absent again.
//  - A page's own 4096 bytes may be overwritten in place: old or new after a power cut, if the
//    device writes 4 KiB whole (or sector by sector, as a bare disk would).
//  - After a failed fdatasync the kernel forgets which pages were dirty: the slice answers EIO to
//    every later persist(), so that a second flush cannot claim what the first one lost.
// No file is mapped: a full file system is an error of pwrite(), not a SIGBUS.
// A settled slice's data file is open while the FileCache has room for it.
// Left out: merging slices.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "blktap/file_cache.h"
#include "blktap/slice_format.h"
#include "common/page.h"
#include "common/status.h"

namespace sf {

class Slice {
 public:
  // Writes the files of a new slice and makes them durable. E_EXISTS, E_NO_SPACE, E_IO.
  static Status Create(const std::string& directory, const std::string& id, uint64_t size_bytes,
                       SliceState state);
  // Opens a slice with the map that is true now: .live of this boot if there is one, else .map.
  // E_CORRUPT if a file is missing, cut short or fails its checks.
  // Its disk is told of errors of the data file by `errors`.
  static Status Open(const std::string& directory, const std::string& id, uint64_t size_bytes,
                     std::shared_ptr<Slice>* out, std::shared_ptr<FileErrors> errors = nullptr);
  // Removes the files of a slice that was never more than a spare; anything else is left alone.
  static Status RemoveSpare(const std::string& directory, const std::string& id,
                            uint64_t size_bytes);

  const std::string& id() const { return id_; }
  SliceState state() const { return static_cast<SliceState>(header_.state); }
  bool settled() const { return settled_.load(std::memory_order_acquire); }
  std::string below() const { return header_text(header_.below, sizeof header_.below); }
  std::string below_generation() const {
    return header_text(header_.below_generation, sizeof header_.below_generation);
  }
  // The pages, in any state: pin() and read() of CachedFile. ESTALE after retire().
  const CachedFile& pages() const { return data_; }
  int read(uint64_t off, size_t len, uint8_t* out, ReadMode mode) const {
    return data_.read(off, len, out, mode);
  }
  // For writing, until the slice is settled.
  const DataFile& data() const { return data_.own(); }
  // Its pages are in other slices now: nobody starts to read them here any more.
  void retire() { data_.remove(); }
  uint64_t allocated_bytes() const;  // 0 if the file cannot be looked at
  uint64_t pages_marked() const { return pages_marked_.load(std::memory_order_relaxed); }

  // Calls `each` for every run of pages that are not absent; validates the map and, if sealed, its
  // checksum. Done once, after Open, before anything else.
  Status scan(const std::function<void(PageIndex, uint64_t, PageState)>& each);

  // 0 or an errno. The caller keeps two threads off one page (Disk's page locks).
  int mark(PageIndex first, uint64_t count, PageState state);
  int punch(PageIndex first, uint64_t count) const;

  Status activate(const std::string& below, const std::string& below_generation);
  Status persist();  // one thread at a time
  Status seal();     // after persist(), of a slice that is no longer the top; the same thread

 private:
  Slice() = default;
  std::string path(const char* suffix) const { return directory_ + "/" + id_ + suffix; }
  Status remake_live();
  void settle();
  Status write_header(const DataFile& file, const std::string& name, MapKind kind);
  Status checksum(const DataFile& file, uint32_t* crc) const;
  Status scan_blocks(const DataFile& file,
                     const std::function<Status(uint64_t, const uint8_t*)>& each) const;

  std::string directory_;
  std::string id_;
  uint64_t size_bytes_ = 0;
  uint64_t map_bytes_ = 0;
  SliceHeader header_ = {};  // as in force now; below settled, `state` stays kOpen
  CachedFile data_;
  DataFile map_;
  DataFile live_;
  std::string live_path_;
  std::atomic<bool> settled_{false};
  std::atomic<uint64_t> pages_marked_{0};  // not counting pages marked again with another state

  std::mutex map_mutex_;         // guards live_'s contents and the two below
  std::vector<uint64_t> dirty_;  // one bit a 4 KiB block of live_ that differs from map_
  bool header_dirty_ = false;
  Status sync_failed_;
};

}  // namespace sf
