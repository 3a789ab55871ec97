// The plain peer of mcdist's distribution bench: a file sent by TCP to each receiver on its own,
// with sendfile() there and 256 KiB reads here. For benchmarks only.
#include <fcntl.h>
#include <netinet/tcp.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>

#include <thread>
#include <vector>

#include "mcdist/js_common.h"

namespace sf::mcdist {
namespace {

constexpr int kBacklog = 64;
constexpr size_t kReadBytes = 256 * 1024;

// Resolves to undefined, or rejects with what went wrong.
class Transfer final : public Napi::AsyncWorker {
 public:
  static Napi::Value Run(Napi::Env env, std::function<Status()> body) {
    auto* worker = new Transfer(env, std::move(body));
    auto promise = worker->deferred_.Promise();
    worker->Queue();
    return promise;
  }

 private:
  Transfer(Napi::Env env, std::function<Status()> body)
      : Napi::AsyncWorker(env),
        deferred_(Napi::Promise::Deferred::New(env)),
        body_(std::move(body)) {}
  void Execute() override { status_ = body_(); }
  void OnOK() override {
    if (!status_.ok()) return deferred_.Reject(js_error(Env(), status_).Value());
    deferred_.Resolve(Env().Undefined());
  }
  Napi::Promise::Deferred deferred_;
  std::function<Status()> body_;
  Status status_;
};

void send_whole(const Fd& peer, const Fd& file, off_t bytes) {
  for (off_t at = 0; at < bytes;) {
    // A receiver that got less says so itself.
    if (::sendfile(peer.get(), file.get(), &at, static_cast<size_t>(bytes - at)) <= 0) return;
  }
}

// (address, path) -> port: sends the file to whoever connects, each on a thread of its own, for the
// life of the process.
Napi::Value Serve(const Napi::CallbackInfo& info) {
  sockaddr_in address;
  throw_if(info.Env(), parse_address(info[0].ToString(), 0, &address));
  const std::string path = info[1].ToString();
  Fd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  struct stat status = {};
  if (!file.valid() || ::fstat(file.get(), &status) != 0) {
    throw js_error(info.Env(), Status::Errno("E_IO", path));
  }
  Fd listener(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (::bind(listener.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 ||
      ::listen(listener.get(), kBacklog) != 0) {
    throw js_error(info.Env(), Status::Errno("E_NETWORK", "bind"));
  }
  const auto port = bound_port(listener);
  auto shared = std::make_shared<Fd>(std::move(file));
  std::thread([fd = std::move(listener), shared, bytes = status.st_size] {
    for (;;) {
      Fd peer(::accept4(fd.get(), nullptr, nullptr, SOCK_CLOEXEC));
      if (!peer.valid()) return;
      std::thread([peer = std::move(peer), shared, bytes] {
        send_whole(peer, *shared, bytes);
      }).detach();
    }
  }).detach();
  return Napi::Number::New(info.Env(), port);
}

Status receive(const sockaddr_in& from, const std::string& path, uint64_t bytes) {
  Fd file(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
  if (!file.valid()) return Status::Errno("E_IO", path);
  Fd fd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&from), sizeof from) != 0) {
    return Status::Errno("E_NETWORK", "connect");
  }
  std::vector<uint8_t> buffer(kReadBytes);
  for (uint64_t at = 0; at < bytes;) {
    const ssize_t n = ::recv(fd.get(), buffer.data(), buffer.size(), 0);
    if (n < 0) return Status::Errno("E_NETWORK", "recv");
    if (n == 0) return Status::Error("E_NETWORK", "the sender closed before the end of the file");
    for (ssize_t done = 0; done < n;) {
      const ssize_t written = ::write(file.get(), buffer.data() + done, n - done);
      if (written < 0) return Status::Errno("E_IO", path);
      done += written;
    }
    at += static_cast<uint64_t>(n);
  }
  return Status::Ok();
}

// (address, port, path, bytes): resolves when the file has all of them.
Napi::Value Receive(const Napi::CallbackInfo& info) {
  sockaddr_in from;
  throw_if(info.Env(), parse_address(info[0].ToString(),
                                     static_cast<int64_t>(whole_of(info[1], "port")), &from));
  const std::string path = info[2].ToString();
  const uint64_t bytes = whole_of(info[3], "bytes");
  return Transfer::Run(info.Env(), [from, path, bytes] { return receive(from, path, bytes); });
}

void Init(Napi::Env env, Napi::Object exports) {
  auto bench = Napi::Object::New(env);
  bench.Set("serve", Napi::Function::New(env, Serve));
  bench.Set("receive", Napi::Function::New(env, Receive));
  exports.Set("tcpBench", bench);
}

Exports exports_of_tcp_bench(&Init);

}  // namespace
}  // namespace sf::mcdist
