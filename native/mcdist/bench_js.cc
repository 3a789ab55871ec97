// What mcdist is measured against, in the same process and language: a bare UDP ping-pong of a page
// in as many datagrams as mcdist needs, a TCP request and response, and the time a thread waits for
// a page that it wants of a replica. For benchmarks only; loops end when their socket is closed.
#include <netinet/tcp.h>
#include <poll.h>
#include <sodium.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>

#include <condition_variable>
#include <mutex>
#include <thread>

#include "mcdist/js_common.h"
#include "pagestore/replica.h"

namespace sf::mcdist {
namespace {

constexpr int kGiveUpMs = 5000;

// Runs `measure` on a thread of its own; resolves to an array of microseconds.
class Measurement final : public Napi::AsyncWorker {
 public:
  using Body = std::function<Status(std::vector<double>*)>;
  static Napi::Value Run(Napi::Env env, Body body) {
    auto* worker = new Measurement(env, std::move(body));
    auto promise = worker->deferred_.Promise();
    worker->Queue();
    return promise;
  }

 private:
  Measurement(Napi::Env env, Body body)
      : Napi::AsyncWorker(env),
        deferred_(Napi::Promise::Deferred::New(env)),
        body_(std::move(body)) {}
  void Execute() override { status_ = body_(&microseconds_); }
  void OnOK() override {
    if (!status_.ok()) return deferred_.Reject(js_error(Env(), status_).Value());
    auto out = Napi::Array::New(Env(), microseconds_.size());
    for (uint32_t i = 0; i < microseconds_.size(); i++) out[i] = microseconds_[i];
    deferred_.Resolve(out);
  }
  Napi::Promise::Deferred deferred_;
  Body body_;
  Status status_;
  std::vector<double> microseconds_;
};

bool readable(int fd) {
  pollfd wait = {fd, POLLIN, 0};
  return ::poll(&wait, 1, kGiveUpMs) > 0;
}

bool read_all(int fd, uint8_t* out, size_t bytes) {
  while (bytes > 0) {
    if (!readable(fd)) return false;
    const ssize_t n = ::recv(fd, out, bytes, 0);
    if (n <= 0) return false;
    out += n;
    bytes -= static_cast<size_t>(n);
  }
  return true;
}

// Several clients ask for the same at once: the i-th at `start` + i * `period`, of the monotonic
// clock in ns. Without a period each asks as soon as it has its last answer.
class Pace {
 public:
  Pace(const Napi::CallbackInfo& info, size_t at)
      : start_(info.Length() > at ? whole_of(info[at], "startNs") : 0),
        period_(info.Length() > at + 1 ? whole_of(info[at + 1], "periodNs") : 0) {}

  void wait(uint64_t i) const {
    if (start_ == 0) return;
    if (i == 0) ::prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0);
    const uint64_t ns = start_ + i * period_;
    const timespec until = {static_cast<time_t>(ns / 1'000'000'000),
                            static_cast<long>(ns % 1'000'000'000)};
    while (::clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, nullptr) == EINTR) {
    }
  }

 private:
  uint64_t start_;
  uint64_t period_;
};

// (replica handle, first, count, handed over, startNs?, periodNs?) -> time from asking to the
// waiting thread running again, one page after the other. The thread lends itself to the client
// (Replica::fetch), unless `handed over`: then the client's thread wakes it.
Napi::Value MeasureFetch(const Napi::CallbackInfo& info) {
  auto replica = unwrap_replica(info[0]);
  const uint64_t first = whole_of(info[1], "first");
  const uint64_t pages = whole_of(info[2], "count");
  const Pace pace(info, 4);
  if (!info[3].ToBoolean()) {
    return Measurement::Run(info.Env(), [replica, first, pages, pace](std::vector<double>* out) {
      for (uint64_t page = first; page < first + pages; page++) {
        pace.wait(page - first);
        const TimeNs begin = now_ns();
        Status status = replica->fetch(page);
        out->push_back(static_cast<double>(now_ns() - begin) / 1000);
        if (!status.ok()) return status;
      }
      return Status::Ok();
    });
  }
  return Measurement::Run(info.Env(), [replica, first, pages, pace](std::vector<double>* out) {
    struct Wait {
      std::mutex mutex;
      std::condition_variable changed;
      bool done = false;
      Status status;
    };
    for (uint64_t page = first; page < first + pages; page++) {
      auto wait = std::make_shared<Wait>();
      pace.wait(page - first);
      const TimeNs begin = now_ns();
      replica->want(page, [wait](const Status& status) {
        std::lock_guard lock(wait->mutex);
        wait->status = status;
        wait->done = true;
        wait->changed.notify_one();
      });
      std::unique_lock lock(wait->mutex);
      wait->changed.wait(lock, [&] { return wait->done; });
      out->push_back(static_cast<double>(now_ns() - begin) / 1000);
      if (!wait->status.ok()) return wait->status;
    }
    return Status::Ok();
  });
}

// (address) -> {udpPort, tcpPort}: answers each 100-byte request with a page, for the life of the
// process.
Napi::Value MeasureServer(const Napi::CallbackInfo& info) {
  sockaddr_in address;
  throw_if(info.Env(), parse_address(info[0].ToString(), 0, &address));
  Fd udp(::socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  Fd tcp(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  const auto* raw = reinterpret_cast<const sockaddr*>(&address);
  if (::bind(udp.get(), raw, sizeof address) != 0 || ::bind(tcp.get(), raw, sizeof address) != 0 ||
      ::listen(tcp.get(), 16) != 0) {
    throw js_error(info.Env(), Status::Errno("E_NETWORK", "bind"));
  }
  auto out = Napi::Object::New(info.Env());
  out.Set("udpPort", bound_port(udp));
  out.Set("tcpPort", bound_port(tcp));
  std::thread([fd = std::move(udp)] {
    uint8_t request[256];
    uint8_t page[kPageBytes] = {1};
    sockaddr_in from = {};
    for (;;) {
      socklen_t size = sizeof from;
      if (::recvfrom(fd.get(), request, sizeof request, 0, reinterpret_cast<sockaddr*>(&from),
                     &size) < 0) {
        return;
      }
      for (size_t at = 0; at < kPageBytes; at += 1366) {
        ::sendto(fd.get(), page + at, std::min<size_t>(1366, kPageBytes - at), 0,
                 reinterpret_cast<sockaddr*>(&from), size);
      }
    }
  }).detach();
  std::thread([fd = std::move(tcp)] {
    for (;;) {
      Fd peer(::accept(fd.get(), nullptr, nullptr));
      if (!peer.valid()) return;
      const int on = 1;
      ::setsockopt(peer.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
      std::thread([peer = std::move(peer)] {
        uint8_t request[100];
        uint8_t page[kPageBytes] = {1};
        while (::recv(peer.get(), request, sizeof request, MSG_WAITALL) == sizeof request) {
          if (::send(peer.get(), page, sizeof page, MSG_NOSIGNAL) < 0) return;
        }
      }).detach();
    }
  }).detach();
  return out;
}

// ('udp' | 'tcp', address, port, count, startNs?, periodNs?) -> round trips.
Napi::Value MeasureRoundTrips(const Napi::CallbackInfo& info) {
  const bool tcp = info[0].ToString().Utf8Value() == "tcp";
  sockaddr_in to;
  throw_if(info.Env(),
           parse_address(info[1].ToString(), static_cast<int64_t>(whole_of(info[2], "port")), &to));
  const uint64_t rounds = whole_of(info[3], "count");
  const Pace pace(info, 4);
  return Measurement::Run(info.Env(), [tcp, to, rounds, pace](std::vector<double>* out) {
    Fd fd(::socket(AF_INET, (tcp ? SOCK_STREAM : SOCK_DGRAM) | SOCK_CLOEXEC, 0));
    if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&to), sizeof to) != 0) {
      return Status::Errno("E_NETWORK", "connect");
    }
    const int on = 1;
    if (tcp) ::setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    uint8_t request[100] = {2};
    uint8_t page[kPageBytes];
    for (uint64_t i = 0; i < rounds; i++) {
      pace.wait(i);
      const TimeNs begin = now_ns();
      if (::send(fd.get(), request, sizeof request, 0) != sizeof request ||
          !read_all(fd.get(), page, sizeof page)) {
        return Status::Errno("E_NETWORK", "round trip");
      }
      out->push_back(static_cast<double>(now_ns() - begin) / 1000);
    }
    return Status::Ok();
  });
}

void Init(Napi::Env env, Napi::Object exports) {
  auto bench = Napi::Object::New(env);
  bench.Set("fetch", Napi::Function::New(env, MeasureFetch));
  bench.Set("server", Napi::Function::New(env, MeasureServer));
  bench.Set("roundTrips", Napi::Function::New(env, MeasureRoundTrips));
  exports.Set("mcdistBench", bench);
}

Exports exports_of_bench(&Init);

}  // namespace
}  // namespace sf::mcdist
