// Fuzzes PATH.map of a replica: header, bitmaps, sizes, and the size of the data beside it.
//
// Opening either fails with a code of the table, or gives a replica in which everything agrees: its
// counts with the states of its pages, each page's state with what a read of it gives; absent pages
// can be filled, and all is the same when it is opened again.
#include "pagestore/replica.h"

#include <algorithm>
#include <cstring>

#include "fuzz/support.h"

namespace sf::fuzz {
namespace {

const std::string kGeneration = "0123456789abcdef0123456789abcdef";

// As native/pagestore/replica.cc writes it.
struct Header {
  char magic[8];
  uint64_t pages;
  uint32_t medium;
  uint32_t reserved;
  char generation[64];
};

class Files {
 public:
  Files(const uint8_t* data, size_t size) : in_(data, size) {}

  void run() {
    clear_folder(folder(), {});
    const uint64_t sizes[] = {1, 63, 64, 65, 300, 2000};
    pages_ =
        rarely(31) ? in_.ConsumeIntegralInRange<uint64_t>(0, 40'000) : in_.PickValueInArray(sizes);
    medium_ = rarely(7) ? Medium::kMemory : Medium::kDisk;
    if (!rarely(15)) make_map();
    if (!rarely(15)) make_data();
    const bool change = in_.ConsumeBool();
    std::shared_ptr<Replica> replica;
    const Status status = Replica::Open(path(), kGeneration, pages_, medium_, &replica);
    if (!status.ok()) {
      expect(status.code == "E_REPLICA_MISMATCH" || status.code == "E_IO" ||
                 status.code == "E_CORRUPT" || (status.code == "E_ARGUMENT" && pages_ == 0),
             "a replica fails to open with another code");
      return;
    }
    look(replica.get());
    if (change) fill(replica.get());
    const uint64_t present = replica->present_count();
    const uint64_t zero = replica->zero_count();
    replica.reset();
    expect_ok(Replica::Open(path(), kGeneration, pages_, medium_, &replica), "open it again");
    expect(replica->present_count() == present && replica->zero_count() == zero,
           "a replica that is opened again counts other pages");
    look(replica.get());
  }

 private:
  bool rarely(int n) { return in_.ConsumeIntegralInRange<int>(0, n) == n; }
  static std::string path() { return folder() + "/replica"; }
  Instead instead() { return static_cast<Instead>(in_.ConsumeIntegralInRange<int>(0, 4)); }

  void make_map() {
    const std::string map = path() + ".map";
    const uint64_t bits = ((pages_ + 63) / 64 * 8 + kPageBytes - 1) / kPageBytes * kPageBytes;
    uint64_t bytes = kPageBytes + 2 * bits;
    if (rarely(15)) bytes = in_.ConsumeIntegralInRange<uint64_t>(0, bytes + kPageBytes);
    resize_file(map, bytes);
    Header header = {};
    std::memcpy(header.magic, "SFREPL01", sizeof header.magic);
    header.pages = pages_;
    header.medium = static_cast<uint32_t>(medium_);
    std::memcpy(header.generation, kGeneration.data(), kGeneration.size());
    auto* raw = reinterpret_cast<uint8_t*>(&header);
    for (int pokes = rarely(7) ? in_.ConsumeIntegralInRange<int>(1, 3) : 0; pokes > 0; pokes--) {
      raw[in_.ConsumeIntegralInRange<size_t>(0, sizeof header - 1)] =
          in_.ConsumeIntegral<uint8_t>();
    }
    if (bytes >= sizeof header) write_file(map, 0, raw, sizeof header);
    for (int pokes = in_.ConsumeIntegralInRange<int>(0, 12); pokes > 0; pokes--) {
      // Half of them in the words that matter, or just behind.
      const uint64_t words = (pages_ + 63) / 64 + 1;
      uint64_t at = kPageBytes + (in_.ConsumeBool() ? bits : 0) +
                    in_.ConsumeIntegralInRange<uint64_t>(0, words * 8);
      if (rarely(15)) at = in_.ConsumeIntegralInRange<uint64_t>(0, bytes);
      const auto byte = in_.ConsumeIntegral<uint8_t>();
      if (at < bytes) write_file(map, at, &byte, 1);
    }
    if (rarely(31)) put_instead(map, instead());
  }

  void make_data() {
    uint64_t bytes = pages_ * kPageBytes;
    if (rarely(15)) bytes = in_.ConsumeIntegralInRange<uint64_t>(0, bytes + kPageBytes);
    resize_file(path(), bytes);
    for (int i = in_.ConsumeIntegralInRange<int>(0, 3); i > 0 && bytes > 0; i--) {
      const uint64_t at = in_.ConsumeIntegralInRange<uint64_t>(0, bytes - 1);
      const uint8_t byte = 0x5f;
      write_file(path(), at, &byte, 1);
    }
    if (rarely(31)) put_instead(path(), instead());
  }

  void look(Replica* replica) const {
    uint64_t present = 0;
    uint64_t zero = 0;
    std::vector<uint8_t> out(kPageBytes);
    for (PageIndex page = 0; page < pages_; page++) {
      switch (replica->state(page)) {
        case PageState::kPresent:
          present++;
          expect(replica->read(page, out.data()) == ReadResult::kData,
                 "a page that is present cannot be read");
          break;
        case PageState::kZero:
          zero++;
          break;
        case PageState::kAbsent:
          break;
      }
    }
    expect(replica->state(pages_) == PageState::kAbsent, "there is a page beyond the end");
    expect(replica->present_count() == present, "other pages are present than are counted");
    expect(replica->zero_count() == zero, "other pages are zero than are counted");
  }

  void fill(Replica* replica) {
    for (int i = in_.ConsumeIntegralInRange<int>(0, 8); i > 0; i--) {
      const PageIndex page = in_.ConsumeIntegralInRange<uint64_t>(0, pages_ - 1);
      const PageState before = replica->state(page);
      if (in_.ConsumeBool()) {
        expect_ok(replica->fill_zero(page), "fill_zero");
        expect(replica->state(page) == (before == PageState::kAbsent ? PageState::kZero : before),
               "a page has another state after it was filled with zeros");
        continue;
      }
      const std::vector<uint8_t> data(kPageBytes, static_cast<uint8_t>(page + 3));
      bool changed = false;
      expect_ok(replica->fill(page, data.data(), &changed), "fill");
      expect(changed == (before == PageState::kAbsent), "a page is filled twice, or never");
      if (!changed) continue;
      std::vector<uint8_t> out(kPageBytes);
      expect(replica->read(page, out.data()) == ReadResult::kData, "read what was filled");
      // In memory a page that has bytes already keeps them: a generation is immutable.
      if (medium_ == Medium::kDisk) expect(out == data, "a page has other bytes than it got");
    }
    look(replica);
  }

  FuzzedDataProvider in_;
  uint64_t pages_ = 0;
  Medium medium_ = Medium::kDisk;
};

}  // namespace
}  // namespace sf::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  sf::fuzz::Files(data, size).run();
  return 0;
}
