// An NBD client that believes nothing: it may send what it likes, and everything that comes back is
// checked against what was sent.
//
// Invariants it checks
// - Each request is answered at most once, under its cookie, and completely; a request that is in
//   order is answered with success, one that is not with an error.
// - Bytes read, and areas said to be zeros, are what the model says. To know that in spite of
//   concurrent requests, a request that overlaps one under way which writes waits for it first.
// - The server answers or hangs up: nothing here waits longer than kPatienceMs.
#pragma once

#include <array>
#include <map>
#include <optional>
#include <set>
#include <vector>

#include "blktap/nbd_proto.h"
#include "fuzz/nbd_disk.h"

namespace sf::fuzz {

constexpr int kPatienceMs = 30'000;

// A socket whose other end is read whenever sending has to wait.
class Wire {
 public:
  explicit Wire(Fd socket) : socket_(std::move(socket)) {}
  void send(const void* data, size_t bytes);  // what nobody reads any more is dropped
  void end_sending();
  bool fetch(size_t bytes);           // false: the stream ends before that many are there
  const uint8_t* take(size_t bytes);  // after fetch()
  // Reads to the end of the stream; returns how many bytes were left.
  size_t drain();

 private:
  void turn(bool sending);  // waits until something can be sent or was received
  Fd socket_;
  std::vector<uint8_t> in_;
  size_t at_ = 0;
  bool ended_ = false;
};

struct OptionAnswer {
  uint32_t type = 0;  // of the last reply: an acknowledgement, an error, or 0: it was hung up
  std::vector<std::pair<uint32_t, std::vector<uint8_t>>> replies;  // before that: type, data
};

class Client {
 public:
  Client(Wire* wire, Model* model, bool writable)
      : wire_(wire), model_(model), writable_(writable) {}

  // Option phase. Each returns false if the server has hung up.
  bool greet(uint32_t flags);
  bool option(uint32_t option, const std::vector<uint8_t>& data, OptionAnswer* out);
  bool export_name(const std::vector<uint8_t>& name, bool no_zeroes);
  bool transmission() const { return transmission_; }

  // Transmission. Fills in the cookie. False: the server hung up.
  bool request(nbd::Request request);
  bool settle();  // waits for all answers
  void send_request(const nbd::Request& request);
  void send_payload(const nbd::Request& request, size_t bytes);
  nbd::Request with_cookie(nbd::Request request);
  // Reads what still comes. With `all`, everything under way has to be answered before the end.
  void finish(bool all);

 private:
  struct Pending {
    nbd::Request request;
    bool must_succeed = false;
    bool must_fail = false;
    uint64_t got = 0;  // bytes of a read
    bool failed = false;
    std::set<uint32_t> contexts;  // that a BLOCK_STATUS was answered for
  };
  using PendingMap = std::map<uint64_t, Pending>;

  void exported(uint64_t size, uint16_t flags);
  void classify(Pending* pending) const;
  bool settle_overlaps(const nbd::Request& request);
  bool answer();  // reads one reply or chunk; false: the stream has ended
  bool simple_answer();
  bool chunk();
  void data(Pending* pending, uint64_t off, const uint8_t* bytes, uint32_t len);
  void hole(Pending* pending, uint64_t off, uint32_t len);
  void status(Pending* pending, const std::vector<uint8_t>& payload);
  void end(PendingMap::iterator pending, uint32_t error);
  PendingMap::iterator find(uint64_t cookie);

  Wire* wire_;
  Model* model_;
  const bool writable_;
  bool structured_ = false;
  std::set<uint32_t> contexts_;
  std::map<uint32_t, std::string> context_names_;
  bool transmission_ = false;
  uint16_t flags_ = 0;
  uint64_t serial_ = 0;
  PendingMap pending_;
};

}  // namespace sf::fuzz
