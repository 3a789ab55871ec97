#include "blktap/nbd_server.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <system_error>

namespace sf::nbd {

Status Server::Start(Config config, std::unique_ptr<Server>* out) {
  if (config.max_connections == 0 || config.max_connections > kMaxConnections) {
    return Status::Error("E_ARGUMENT", "a server has 1 to 4096 connections");
  }
  if (config.max_handshakes == 0 || config.max_handshakes > kMaxHandshakes) {
    return Status::Error("E_ARGUMENT", "a server has 1 to 1024 handshakes at a time");
  }
  if (config.handshake_ms == 0 || config.handshake_ms > kMaxHandshakeMs) {
    return Status::Error("E_ARGUMENT", "a handshake has 1 ms to 10 minutes");
  }
  std::unique_ptr<Server> server(new Server());
  if (!config.socket_path.empty()) {
    auto& listener = server->listeners_.emplace_back();
    const UnixPlace place = {config.socket_path, config.uid, config.gid, config.mode};
    Status status = Listener::Unix(place, &listener);
    if (!status.ok()) return status;
  }
  if (config.tcp.has_value()) {
    auto& listener = server->listeners_.emplace_back();
    Status status = Listener::Tcp(*config.tcp, &listener);
    if (!status.ok()) return status;
    server->port_ = listener->port();
  }
  if (server->listeners_.empty()) {
    return Status::Error("E_ARGUMENT", "an NBD server needs a socket path or a TCP address");
  }
  server->stop_event_ = Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!server->stop_event_.valid()) return Status::Errno("E_IO", "make an eventfd");
  server->config_ = std::move(config);
  server->thread_ = std::thread([raw = server.get()] {
    ::pthread_setname_np(::pthread_self(), "nbd-accept");
    raw->accept_loop();
  });
  *out = std::move(server);
  return Status::Ok();
}

Server::~Server() { stop(); }

void Server::stop() {
  if (!thread_.joinable()) return;
  const uint64_t one = 1;
  while (::write(stop_event_.get(), &one, sizeof one) < 0 && errno == EINTR) {
  }
  thread_.join();
  for (auto& listener : listeners_) listener->close();
  for (auto& client : clients_) client.connection->stop();
  exports_.close();
  reap(true);
  workers_.stop();
  listeners_.clear();
}

TlsGate::Stats Server::tls() const {
  for (const auto& listener : listeners_) {
    if (listener->gate() != nullptr) return listener->gate()->stats();
  }
  return {};
}

void Server::accept_loop() {
  std::vector<pollfd> fds = {{stop_event_.get(), POLLIN, 0}};
  for (const auto& listener : listeners_) fds.push_back({listener->fd(), POLLIN, 0});
  for (;;) {
    if (::poll(fds.data(), fds.size(), -1) < 0) {
      if (errno != EINTR) return;
      continue;
    }
    if (fds[0].revents != 0) return;
    for (size_t i = 0; i < listeners_.size(); i++) {
      reap(false);
      if (fds[i + 1].revents != 0) accept_one(*listeners_[i]);
    }
  }
}

void Server::accept_one(Listener& listener) {
  Fd socket = listener.accept();
  if (!socket.valid()) {
    // Out of descriptors: the connection stays in the queue. Not to be asked again at once.
    if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS) {
      pollfd stop = {stop_event_.get(), POLLIN, 0};
      ::poll(&stop, 1, 100);
    }
    return;
  }
  const bool tls = listener.gate() != nullptr;
  if (tls) make_room();
  Client& client = clients_.emplace_back();
  // What was told to go may take a moment to; threads are bounded meanwhile, too.
  const size_t most = config_.max_connections + 2 * config_.max_handshakes;
  if (clients_.size() > most || (!tls && !take_slot(client))) {
    refused_ += clients_.size() > most ? 1 : 0;
    clients_.pop_back();
    return;  // closes it
  }
  Entrance entrance;
  entrance.timeout_ms = config_.handshake_ms;
  entrance.gate = listener.gate();
  entrance.authenticated = [this, &client] { return take_slot(client); };
  client.connection =
      std::make_shared<Connection>(exports_, std::move(socket), std::move(entrance));
  try {
    client.thread = std::thread([this, &client] {
      ::pthread_setname_np(::pthread_self(), "nbd-conn");
      client.connection->run();
      if (client.has_slot) open_--;
      client.finished = true;
    });
  } catch (const std::system_error&) {  // no thread to be had
    if (client.has_slot) open_--;
    refused_++;
    clients_.pop_back();
    return;
  }
  accepted_++;
}

void Server::make_room() {
  auto strangers = [](const Client& client) {
    return !client.has_slot && !client.finished && !client.dropped;
  };
  if (static_cast<size_t>(std::ranges::count_if(clients_, strangers)) < config_.max_handshakes) {
    return;
  }
  const auto oldest = std::ranges::find_if(clients_, strangers);
  if (oldest == clients_.end()) return;  // the last of them has just come in or gone
  oldest->dropped = true;
  oldest->connection->stop();
  dropped_++;
}

bool Server::take_slot(Client& client) {
  if (open_.fetch_add(1) < config_.max_connections) {
    client.has_slot = true;
    return true;
  }
  open_--;
  refused_++;
  return false;
}

void Server::reap(bool all) {
  for (auto client = clients_.begin(); client != clients_.end();) {
    if (!all && !client->finished) {
      ++client;
      continue;
    }
    client->thread.join();
    client = clients_.erase(client);
  }
}

}  // namespace sf::nbd
