// Descriptors of the data files of slices: a chain may be longer than a process may have files
// open.
//
// A CachedFile is one slice's data file. States:
//   kept     its owner writes it (the top of a disk, a slice that settles): open, never closed here
//   cached   sealed and open: the cache may close it whenever nobody reads it
//   closed   sealed: opened again, by its path, when it is read
//   removed  its pages are elsewhere now (merged away): reading it is ESTALE, so that the reader
//            looks the page up again; readers that have it pinned go on
// kept -> cached (release) <-> closed, and any -> removed.
//
// All of that is one atomic word, with the count of those who read (pins): to pin an open file is
// one addition, to unpin it one subtraction. Whoever finds it closed opens it, under a lock of a
// few files, and puts it into the ring of open ones; the cache gives up those that were not read
// since the clock's hand came by last (second chance).
//
// Invariants:
//  - A descriptor is closed only by whoever changed the word from `open, no pins` to `no
//  descriptor`.
//  - A file opened again is the one that was opened first: same device, inode, time of birth and
//    size. If not it is an error, never somebody else's bytes.
//  - At most `capacity` descriptors are cached, and those of files pinned beyond that, up to twice
//    the capacity. At that limit a reader waits for at most kWait_ms, then fails with EMFILE.
//    With ReadMode::kNowait nothing ever waits: EAGAIN.
// So whoever holds pins while others' progress depends on its own (asynchronous reads) must pin
// with kNowait, or hold few.
//
// Locks, in this order: one of open_locks_ (one opener of a file at a time), then mutex_ (the
// ring). Left out: files renamed with their folder while a disk is open: they are looked for at
// their path.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "blktap/data_file.h"
#include "common/status.h"

namespace sf {

class FileCache;

class CachedFile final : public ReadOwner {
 public:
  // A pinned descriptor: stays open and the same file until this goes. The CachedFile outlives it.
  class Pin {
   public:
    Pin() = default;
    Pin(Pin&& other) noexcept : file_(std::exchange(other.file_, nullptr)), fd_(other.fd_) {}
    Pin& operator=(Pin&& other) noexcept {
      reset();
      file_ = std::exchange(other.file_, nullptr);
      fd_ = other.fd_;
      return *this;
    }
    ~Pin() { reset(); }
    void reset() {
      if (file_ != nullptr) std::exchange(file_, nullptr)->unpin();
    }
    const CachedFile* file() const { return file_; }
    FileRef ref() const { return {fd_, file_->nowait_}; }
    // As FileRef::read.
    int read(uint64_t off, size_t len, uint8_t* out, ReadMode mode) const;

   private:
    friend class CachedFile;
    const CachedFile* file_ = nullptr;
    int fd_ = -1;
  };

  CachedFile() = default;
  ~CachedFile();
  CachedFile(const CachedFile&) = delete;
  CachedFile& operator=(const CachedFile&) = delete;

  // Takes over `file`, open for reading and writing: kept. E_IO. Once, before all else.
  Status keep(FileCache* cache, std::string path, DataFile file,
              std::shared_ptr<FileErrors> errors);
  // While it is kept: for its owner's writes. Not valid after.
  const DataFile& own() const { return own_; }
  void release();  // kept -> cached; nobody writes it any more
  void remove();   // ESTALE from now on
  const std::string& path() const { return path_; }

  // 0, ESTALE, EMFILE, EAGAIN (kNowait: would wait for a device or a descriptor), EIO if it is
  // gone, replaced or cut short, or another errno of open().
  int pin(ReadMode mode, Pin* out) const;
  // pin(), FileRef::read, unpin.
  int read(uint64_t off, size_t len, uint8_t* out, ReadMode mode) const;
  void read_failed(int error) const override;

 private:
  friend class FileCache;
  struct Identity {
    uint64_t device = 0, inode = 0, size = 0;
    int64_t born_s = 0;
    uint32_t born_ns = 0;
    bool operator==(const Identity&) const = default;
  };
  static int identify(int fd, Identity* out);
  void unpin() const;
  int open_again(ReadMode mode, Fd* out) const;
  void complain(const Status& status) const;

  mutable std::atomic<uint64_t> word_{0};
  FileCache* cache_ = nullptr;
  std::string path_;
  Identity identity_;
  DataFile own_;
  Nowait nowait_ = Nowait::kRefused;
  std::shared_ptr<FileErrors> errors_;
  mutable std::atomic<bool> complained_{false};
  mutable size_t slot_ = 0;  // in the ring, with FileCache::mutex_
};

class FileCache {
 public:
  // An open file takes about 1.5 KiB of the kernel's memory, opening one again takes as long as
  // several reads: so the deep chains that occur fit, unless the process may open only a few.
  static constexpr size_t kDefaultCapacity = 2048;
  static constexpr unsigned kWait_ms = 1000;

  struct Stats {
    size_t capacity, open;  // open: of cached files; kept ones are their disks' own
    uint64_t opened, closed;
  };

  explicit FileCache(size_t capacity) : capacity_(capacity) {}
  FileCache(const FileCache&) = delete;
  FileCache& operator=(const FileCache&) = delete;

  // Of this process: descriptors are. Lives as long as it. Its capacity is the default, but at most
  // a quarter of the descriptors that the process may have when this is first called.
  static FileCache& shared();

  void set_capacity(size_t capacity);  // at least 1
  Stats stats();

 private:
  friend class CachedFile;
  int pin_closed(const CachedFile& file, ReadMode mode);
  int reserve(ReadMode mode, std::vector<Fd>* closing);
  void add(const CachedFile& file);
  void forget(const CachedFile& file, bool last);
  bool evict(std::vector<Fd>* closing);
  void trim(std::vector<Fd>* closing);
  void take_out(const CachedFile& file);
  bool take_descriptor(const CachedFile& file, uint64_t word, std::vector<Fd>* closing);

  std::array<std::mutex, 16> open_locks_;
  std::mutex mutex_;
  std::condition_variable unpinned_;
  std::atomic<unsigned> waiting_{0};
  size_t capacity_;  // all below: mutex_
  size_t open_ = 0;  // in the ring, and being opened
  std::vector<const CachedFile*> ring_;
  size_t hand_ = 0;
  uint64_t opened_ = 0, closed_ = 0;
};

}  // namespace sf
