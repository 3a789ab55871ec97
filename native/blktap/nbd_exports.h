// The exports of a server by name; they come and go while it runs.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "blktap/nbd_export.h"
#include "common/status.h"

namespace sf::nbd {

class Exports {
 public:
  static constexpr size_t kMaxExports = 1024;

  // E_ARGUMENT (a name or description that is no protocol string), E_EXISTS (the name, or a second
  // default), E_CAPACITY, E_CLOSED after close().
  Status add(ExportInfo info, std::shared_ptr<Device> device, Workers* workers);
  // Ends its connections and waits for them: the device is not touched afterwards. E_NOT_FOUND.
  Status remove(const std::string& name);
  void close();  // removes all; none can be added any more

  // The empty name is the default export. Null if there is no such export.
  std::shared_ptr<Export> find(const std::string& name);
  std::vector<std::shared_ptr<Export>> list();  // by name

 private:
  std::mutex mutex_;
  std::map<std::string, std::shared_ptr<Export>> exports_;
  std::shared_ptr<Export> default_;
  bool closed_ = false;
};

}  // namespace sf::nbd
