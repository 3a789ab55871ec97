// A small disk on three generations and a raw image, served over NBD, with a model of its bytes.
//
// The generations are made once. Each input gets a disk of its own on the newest of them, so that
// what an input does depends on nothing but its bytes.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "blktap/disk.h"
#include "blktap/nbd_server.h"
#include "blktap/view.h"
#include "common/fd.h"

namespace sf::fuzz {

constexpr uint64_t kDiskBytes =
    70 * kPageBytes + 1000;  // two index leaves, the last page not whole

// What a disk holds, byte for byte. A byte is unknown while nobody can tell: a write whose answer
// was lost, a part of a page that a TRIM may or may not have taken.
class Model {
 public:
  explicit Model(std::vector<uint8_t> bytes) : bytes_(std::move(bytes)), known_(bytes_.size(), 1) {}
  void write(uint64_t off, const uint8_t* data, size_t len);
  void zero(uint64_t off, uint64_t len);
  void trim(uint64_t off, uint64_t len);
  void forget(uint64_t off, uint64_t len);
  bool agrees(uint64_t off, const uint8_t* data, size_t len) const;
  bool zeros(uint64_t off, uint64_t len) const;

 private:
  std::vector<uint8_t> bytes_;
  std::vector<uint8_t> known_;
};

class ServedDisk {
 public:
  // With `old`, what is served under the one name is the newest generation, read-only.
  explicit ServedDisk(bool old);
  // Stops the server, compares disk and generations with what they should hold, removes the files.
  void finish(const Model& model);

  Fd connect() const;
  Model model() const;  // of what is served, as it is when nobody has written yet
  bool writable() const { return !old_; }
  // Forks the disk; the generation must hold for ever what `model` says. Once. Nothing under way.
  void fork(const Model& model);

 private:
  const bool old_;
  std::shared_ptr<Store> store_;
  std::shared_ptr<Disk> disk_;
  std::shared_ptr<View> view_;
  std::shared_ptr<View> forked_;
  std::unique_ptr<Model> at_fork_;
  std::unique_ptr<nbd::Server> server_;
};

}  // namespace sf::fuzz
