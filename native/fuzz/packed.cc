// Fuzzes packed pages (native/mcdist/pack.h): an input is what a packet held. It unpacks to a page
// or is refused; a page packs into the limit or not at all, and comes back as it was.
#include <cstring>

#include "common/page.h"
#include "fuzz/support.h"
#include "mcdist/pack.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace sf;
  static mcdist::Packer packer;
  // Of their very sizes, so that AddressSanitizer sees a byte too far.
  const std::vector<uint8_t> packed(data, data + size);
  std::vector<uint8_t> page(kPageBytes);
  if (!mcdist::unpack_page(packed.data(), packed.size(), page.data())) {
    std::memset(page.data(), 0, page.size());
    std::memcpy(page.data(), data, std::min(size, page.size()));
  }
  std::vector<uint8_t> out(size == 0 ? 0 : data[0] * size_t{16});
  const size_t bytes = packer.pack(page.data(), out.data(), out.size());
  fuzz::expect(bytes <= out.size(), "a packed page is larger than its limit");
  if (bytes == 0) return 0;
  out.resize(bytes);
  std::vector<uint8_t> back(kPageBytes);
  fuzz::expect(mcdist::unpack_page(out.data(), out.size(), back.data()) && back == page,
               "a page comes back otherwise");
  return 0;
}
