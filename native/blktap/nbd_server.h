// Exports behind a Unix socket, a TCP port, or both: accepts connections, each with a thread of its
// own.
//
// States: listening -> stopped. Exports come and go while it listens; one without exports answers
// that there are none.
//
// A connection has a slot (of max_connections) from the moment it is accepted, chosen export or
// not; with TLS only from the moment its peer has proved who it is. Until then it is one of
// max_handshakes, and when those are all taken the oldest of them goes: strangers who stall cannot
// keep others out. What a connection chose counts it against its own bound too (ExportInfo).
#pragma once

#include <atomic>
#include <list>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "blktap/nbd_connection.h"
#include "blktap/nbd_listener.h"
#include "common/status.h"

namespace sf::nbd {

class Server {
 public:
  struct Config {
    // One of the two at least.
    std::string socket_path;
    std::optional<TcpPlace> tcp;
    uid_t uid = static_cast<uid_t>(-1);  // of the Unix socket; -1: as created
    gid_t gid = static_cast<gid_t>(-1);
    mode_t mode = 0600;
    size_t max_connections = 256;  // more are closed without a word; at most kMaxConnections
    size_t max_handshakes = 32;    // at most kMaxHandshakes
    uint64_t handshake_ms = 30'000;
  };
  static constexpr size_t kMaxConnections = 4096;
  static constexpr size_t kMaxHandshakes = 1024;
  static constexpr uint64_t kMaxHandshakeMs = 600'000;

  // Errors as of Listener.
  static Status Start(Config config, std::unique_ptr<Server>* out);
  ~Server();
  void stop();  // ends all connections; waits for requests being carried out
  // As Exports::add() and remove(). Any thread, also while stop() runs.
  Status add_export(ExportInfo info, std::shared_ptr<Device> device) {
    return exports_.add(std::move(info), std::move(device), &workers_);
  }
  Status remove_export(const std::string& name) { return exports_.remove(name); }
  std::vector<std::shared_ptr<Export>> exports() { return exports_.list(); }
  size_t connections() const { return open_.load(); }  // those with a slot
  uint64_t accepted() const { return accepted_.load(); }
  uint64_t refused() const { return refused_.load(); }  // for max_connections
  uint64_t dropped() const { return dropped_.load(); }  // for max_handshakes
  uint16_t port() const { return port_; }               // 0: no TCP
  TlsGate::Stats tls() const;

 private:
  struct Client {
    std::shared_ptr<Connection> connection;
    std::thread thread;
    bool dropped = false;
    std::atomic<bool> has_slot{false};
    std::atomic<bool> finished{false};
  };

  Server() = default;
  void accept_loop();
  void accept_one(Listener& listener);
  void make_room();  // for one more handshake
  bool take_slot(Client& client);
  void reap(bool all);

  Config config_;
  std::vector<std::unique_ptr<Listener>> listeners_;
  uint16_t port_ = 0;
  Fd stop_event_;
  Workers workers_;
  Exports exports_;
  std::thread thread_;
  std::list<Client> clients_;  // of the accepting thread, and of stop() after that has ended
  std::atomic<size_t> open_{0};
  std::atomic<uint64_t> accepted_{0};
  std::atomic<uint64_t> refused_{0};
  std::atomic<uint64_t> dropped_{0};
};

}  // namespace sf::nbd
