#include "blktap/nbd_exports.h"

#include <utility>

namespace sf::nbd {
namespace {

// "Strings" of the protocol: UTF-8 (which JavaScript's strings always are), no NULs, bounded.
bool is_protocol_string(const std::string& text) {
  return text.size() <= kMaxString && text.find('\0') == std::string::npos;
}

}  // namespace

Status Exports::add(ExportInfo info, std::shared_ptr<Device> device, Workers* workers) {
  if (!is_protocol_string(info.name) || !is_protocol_string(info.description)) {
    return Status::Error("E_ARGUMENT",
                         "export name or description is longer than 4096 bytes, or has a NUL");
  }
  if (info.max_connections == 0) {
    return Status::Error("E_ARGUMENT", "export " + info.name + " allows no connections");
  }
  // Under the empty name nothing but the default can be asked for.
  if (info.name.empty()) info.is_default = true;
  info.size = device->size();
  info.writable = device->writable();
  auto exported = std::make_shared<Export>(std::move(info), std::move(device), workers);
  const std::string& name = exported->info().name;
  std::lock_guard lock(mutex_);
  if (closed_) return Status::Error("E_CLOSED", "the server is closed");
  if (exports_.contains(name)) {
    return Status::Error("E_EXISTS", "the server has an export \"" + name + "\" already");
  }
  if (exported->info().is_default && default_ != nullptr) {
    return Status::Error(
        "E_EXISTS", "the server's default export is \"" + default_->info().name + "\" already");
  }
  if (exports_.size() >= kMaxExports) {
    return Status::Error("E_CAPACITY", "a server has at most 1024 exports");
  }
  if (exported->info().is_default) default_ = exported;
  exports_.emplace(name, std::move(exported));
  return Status::Ok();
}

Status Exports::remove(const std::string& name) {
  std::shared_ptr<Export> removed;
  {
    std::lock_guard lock(mutex_);
    auto found = exports_.find(name);
    if (found == exports_.end()) {
      return Status::Error("E_NOT_FOUND", "the server has no export \"" + name + "\"");
    }
    removed = std::move(found->second);
    exports_.erase(found);
    if (default_ == removed) default_.reset();
  }
  removed->close();
  return Status::Ok();
}

void Exports::close() {
  std::map<std::string, std::shared_ptr<Export>> all;
  {
    std::lock_guard lock(mutex_);
    closed_ = true;
    all.swap(exports_);
    default_.reset();
  }
  for (const auto& [name, exported] : all) exported->close();
}

std::shared_ptr<Export> Exports::find(const std::string& name) {
  std::lock_guard lock(mutex_);
  if (name.empty()) return default_;
  auto found = exports_.find(name);
  return found == exports_.end() ? nullptr : found->second;
}

std::vector<std::shared_ptr<Export>> Exports::list() {
  std::vector<std::shared_ptr<Export>> out;
  std::lock_guard lock(mutex_);
  out.reserve(exports_.size());
  for (const auto& [name, exported] : exports_) out.push_back(exported);
  return out;
}

}  // namespace sf::nbd
