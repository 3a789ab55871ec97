// Frames between a descriptor (tap or packet socket) and JavaScript: the control plane's few
// frames, never a guest's traffic.
//
// The descriptor is polled by Node's own loop. A token bucket bounds what reaches JavaScript: when
// it is empty, polling stops and the kernel's receive buffer, itself bounded, drops the rest.
#include <linux/if_packet.h>
#include <sys/socket.h>
#include <unistd.h>
#include <uv.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "common/fd.h"
#include "common/js.h"

namespace sf {
namespace {

constexpr int kFramesAWakeup = 16;
constexpr int64_t kMaxFrameBytes = 128 * 1024;

class FramePort : public Napi::ObjectWrap<FramePort> {
 public:
  static void Init(Napi::Env env, Napi::Object exports) {
    exports.Set("FramePort", DefineClass(env, "FramePort",
                                         {
                                             InstanceMethod("send", &FramePort::Send),
                                             InstanceMethod("lost", &FramePort::Lost),
                                             InstanceMethod("close", &FramePort::Close),
                                         }));
  }

  // new FramePort(fd, { maxFrameBytes, framesPerSecond, burst }, onFrame(Buffer), onEnd(Error))
  // Owns the descriptor, also if it throws. framesPerSecond 0: no limit.
  explicit FramePort(const Napi::CallbackInfo& info) : Napi::ObjectWrap<FramePort>(info) {
    Napi::Env env = info.Env();
    fd_.reset(info[0].ToNumber().Int32Value());
    const Napi::Object options = info[1].ToObject();
    max_frame_bytes_ = options.Get("maxFrameBytes").ToNumber().Int64Value();
    frames_per_second_ = options.Get("framesPerSecond").ToNumber().DoubleValue();
    burst_ = std::max(1.0, options.Get("burst").ToNumber().DoubleValue());
    if (!fd_.valid() || max_frame_bytes_ < 14 || max_frame_bytes_ > kMaxFrameBytes ||
        !(frames_per_second_ >= 0) || !info[2].IsFunction() || !info[3].IsFunction()) {
      throw js_error(env, Status::Error("E_ARGUMENT", "FramePort: bad arguments"));
    }
    buffer_.resize(static_cast<size_t>(max_frame_bytes_) + 1);
    on_frame_ = Napi::Persistent(info[2].As<Napi::Function>());
    on_end_ = Napi::Persistent(info[3].As<Napi::Function>());
    context_.emplace(env, "FramePort");

    uv_loop_t* loop = nullptr;
    if (napi_get_uv_event_loop(env, &loop) != napi_ok) {
      throw js_error(env, Status::Error("E_INTERNAL", "FramePort: no event loop"));
    }
    handles_ = new Handles();
    handles_->owner = this;
    tokens_ = burst_;
    refilled_ns_ = uv_hrtime();
    uv_timer_init(loop, &handles_->timer);
    handles_->timer.data = handles_;
    const int error = uv_poll_init(loop, &handles_->poll, fd_.get());
    if (error != 0) {
      Handles* handles = std::exchange(handles_, nullptr);
      uv_close(reinterpret_cast<uv_handle_t*>(&handles->timer),
               [](uv_handle_t* handle) { delete static_cast<Handles*>(handle->data); });
      throw js_error(env, Status::Errno("E_NETWORK", "poll a descriptor", -error));
    }
    handles_->poll.data = handles_;
    Ref();  // until closed
    Watch();
  }

 private:
  // Outlives the object by as long as libuv needs to close both.
  struct Handles {
    FramePort* owner = nullptr;
    uv_poll_t poll = {};
    uv_timer_t timer = {};
  };

  void Watch() {
    uv_poll_start(&handles_->poll, UV_READABLE, [](uv_poll_t* poll, int status, int) {
      if (FramePort* owner = static_cast<Handles*>(poll->data)->owner) owner->Readable(status);
    });
  }

  // False when the bucket is empty; polling then starts again with the next token.
  bool TakeToken() {
    if (frames_per_second_ == 0) return true;
    const uint64_t now = uv_hrtime();
    tokens_ = std::min(
        burst_, tokens_ + static_cast<double>(now - refilled_ns_) * 1e-9 * frames_per_second_);
    refilled_ns_ = now;
    if (tokens_ >= 1) {
      tokens_ -= 1;
      return true;
    }
    uv_poll_stop(&handles_->poll);
    const double wait_ms = (1 - tokens_) / frames_per_second_ * 1000;
    uv_timer_start(
        &handles_->timer,
        [](uv_timer_t* timer) {
          if (FramePort* owner = static_cast<Handles*>(timer->data)->owner) owner->Watch();
        },
        static_cast<uint64_t>(wait_ms) + 1, 0);
    return false;
  }

  void Readable(int status) {
    Napi::HandleScope scope(Env());
    if (status < 0) return End(-status);
    for (int i = 0; i < kFramesAWakeup && handles_ != nullptr; ++i) {
      if (!TakeToken()) return;
      const ssize_t length = ::read(fd_.get(), buffer_.data(), buffer_.size());
      if (length < 0) {
        tokens_ = std::min(burst_, tokens_ + 1);
        if (errno == EAGAIN || errno == EINTR || (errno == ENETDOWN && StillBound())) return;
        return End(errno);
      }
      if (length > max_frame_bytes_) continue;  // no such frame is of use to the owner
      Call(on_frame_,
           Napi::Buffer<uint8_t>::Copy(Env(), buffer_.data(), static_cast<size_t>(length)));
    }
  }

  // A packet socket says ENETDOWN both when its interface is set down and when it is removed.
  bool StillBound() const {
    sockaddr_ll address = {};
    socklen_t size = sizeof address;
    return ::getsockname(fd_.get(), reinterpret_cast<sockaddr*>(&address), &size) == 0 &&
           address.sll_family == AF_PACKET && address.sll_ifindex > 0;
  }

  void End(int error) {
    Napi::Error why = js_error(Env(), Status::Errno("E_NETWORK", "read frames", error));
    // The function is called after the object has let go of everything.
    Napi::FunctionReference on_end = Napi::Persistent(on_end_.Value());
    Shut();
    Call(on_end, why.Value());
  }

  void Call(const Napi::FunctionReference& function, Napi::Value argument) {
    try {
      function.MakeCallback(Env().Global(), {argument}, *context_);
    } catch (const Napi::Error& error) {
      napi_fatal_exception(Env(), error.Value());
    }
  }

  // Returns false if the kernel had no room: a frame may always be lost.
  Napi::Value Send(const Napi::CallbackInfo& info) {
    Napi::Env env = info.Env();
    if (handles_ == nullptr) throw js_error(env, Status::Error("E_CLOSED", "port is closed"));
    if (!info[0].IsTypedArray()) {
      throw js_error(env, Status::Error("E_ARGUMENT", "a frame is a Uint8Array"));
    }
    auto frame = info[0].As<Napi::Uint8Array>();
    const ssize_t sent = ::write(fd_.get(), frame.Data(), frame.ByteLength());
    if (sent < 0 && errno != EAGAIN && errno != ENOBUFS && errno != EINTR) {
      throw js_error(env, Status::Errno("E_NETWORK", "send a frame"));
    }
    return Napi::Boolean::New(env, sent >= 0);
  }

  // Frames that a packet socket's full buffer lost since the last call; the kernel's count begins
  // anew with each look at it (packet(7), PACKET_STATISTICS).
  Napi::Value Lost(const Napi::CallbackInfo& info) {
    tpacket_stats stats = {};
    socklen_t size = sizeof stats;
    const bool known = handles_ != nullptr &&
                       ::getsockopt(fd_.get(), SOL_PACKET, PACKET_STATISTICS, &stats, &size) == 0;
    return Napi::Number::New(info.Env(), known ? stats.tp_drops : 0);
  }

  void Close(const Napi::CallbackInfo&) { Shut(); }

  void Shut() {
    if (handles_ == nullptr) return;
    Handles* handles = std::exchange(handles_, nullptr);
    handles->owner = nullptr;
    uv_poll_stop(&handles->poll);
    uv_timer_stop(&handles->timer);
    fd_.reset();  // after uv_poll_stop, which takes it out of the loop's epoll set
    uv_close(reinterpret_cast<uv_handle_t*>(&handles->poll), [](uv_handle_t* poll) {
      uv_close(reinterpret_cast<uv_handle_t*>(&static_cast<Handles*>(poll->data)->timer),
               [](uv_handle_t* timer) { delete static_cast<Handles*>(timer->data); });
    });
    Unref();
  }

  Fd fd_;
  std::vector<uint8_t> buffer_;
  int64_t max_frame_bytes_ = 0;
  double frames_per_second_ = 0;
  double burst_ = 1;
  double tokens_ = 0;
  uint64_t refilled_ns_ = 0;
  Napi::FunctionReference on_frame_;
  Napi::FunctionReference on_end_;
  std::optional<Napi::AsyncContext> context_;
  Handles* handles_ = nullptr;
};

const Exports exports_of_frame_port(&FramePort::Init);

}  // namespace
}  // namespace sf
