// A result that carries a stable error code of src/errors.ts and a message for people.
#pragma once

#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

namespace sf {

struct Status {
  std::string code;     // empty: success. Otherwise a code of src/errors.ts, e.g. "E_SOURCE_LOST".
  std::string message;  // what happened, to what

  bool ok() const { return code.empty(); }
  static Status Ok() { return {}; }
  static Status Error(std::string code, std::string message) {
    return {std::move(code), std::move(message)};
  }
  // `what` says what was tried and to what, e.g. "open /x/y"; errno's text is appended.
  static Status Errno(std::string code, const std::string& what, int error = errno) {
    return {std::move(code), what + ": " + std::strerror(error)};
  }
};

}  // namespace sf
