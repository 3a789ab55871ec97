// The mcdist client of one generation on one host: fetches absent pages into a replica, and stores
// whatever page of that generation comes by, asked for from here or not.
//
// States:  greeting (no cookie yet) -> welcomed -> greeting (the server restarted, another server)
//          any -> lost (no authentic word from any server in time) -> greeting (set_server)
// Servers: one at a time is asked, the *current* one; first the one given. Announces make others
// known (SenderTable). When the current one is silent, or refuses a page, another one becomes the
// current one; never back unless that one fails as well, or set_server() says so.
// Invariants:
//  - Only bytes that opened with the generation's key, under this generation's id, reach the
//    replica. Whose they are does not matter: a generation is immutable.
//  - A page under way is asked of the network once per time-out, however many wait for it.
//  - Every wait ends: with the page, or with fail_page() or fail() of the replica.
//  - "The server lives" is believed only of packets that cannot be replays: a welcome that answers
//    a question of ours, or a higher counter under the boot id of that welcome.
// Threads: whoever receives has the *role* (role_mutex_): the client's own thread, or a thread that
// waits in fetch() and lends itself, which saves a wake-up: its page comes to it directly. As long
// as threads lend themselves one after the other, the client's own thread keeps away from the
// sockets (`lent_`); it takes the role back a moment after the last one left, and at once if
// somebody else's fault is under way then (leave() and want() see to it under mutex_, so none is
// left alone; one that goes to look at a descriptor of its own, and will be back, is waited for a
// moment). want() sends its request on the calling thread when it can.
// A lent thread looks for its page a moment before it sleeps (common/spin.h).
// Lock order: role_mutex_, lost_mutex_, the replica's locks, mutex_. The replica is never called
// with mutex_ held (state() and absent_mask() excepted, which take no lock).
#pragma once

#include <poll.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "common/fd.h"
#include "common/page.h"
#include "common/spin.h"
#include "common/status.h"
#include "mcdist/counters.h"
#include "mcdist/parity_table.h"
#include "mcdist/reassembly.h"
#include "mcdist/requester.h"
#include "mcdist/senders.h"
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
    bool history = false;  // let the server send first what others faulted on
    RequesterConfig requester;
  };
  struct Gauges {
    uint64_t under_way;
    uint64_t window;
    uint64_t receive_rate;  // bytes a second
    TimeNs fault_rtt;
    TimeNs prefetch_rtt;
    TimeNs fault_timeout;
    uint64_t servers;          // known, the current one among them
    uint64_t loss_permille;    // of what was sent to us lately
    uint64_t reported_blocks;  // reported as lacking something, not repaired yet
    sockaddr_in server;        // the current one
    bool welcomed;
    bool subscribed;
    bool unicast_only;
    bool lost;
  };

  static Status Open(const Options& options, std::shared_ptr<Replica> replica,
                     std::shared_ptr<Client>* out);
  ~Client() override;

  void want(PageIndex page, Urgency urgency) override;
  bool fetch(std::span<const PageIndex> pages, const Lending& lending) override;
  // Pages beyond the end are left out; all pages: subscribes. False: too many ranges, none was
  // taken.
  bool prefetch(PageIndex first, uint64_t count) override;
  // `others` (32 at most) are turned to as well as those that announce themselves.
  void set_server(const sockaddr_in& server, const std::vector<sockaddr_in>& others = {});
  // All pages that the replica's users need, as fast as the server sends them. Until all are here,
  // or none can be had any more, or taken back.
  bool subscribe(bool on) override;
  bool subscribed() const override;
  // Detaches from the replica, whose waiters stay for its next fetcher, and ends the thread.
  void close();

  const std::shared_ptr<Replica>& replica() const { return replica_; }
  const ClientCounters& counters() const { return counters_; }
  Gauges gauges() const;

 private:
  Client(const Options& options, const BootId& boot, std::shared_ptr<Replica> replica);
  void run();
  void doze(pollfd* others);
  // With the role:
  void serve();
  void tend(bool drained);
  size_t receive(const Fd& fd, bool group, bool* full);  // datagrams; `full`: more may be there
  bool clear_wake();                                     // false: closing
  void flush(bool drained);
  void watch_source(TimeNs now);
  void lose(const Status& status);

  // client_lent.cc: of a thread that lent itself, with the role
  bool receive_lent(const Lending& lending);
  void wait_lent(std::span<pollfd> fds);
  void leave(bool returns);
  bool settled() const;  // with mutex_ held

  // client_receive.cc
  void handle(const uint8_t* data, size_t size, bool group, TimeNs now);
  Sender* open_long(const Header& header, const uint8_t* data, size_t size);
  void heard(Sender* sender, const Header& header, bool group, TimeNs now);
  void handle_page(Sender* sender, const Header& header, const uint8_t* data, size_t size,
                   bool group, TimeNs now);
  void store(PageIndex page, const uint8_t* bytes, TimeNs now);
  void tell_pushed(TimeNs now);
  void land(TimeNs now);
  void settle(TimeNs now);
  void handle_zero(const std::vector<Run>& runs, TimeNs now);
  void handle_negative(const Sender* sender, const std::vector<Run>& runs, TimeNs now);
  void handle_welcome(Sender* sender, const Header& header, const Welcome& welcome, TimeNs now);
  void handle_announce(Sender* sender, const Announce& announce, TimeNs now);
  void handle_packed(const Header& header, size_t size, TimeNs now);
  void handle_parity(const Sender* sender, const Header& header, size_t size, TimeNs now);
  void repair(uint64_t block, TimeNs now);
  const uint8_t* symbol(PageIndex page, unsigned fragment);
  void look(BlockReport* report) const;
  void refresh_needed(TimeNs now);

  // client_servers.cc
  void watch_server(TimeNs now);
  bool turn_to_other(TimeNs now, bool ask_again);

  // With mutex_ held:
  void send_request(TimeNs now);  // of request_
  void greet(TimeNs now);
  bool tells() const;
  void arm(TimeNs at);
  void busy(TimeNs now);
  void wake();
  void give_back();
  void end_subscription();
  void turn_to(const sockaddr_in& server, uint64_t cookie, TimeNs now);
  // Of those that were named with the server that was set.
  struct Named {
    sockaddr_in address;
    TimeNs tried;
  };
  Named* unheard();          // to be tried next, of those that have not made themselves known
  size_t servers_usable();   // the current one among them
  size_t servers_hopeful();  // but for the current one, and those found silent

  const Options options_;
  const std::shared_ptr<Replica> replica_;
  const size_t max_runs_;
  Sealer sealer_;
  Fd member_, unicast_, timer_, wake_;
  std::thread thread_;
  ClientCounters counters_;
  std::mutex lost_mutex_;  // makes lose() and set_server() exclude each other
  std::mutex close_mutex_;
  std::mutex role_mutex_;

  mutable std::mutex mutex_;  // guards all up to the blank line
  Requester requester_;
  sockaddr_in server_;
  uint64_t cookie_ = 0;  // 0: greeting
  bool lost_ = false;
  bool closing_ = false;
  bool wake_pending_ = false;
  size_t last_batch_ = 0;  // packets
  bool dozing_ = false;    // the own thread reads the sockets only soon
  bool helping_ = false;   // a thread that lent itself has the role
  bool lent_ = false;      // ... or had it a moment ago: the own thread waits in role_changed_
  TimeNs helped_at_ = 0;
  TimeNs lent_for_ = 0;  // how long after that
  std::condition_variable role_changed_;
  bool server_set_ = false;  // by set_server(), the thread has not seen it yet
  TimeNs busy_since_ = 0;
  TimeNs armed_ = kNever;
  TimeNs greet_due_ = 0;
  unsigned greetings_ = 0;
  uint64_t last_counter_ = 0;  // of the request sent last
  TimeNs last_sent_ = 0;
  uint64_t last_echo_ = 0;
  unsigned probes_ = 0;  // greetings answered although the group was not heard
  bool unicast_only_ = false;
  uint64_t loss_permille_ = 0;  // as told last
  uint64_t asked_from_ = 0;     // counter of the last request before the current server's first
  sockaddr_in home_;            // the server that was set, to fall back to
  std::vector<Named> named_;
  Request request_;
  std::vector<uint8_t> body_;
  std::vector<uint8_t> packet_;
  double receive_rate_ = 0;
  uint64_t untold_bytes_ = 0;  // received since the last request
  TimeNs rate_at_ = 0;

  // Of whoever has the role.
  Spin spin_{"SNOWFLOCK_MCDIST_SPIN"};
  ReceiveBatch received_;
  Reassembly reassembly_;
  ParityTable parities_;
  PageIndex pushed_page_ = 0;    // of the push's last packet
  uint32_t pushed_packets_ = 0;  // of that block, not told to the requester yet
  bool repairing_ = false;
  PageIndex symbol_page_ = 0;  // what is in symbols_
  bool symbol_read_ = false;
  uint8_t symbols_[kPageBytes];
  SenderTable senders_;
  Sender* current_ = nullptr;  // who welcomed us last, in senders_
  TimeNs last_word_ = 0;       // of the current server
  TimeNs turned_at_ = 0;
  TimeNs silent_since_ = 0;
  uint64_t retries_then_ = 0;     // when it spoke last
  uint8_t fragments_;             // symbols in a page, as sent to us last
  std::vector<uint64_t> needed_;  // bit maps of the replica's needed pages; empty: all
  uint64_t needed_version_ = 0;
  TimeNs needed_at_ = 0;
  std::atomic<uint64_t> servers_{0};
  std::atomic<bool> group_heard_{false};
  std::vector<Run> runs_;
  uint8_t clear_[kMaxMtuBytes];
  uint8_t unpacked_[kPageBytes];
};

}  // namespace sf::mcdist
