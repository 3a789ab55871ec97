// The mcdist server of a host: one UDP socket and one thread for all generations it serves.
//
// A generation is: not served -> served (serve) -> not served (unserve). Requests for generations
// not served here are dropped: without their key they cannot be told from noise.
// Invariants:
//  - A page is sent only while somebody asks or subscribed by packets that are authentic, fresh and
//    with a cookie.
//  - The provider is read on the server's thread only, and never again once unserve() returned.
//  - Per generation the state is a Policy and a PeerTable, both bounded.
// Left out on purpose: a provider that blocks on a slow disk holds up the other generations.
#pragma once

#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <vector>

#include "common/fd.h"
#include "common/page.h"
#include "common/spin.h"
#include "common/status.h"
#include "mcdist/counters.h"
#include "mcdist/pack.h"
#include "mcdist/parity.h"
#include "mcdist/peers.h"
#include "mcdist/policy.h"
#include "mcdist/socket.h"
#include "mcdist/wire.h"

namespace sf::mcdist {

struct ServerStats {
  ServerCounters counters;
  std::atomic<uint64_t> queued{0};
  std::atomic<uint64_t> peers{0};
  std::atomic<uint64_t> rate{0};               // limit now, bytes a second
  std::atomic<uint64_t> mean_receive_rate{0};  // of the clients, as they report it
  std::atomic<uint64_t> rate_cuts{0};
  std::atomic<uint64_t> rate_cuts_undone{0};  // what was lost did not depend on the rate
  std::atomic<uint64_t> noise_ppm{0};         // that share, in a million
  std::atomic<uint64_t> subscribers{0};
  std::atomic<uint64_t> push_position{0};  // the cursor's next page
  std::atomic<uint64_t> pushing{0};
  std::atomic<uint64_t> history_pages{0};
};

// Of packets that belong to no generation served here.
struct StrayStats {
  Counter wrong_generation{0};
  Counter bad_packets{0};
};

class Server {
 public:
  struct Options {
    sockaddr_in bind = {};
    in_addr interface_address = {};
    int ttl = 1;
    size_t mtu_bytes = 1500;
  };
  struct Generation {
    GenerationId id{};
    Key key{};
    std::shared_ptr<PageProvider> provider;
    sockaddr_in group = {};
    PolicyConfig policy;
  };

  static Status Open(const Options& options, std::shared_ptr<Server>* out);
  ~Server();

  uint16_t port() const { return bound_port(socket_); }
  Status serve(Generation generation);
  // Waits until the thread has let go of the provider. Unknown generations: nothing happens.
  void unserve(const GenerationId& id);
  // The order of first faults up to now, for the generation after it (PolicyConfig::history). Waits
  // for the thread. Not served: nothing.
  std::vector<HistoryEntry> history(const GenerationId& id);
  void close();  // waits for the thread

  std::shared_ptr<const ServerStats> stats(const GenerationId& id) const;  // nullptr: not served
  std::vector<std::shared_ptr<const ServerStats>> all_stats() const;
  const StrayStats& stray() const { return stray_; }

 private:
  // Pages of one turn that are told in runs: zeros, or refused ones, to the group or one peer.
  struct Answers {
    Type type = Type::kZero;
    uint32_t peer = 0;
    bool pushed = false;
    uint8_t cursor = 0;
    std::vector<Run> runs;
  };
  struct Served {
    Served(Generation g, const BootId& boot, std::shared_ptr<ServerStats> s)
        : generation(std::move(g)),
          sealer(generation.id, generation.key, boot, Side::kServer),
          policy(generation.policy, generation.provider->pages()),
          stats(std::move(s)) {}
    Generation generation;
    Sealer sealer;
    PeerTable peers;
    Policy policy;
    std::vector<Answers> answers;  // gathered for a few packets
    std::shared_ptr<ServerStats> stats;
  };

  explicit Server(const Options& options);
  void wake();
  void run();
  bool look(TimeNs ready);
  size_t receive();
  void handle(const uint8_t* data, size_t size, const sockaddr_in& from, TimeNs now);
  void welcome(Served& served, Peer& peer, uint64_t echo, const sockaddr_in& to);
  TimeNs pump();  // sends a bounded number of pages; when to come again
  bool answer(Served& served, const Policy::Item& item);  // false: nothing but a few bytes
  void answer_page(Served& served, const Policy::Item& item, const sockaddr_in& to);
  bool answer_packed(Served& served, const Policy::Item& item, const sockaddr_in& to);
  void answer_parity(Served& served, const Policy::Item& item, const sockaddr_in& to);
  void announce(Served& served, const Policy::Item& item, const sockaddr_in& to);
  void take(Served& served, uint32_t peer, TimeNs now);  // request_
  void tell(Served& served, const Policy::Item& item, Type type, bool error);
  void send_runs(Served& served);
  void publish(Served& served, TimeNs now);
  void emit(Served& served, Header* header, const uint8_t* body, size_t size, const sockaddr_in& to,
            const uint8_t* head = nullptr, size_t head_bytes = 0);
  void flush();

  const Options options_;
  const unsigned fragments_;
  sockaddr_in address_ = {};  // told in announces
  Fd socket_;
  Fd wake_;
  std::thread thread_;
  StrayStats stray_;

  mutable std::mutex mutex_;  // guards the three below
  std::unordered_map<GenerationId, std::shared_ptr<ServerStats>, IdHash> stats_;
  std::vector<std::function<void()>> commands_;
  bool closing_ = false;
  std::mutex join_mutex_;

  // The thread's own.
  Spin spin_{"SNOWFLOCK_MCDIST_SPIN"};
  bool faulted_ = false;  // a fault was asked for since the last look
  std::unordered_map<GenerationId, std::unique_ptr<Served>, IdHash> served_;
  std::unordered_map<uint32_t, Served*> by_tag_;  // what a packet's header names
  ReceiveBatch received_;
  SendBatch batch_;
  Served* batch_of_ = nullptr;
  TimeNs mean_at_ = 0;
  Request request_;
  std::vector<uint8_t> body_;
  std::vector<uint8_t> parity_;
  Packer packer_;
  uint8_t packed_[kPageBytes];
  alignas(64) uint8_t page_[kPageBytes + kMaxFragments] = {};  // zeros pad the last fragment
  uint8_t clear_[kMaxMtuBytes];
};

}  // namespace sf::mcdist
