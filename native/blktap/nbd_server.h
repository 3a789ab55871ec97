// A Unix socket with exports behind it: accepts connections, each with a thread of its own.
//
// States: listening -> stopped. Exports come and go while it listens; one without exports answers
// that there are none. A connection counts against max_connections from the moment it is accepted,
// chosen export or not; what it chose counts it against its own bound (ExportInfo).
#pragma once

#include <sys/types.h>

#include <atomic>
#include <list>
#include <memory>
#include <string>
#include <thread>

#include "blktap/nbd_connection.h"
#include "common/status.h"

namespace sf::nbd {

class Server {
 public:
  struct Config {
    std::string socket_path;
    uid_t uid = static_cast<uid_t>(-1);  // -1: as created
    gid_t gid = static_cast<gid_t>(-1);
    mode_t mode = 0600;
    size_t max_connections = 256;  // more are closed without a word; at most kMaxConnections
  };
  static constexpr size_t kMaxConnections = 4096;

  // The socket appears at its path complete, with its owner and mode. A socket left there by a dead
  // process is replaced; one that somebody listens on is E_IN_USE, any other file E_EXISTS.
  static Status Start(Config config, std::unique_ptr<Server>* out);
  ~Server();
  void stop();  // ends all connections; waits for requests being carried out
  // As Exports::add() and remove(). Any thread, also while stop() runs.
  Status add_export(ExportInfo info, std::shared_ptr<Device> device) {
    return exports_.add(std::move(info), std::move(device), &workers_);
  }
  Status remove_export(const std::string& name) { return exports_.remove(name); }
  std::vector<std::shared_ptr<Export>> exports() { return exports_.list(); }
  size_t connections() const { return open_.load(); }
  uint64_t accepted() const { return accepted_.load(); }
  uint64_t refused() const { return refused_.load(); }  // for max_connections

 private:
  struct Client {
    std::shared_ptr<Connection> connection;
    std::thread thread;
    std::atomic<bool> finished{false};
  };

  Server() = default;
  void accept_loop();
  void accept_one();
  void reap(bool all);

  Config config_;
  Fd listener_;
  Fd stop_event_;
  Workers workers_;
  Exports exports_;
  std::thread thread_;
  std::list<Client> clients_;  // of the accepting thread, and of stop() after that has ended
  std::atomic<size_t> open_{0};
  std::atomic<uint64_t> accepted_{0};
  std::atomic<uint64_t> refused_{0};
  dev_t socket_device_ = 0;
  ino_t socket_inode_ = 0;
};

}  // namespace sf::nbd
