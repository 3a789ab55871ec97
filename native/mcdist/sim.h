// mcdist in virtual time: the very Policy and Requester that run, with thousands of clients. No
// packets, no crypto, no bytes: an answer carries a sum for each page, by which a wrong page would
// be noticed.
//
//   SimClients (Requester each) --requests--> ingress link -> SimServer (Policy) -> its link
//        ^                                                                            |
//        +---- segment's link (rate, queue), loss for each client by itself <---------+
//
// The two sides here do what client.cc and server.cc do around the two classes: greeting and
// cookies, requests ahead of collect(), batches of requests between turns of sending.
//
// Invariants, checked as the run goes on (a violation ends it with an error that says seed, time
// and what): who wants a page gets it or an error, within a bound; queues stay in their bounds; no
// page comes out wrong; bytes sent stay below a bound.
#pragma once

#include <atomic>
#include <deque>
#include <list>
#include <memory>
#include <unordered_set>

#include "common/status.h"
#include "mcdist/sim_config.h"
#include "mcdist/sim_net.h"
#include "mcdist/wire.h"

namespace sf::mcdist {

constexpr uint32_t kEverybody = UINT32_MAX;

// What the server sends: packets of a page, parities of a block, runs of pages, an announce or a
// welcome.
struct SimAnswer {
  Type type = Type::kPage;
  uint32_t to = kEverybody;
  PageIndex page = 0;
  uint8_t fragments = 0;  // mask of those sent (kPage); else bit 0: the packet
  uint8_t dropped = 0;    // of those, by the segment's queue
  uint64_t sum = 0;       // of the page's bytes, in place of them
  uint64_t cookie = 0;    // kWelcome
  bool pushed = false;
  Parity parity;         // kParity: of the block that begins at `page`; bit i of `fragments`: one
  bool pushing = false;  // kAnnounce
  PageIndex position = 0;
  uint32_t peers = 0;
  std::vector<Run> runs;  // kZero, kNegative
  uint64_t bytes = 0;     // of one packet, with UDP and IP headers
};

struct SimRequest {
  uint32_t client = 0;
  uint64_t bytes = 0;
  Request body;
};

class SimNetwork {
 public:
  virtual ~SimNetwork() = default;
  virtual TimeNs now() const = 0;
  virtual void wake(SimEvent::Kind kind, uint32_t subject, TimeNs at) = 0;
  virtual void request(SimRequest request) = 0;  // client -> server
  virtual void answer(SimAnswer answer) = 0;     // server -> client or all
  virtual uint64_t server_backlog_bytes() const = 0;
  virtual TimeNs server_room_at(uint64_t bytes) const = 0;  // backlog is at most that
  virtual double receive_rate(uint32_t client) const = 0;
  virtual bool reached(uint32_t client) const = 0;  // it is not cut off
  [[noreturn]] virtual void violation(const std::string& what) const = 0;
  uint64_t sum_of(PageIndex page) const { return mix64(seed_ ^ (page + 1)); }
  bool zero(PageIndex page) const { return unit_of(mix64(seed_ * 31 + page)) < zero_share_; }

 protected:
  uint64_t seed_ = 0;
  double zero_share_ = 0;
};

class SimServer {
 public:
  SimServer(const SimConfig& config, SimNetwork* network, SimResult* result);
  void arrived(SimRequest request, TimeNs now);  // in its receive buffer
  void loop(TimeNs now);                         // one turn of Server::run()
  void check() const;
  void die() { alive_ = false; }
  void restart(TimeNs now);
  bool alive() const { return alive_; }
  size_t queued() const { return config_.unicast ? direct_.size() : policy_->queued(); }
  double rate() const { return policy_->rate(); }
  void finish() const;  // what only Policy counts, into the result

 private:
  struct Known {
    uint64_t cookie = 0;
    uint32_t id = 0;
    TimeNs heard = 0;
    std::list<uint32_t>::iterator at;
  };
  struct Runs {
    Type type;
    uint32_t to;
    bool pushed;
    std::vector<Run> runs;
  };
  void handle(const SimRequest& request, TimeNs now);
  void take(uint32_t peer, const SimRequest& request, TimeNs now);
  void take_direct(const SimRequest& request);
  void welcome(uint32_t client, const Known& peer, TimeNs now);
  bool send(const Policy::Item& item, TimeNs now);  // true if pages or parities went out
  void send_page(uint32_t to, const Policy::Item& item, TimeNs now);
  void send_parity(const Policy::Item& item, TimeNs now);
  void announce(uint32_t to, const Policy::Item& item, TimeNs now);
  void tell(uint32_t to, const Policy::Item& item, Type type);
  void send_runs();
  void schedule(TimeNs at);
  void served(PageIndex page);

  const SimConfig& config_;
  SimNetwork* const network_;
  SimResult* const result_;
  std::unique_ptr<Policy> policy_;
  std::deque<SimRequest> received_;
  uint64_t received_bytes_ = 0;
  TimeNs busy_until_ = 0;
  TimeNs armed_ = kNever;
  bool alive_ = true;
  uint64_t life_ = 1;  // restarts; a cookie tells it
  uint32_t ids_ = 0;
  std::unordered_map<uint32_t, Known> peers_;         // by client
  std::unordered_map<uint32_t, uint32_t> client_of_;  // by id
  std::list<uint32_t> order_;                         // heard last first
  std::vector<Runs> runs_;
  std::vector<bool> served_, pushed_;
  // Unicast baseline: what is to be answered, to whom.
  std::deque<std::pair<uint32_t, Policy::Item>> direct_;
  std::unordered_set<uint64_t> direct_index_;
};

class SimClients {
 public:
  SimClients(const SimConfig& config, SimNetwork* network, SimImage* image, SimResult* result);
  void start(uint32_t client);
  void run(uint32_t client, TimeNs now);    // its processor goes on
  void timer(uint32_t client, TimeNs now);  // its mcdist thread wakes
  // Those of first..end-1 that waited for the page and now hold it go on.
  void delivered(PageIndex page, uint64_t sum, uint32_t first, uint32_t end, TimeNs now);
  // A pushed answer reached all of the segment but for `losses`; `packets` of it.
  void pushed(uint32_t segment, PageIndex page, uint8_t packets, const std::vector<SimLoss>& losses,
              TimeNs now);
  void announced(uint32_t first, uint32_t end, const SimAnswer& answer, TimeNs now);
  void refused(PageIndex page, const Run& run, uint32_t first, uint32_t end, TimeNs now);
  void welcomed(uint32_t client, uint64_t cookie, TimeNs now);
  void heard(uint32_t client, TimeNs now);
  void heard_segment(uint32_t segment, TimeNs now) { segment_heard_[segment] = now; }
  void die(uint32_t client);
  void check(TimeNs now) const;
  bool all_over() const { return over_ == clients_.size(); }
  uint64_t over() const { return over_; }
  uint8_t segment_of(uint32_t client) const { return segment_[client]; }
  // Left to run, in a word: for messages.
  std::string describe(uint32_t client) const;
  std::string describe_first() const;  // of those not over

 private:
  enum class State : uint8_t { kAbsent, kComputing, kWaiting, kFilling, kOver };
  struct Client {
    explicit Client(std::unique_ptr<Requester> of) : requester(std::move(of)) {}
    std::unique_ptr<Requester> requester;
    State state = State::kAbsent;
    uint32_t position = 0;  // in its trace
    uint32_t touches = 0;   // made
    uint32_t order_window = UINT32_MAX;
    std::vector<uint8_t> order;
    PageIndex page = 0;  // touched next, or waited for
    TimeNs wait_since = 0;
    TimeNs armed = kNever;
    TimeNs last_word = 0;
    TimeNs busy_since = 0;
    uint64_t cookie = 0;
    TimeNs greet_due = 0;
    TimeNs greeted_at = 0;
    unsigned greetings = 0;
    unsigned probes = 0;
    bool unicast_only = false;
    PageIndex filled = 0;  // all pages before it are here
    TimeNs started = 0;
    TimeNs block_waited = 0;
    TimeNs block_computed = 0;
    double pace = 1;
  };
  bool next_touch(uint32_t client, Client& state, TimeNs* compute);
  void go_on(uint32_t client, TimeNs now);
  void touched(uint32_t client, Client& state, TimeNs waited, TimeNs now);
  void filled(uint32_t client, TimeNs now);
  void greet(uint32_t client, TimeNs now);
  void flush(uint32_t client, TimeNs now);
  void send(uint32_t client, TimeNs now);  // request_
  bool group_heard(uint32_t client) const;
  void step(uint32_t client, TimeNs now);  // flush if something is due
  void arm(uint32_t client, TimeNs at);
  void watch_source(uint32_t client, TimeNs now);
  void over(uint32_t client, SimOutcome outcome, TimeNs now);
  TimeNs last_word(uint32_t client) const;

  const SimConfig& config_;
  SimNetwork* const network_;
  SimImage* const image_;
  SimResult* const result_;
  const size_t max_runs_;
  std::vector<Client> clients_;
  std::vector<uint8_t> segment_;
  std::vector<TimeNs> segment_heard_;
  // Who has the page under way: what an answer has to look at.
  std::unordered_map<PageIndex, std::vector<uint32_t>> interest_;
  Request request_;
  std::vector<std::vector<uint32_t>> subscribers_;  // by segment
  uint64_t over_ = 0;
};

// Runs it to its end. E_SIMULATION: a violation; E_INTERRUPTED: `stop` was set.
Status simulate(const SimConfig& config, const std::atomic<bool>& stop, SimResult* result);

}  // namespace sf::mcdist
