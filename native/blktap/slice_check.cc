#include "blktap/slice_check.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <functional>

#include "blktap/files.h"
#include "blktap/map_file.h"

namespace sf {
namespace {

const char* state_name(uint32_t state) {
  return state == 0 ? "spare" : state == 1 ? "open" : "sealed";
}

uint64_t allocated(const DataFile& file) {
  struct stat st = {};
  return ::fstat(file.fd(), &st) == 0 ? static_cast<uint64_t>(st.st_blocks) * 512 : 0;
}

Status check_arguments(const std::string& id, uint64_t size_bytes) {
  if (is_hex_id(id) && size_bytes > 0 && size_bytes <= kMaxDiskBytes) return Status::Ok();
  return Status::Error("E_ARGUMENT", "slice " + id + ": bad id or size");
}

}  // namespace

Status check_slice(const std::string& directory, const std::string& id, uint32_t edition,
                   uint64_t size_bytes, SliceCheck* out) {
  Status status = check_arguments(id, size_bytes);
  std::string boot;
  if (status.ok()) status = boot_id(&boot);
  if (!status.ok()) return status;
  const std::string stem = directory + "/" + id;
  auto wrong = [&](const Status& why) {
    if (!why.ok()) out->errors.push_back(why.message);
    return !why.ok();
  };
  DataFile data;
  const bool no_data =
      wrong(open_sized(stem + ".data", O_RDONLY, pages_of(size_bytes) * kPageBytes, &data));
  if (!no_data) out->data_bytes = allocated(data);

  std::string path = stem + map_suffix(edition);
  DataFile map;
  SliceHeader header = {};
  if (wrong(open_sized(path, O_RDONLY, map_file_bytes(size_bytes), &map)) ||
      wrong(read_header(map, path, id, size_bytes, MapKind::kDurable, &header))) {
    return Status::Ok();
  }
  const std::string live_path = stem + "." + boot + ".live";
  const bool sealed = header.state == static_cast<uint32_t>(SliceState::kSealed);
  if (!sealed && ::access(live_path.c_str(), F_OK) == 0) {
    DataFile live;
    if (wrong(open_sized(live_path, O_RDONLY, map_file_bytes(size_bytes), &live)) ||
        wrong(read_header(live, live_path, id, size_bytes, MapKind::kLive, &header))) {
      return Status::Ok();
    }
    if (header.state == static_cast<uint32_t>(SliceState::kSealed)) {
      wrong(Status::Error("E_CORRUPT", live_path + " says sealed, which no live map does"));
      return Status::Ok();
    }
    wrong(check_covered(map, path, live, live_path, size_bytes));
    path = live_path;
    map = std::move(live);
  }
  out->state = state_name(header.state);
  uint64_t covered = 0;  // bytes in .data under pages that are data
  Status seek = Status::Ok();
  status = scan_map(map, path, size_bytes, sealed ? &header : nullptr,
                    [&](PageIndex first, uint64_t count, PageState state) {
                      out->pages += count;
                      if (state == PageState::kZero) out->zero_pages += count;
                      if (state == PageState::kZero || no_data || !seek.ok()) return;
                      uint64_t here = 0;
                      seek =
                          each_data(data, stem + ".data", first * kPageBytes,
                                    (first + count) * kPageBytes, [&](uint64_t from, uint64_t to) {
                                      here += to - from;
                                      return Status::Ok();
                                    });
                      covered += here;
                      out->holes += (count * kPageBytes - here) / kPageBytes;
                    });
  if (wrong(status) || wrong(seek) || no_data) return Status::Ok();
  uint64_t all = 0;
  wrong(each_data(data, stem + ".data", 0, pages_of(size_bytes) * kPageBytes,
                  [&](uint64_t from, uint64_t to) {
                    all += to - from;
                    return Status::Ok();
                  }));
  out->leaked_bytes = all > covered ? all - covered : 0;
  return Status::Ok();
}

Status trim_slice(const std::string& directory, const std::string& id, uint32_t edition,
                  uint64_t size_bytes, uint64_t* given_back) {
  *given_back = 0;
  Status status = check_arguments(id, size_bytes);
  if (!status.ok()) return status;
  const std::string path = directory + "/" + id + ".data";
  const std::string map_path = directory + "/" + id + map_suffix(edition);
  const uint64_t bytes = pages_of(size_bytes) * kPageBytes;
  DataFile data;
  DataFile map;
  SliceHeader header = {};
  status = open_sized(path, O_RDWR, bytes, &data);
  if (status.ok()) status = open_sized(map_path, O_RDONLY, map_file_bytes(size_bytes), &map);
  if (status.ok()) {
    status = read_header(map, map_path, id, size_bytes, MapKind::kDurable, &header);
  }
  if (!status.ok()) return status;
  if (header.state != static_cast<uint32_t>(SliceState::kSealed)) {
    return Status::Error("E_STATE", "slice " + id + " is not sealed: its space is not looked at");
  }
  // Once to see that the map is whole, then to act by it.
  status = scan_map(map, map_path, size_bytes, &header, [](PageIndex, uint64_t, PageState) {});
  if (!status.ok()) return status;
  const uint64_t before = allocated(data);
  auto punch = [&](uint64_t from, uint64_t to) {
    return each_data(data, path, from, to, [&](uint64_t start, uint64_t end) {
      const int flags = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;
      if (::fallocate(data.fd(), flags, static_cast<off_t>(start),
                      static_cast<off_t>(end - start)) == 0) {
        return Status::Ok();
      }
      return file_error("punch a hole into " + path);
    });
  };
  uint64_t at = 0;
  Status result = Status::Ok();
  status = scan_map(map, map_path, size_bytes, &header,
                    [&](PageIndex first, uint64_t count, PageState state) {
                      if (state == PageState::kZero || !result.ok()) return;
                      result = punch(at, first * kPageBytes);
                      at = (first + count) * kPageBytes;
                    });
  if (status.ok() && result.ok()) result = punch(at, bytes);
  const uint64_t after = allocated(data);
  *given_back = before > after ? before - after : 0;
  return status.ok() ? result : status;
}

}  // namespace sf
