// Making and removing the files of slices.
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include <map>
#include <vector>

#include "blktap/files.h"
#include "blktap/map_file.h"
#include "blktap/slice.h"

namespace sf {

Status Slice::Create(const std::string& directory, const std::string& id, uint64_t size_bytes,
                     SliceState state) {
  if (!is_hex_id(id)) return Status::Error("E_ARGUMENT", "bad slice id " + id);
  if (size_bytes == 0 || size_bytes > kMaxDiskBytes) {
    return Status::Error("E_ARGUMENT", "slice " + id + ": a disk has 1 to 2^46 bytes");
  }
  const std::string data_path = directory + "/" + id + ".data";
  const std::string map_path = directory + "/" + id + map_suffix(0);
  Fd data(::open(data_path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (!data.valid()) return file_error("create " + data_path);
  Status status = Status::Ok();
  if (::ftruncate(data.get(), static_cast<off_t>(pages_of(size_bytes) * kPageBytes)) != 0 ||
      ::fsync(data.get()) != 0) {
    status = file_error("size " + data_path);
  }
  bool map_made = false;
  if (status.ok()) {
    status =
        write_new_map(map_path, make_header(id, size_bytes, state, MapKind::kDurable), size_bytes);
    map_made = status.code != "E_EXISTS";
  }
  if (status.ok()) status = sync_directory(directory);
  if (!status.ok()) {
    ::unlink(data_path.c_str());
    if (map_made) ::unlink(map_path.c_str());
  }
  return status;
}

Status Slice::RemoveSpare(const std::string& directory, const std::string& id, uint64_t size_bytes,
                          bool* removed) {
  *removed = false;
  if (!is_hex_id(id)) return Status::Error("E_ARGUMENT", "bad slice id " + id);
  std::shared_ptr<Slice> slice;
  const std::string stem = directory + "/" + id;
  const std::string map_path = stem + map_suffix(0);
  Status status = Status::Ok();
  if (size_bytes == 0) status = size_in_header(map_path, &size_bytes);
  if (status.ok()) status = Open(directory, id, 0, size_bytes, nullptr, &slice);
  if (!status.ok() && status.code != "E_CORRUPT") return status;
  // Half made (a kill inside Create): no map, and so never written to.
  const bool half = !status.ok() && ::access(map_path.c_str(), F_OK) != 0 && errno == ENOENT &&
                    ::access((stem + ".data").c_str(), F_OK) == 0;
  if (!half && (slice == nullptr || slice->state() != SliceState::kSpare)) return Status::Ok();
  if (slice != nullptr) ::unlink(slice->live_path_.c_str());
  ::unlink(map_path.c_str());
  if (::unlink((stem + ".data").c_str()) != 0) return file_error("remove " + stem + ".data");
  *removed = true;
  return Status::Ok();
}

// The data last: a folder in which only some of it happened shows whose files the rest are.
Status Slice::Remove(const std::string& directory, const std::vector<std::string>& ids) {
  std::map<std::string, std::vector<std::string>> names;
  for (const auto& id : ids) {
    if (!is_hex_id(id)) return Status::Error("E_ARGUMENT", "bad slice id " + id);
    names[id];
  }
  Status status = files_of_slices(directory, &names);
  if (!status.ok()) return status;
  for (auto& [id, files] : names) {
    files.push_back(id + ".data");
    for (const auto& name : files) {
      const std::string path = directory + "/" + name;
      if (::unlink(path.c_str()) != 0 && errno != ENOENT) return file_error("remove " + path);
    }
  }
  return sync_directory(directory);
}

}  // namespace sf
