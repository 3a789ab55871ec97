#include "mcdist/server.h"

#include <poll.h>
#include <sodium.h>
#include <sys/eventfd.h>

#include <algorithm>

namespace sf::mcdist {
namespace {

// Pages of one generation sent before the others, and new requests, get their turn.
constexpr size_t kTurnPages = 16;
// Pages of one request packet that are looked at; honest clients ask for fewer at a time.
constexpr size_t kPacketPages = 4096;

void add_run(std::vector<Run>* runs, PageIndex page, bool error) {
  if (!runs->empty()) {
    Run& last = runs->back();
    if (last.first + last.count == page && last.count < kMaxRunPages && last.error == error) {
      last.count++;
      return;
    }
  }
  Run run;
  run.first = page;
  run.error = error;
  runs->push_back(run);
}

}  // namespace

Server::Server(const Options& options)
    : options_(options), fragments_(fragments_for(options.mtu_bytes)), batch_(options.mtu_bytes) {}

Status Server::Open(const Options& options, std::shared_ptr<Server>* out) {
  if (::sodium_init() < 0) return Status::Error("E_INTERNAL", "libsodium does not initialize");
  if (options.mtu_bytes < kMinMtuBytes || options.mtu_bytes > kMaxMtuBytes) {
    return Status::Error(
        "E_ARGUMENT", "MTU " + std::to_string(options.mtu_bytes) + " is not between 1280 and 9216");
  }
  std::shared_ptr<Server> server(new Server(options));
  Status status =
      open_unicast(options.bind, options.interface_address, options.ttl, &server->socket_);
  if (!status.ok()) return status;
  server->wake_ = Fd(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!server->wake_.valid()) return Status::Errno("E_INTERNAL", "eventfd");
  server->thread_ = std::thread([raw = server.get()] { raw->run(); });
  *out = std::move(server);
  return Status::Ok();
}

Server::~Server() { close(); }

void Server::wake() {
  const uint64_t one = 1;
  (void)!::write(wake_.get(), &one, sizeof one);
}

Status Server::serve(Generation generation) {
  const GenerationId id = generation.id;
  auto stats = std::make_shared<ServerStats>();
  BootId boot;
  ::randombytes_buf(boot.data(), boot.size());
  auto served = std::make_shared<std::unique_ptr<Served>>(
      std::make_unique<Served>(std::move(generation), boot, stats));
  {
    std::lock_guard lock(mutex_);
    if (closing_) return Status::Error("E_CLOSED", "the mcdist server is closed");
    for (const auto& [other, unused] : stats_) {
      if (tag_of(other) != tag_of(id)) continue;
      return Status::Error("E_EXISTS", other == id
                                           ? "the generation is served already"
                                           : "a generation is served whose id begins alike");
    }
    stats_.emplace(id, stats);
    commands_.push_back([this, id, served] {
      by_tag_[tag_of(id)] = served->get();
      served_[id] = std::move(*served);
    });
  }
  wake();
  return Status::Ok();
}

void Server::unserve(const GenerationId& id) {
  auto done = std::make_shared<std::promise<void>>();
  auto waited = done->get_future();
  bool closing;
  {
    std::lock_guard lock(mutex_);
    closing = closing_;
    if (!closing) {
      stats_.erase(id);
      // Under the lock that close() takes: the thread runs all commands posted before it ends.
      commands_.push_back([this, id, done] {
        flush();
        if (served_.erase(id) > 0) by_tag_.erase(tag_of(id));
        batch_of_ = nullptr;
        done->set_value();
      });
    }
  }
  if (closing) return close();
  wake();
  waited.wait();
}

void Server::close() {
  {
    std::lock_guard lock(mutex_);
    closing_ = true;
  }
  wake();
  std::lock_guard joining(join_mutex_);
  if (thread_.joinable()) thread_.join();
  socket_.reset();
  std::lock_guard lock(mutex_);
  stats_.clear();
}

std::shared_ptr<const ServerStats> Server::stats(const GenerationId& id) const {
  std::lock_guard lock(mutex_);
  auto found = stats_.find(id);
  return found == stats_.end() ? nullptr : found->second;
}

std::vector<std::shared_ptr<const ServerStats>> Server::all_stats() const {
  std::lock_guard lock(mutex_);
  std::vector<std::shared_ptr<const ServerStats>> all;
  for (const auto& [id, stats] : stats_) all.push_back(stats);
  return all;
}

void Server::run() {
  pollfd watched[2] = {{socket_.get(), POLLIN, 0}, {wake_.get(), POLLIN, 0}};
  for (;;) {
    const TimeNs ready = pump();
    const TimeNs now = now_ns();
    const TimeNs wait = ready == kNever ? 0 : std::max<TimeNs>(ready - now, 0);
    const timespec timeout = {wait / kSecond, wait % kSecond};
    if (::ppoll(watched, 2, ready == kNever ? nullptr : &timeout, nullptr) <= 0) continue;
    if ((watched[1].revents & POLLIN) != 0) {
      uint64_t drained;
      (void)!::read(wake_.get(), &drained, sizeof drained);
      std::vector<std::function<void()>> commands;
      bool closing;
      {
        std::lock_guard lock(mutex_);
        commands.swap(commands_);
        closing = closing_;
      }
      for (auto& command : commands) command();
      if (closing) break;
    }
    if (watched[0].revents != 0) receive(now_ns());
  }
  served_.clear();
}

void Server::receive(TimeNs now) {
  const size_t n = received_.receive(socket_);
  for (size_t i = 0; i < n; i++) {
    handle(received_.data(i), received_.size(i), received_.from(i), now);
  }
  flush();
}

void Server::handle(const uint8_t* data, size_t size, const sockaddr_in& from, TimeNs now) {
  Header header;
  if (!decode_header(data, size, &header)) return count(stray_.bad_packets);
  auto found = by_tag_.find(header.generation);
  if (found == by_tag_.end()) return count(stray_.wrong_generation);
  Served& served = *found->second;
  ServerCounters& counters = served.stats->counters;
  if (header.type != Type::kRequest) return count(counters.bad_packets);
  Peer* peer = served.peers.find(header.boot);
  std::unique_ptr<SenderKey> fresh;
  if (peer == nullptr) {
    fresh = std::make_unique<SenderKey>(served.generation.id, served.generation.key, header.boot,
                                        Side::kClient);
  }
  if (!(peer == nullptr ? fresh : peer->key)->open(data, size, clear_)) {
    return count(counters.auth_failures);
  }
  if (!decode_request(clear_, size - kLongOverheadBytes, served.generation.provider->pages(),
                      &request_)) {
    return count(counters.bad_packets);
  }
  if (peer == nullptr) {
    uint64_t cookie;
    ::randombytes_buf(&cookie, sizeof cookie);
    uint32_t evicted;
    peer = &served.peers.admit(std::move(fresh), cookie | 1, &evicted);  // 0 means "none yet"
    if (evicted != 0) served.policy.forget(evicted);
  }
  if (request_.cookie != peer->cookie) return welcome(served, *peer, header.counter, from);
  if (!peer->window.accept(header.counter)) return count(counters.replays);
  count(counters.requests);
  served.policy.report(peer->id, request_.receive_kbps * 1000.0, now);
  if (request_.runs.empty()) return welcome(served, *peer, header.counter, from);

  // A packet may name more pages than a peer may have queued: past the first that is refused for
  // that reason the rest of its kind is not looked at.
  bool full[2] = {false, false};
  size_t looked = 0;
  for (const Run& run : request_.runs) {
    const Urgency urgency = run.urgent ? Urgency::kFault : Urgency::kPrefetch;
    count(counters.pages_requested, run.count);
    if (run.retry) count(counters.retries, run.count);
    for (uint32_t i = 0; i < run.count; i++) {
      if (full[static_cast<size_t>(urgency)] || ++looked > kPacketPages) {
        count(counters.queue_dropped, run.count - i);
        break;
      }
      const uint8_t mask = run.fragments & ((1 << fragments_) - 1);
      switch (served.policy.request(peer->id, run.first + i, urgency, run.retry, mask, now)) {
        case Policy::Verdict::kQueued:
          break;
        case Policy::Verdict::kMerged:
          count(counters.merged);
          break;
        case Policy::Verdict::kLockstep:
          count(counters.lockstep_ignored);
          break;
        case Policy::Verdict::kQueueFull:
        case Policy::Verdict::kPeerFull:
          count(counters.queue_dropped);
          full[static_cast<size_t>(urgency)] = true;
          break;
      }
    }
  }
}

void Server::welcome(Served& served, Peer& peer, uint64_t echo, const sockaddr_in& to) {
  Welcome answer{peer.cookie, peer.boot, echo, served.generation.provider->pages()};
  encode_welcome(answer, &body_);
  Header header;
  header.type = Type::kWelcome;
  emit(served, &header, body_.data(), body_.size(), to);
  count(served.stats->counters.welcomes);
}

TimeNs Server::pump() {
  TimeNs ready = kNever;
  for (auto& [id, served] : served_) {
    TimeNs now = now_ns();
    Policy::Item item;
    for (size_t i = 0; i < kTurnPages && served->policy.next(now, &item); i++) {
      answer(*served, item);
      now = now_ns();
    }
    send_runs(*served, &served->zeros, Type::kZero);
    send_runs(*served, &served->refused, Type::kNegative);
    flush();
    ServerStats& stats = *served->stats;
    stats.queued.store(served->policy.queued(), std::memory_order_relaxed);
    stats.peers.store(served->peers.size(), std::memory_order_relaxed);
    stats.rate.store(static_cast<uint64_t>(served->policy.rate()), std::memory_order_relaxed);
    stats.rate_cuts.store(served->policy.cuts(), std::memory_order_relaxed);
    if (now - mean_at_ > 50 * kMillisecond) {  // walks all peers
      stats.mean_receive_rate.store(static_cast<uint64_t>(served->policy.mean_receive_rate(now)),
                                    std::memory_order_relaxed);
    }
    ready = std::min(ready, served->policy.ready_at(now));
  }
  if (const TimeNs now = now_ns(); now - mean_at_ > 50 * kMillisecond) mean_at_ = now;
  return ready;
}

void Server::answer(Served& served, const Policy::Item& item) {
  ServerCounters& counters = served.stats->counters;
  uint64_t wire_bytes = kRunBytes;
  const ReadResult result = served.generation.provider->read(item.page, page_);
  if (result == ReadResult::kData) {
    wire_bytes = 0;
    for (unsigned i = 0; i < fragments_; i++) {
      if (item.fragments != 0 && ((item.fragments >> i) & 1) == 0) continue;
      Header header;
      header.type = Type::kPage;
      header.page = item.page;
      header.fragment = static_cast<uint8_t>(i);
      header.fragments = static_cast<uint8_t>(fragments_);
      const size_t length = symbol_bytes(fragments_);
      emit(served, &header, page_ + fragment_offset(i, fragments_), length,
           served.generation.group);
      count(counters.payload_bytes, fragment_length(i, fragments_));
      wire_bytes += length + kOverheadBytes + kUdpIpBytes;
    }
    count(counters.pages_served);
  } else if (result == ReadResult::kZero) {
    add_run(&served.zeros, item.page, false);
    count(counters.zero_pages_served);
  } else {
    add_run(&served.refused, item.page, result == ReadResult::kError);
    count(counters.negative_answers);
  }
  served.policy.sent(item, wire_bytes, now_ns());
}

void Server::send_runs(Served& served, std::vector<Run>* runs, Type type) {
  if (runs->empty()) return;
  // A turn has fewer runs than the smallest MTU holds.
  static_assert(kTurnPages * kRunBytes <= kMinMtuBytes - kUdpIpBytes - kOverheadBytes);
  body_.clear();
  encode_runs(*runs, &body_);
  Header header;
  header.type = type;
  header.page = runs->front().first;
  emit(served, &header, body_.data(), body_.size(), served.generation.group);
  runs->clear();
}

void Server::emit(Served& served, Header* header, const uint8_t* body, size_t size,
                  const sockaddr_in& to) {
  if (batch_.full() || batch_of_ != &served) flush();
  batch_of_ = &served;
  const size_t bytes = served.sealer.seal(header, body, size, batch_.next());
  batch_.commit(bytes, to);
  count(served.stats->counters.packets_sent);
  count(served.stats->counters.wire_bytes, bytes + kUdpIpBytes);
}

void Server::flush() {
  if (batch_.empty()) return;
  const size_t failed = batch_.flush(socket_);
  if (failed > 0) count(batch_of_->stats->counters.send_errors, failed);
}

}  // namespace sf::mcdist
