// The mcdist client of one generation on one host: fetches absent pages into a replica, and stores
// whatever page of that generation comes by, asked for from here or not.
//
// States:  greeting (no cookie yet) -> welcomed -> greeting (the server restarted, set_server)
//          any -> lost (no authentic word from the server in time) -> greeting (set_server)
// Invariants:
//  - Only bytes that opened with the generation's key, under this generation's id, reach the
//  replica.
//  - A page under way is asked of the network once per time-out, however many wait for it.
//  - Every wait ends: with the page, or with fail_page() or fail() of the replica.
//  - "The server lives" is believed only of packets that cannot be replays: a welcome that answers
//  a
//    question of ours, or a higher counter under the boot id of that welcome.
// Threads: want() runs on the faulting side's thread and sends its request itself when it can, so
// that a fault wakes one thread here: the client's own, by the answer. Lock order: lost_mutex_, the
// replica's locks, mutex_; the replica is never called with mutex_ held (state() excepted, which
// takes no lock).
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "common/fd.h"
#include "common/page.h"
#include "common/status.h"
#include "mcdist/counters.h"
#include "mcdist/reassembly.h"
#include "mcdist/requester.h"
#include "mcdist/socket.h"
#include "mcdist/wire.h"
#include "pagestore/replica.h"

namespace sf::mcdist {

class Client final : public PageFetcher {
 public:
  struct Options {
    GenerationId generation{};
    Key key{};
    sockaddr_in server = {};
    sockaddr_in group = {};
    in_addr interface_address = {};
    TimeNs source_timeout = 30 * kSecond;
    size_t mtu_bytes = 1500;
    RequesterConfig requester;
  };
  struct Gauges {
    uint64_t under_way;
    uint64_t window;
    uint64_t receive_rate;  // bytes a second
    TimeNs fault_rtt;
    TimeNs prefetch_rtt;
    TimeNs fault_timeout;
    bool welcomed;
    bool lost;
  };

  static Status Open(const Options& options, std::shared_ptr<Replica> replica,
                     std::shared_ptr<Client>* out);
  ~Client() override;

  void want(PageIndex page, Urgency urgency) override;
  // Pages beyond the end are left out. False: too many ranges, none was taken.
  bool prefetch(PageIndex first, uint64_t count) override;
  void set_server(const sockaddr_in& server);
  // Detaches from the replica, whose waiters stay for its next fetcher, and ends the thread.
  void close();

  const std::shared_ptr<Replica>& replica() const { return replica_; }
  const ClientCounters& counters() const { return counters_; }
  Gauges gauges() const;

 private:
  Client(const Options& options, const BootId& boot, std::shared_ptr<Replica> replica);
  void run();
  bool receive(const Fd& fd);  // true if more may be there
  void handle(const uint8_t* data, size_t size, TimeNs now);
  void handle_page(const Header& header, const uint8_t* data, size_t size, TimeNs now);
  void handle_zero(const std::vector<Run>& runs, TimeNs now);
  void handle_negative(const std::vector<Run>& runs, TimeNs now);
  void handle_welcome(const Header& header, const Welcome& welcome, std::unique_ptr<SenderKey> key,
                      TimeNs now);
  void heard(const Header& header, TimeNs now);
  void flush(bool drained);
  void watch_source(TimeNs now);
  void lose(const Status& status);

  // With mutex_ held:
  void send_request(const std::vector<Run>& runs, TimeNs now);
  void greet(TimeNs now);
  void arm(TimeNs at);
  void busy(TimeNs now);

  const Options options_;
  const std::shared_ptr<Replica> replica_;
  const size_t max_runs_;
  Sealer sealer_;
  std::unique_ptr<SenderKey> server_key_;  // the thread's own
  Fd member_, unicast_, timer_, wake_;
  std::thread thread_;
  ClientCounters counters_;
  std::mutex lost_mutex_;  // makes lose() and set_server() exclude each other
  std::mutex close_mutex_;

  mutable std::mutex mutex_;  // guards all up to the blank line
  Requester requester_;
  sockaddr_in server_;
  uint64_t cookie_ = 0;  // 0: greeting
  bool lost_ = false;
  bool closing_ = false;
  bool wake_pending_ = false;
  TimeNs busy_since_ = 0;
  TimeNs armed_ = kNever;
  TimeNs greet_due_ = 0;
  unsigned greetings_ = 0;
  uint64_t last_counter_ = 0;  // of the request sent last
  TimeNs last_sent_ = 0;
  uint64_t last_echo_ = 0;
  std::vector<uint8_t> body_;
  std::vector<uint8_t> packet_;
  double receive_rate_ = 0;
  TimeNs rate_at_ = 0;

  // The thread's own.
  ReceiveBatch received_;
  Reassembly reassembly_;
  BootId server_boot_{};
  uint64_t server_counter_ = 0;
  TimeNs last_word_ = 0;
  std::vector<Run> runs_;
  std::vector<Run> sending_;
  uint8_t clear_[kMaxMtuBytes];
};

}  // namespace sf::mcdist
