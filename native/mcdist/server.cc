#include "mcdist/server.h"

#include <poll.h>
#include <sched.h>
#include <sodium.h>
#include <sys/eventfd.h>

#include <algorithm>
#include <utility>

namespace sf::mcdist {
namespace {

// Pages of one generation sent before the others, and new requests, get their turn.
// As many as one segmented send holds at an MTU of 1500.
constexpr size_t kTurnPages = 15;
// Pages of a turn that are zero, refused or not held: they cost a read each and few bytes.
constexpr size_t kTurnCheapPages = 512;
constexpr size_t kTurnRuns = 128;
// Pages of one request packet that are looked at; honest clients ask for fewer at a time.
constexpr size_t kPacketPages = 4096;
// Of a look: then whoever is to ask may need this CPU.
constexpr TimeNs kYieldAfter = 25 * kMicrosecond;

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
  if (status.ok()) status = report_errors(server->socket_);
  if (!status.ok()) return status;
  server->address_ = options.bind;
  if (server->address_.sin_addr.s_addr == INADDR_ANY) {
    server->address_.sin_addr = options.interface_address;
  }
  server->address_.sin_port = htons(bound_port(server->socket_));
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

std::vector<HistoryEntry> Server::history(const GenerationId& id) {
  auto done = std::make_shared<std::promise<std::vector<HistoryEntry>>>();
  auto entries = done->get_future();
  {
    std::lock_guard lock(mutex_);
    if (closing_) return {};
    commands_.push_back([this, id, done] {
      const auto found = served_.find(id);
      if (found == served_.end()) return done->set_value({});
      done->set_value(found->second->policy.history());
    });
  }
  wake();
  return entries.get();
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
  ::pthread_setname_np(::pthread_self(), "mcdist-server");
  pollfd watched[2] = {{socket_.get(), POLLIN, 0}, {wake_.get(), POLLIN, 0}};
  for (;;) {
    const TimeNs ready = pump();
    if (look(ready)) continue;
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
    if ((watched[0].revents & POLLERR) != 0) drain_errors(socket_);
    if (watched[0].revents != 0) receive();
  }
  served_.clear();
}

// After a fault was answered the next one may come at once: looks for it a moment before it sleeps.
// True if something came.
bool Server::look(TimeNs ready) {
  if (!std::exchange(faulted_, false)) return false;
  const TimeNs began = now_ns();
  const auto limit = static_cast<TimeNs>(Spin::kLimit_ns);
  if (ready - began < limit || !spin_.wanted()) return false;
  TimeNs took = 0;
  for (;;) {
    const bool came = receive() > 0;
    if (!came) took = now_ns() - began;
    if (came || took >= limit) {
      spin_.looked(came, static_cast<uint64_t>(took));
      return came;
    }
    if (took >= kYieldAfter) ::sched_yield();
  }
}

size_t Server::receive() {
  const size_t n = received_.receive(socket_);
  if (n == 0) return 0;
  const TimeNs now = now_ns();
  for (size_t i = 0; i < n; i++) {
    handle(received_.data(i), received_.size(i), received_.from(i), now);
  }
  flush();
  return n;
}

void Server::handle(const uint8_t* data, size_t size, const sockaddr_in& from, TimeNs now) {
  Header header;
  if (!decode_header(data, size, &header)) return count(stray_.bad_packets);
  auto found = by_tag_.find(header.generation);
  if (found == by_tag_.end()) return count(stray_.wrong_generation);
  Served& served = *found->second;
  ServerCounters& counters = served.stats->counters;
  if (header.type != Type::kRequest) return count(counters.bad_packets);
  Peer* peer = served.peers.find(header.boot, now);
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
    if (!served.peers.room(now)) return count(counters.peers_refused);
    uint64_t cookie;
    ::randombytes_buf(&cookie, sizeof cookie);
    uint32_t evicted;
    peer = &served.peers.admit(std::move(fresh), cookie | 1, now, &evicted);  // 0 means "none yet"
    if (evicted != 0) served.policy.forget(evicted);
  }
  if (request_.cookie != peer->cookie) return welcome(served, *peer, header.counter, from);
  if (!peer->window.accept(header.counter)) return count(counters.replays);
  count(counters.requests);
  peer->address = from;
  served.policy.heard(peer->id,
                      {request_.receive_kbps * 1000.0, request_.unicast_only, request_.subscribe,
                       request_.history, request_.room * kRoomUnit},
                      now);
  if (request_.runs.empty() && request_.reports.empty()) {
    return welcome(served, *peer, header.counter, from);
  }
  take(served, peer->id, now);
}

void Server::take(Served& served, uint32_t peer, TimeNs now) {
  ServerCounters& counters = served.stats->counters;
  // A packet may name more pages than a peer may have queued: past the first that is refused for
  // that reason the rest of its kind is not looked at.
  bool full[2] = {false, false};
  size_t looked = 0;
  for (const Run& run : request_.runs) {
    const Urgency urgency = run.urgent ? Urgency::kFault : Urgency::kPrefetch;
    count(counters.pages_requested, run.count);
    if (run.retry) count(counters.retries, run.count);
    faulted_ = faulted_ || run.urgent;
    for (uint32_t i = 0; i < run.count; i++) {
      if (full[static_cast<size_t>(urgency)] || ++looked > kPacketPages) {
        count(counters.queue_dropped, run.count - i);
        break;
      }
      const uint8_t mask = run.fragments & ((1 << fragments_) - 1);
      switch (served.policy.request(peer, run.first + i, urgency, run.retry, mask, now)) {
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
  for (const BlockReport& report : request_.reports) {
    count(counters.reports);
    if (report.fragments != fragments_) {
      // What this block was sent in was cut otherwise, by another server: whole pages, then.
      for (uint32_t left = report.wanted; left != 0; left &= left - 1) {
        const PageIndex page =
            report.block * kBlockPages + static_cast<unsigned>(__builtin_ctz(left));
        served.policy.request(peer, page, Urgency::kPrefetch, true, 0, now);
      }
      continue;
    }
    switch (served.policy.report(peer, report, now)) {
      case Repair::Verdict::kTaken:
      case Repair::Verdict::kNothing:
        break;
      case Repair::Verdict::kOnItsWay:
        count(counters.reports_ignored);
        break;
      case Repair::Verdict::kFull:
        count(counters.reports_dropped);
        break;
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
  served.policy.introduce(peer.id, now_ns());
}

TimeNs Server::pump() {
  TimeNs ready = kNever;
  for (auto& [id, served] : served_) {
    TimeNs now = now_ns();
    Policy::Item item;
    size_t pages = 0;
    size_t cheap = 0;
    const auto next = [&] {
      if (served->policy.uses_idle_time()) {
        served->policy.link_busy(unsent_bytes(socket_) > Policy::kIdleBytes || !batch_.empty());
      }
      return served->policy.next(now, &item);
    };
    while (pages < kTurnPages && cheap < kTurnCheapPages && served->answers.size() < kTurnRuns &&
           next()) {
      (answer(*served, item) ? pages : cheap)++;
      now = now_ns();
    }
    send_runs(*served);
    flush();
    publish(*served, now);
    ready = std::min(ready, served->policy.ready_at(now));
  }
  if (const TimeNs now = now_ns(); now - mean_at_ > 50 * kMillisecond) mean_at_ = now;
  return ready;
}

void Server::publish(Served& served, TimeNs now) {
  const auto set = [](std::atomic<uint64_t>& stat, auto value) {
    stat.store(static_cast<uint64_t>(value), std::memory_order_relaxed);
  };
  ServerStats& stats = *served.stats;
  set(stats.queued, served.policy.queued());
  set(stats.peers, served.peers.size());
  set(stats.subscribers, served.policy.subscribers());
  set(stats.rate, served.policy.rate());
  set(stats.rate_cuts, served.policy.cuts());
  set(stats.rate_cuts_undone, served.policy.cuts_undone());
  set(stats.noise_ppm, served.policy.noise() * 1e6);
  set(stats.push_position, served.policy.push_position());
  set(stats.pushing, served.policy.pushing() ? 1 : 0);
  set(stats.history_pages, served.policy.history_pages());
  if (now - mean_at_ > 50 * kMillisecond) {  // walks all peers
    set(stats.mean_receive_rate, served.policy.mean_receive_rate(now));
  }
}

bool Server::answer(Served& served, const Policy::Item& item) {
  sockaddr_in to = served.generation.group;
  if (item.peer != 0) {
    const Peer* peer = served.peers.find(item.peer);
    if (peer == nullptr) {  // evicted since it asked
      served.policy.sent(item, Policy::Outcome::kRefused, 0, now_ns());
      return false;
    }
    to = peer->address;
  }
  switch (item.kind) {
    case Policy::Item::Kind::kAnnounce:
      announce(served, item, to);
      return false;
    case Policy::Item::Kind::kParity:
      answer_parity(served, item, to);
      return true;
    case Policy::Item::Kind::kPage:
      break;
  }
  const ReadResult result = served.generation.provider->read(item.page, page_);
  if (item.replayed) count(served.stats->counters.pages_replayed);
  if (result == ReadResult::kData) {
    answer_page(served, item, to);
    return true;
  }
  // A zero page is told in its run at the end of the turn, with its neighbours. A pushed page that
  // is not held is passed by: who lacks it asks, and hears so.
  if (result == ReadResult::kZero) {
    count(served.stats->counters.zero_pages_served);
    tell(served, item, Type::kZero, false);
  } else if (!item.pushed && !item.replayed) {
    count(served.stats->counters.negative_answers);
    tell(served, item, Type::kNegative, result == ReadResult::kError);
  }
  served.policy.sent(
      item, result == ReadResult::kZero ? Policy::Outcome::kZero : Policy::Outcome::kRefused,
      kRunBytes, now_ns());
  return false;
}

void Server::answer_page(Served& served, const Policy::Item& item, const sockaddr_in& to) {
  if (answer_packed(served, item, to)) return;
  ServerCounters& counters = served.stats->counters;
  const size_t length = symbol_bytes(fragments_);
  size_t symbols = 0;
  for (unsigned i = 0; i < fragments_; i++) {
    if (item.fragments != 0 && ((item.fragments >> i) & 1) == 0) continue;
    Header header;
    header.type = Type::kPage;
    header.page = item.page;
    header.fragment = static_cast<uint8_t>(i);
    header.fragments = static_cast<uint8_t>(fragments_);
    header.pushed = item.pushed;
    header.cursor = item.cursor;
    emit(served, &header, page_ + fragment_offset(i, fragments_), length, to);
    count(counters.payload_bytes, fragment_length(i, fragments_));
    symbols++;
  }
  count(counters.pages_served);
  if (item.pushed) count(counters.pages_pushed);
  if (item.repair) count(counters.repair_symbols, symbols);
  if (item.peer != 0) count(counters.unicast_answers);
  served.policy.sent(item, Policy::Outcome::kData,
                     symbols * (length + kOverheadBytes + kUdpIpBytes), now_ns());
}

// A whole page in one packet, if that is wished and it fits.
bool Server::answer_packed(Served& served, const Policy::Item& item, const sockaddr_in& to) {
  if (!served.generation.policy.pack || item.fragments != 0 || fragments_ == 1) return false;
  const size_t bytes =
      packer_.pack(page_, packed_, options_.mtu_bytes - kUdpIpBytes - kOverheadBytes);
  if (bytes == 0) return false;
  ServerCounters& counters = served.stats->counters;
  Header header;
  header.type = Type::kPacked;
  header.page = item.page;
  header.pushed = item.pushed;
  header.cursor = item.cursor;
  emit(served, &header, packed_, bytes, to);
  count(counters.payload_bytes, kPageBytes);
  count(counters.packed_pages);
  count(counters.pages_served);
  if (item.pushed) count(counters.pages_pushed);
  if (item.repair) count(counters.repair_symbols, fragments_);
  if (item.peer != 0) count(counters.unicast_answers);
  served.policy.sent(item, Policy::Outcome::kData, bytes + kOverheadBytes + kUdpIpBytes, now_ns());
  return true;
}

void Server::answer_parity(Served& served, const Policy::Item& item, const sockaddr_in& to) {
  ServerCounters& counters = served.stats->counters;
  const size_t length = symbol_bytes(fragments_);
  const unsigned count_of = item.parities;
  parity_.resize(count_of * length);
  const BlockReader read = [&](unsigned page) -> const uint8_t* {
    const ReadResult result = served.generation.provider->read(item.page + page, page_);
    if (result == ReadResult::kZero) std::memset(page_, 0, kPageBytes);
    return result == ReadResult::kData || result == ReadResult::kZero ? page_ : nullptr;
  };
  if (!encode_parity(fragments_, item.parity.cover, item.parity.index, count_of, read,
                     parity_.data())) {
    // A page of the cover cannot be read any more: each is asked for alone, and that one refused.
    return served.policy.sent(item, Policy::Outcome::kRefused, 0, now_ns());
  }
  uint8_t prefix[kParityFixed];
  for (unsigned i = 0; i < count_of; i++) {
    Parity parity = item.parity;
    parity.index = static_cast<uint8_t>(item.parity.index + i);
    encode_parity(parity, prefix);
    Header header;
    header.type = Type::kParity;
    header.page = item.page;
    header.fragments = static_cast<uint8_t>(fragments_);
    emit(served, &header, parity_.data() + i * length, length, to, prefix, sizeof prefix);
  }
  count(counters.parity_symbols, count_of);
  served.policy.sent(item, Policy::Outcome::kData,
                     count_of * (length + kParityFixed + kOverheadBytes + kUdpIpBytes), now_ns());
}

void Server::announce(Served& served, const Policy::Item& item, const sockaddr_in& to) {
  Announce announce;
  announce.address = address_.sin_addr;
  announce.port = ntohs(address_.sin_port);
  announce.pages = served.generation.provider->pages();
  announce.held = std::min(served.generation.provider->held(), announce.pages);
  announce.complete = announce.held == announce.pages;
  announce.pushing = item.pushed;
  announce.cursor = item.cursor;
  announce.position = item.position;
  announce.peers = item.peers;
  encode_announce(announce, &body_);
  Header header;
  header.type = Type::kAnnounce;
  // Zeros that were passed are told first: what the position has passed has been sent.
  send_runs(served);
  emit(served, &header, body_.data(), body_.size(), to);
  count(served.stats->counters.announces);
  served.policy.sent(item, Policy::Outcome::kData, body_.size() + kLongOverheadBytes + kUdpIpBytes,
                     now_ns());
}

void Server::tell(Served& served, const Policy::Item& item, Type type, bool error) {
  for (Answers& some : served.answers) {
    if (some.type == type && some.peer == item.peer && some.pushed == item.pushed &&
        some.cursor == item.cursor && some.runs.size() < kTurnRuns) {
      return add_run(&some.runs, item.page, error);
    }
  }
  served.answers.push_back({type, item.peer, item.pushed, item.cursor, {}});
  add_run(&served.answers.back().runs, item.page, error);
}

void Server::send_runs(Served& served) {
  // One packet takes all runs of an entry.
  static_assert(kTurnRuns * kRunBytes <= kMinMtuBytes - kUdpIpBytes - kOverheadBytes);
  for (const Answers& some : served.answers) {
    sockaddr_in to = served.generation.group;
    if (some.peer != 0) {
      const Peer* peer = served.peers.find(some.peer);
      if (peer == nullptr) continue;
      to = peer->address;
    }
    body_.clear();
    encode_runs(some.runs, &body_);
    Header header;
    header.type = some.type;
    header.page = some.runs.front().first;
    header.pushed = some.pushed;
    header.cursor = some.cursor;
    emit(served, &header, body_.data(), body_.size(), to);
  }
  served.answers.clear();
}

void Server::emit(Served& served, Header* header, const uint8_t* body, size_t size,
                  const sockaddr_in& to, const uint8_t* head, size_t head_bytes) {
  if (batch_.full() || (batch_of_ != &served && !batch_.empty())) flush();
  batch_of_ = &served;
  const size_t bytes = served.sealer.seal(header, body, size, batch_.next(), head, head_bytes);
  batch_.commit(bytes, to);
  count(served.stats->counters.packets_sent);
  count(served.stats->counters.wire_bytes, bytes + kUdpIpBytes);
}

void Server::flush() {
  if (batch_.empty()) return;
  const SendBatch::Result result = batch_.flush(socket_);
  if (result.failed > 0) count(batch_of_->stats->counters.send_errors, result.failed);
  if (result.waits > 0) {
    count(batch_of_->stats->counters.send_waits, result.waits);
    batch_of_->policy.waited();
  }
}

}  // namespace sf::mcdist
