#include "blktap/files.h"

#include <dirent.h>
#include <fcntl.h>
#include <unistd.h>

#include <cstring>
#include <memory>

#include "blktap/base.h"
#include "common/fd.h"

namespace sf {

Status file_error(const std::string& what, int error) {
  const char* code = error == ENOSPC || error == EDQUOT ? "E_NO_SPACE"
                     : error == EEXIST                  ? "E_EXISTS"
                                                        : "E_IO";
  return Status::Errno(code, what, error);
}

Status sync_directory(const std::string& path) {
  Fd fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd.valid()) return file_error("open " + path);
  if (::fsync(fd.get()) != 0) return file_error("sync " + path);
  return Status::Ok();
}

Status boot_id(std::string* out) {
  static const std::string id = [] {
    std::string hex;
    Fd fd(::open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC));
    char text[64] = {};
    if (!fd.valid() || ::read(fd.get(), text, sizeof text - 1) <= 0) return hex;
    for (const char* c = text; *c != '\0' && *c != '\n'; c++) {
      if (*c != '-') hex += *c;
    }
    return hex;
  }();
  if (id.size() != 32) {
    return Status::Error("E_REQUIREMENT", "/proc/sys/kernel/random/boot_id cannot be read");
  }
  *out = id;
  return Status::Ok();
}

Status files_of_slices(const std::string& directory,
                       std::map<std::string, std::vector<std::string>>* out) {
  std::unique_ptr<DIR, int (*)(DIR*)> dir(::opendir(directory.c_str()), ::closedir);
  if (dir == nullptr) return file_error("open " + directory);
  while (const dirent* entry = ::readdir(dir.get())) {
    const std::string name = entry->d_name;
    const auto found = out->find(name.substr(0, name.find('.')));
    if (found != out->end() &&
        (name.ends_with(".map") || name.ends_with(".live") || name.ends_with(".live-new"))) {
      found->second.push_back(name);
    }
  }
  return Status::Ok();
}

Status remove_stale_live(const std::string& directory, const std::string& slice,
                         const std::string& keep) {
  std::map<std::string, std::vector<std::string>> names = {{slice, {}}};
  Status status = files_of_slices(directory, &names);
  if (!status.ok()) return status;
  for (const auto& name : names[slice]) {
    const std::string path = directory + "/" + name;
    if (name.ends_with(".live") && path != keep) ::unlink(path.c_str());
  }
  return Status::Ok();
}

bool is_zero_block(const void* block) { return is_zero_page(static_cast<const uint8_t*>(block)); }

}  // namespace sf
