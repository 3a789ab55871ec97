#include "blktap/base.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cstring>

#include "blktap/files.h"

namespace sf {

bool is_zero_page(const uint8_t* page) {
  uint64_t head = 0;
  std::memcpy(&head, page, sizeof head);
  return head == 0 && std::memcmp(page, page + 8, kPageBytes - 8) == 0;
}

namespace {

class ZeroBase final : public Base {
 public:
  int read(uint64_t, size_t len, uint8_t* out, ReadMode, bool*) const override {
    std::memset(out, 0, len);
    return 0;
  }
  int plan_read(uint64_t, size_t len, uint8_t* out, ReadPlan*) const override {
    std::memset(out, 0, len);
    return 0;
  }
  ReadResult read_page(PageIndex, uint8_t*) const override { return ReadResult::kZero; }
  uint64_t extent(uint64_t, uint64_t limit, bool* zero) const override {
    *zero = true;
    return limit;
  }
  bool all_zero() const override { return true; }
};

class ImageBase final : public Base, public ReadOwner {
 public:
  ImageBase(Fd fd, std::string path, uint64_t bytes, std::shared_ptr<FileErrors> errors)
      : file_(std::move(fd)), path_(std::move(path)), bytes_(bytes), errors_(std::move(errors)) {}

  int read(uint64_t off, size_t len, uint8_t* out, ReadMode mode, bool* zero) const override {
    const size_t in_file = off >= bytes_ ? 0 : std::min<uint64_t>(len, bytes_ - off);
    if (in_file > 0) {
      *zero = false;
      const int error = file_.read(off, in_file, out, mode);
      if (error != 0 && error != EAGAIN) read_failed(error);
      if (error != 0) return error;
    }
    std::memset(out + in_file, 0, len - in_file);
    return 0;
  }

  int plan_read(uint64_t off, size_t len, uint8_t* out, ReadPlan* plan) const override {
    const size_t in_file = off >= bytes_ ? 0 : std::min<uint64_t>(len, bytes_ - off);
    if (in_file > 0) plan->segments.push_back({file_.ref(), off, in_file, out, this});
    std::memset(out + in_file, 0, len - in_file);
    return 0;
  }

  ReadResult read_page(PageIndex page, uint8_t* out) const override {
    bool zero = true;
    if (read(page * kPageBytes, kPageBytes, out, ReadMode::kBlock, &zero) != 0) {
      return ReadResult::kError;
    }
    return zero || is_zero_page(out) ? ReadResult::kZero : ReadResult::kData;
  }

  uint64_t extent(uint64_t off, uint64_t limit, bool* zero) const override {
    *zero = false;
    if (off >= bytes_) {
      *zero = true;
      return limit;
    }
    const off_t data = ::lseek(file_.fd(), static_cast<off_t>(off), SEEK_DATA);
    uint64_t end = bytes_;
    if (data < 0 && errno == ENXIO) {
      *zero = true;  // a hole up to the end of the file, and zeros after it
      return limit;
    }
    if (data > static_cast<off_t>(off)) {
      *zero = true;
      end = static_cast<uint64_t>(data);
    } else if (data == static_cast<off_t>(off)) {
      const off_t hole = ::lseek(file_.fd(), data, SEEK_HOLE);
      if (hole > data) end = static_cast<uint64_t>(hole);
    }
    return std::min(limit, end - off);
  }

  void cache(uint64_t off, uint64_t len) const override { file_.read_ahead(off, len); }

  void read_failed(int error) const override {
    if (errors_ != nullptr) errors_->report(file_error("read base image " + path_, error));
  }

 private:
  DataFile file_;
  const std::string path_;
  const uint64_t bytes_;
  const std::shared_ptr<FileErrors> errors_;
};

class ReplicaBase final : public Base {
 public:
  ReplicaBase(std::shared_ptr<Replica> replica, Fd fd)
      : replica_(std::move(replica)), file_(std::move(fd)) {}

  int read(uint64_t off, size_t len, uint8_t* out, ReadMode mode, bool* zero) const override {
    return each_run(off, len, out, [&](uint64_t at, size_t bytes, uint8_t* into) {
      *zero = false;
      return file_.read(at, bytes, into, mode);
    });
  }

  int plan_read(uint64_t off, size_t len, uint8_t* out, ReadPlan* plan) const override {
    return each_run(off, len, out, [&](uint64_t at, size_t bytes, uint8_t* into) {
      plan->segments.push_back({file_.ref(), at, bytes, into});
      return 0;
    });
  }

  ReadResult read_page(PageIndex page, uint8_t* out) const override {
    return replica_->read(page, out);
  }

  uint64_t extent(uint64_t off, uint64_t limit, bool* zero) const override {
    PageIndex page = off / kPageBytes;
    *zero = replica_->state(page) == PageState::kZero;
    do {
      page++;
    } while (page * kPageBytes < off + limit &&
             (replica_->state(page) == PageState::kZero) == *zero);
    return std::min(limit, page * kPageBytes - off);
  }

  void cache(uint64_t off, uint64_t len) const override { file_.read_ahead(off, len); }

  bool fills() const override { return true; }
  bool absent(PageIndex page) const override { return replica_->state(page) == PageState::kAbsent; }
  void want(PageIndex page, std::function<void(const Status&)> done) override {
    replica_->want(page, std::move(done));
  }
  void add_user(std::weak_ptr<const PageUser> user) override {
    replica_->add_user(std::move(user));
  }

 private:
  // Zeros are put into `out`; `data(offset, bytes, into)` is called for each run of other pages.
  template <typename Data>
  int each_run(uint64_t off, size_t len, uint8_t* out, const Data& data) const {
    while (len > 0) {
      const PageIndex page = off / kPageBytes;
      const PageState state = replica_->state(page);
      if (state == PageState::kAbsent) return ENODATA;
      PageIndex last = page;
      while ((last + 1) * kPageBytes < off + len && replica_->state(last + 1) == state) last++;
      const size_t n = std::min<uint64_t>(len, (last + 1) * kPageBytes - off);
      if (state == PageState::kZero) {
        std::memset(out, 0, n);
      } else {
        const int error = data(off, n, out);
        if (error != 0) return error;
      }
      off += n;
      out += n;
      len -= n;
    }
    return 0;
  }

  std::shared_ptr<Replica> replica_;
  DataFile file_;
};

}  // namespace

std::shared_ptr<Base> make_zero_base() { return std::make_shared<ZeroBase>(); }

Status open_image_base(const std::string& path, uint64_t image_bytes,
                       std::shared_ptr<FileErrors> errors, std::shared_ptr<Base>* out) {
  Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!fd.valid()) return Status::Errno("E_IO", "open base image " + path);
  struct stat st = {};
  if (::fstat(fd.get(), &st) != 0) return Status::Errno("E_IO", "stat base image " + path);
  if (!S_ISREG(st.st_mode)) {
    return Status::Error("E_ARGUMENT", "base image " + path + " is not a regular file");
  }
  if (static_cast<uint64_t>(st.st_size) < image_bytes) {
    return Status::Error("E_CORRUPT", "base image " + path + " is shorter than when it was taken");
  }
  *out = std::make_shared<ImageBase>(std::move(fd), path, image_bytes, std::move(errors));
  return Status::Ok();
}

Status open_replica_base(std::shared_ptr<Replica> replica, std::shared_ptr<Base>* out) {
  Fd fd;
  Status status = replica->open_readonly(&fd);
  if (!status.ok()) return status;
  *out = std::make_shared<ReplicaBase>(std::move(replica), std::move(fd));
  return Status::Ok();
}

}  // namespace sf
