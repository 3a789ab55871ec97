// One datagram to a Unix socket, which Node.js has no call for: sd_notify(3) is made of it.

#include <sys/socket.h>
#include <sys/un.h>

#include "common/fd.h"
#include "common/js.h"

namespace sf {
namespace {

// (path, text): a leading `@` names an abstract socket, as in $NOTIFY_SOCKET. Throws E_IO.
void send_datagram(const Napi::CallbackInfo& info) {
  Napi::Env env = info.Env();
  if (info.Length() != 2 || !info[0].IsString() || !info[1].IsString()) {
    throw js_error(env, Status::Error("E_ARGUMENT", "sendDatagram(path, text)"));
  }
  std::string path = info[0].As<Napi::String>(), text = info[1].As<Napi::String>();
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof(address.sun_path)) {
    throw js_error(env, Status::Error("E_IO", "socket path " + path + " does not fit"));
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  if (path[0] == '@') address.sun_path[0] = '\0';
  socklen_t bytes = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + path.size());
  Fd fd(socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  if (fd.get() < 0) throw js_error(env, Status::Errno("E_IO", "socket"));
  ssize_t sent = sendto(fd.get(), text.data(), text.size(), MSG_DONTWAIT | MSG_NOSIGNAL,
                        reinterpret_cast<sockaddr*>(&address), bytes);
  if (sent < 0) throw js_error(env, Status::Errno("E_IO", "send to " + path));
}

void init(Napi::Env env, Napi::Object exports) {
  exports.Set("sendDatagram", Napi::Function::New(env, send_datagram, "sendDatagram"));
}

Exports exports_of_datagram(&init);

}  // namespace
}  // namespace sf
