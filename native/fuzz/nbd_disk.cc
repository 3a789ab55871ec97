#include "fuzz/nbd_disk.h"

#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <algorithm>
#include <cstring>

#include "fuzz/support.h"

namespace sf::fuzz {
namespace {

constexpr uint64_t kImageBytes = 20 * kPageBytes + 77;
const std::string kStem = "5f000000000000000000000000000";  // and three digits: a slice's id

std::string slice_id(unsigned n) { return kStem + std::to_string(100 + n); }
std::string store_folder() { return folder() + "/store"; }
std::string socket_path() { return folder() + "/nbd"; }

Status open_base(std::shared_ptr<Base>* out) {
  return open_image_base(folder() + "/image", kImageBytes, nullptr, out);
}

void make_slice(unsigned n, SliceState state) {
  expect_ok(Slice::Create(store_folder(), slice_id(n), kDiskBytes, state), "make a slice");
}

std::vector<SliceRef> chain(unsigned slices) {
  std::vector<SliceRef> out;
  for (unsigned n = 0; n < slices; n++) out.push_back({slice_id(n), 0, false});
  return out;
}

std::shared_ptr<Disk> open_disk(const std::shared_ptr<Store>& store, unsigned top) {
  NodePtr node;
  expect_ok(store->resolve(chain(top + 1), kDiskBytes, true, &node), "resolve the chain");
  std::shared_ptr<Disk> disk;
  expect_ok(Disk::Open(std::move(node), slice_id(top + 1), open_base, &disk), "open the disk");
  return disk;
}

std::shared_ptr<View> open_view(const std::shared_ptr<Store>& store, unsigned slice) {
  NodePtr node;
  std::shared_ptr<View> view;
  expect_ok(store->resolve(chain(slice + 1), kDiskBytes, false, &node), "resolve the generation");
  expect_ok(store->view(node, open_base, &view), "open the generation");
  return view;
}

void fork_disk(Disk* disk, unsigned generation) {
  Disk::ForkResult result;
  bool busy = false;
  expect_ok(disk->fork(slice_id(generation), true, &busy, &result), "fork");
}

std::vector<uint8_t> read_device(Device* device) {
  std::vector<uint8_t> out(kDiskBytes);
  bool zero = false;
  const int error = device->read(0, out.size(), out.data(), ReadMode::kBlock, &zero);
  if (error != 0) fail("a read of the whole device ended with errno " + std::to_string(error));
  return out;
}

// Slices 0 to 2 and what the newest generation holds.
const std::vector<uint8_t>& template_bytes() {
  static const std::vector<uint8_t> bytes = [] {
    std::vector<uint8_t> made(kDiskBytes);
    for (size_t i = 0; i < kImageBytes; i++) made[i] = static_cast<uint8_t>(i / 64 + i);
    write_file(folder() + "/image", 0, made.data(), kImageBytes);
    Model model(made);
    resize_file(store_folder() + "/store.lock", 0);
    std::shared_ptr<Store> store;
    expect_ok(Store::Open(store_folder(), &store), "open the store");
    make_slice(0, SliceState::kOpen);
    make_slice(1, SliceState::kSpare);
    auto disk = open_disk(store, 0);
    for (unsigned generation = 0; generation < 3; generation++) {
      // Whole pages, parts of pages, the end of the disk; some again in the next generation.
      for (uint64_t off = generation * 5000; off < kDiskBytes; off += 37 * 1024) {
        const std::vector<uint8_t> data(std::min<uint64_t>(6000, kDiskBytes - off),
                                        static_cast<uint8_t>(0x40 + generation));
        expect(disk->write(off, data.size(), data.data(), ReadMode::kBlock) == 0, "write");
        std::copy(data.begin(), data.end(), made.begin() + static_cast<ptrdiff_t>(off));
      }
      fork_disk(disk.get(), generation);
      make_slice(generation + 2, SliceState::kSpare);
      expect_ok(disk->attach_spare(slice_id(generation + 2)), "attach a spare");
    }
    expect_ok(disk->close(), "close the disk");
    disk.reset();
    expect_ok(store->close(), "close the store");
    return made;
  }();
  return bytes;
}

// The disk writable, or the newest generation, under one name.
Status serve(std::shared_ptr<Device> device, std::unique_ptr<nbd::Server>* out) {
  nbd::Server::Config config;
  config.socket_path = socket_path();
  Status status = nbd::Server::Start(std::move(config), out);
  if (!status.ok()) return status;
  nbd::ExportInfo info;
  info.name = "disk";
  info.description = "for fuzzing";
  info.is_default = true;
  return (*out)->add_export(std::move(info), std::move(device));
}

}  // namespace

void Model::write(uint64_t off, const uint8_t* data, size_t len) {
  std::copy_n(data, len, bytes_.begin() + static_cast<ptrdiff_t>(off));
  std::fill_n(known_.begin() + static_cast<ptrdiff_t>(off), len, 1);
}

void Model::zero(uint64_t off, uint64_t len) {
  std::fill_n(bytes_.begin() + static_cast<ptrdiff_t>(off), len, 0);
  std::fill_n(known_.begin() + static_cast<ptrdiff_t>(off), len, 1);
}

// Pages covered in part stay as they are; whether the last page of the disk is one, nobody says.
void Model::trim(uint64_t off, uint64_t len) {
  const uint64_t first = (off + kPageBytes - 1) / kPageBytes * kPageBytes;
  const uint64_t end = (off + len) / kPageBytes * kPageBytes;
  if (first < end) zero(first, end - first);
  if (off + len == bytes_.size()) {
    const uint64_t from = std::max(first, end);
    if (from < off + len) forget(from, off + len - from);
  }
}

void Model::forget(uint64_t off, uint64_t len) {
  std::fill_n(known_.begin() + static_cast<ptrdiff_t>(off), len, 0);
}

bool Model::agrees(uint64_t off, const uint8_t* data, size_t len) const {
  if (std::memcmp(bytes_.data() + off, data, len) == 0) return true;
  for (size_t i = 0; i < len; i++) {
    if (known_[off + i] != 0 && bytes_[off + i] != data[i]) return false;
  }
  return true;
}

bool Model::zeros(uint64_t off, uint64_t len) const {
  for (size_t i = 0; i < len; i++) {
    if (known_[off + i] != 0 && bytes_[off + i] != 0) return false;
  }
  return true;
}

ServedDisk::ServedDisk(bool old) : old_(old) {
  static const bool made = (::mkdir(store_folder().c_str(), 0700), true);
  expect(made, "make the store");
  template_bytes();
  clear_folder(store_folder(), {slice_id(0), slice_id(1), slice_id(2), "store.lock"});
  expect_ok(Store::Open(store_folder(), &store_), "open the store");
  make_slice(3, SliceState::kOpen);
  make_slice(4, SliceState::kSpare);
  disk_ = open_disk(store_, 3);
  view_ = open_view(store_, 2);
  std::shared_ptr<Device> device = disk_;
  if (old_) device = view_;
  expect_ok(serve(std::move(device), &server_), "serve the disk");
}

Model ServedDisk::model() const { return Model(template_bytes()); }

void ServedDisk::fork(const Model& model) {
  if (at_fork_ != nullptr) return;
  at_fork_ = std::make_unique<Model>(model);
  fork_disk(disk_.get(), 3);
  forked_ = open_view(store_, 3);
}

Fd ServedDisk::connect() const {
  Fd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, socket_path().c_str(), sizeof address.sun_path - 1);
  const auto* to = reinterpret_cast<const sockaddr*>(&address);
  if (::connect(socket.get(), to, sizeof address) != 0) fail("the server takes no connection");
  return socket;
}

void ServedDisk::finish(const Model& model) {
  server_->stop();
  server_.reset();
  const std::vector<uint8_t> now = read_device(disk_.get());
  const Model untouched(template_bytes());
  if (!(old_ ? untouched : model).agrees(0, now.data(), now.size())) {
    fail("the disk does not hold what was written to it");
  }
  const std::vector<uint8_t> before = read_device(view_.get());
  if (!untouched.agrees(0, before.data(), before.size())) fail("a generation has changed");
  if (forked_ != nullptr) {
    const std::vector<uint8_t> at_fork = read_device(forked_.get());
    if (!at_fork_->agrees(0, at_fork.data(), at_fork.size())) {
      fail("the generation does not hold what the disk held at the fork");
    }
  }
  forked_.reset();
  view_.reset();
  expect_ok(disk_->close(), "close the disk");
  disk_.reset();
  expect_ok(store_->close(), "close the store");
}

}  // namespace sf::fuzz
