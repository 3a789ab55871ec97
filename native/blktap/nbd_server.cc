#include "blktap/nbd_server.h"

#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <system_error>

namespace sf::nbd {
namespace {

constexpr int kBacklog = 128;
constexpr int kSocketBuffer = 1 << 20;

Status socket_address(const std::string& path, sockaddr_un* out) {
  *out = {};
  out->sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof out->sun_path) {
    return Status::Error("E_ARGUMENT", "socket path " + path + " is empty or longer than " +
                                           std::to_string(sizeof out->sun_path - 1) + " bytes");
  }
  std::memcpy(out->sun_path, path.data(), path.size());
  return Status::Ok();
}

// E_IN_USE if somebody listens there, E_EXISTS if it is no socket.
Status check_free(const std::string& path) {
  struct stat st = {};
  if (::lstat(path.c_str(), &st) != 0) {
    return errno == ENOENT ? Status::Ok() : Status::Errno("E_IO", "stat " + path);
  }
  if (!S_ISSOCK(st.st_mode)) return Status::Error("E_EXISTS", path + " exists, and is no socket");
  sockaddr_un address;
  Status status = socket_address(path, &address);
  if (!status.ok()) return status;
  Fd probe(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!probe.valid()) return Status::Errno("E_IO", "make a socket");
  const auto* to = reinterpret_cast<const sockaddr*>(&address);
  if (::connect(probe.get(), to, sizeof address) == 0 || errno == EAGAIN) {
    return Status::Error("E_IN_USE", "another server listens on " + path);
  }
  return Status::Ok();
}

}  // namespace

Status Server::Start(Config config, std::unique_ptr<Server>* out) {
  if (config.max_connections == 0 || config.max_connections > kMaxConnections) {
    return Status::Error("E_ARGUMENT", "a server has 1 to 4096 connections");
  }
  const std::string& path = config.socket_path;
  sockaddr_un address;
  Status status = socket_address(path, &address);
  if (status.ok()) status = check_free(path);
  if (!status.ok()) return status;
  // Bound under a short name of its own in the same folder, then renamed: no client ever meets a
  // socket with the wrong owner or one that does not listen yet.
  const size_t slash = path.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash);
  static std::atomic<unsigned> serial{0};
  const std::string temporary =
      folder + "/." + std::to_string(::getpid()) + "-" + std::to_string(serial++);
  status = socket_address(temporary, &address);
  if (!status.ok()) return status;
  std::unique_ptr<Server> server(new Server());
  server->listener_ = Fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  server->stop_event_ = Fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!server->listener_.valid() || !server->stop_event_.valid()) {
    return Status::Errno("E_IO", "make a socket");
  }
  ::unlink(temporary.c_str());
  const auto* to = reinterpret_cast<const sockaddr*>(&address);
  if (::bind(server->listener_.get(), to, sizeof address) != 0) {
    return Status::Errno("E_IO", "bind " + temporary);
  }
  struct stat st = {};
  if (::chmod(temporary.c_str(), config.mode) != 0 ||
      ::chown(temporary.c_str(), config.uid, config.gid) != 0 ||
      ::listen(server->listener_.get(), kBacklog) != 0 || ::lstat(temporary.c_str(), &st) != 0 ||
      ::rename(temporary.c_str(), path.c_str()) != 0) {
    status = Status::Errno("E_IO", "set up socket " + path);
    ::unlink(temporary.c_str());
    return status;
  }
  server->socket_device_ = st.st_dev;
  server->socket_inode_ = st.st_ino;
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
  listener_.reset();
  for (auto& client : clients_) client.connection->stop();
  exports_.close();
  reap(true);
  workers_.stop();
  // Only our own socket: another process may have taken over the path.
  struct stat st = {};
  if (::lstat(config_.socket_path.c_str(), &st) == 0 && st.st_dev == socket_device_ &&
      st.st_ino == socket_inode_) {
    ::unlink(config_.socket_path.c_str());
  }
}

void Server::accept_loop() {
  for (;;) {
    pollfd fds[2] = {{listener_.get(), POLLIN, 0}, {stop_event_.get(), POLLIN, 0}};
    if (::poll(fds, 2, -1) < 0 && errno != EINTR) return;
    if (fds[1].revents != 0) return;
    reap(false);
    if (fds[0].revents != 0) accept_one();
  }
}

void Server::accept_one() {
  Fd socket(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
  if (!socket.valid()) {
    // Out of descriptors: the connection stays in the queue. Not to be asked again at once.
    if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS) {
      pollfd stop = {stop_event_.get(), POLLIN, 0};
      ::poll(&stop, 1, 100);
    }
    return;
  }
  if (clients_.size() >= config_.max_connections) {
    refused_++;
    return;  // closes it
  }
  // Room for a batch of replies; a refusal only costs speed.
  ::setsockopt(socket.get(), SOL_SOCKET, SO_SNDBUF, &kSocketBuffer, sizeof kSocketBuffer);
  Client& client = clients_.emplace_back();
  client.connection = std::make_shared<Connection>(exports_, std::move(socket));
  open_++;
  try {
    client.thread = std::thread([this, &client] {
      ::pthread_setname_np(::pthread_self(), "nbd-conn");
      client.connection->run();
      open_--;
      client.finished = true;
    });
  } catch (const std::system_error&) {  // no thread to be had
    open_--;
    refused_++;
    clients_.pop_back();
    return;
  }
  accepted_++;
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
