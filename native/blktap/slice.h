// A slice: the pages written to a disk between two forks.
//
// States:  spare -> open (activate, at a fork) -> sealed (the next fork)
//   spare   made ahead of time, empty, so that a fork only has to name it the new top
//   open    the top of its chain; the only state in which pages change
//   sealed  immutable. A slice below the top is never written again, from the instant of the fork;
//           after persist() seal() writes that into its header. Until then it is not `settled`.
//
// Files of slice ID in the store's folder:
//   ID.data         page p at offset p * 4096, sparse
//   ID.N.map        durable map, edition N: header, then two bits a page (0 absent, 1 data, 2
//   zero).
//                   Only a merge makes another edition than 0 (merge.h).
//   ID.BOOT.live    live map, same layout, until the slice is settled; BOOT is the kernel's boot id
//
// Why two maps. A bit must never be durable before its page: after a power cut it would show a hole
// (zeros) where the old page was. And the kernel writes back whatever is in the page cache in any
// order. So there are two truths for two accidents:
//  - The process dies: the page cache lives. Every write goes to .data, then its bits to .live,
//    both by pwrite(), before it is acknowledged; the next process reads .live and has lost
//    nothing.
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
//  - A sealed slice keeps no map in memory and no map file open: scan() reads it when it is needed.
//  - What a process finds in .map may be unsynced work of one that was killed: it is synced before
//    anything is built on it (finish_seal; header_dirty_ and all blocks dirty after Open).
// No file is mapped: a full file system is an error of pwrite(), not a SIGBUS.
// A settled slice's data file is open while the FileCache has room for it.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "blktap/file_cache.h"
#include "blktap/map_file.h"
#include "blktap/slice_format.h"
#include "common/page.h"
#include "common/status.h"

namespace sf {

class Slice {
 public:
  using Run = std::function<void(PageIndex first, uint64_t count, PageState state)>;

  // Writes the files of a new slice and makes them durable. E_EXISTS, E_NO_SPACE, E_IO.
  static Status Create(const std::string& directory, const std::string& id, uint64_t size_bytes,
                       SliceState state);
  // Opens a slice with the map that is true now: .live of this boot if there is one, else .map of
  // `edition`. E_CORRUPT if a file is missing, cut short or its header fails its checks. What goes
  // wrong with its data file later is told to `errors`, which may be null.
  static Status Open(const std::string& directory, const std::string& id, uint32_t edition,
                     uint64_t size_bytes, std::shared_ptr<FileErrors> errors,
                     std::shared_ptr<Slice>* out);
  // The same of a spare that was made under this boot, else E_STATE: there are no live maps of
  // earlier ones, for which Open looks through the whole folder.
  static Status OpenNewSpare(const std::string& directory, const std::string& id,
                             uint64_t size_bytes, std::shared_ptr<FileErrors> errors,
                             std::shared_ptr<Slice>* out);
  // The same of a sealed slice only, else E_STATE; changes nothing in the folder.
  static Status OpenSealed(const std::string& directory, const std::string& id, uint32_t edition,
                           uint64_t size_bytes, std::shared_ptr<FileErrors> errors,
                           std::shared_ptr<Slice>* out);
  // Removes the files of a slice that was never more than a spare, or half made. Anything else is
  // left alone, and *removed is false.
  static Status RemoveSpare(const std::string& directory, const std::string& id,
                            uint64_t size_bytes, bool* removed);
  // Removes all files of slices: one look through the folder, and one sync of it, for all of them.
  // The caller knows that nobody needs them.
  static Status Remove(const std::string& directory, const std::vector<std::string>& ids);

  const std::string& id() const { return id_; }
  uint64_t size_bytes() const { return size_bytes_; }
  SliceState state() const { return static_cast<SliceState>(header_.state); }
  bool settled() const { return settled_.load(std::memory_order_acquire); }
  std::string below() const { return header_text(header_.below, sizeof header_.below); }
  std::string below_generation() const {
    return header_text(header_.below_generation, sizeof header_.below_generation);
  }
  uint32_t edition() const { return edition_.load(std::memory_order_acquire); }
  // A merge gave it another map. Its pages' bytes, as far as anybody reads them, are the same.
  void set_edition(uint32_t edition) { edition_.store(edition, std::memory_order_release); }
  // The pages, in any state. Pins last until the section of the read gate in which they were taken
  // is over, at most: the slice may go after it.
  const CachedFile& pages() const { return data_; }
  // For writing, until the slice is settled.
  const DataFile& data() const { return data_.own(); }
  // Merged away, and no reader is left: pin() is ESTALE, which nobody sees (chain.cc).
  void retire() { data_.remove(); }
  // What its pages take in the file system. E_IO.
  Status allocated_bytes(uint64_t* out) const;

  // Calls `each` for every run of pages that are not absent, in order; checks the map and, if
  // sealed, its checksum. Reads the files anew, beside whatever else goes on; of the top of a disk
  // under way it sees some of what is being written.
  Status scan(const Run& each) const;

  // 0 or an errno. The caller keeps two threads off one page (Disk's page locks).
  int mark(PageIndex first, uint64_t count, PageState state);
  // Several at once, of at most 64 pages in one group of 64 aligned ones each, as kPresent; each
  // gets its own errno. What lies in one block of the map is written together.
  struct Mark {
    PageIndex first = 0;
    uint64_t count = 0;
    int error = -1;
  };
  void mark_present(std::span<Mark> marks);
  int punch(PageIndex first, uint64_t count) const;
  // Makes these pages of .data zeros that have their space, and takes the space of their bits in
  // .map; the caller marks them. ENOSPC.
  int allocate_zeroes(PageIndex first, uint64_t count) const;

  Status activate(const std::string& below, const std::string& below_generation);
  Status persist();  // one thread at a time
  Status seal();     // after persist(), of a slice that is no longer the top; the same thread

 private:
  Slice() = default;
  enum class Expected : uint8_t { kAny, kNewSpare, kSealed };
  static Status OpenAny(const std::string& directory, const std::string& id, uint32_t edition,
                        uint64_t size_bytes, Expected expected, std::shared_ptr<FileErrors> errors,
                        std::shared_ptr<Slice>* out);
  std::string path(const std::string& suffix) const { return directory_ + "/" + id_ + suffix; }
  std::string map_path() const { return path(map_suffix(edition())); }
  int mark_block(uint64_t block, std::span<Mark> marks);
  Status open_live(Expected expected);
  Status remake_live(Expected expected);
  Status finish_seal();
  void settle();
  Status write_header(const DataFile& file, const std::string& name, MapKind kind);

  std::string directory_;
  std::string id_;
  uint64_t size_bytes_ = 0;
  uint64_t map_bytes_ = 0;
  std::atomic<uint32_t> edition_{0};
  SliceHeader header_ = {};  // as in force now; below settled, `state` stays kOpen
  CachedFile data_;
  DataFile map_;   // until settled
  DataFile live_;  // until settled
  std::string live_path_;
  std::atomic<bool> settled_{false};

  std::mutex map_mutex_;         // guards live_'s contents and the two below
  std::vector<uint64_t> dirty_;  // one bit a 4 KiB block of live_ that differs from map_
  bool header_dirty_ = false;
  Status sync_failed_;
};

}  // namespace sf
