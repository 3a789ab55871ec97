// The pages that were copied out of a running parent because it was about to overwrite them: a
// sparse file `saved` and, mapped shared, its bitmaps `saved.map`, in the generation's own
// directory.
//
// The files outlive the process that fills them. What makes that sound if it is killed with SIGKILL
// at any instruction (the kernel keeps the page cache; only program order matters):
//  1. the old bytes are written whole, 2. the page's bit is set, 3. the write protection is lifted.
//  Killed before 2, the page is still protected and still holds the old bytes, so the live page is
//  the right answer, and the guest's write faults again once the next process serves it; the
//  half-written copy is overwritten. Killed after 2, the copy is whole, and the guest's write, if
//  it happened, came later. There is no instant at which neither holds.
// `newer` names the generation that saves pages on this one's behalf (see vm.h). It is kept in two
// slots and switched by one store, so that it is never read half written.
// The bitmaps are allocated in full at creation: a full tmpfs must be an error of fallocate(), not
// a SIGBUS at the first bit that needs a page.
#pragma once

#include <atomic>
#include <memory>
#include <string>

#include "common/fd.h"
#include "common/page.h"
#include "common/status.h"

namespace sf {

class SavedPages {
 public:
  enum class State : uint32_t {
    kProtecting = 1,  // between forkBegin and forkCommit: no generation yet
    kOpen = 2,
    kFailed = 3,  // a page of it was lost to the guest (no space): it must not be read
  };

  // Makes the directory if it is missing. E_EXISTS, E_NO_SPACE, E_IO.
  static Status Create(const std::string& directory, const std::string& vm,
                       const std::string& generation, uint64_t pages,
                       std::shared_ptr<SavedPages>* out);
  // E_NOT_FOUND, E_REPLICA_MISMATCH (of another VM, generation or size), E_IN_USE, E_CORRUPT.
  static Status Open(const std::string& directory, const std::string& vm,
                     const std::string& generation, uint64_t pages,
                     std::shared_ptr<SavedPages>* out);
  ~SavedPages();

  const std::string& generation() const { return generation_; }
  State state() const;
  void set_state(State state);
  std::string newer() const;
  void set_newer(const std::string& generation);

  bool has(PageIndex page) const { return test(saved_words_, page); }
  uint64_t word(uint64_t index) const;  // 64 saved bits, from page 64 * index on
  uint64_t count() const { return count_.load(std::memory_order_relaxed); }
  // E_NO_SPACE or E_IO; the page is then not saved.
  Status save(PageIndex page, const uint8_t* data);
  ReadResult read(PageIndex page, uint8_t* out) const;  // of a page it has

  // Unlinks the files and, if that leaves it empty, the directory. Readers under way keep theirs.
  void remove_files();

 private:
  struct Header;
  SavedPages() = default;
  Status open_files(const std::string& directory, const std::string& generation, uint64_t pages,
                    int flags);
  bool test(const std::atomic<uint64_t>* words, PageIndex page) const {
    return ((words[page / 64].load(std::memory_order_acquire) >> (page % 64)) & 1) != 0;
  }

  std::string directory_;
  std::string generation_;
  uint64_t pages_ = 0;
  Fd data_;
  Fd map_;
  size_t map_bytes_ = 0;
  Header* header_ = nullptr;
  std::atomic<uint64_t>* saved_words_ = nullptr;
  std::atomic<uint64_t>* zero_words_ = nullptr;  // saved, all zeros, without bytes in the file
  std::atomic<uint64_t> count_{0};
};

}  // namespace sf
