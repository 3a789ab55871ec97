// Fuzzes a slice's files: its durable map, its live map, the size of its data; each may be damaged,
// cut, of another kind or missing.
//
// What the functions that read them say must hold together:
//  - none of them crashes, or takes memory or time with the sizes that the files claim;
//  - a map that opens and scans gives exactly the states in its bytes (read here once more, in the
//    plainest way), in order, none of them beyond the disk;
//  - check_slice() finds a fault if and only if opening and scanning does;
//  - a slice that opens can be written, sealed and opened again, and gives the same states then;
//  - what a disk on such a slice reads is what states and data say.
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>

#include "blktap/crc32c.h"
#include "blktap/disk.h"
#include "blktap/files.h"
#include "blktap/map_file.h"
#include "blktap/slice_check.h"
#include "fuzz/support.h"

namespace sf::fuzz {
namespace {

const std::string kId = "0123456789abcdef0123456789abcdef";

using States = std::map<PageIndex, unsigned>;  // but for absent pages

Status zero_base(std::shared_ptr<Base>* out) {
  *out = make_zero_base();
  return Status::Ok();
}

// Runs as they are reported, each checked on its own.
class Runs {
 public:
  explicit Runs(uint64_t size_bytes) : pages_(pages_of(size_bytes)) {}
  void operator()(PageIndex first, uint64_t count, PageState state) {
    expect(count > 0 && first >= next_, "runs overlap or are out of order");
    expect(count <= pages_ && first <= pages_ - count, "a run lies beyond the disk");
    expect(state == PageState::kPresent || state == PageState::kZero, "a run of no state");
    next_ = first + count;
    for (PageIndex page = first; page < next_; page++) {
      states[page] = static_cast<unsigned>(state);
    }
  }
  States states;

 private:
  const uint64_t pages_;
  PageIndex next_ = 0;
};

class Files {
 public:
  Files(const uint8_t* data, size_t size) : in_(data, size) {}

  void run() {
    clear_folder(folder(), {});
    size_ = disk_size();
    std::string boot;
    expect_ok(boot_id(&boot), "boot id");
    live_ = stem() + "." + boot + ".live";
    const bool live = in_.ConsumeBool();
    make_map(stem() + ".0.map", MapKind::kDurable);
    if (live) make_map(live_, MapKind::kLive);
    make_data();
    if (rarely(15)) resize_file(stem() + ".00000000000000000000000000000000.live", 100);
    if (rarely(31)) put_instead(stem() + ".live-new", instead());
    const int then = in_.ConsumeIntegralInRange<int>(0, 3);
    check();
    if (then == 1) return remove();
    if (then == 2) trim();
    if (then == 3) return read_as_disk();
    open();
  }

 private:
  bool rarely(int n) { return in_.ConsumeIntegralInRange<int>(0, n) == n; }
  std::string stem() const { return folder() + "/" + kId; }
  Instead instead() { return static_cast<Instead>(in_.ConsumeIntegralInRange<int>(0, 4)); }

  uint64_t disk_size() {
    static const uint64_t sizes[] = {64 * kPageBytes,        5000,         1, 16384 * kPageBytes,
                                     16385 * kPageBytes + 1, kMaxDiskBytes};
    if (rarely(7)) return in_.ConsumeIntegralInRange<uint64_t>(1, kMaxDiskBytes);
    return in_.PickValueInArray(sizes);
  }

  // Near the beginning, at the borders of blocks, near the end.
  PageIndex page() {
    const uint64_t pages = pages_of(size_);
    const uint64_t past = (map_file_bytes(size_) - kMapStart) * kPagesPerByte;
    switch (in_.ConsumeIntegralInRange<int>(0, 7)) {
      case 0:
        return in_.ConsumeIntegralInRange<uint64_t>(0, past - 1);
      case 1:
        return pages - 1;
      case 2:
        return std::min(past - 1, pages - 1 + in_.ConsumeIntegralInRange<uint64_t>(0, 8));
      case 3:
        return std::min(past - 1, kPagesPerBlock - 4 + in_.ConsumeIntegralInRange<uint64_t>(0, 8));
      default:
        return in_.ConsumeIntegralInRange<uint64_t>(0, std::min<uint64_t>(pages, 100) - 1);
    }
  }

  uint64_t lie(uint64_t bytes) {
    if (!rarely(31)) return bytes;
    static const uint64_t sizes[] = {0, 1, 168, 4096, 8192, 4095};
    if (in_.ConsumeBool()) return in_.PickValueInArray(sizes);
    return bytes + in_.ConsumeIntegralInRange<uint64_t>(0, 8192) - std::min<uint64_t>(bytes, 4096);
  }

  void make_map(const std::string& path, MapKind kind) {
    // Most of what is sealed has no live map.
    auto state = static_cast<SliceState>(in_.ConsumeIntegralInRange<int>(0, 2));
    if (kind == MapKind::kLive && state == SliceState::kSealed && !rarely(7)) {
      state = SliceState::kOpen;
    }
    SliceHeader header = make_header(kId, size_, state, kind);
    resize_file(path, lie(map_file_bytes(size_)));
    // States: runs, and bytes as they come.
    std::map<uint64_t, uint8_t> bytes;
    for (int runs = in_.ConsumeIntegralInRange<int>(0, 12); runs > 0; runs--) {
      const PageIndex first = page();
      const uint64_t count = in_.ConsumeIntegralInRange<uint64_t>(1, rarely(7) ? 5000 : 40);
      const unsigned bits = rarely(63) ? 3 : in_.ConsumeIntegralInRange<unsigned>(0, 2);
      const uint64_t end = rarely(31) ? first + count : std::min(first + count, pages_of(size_));
      for (PageIndex p = first; p < end; p++) {
        uint8_t& byte = bytes[p / kPagesPerByte];
        const unsigned shift = p % kPagesPerByte * 2;
        byte = static_cast<uint8_t>((byte & ~(3u << shift)) | (bits << shift));
      }
    }
    for (int pokes = rarely(7) ? in_.ConsumeIntegralInRange<int>(0, 4) : 0; pokes > 0; pokes--) {
      bytes[page() / kPagesPerByte] = in_.ConsumeIntegral<uint8_t>();
    }
    struct stat st = {};
    expect(::stat(path.c_str(), &st) == 0, "stat");
    const auto file_bytes = static_cast<uint64_t>(st.st_size);
    const Blocks blocks = in_blocks(bytes);
    for (const auto& [block, content] : blocks) {
      const uint64_t at = kMapStart + block * kPageBytes;
      if (at >= file_bytes) break;
      write_file(path, at, content.data(), std::min<uint64_t>(kPageBytes, file_bytes - at));
    }
    if (state == SliceState::kSealed && !rarely(15)) header.map_crc = checksum(blocks);
    if (rarely(3)) {
      const std::string text = in_.ConsumeRandomLengthString(80);
      std::memcpy(in_.ConsumeBool() ? header.below : header.below_generation, text.data(),
                  std::min(text.size(), sizeof header.below));
    }
    auto* raw = reinterpret_cast<uint8_t*>(&header);
    for (int pokes = rarely(7) ? in_.ConsumeIntegralInRange<int>(1, 3) : 0; pokes > 0; pokes--) {
      const size_t at = in_.ConsumeIntegralInRange<size_t>(0, sizeof header - 1);
      raw[at] = in_.ConsumeIntegral<uint8_t>();
    }
    if (!rarely(15)) seal_header(&header);
    if (file_bytes >= sizeof header) write_file(path, 0, raw, sizeof header);
    if (rarely(31)) put_instead(path, instead());
  }

  using Blocks = std::map<uint64_t, std::array<uint8_t, kPageBytes>>;
  static Blocks in_blocks(const std::map<uint64_t, uint8_t>& bytes) {
    Blocks out;
    for (const auto& [at, byte] : bytes) {
      if (byte != 0) out[at / kPageBytes][at % kPageBytes] = byte;
    }
    return out;
  }

  // As the documentation of the format has it.
  static uint32_t checksum(const Blocks& blocks) {
    uint32_t crc = 0;
    for (const auto& [block, content] : blocks) {
      crc = crc32c(crc, &block, sizeof block);
      crc = crc32c(crc, content.data(), content.size());
    }
    return crc;
  }

  void make_data() {
    const std::string path = stem() + ".data";
    const uint64_t bytes = lie(pages_of(size_) * kPageBytes);
    resize_file(path, bytes);
    for (int i = in_.ConsumeIntegralInRange<int>(0, 4); i > 0; i--) {
      const uint64_t off = page() * kPageBytes;
      if (off + kPageBytes > bytes) continue;
      const std::vector<uint8_t> data(kPageBytes, static_cast<uint8_t>(off / kPageBytes + 1));
      write_file(path, off, data.data(), data.size());
    }
    if (rarely(31)) put_instead(path, instead());
  }

  // The states in a map's bytes, block by block where the file has any.
  States decode(const std::string& path) const {
    States out;
    DataFile file;
    expect_ok(open_sized(path, 0, map_file_bytes(size_), &file), "open a map that was read");
    expect_ok(each_data(file, path, kMapStart, map_file_bytes(size_),
                        [&](uint64_t from, uint64_t to) {
                          const auto bytes = read_file(path, from, to - from);
                          for (size_t i = 0; i < bytes.size() * kPagesPerByte; i++) {
                            const unsigned bits =
                                (bytes[i / kPagesPerByte] >> (i % kPagesPerByte * 2)) & 3;
                            const PageIndex p = (from - kMapStart) * kPagesPerByte + i;
                            if (bits != 0) out[p] = bits;
                          }
                          return Status::Ok();
                        }),
              "read a map");
    return out;
  }

  void check() {
    expect_ok(check_slice(folder(), kId, 0, size_, &found_), "check_slice");
    expect(found_.zero_pages <= found_.pages && found_.pages <= pages_of(size_),
           "check_slice counts more pages than there are");
  }

  // The states of an open slice; false if it says that they are damaged.
  bool scan(const Slice& slice, States* out) {
    Runs runs(size_);
    const Status status = slice.scan(
        [&](PageIndex first, uint64_t count, PageState state) { runs(first, count, state); });
    if (!status.ok()) {
      expect(status.code == "E_CORRUPT", "a scan fails with something else than E_CORRUPT");
      return false;
    }
    *out = std::move(runs.states);
    return true;
  }

  void open() {
    std::shared_ptr<Slice> slice;
    Status status = Slice::OpenSealed(folder(), kId, 0, size_, nullptr, &slice);
    const bool sealed = status.ok();
    if (sealed) expect(slice->settled(), "a sealed slice is not settled");
    slice.reset();
    status = Slice::Open(folder(), kId, 0, size_, nullptr, &slice);
    States states;
    if (!status.ok() || !scan(*slice, &states)) {
      if (sealed && !status.ok()) fail("a sealed slice opens for reading alone: " + status.message);
      if (found_.errors.empty() && status.code != "E_EXISTS") {
        fail("check_slice finds nothing, but the slice cannot be used: " + status.message);
      }
      return;
    }
    if (!found_.errors.empty()) {
      fail("check_slice finds a fault in a slice that opens: " + found_.errors.front());
    }
    expect(slice->settled() == sealed, "only one of two ways to open it finds the slice sealed");
    expect(states == decode(sealed ? stem() + ".0.map" : live_), "a scan gives other states");
    expect(found_.pages == states.size(), "check_slice counts other pages than a scan");
    if (!sealed) write_and_seal(std::move(slice), std::move(states));
  }

  void write_and_seal(std::shared_ptr<Slice> slice, States states) {
    for (int i = in_.ConsumeIntegralInRange<int>(0, 4); i > 0; i--) {
      const PageIndex first = std::min(page(), pages_of(size_) - 1);
      const uint64_t count =
          std::min(in_.ConsumeIntegralInRange<uint64_t>(1, 20000), pages_of(size_) - first);
      const unsigned bits = in_.ConsumeIntegralInRange<unsigned>(1, 2);
      expect(slice->mark(first, count, static_cast<PageState>(bits)) == 0, "mark");
      for (PageIndex p = first; p < first + count; p++) states[p] = bits;
    }
    expect_ok(slice->persist(), "persist");
    expect_ok(slice->seal(), "seal");
    slice.reset();
    expect_ok(Slice::OpenSealed(folder(), kId, 0, size_, nullptr, &slice), "open what was sealed");
    States again;
    expect(scan(*slice, &again), "what was sealed does not scan");
    expect(again == states, "a sealed slice has other states than before");
  }

  void trim() {
    uint64_t given_back = 0;
    const Status status = trim_slice(folder(), kId, 0, size_, &given_back);
    if (status.ok()) {
      expect(found_.errors.empty() && found_.state == "sealed", "a damaged slice is trimmed");
      const auto before = found_;
      found_ = {};
      check();
      expect(found_.errors.empty() && found_.pages == before.pages, "trimming damages a slice");
      expect(found_.holes == before.holes, "trimming takes pages that hold data");
      expect(found_.leaked_bytes == 0, "trimming leaves pages that nobody reads");
    } else {
      expect(status.code == "E_CORRUPT" || status.code == "E_STATE" || status.code == "E_IO",
             "trim_slice fails with another code");
    }
  }

  void remove() {
    bool removed = false;
    const bool had_map = ::access((stem() + ".0.map").c_str(), F_OK) == 0;
    const Status status =
        Slice::RemoveSpare(folder(), kId, in_.ConsumeBool() ? 0 : size_, &removed);
    if (!removed) return;
    expect_ok(status, "remove a spare");
    expect(!had_map || found_.state == "spare", "a slice that is no spare is removed as one");
  }

  void read_as_disk() {
    std::shared_ptr<Store> store;
    expect_ok(Store::Open(folder(), &store), "open the store");
    NodePtr node;
    expect_ok(store->resolve({{kId, 0, false}}, size_, true, &node), "resolve");
    std::shared_ptr<Disk> disk;
    const Status status = Disk::Open(std::move(node), "", zero_base, &disk);
    if (!status.ok()) {
      disk.reset();
      if (found_.errors.empty() && found_.state == "open" && status.code != "E_EXISTS") {
        fail("check_slice finds nothing, but the disk does not open: " + status.message);
      }
      return expect_ok(store->close(), "close the store");
    }
    expect(found_.state == "open" && found_.errors.empty(), "a disk opens on a slice it cannot be");
    const States states = decode(live_);
    size_t looked = 0;
    for (const auto& [page, state] : states) {
      if (++looked > 64) break;
      const uint64_t off = page * kPageBytes;
      const size_t bytes = std::min<uint64_t>(kPageBytes, size_ - off);
      std::vector<uint8_t> got(bytes);
      bool zero = false;
      expect(disk->read(off, bytes, got.data(), ReadMode::kBlock, &zero) == 0, "read");
      const auto want =
          state == 2 ? std::vector<uint8_t>(bytes) : read_file(stem() + ".data", off, bytes);
      expect(got == want, "a disk reads other bytes than its slice holds");
    }
    expect_ok(disk->close(), "close the disk");
    disk.reset();
    expect_ok(store->close(), "close the store");
  }

  FuzzedDataProvider in_;
  uint64_t size_ = 0;
  std::string live_;
  SliceCheck found_;
};

}  // namespace
}  // namespace sf::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  sf::fuzz::Files(data, size).run();
  return 0;
}
