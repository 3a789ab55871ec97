// What server.cc does around Policy: a thread that takes requests in batches, then sends a turn.
#include <algorithm>
#include <bit>

#include "mcdist/sim.h"

namespace sf::mcdist {
namespace {

// As in server.cc: what is sent before new requests are looked at.
constexpr size_t kTurnPages = 15;
constexpr size_t kTurnCheapPages = 512;
constexpr size_t kTurnRuns = 128;
constexpr size_t kTurnRequests = 64;   // ReceiveBatch
constexpr size_t kPacketPages = 4096;  // server.cc
// What the kernel charges a receive buffer for a small packet.
constexpr uint64_t kSmallPacketBytes = 768;

uint64_t direct_key(uint32_t client, PageIndex page) { return page << 24 | client; }

}  // namespace

SimServer::SimServer(const SimConfig& config, SimNetwork* network, SimResult* result)
    : config_(config),
      network_(network),
      result_(result),
      policy_(std::make_unique<Policy>(config.policy, config.pages)),
      served_(config.pages),
      pushed_(config.pages) {}

void SimServer::schedule(TimeNs at) {
  if (at == kNever || at >= armed_) return;
  armed_ = at;
  network_->wake(SimEvent::Kind::kServer, 0, at);
}

void SimServer::arrived(SimRequest request, TimeNs now) {
  if (!alive_) return;
  if (received_bytes_ + kSmallPacketBytes > config_.server_receive_bytes) {
    result_->requests_dropped++;
    return;
  }
  received_bytes_ += kSmallPacketBytes;
  const bool was_idle = received_.empty();
  received_.push_back(std::move(request));
  if (was_idle) schedule(std::max(busy_until_, now + config_.wake));
}

void SimServer::restart(TimeNs now) {
  alive_ = true;
  policy_ = std::make_unique<Policy>(config_.policy, config_.pages);
  life_++;
  pushed_.assign(config_.pages, false);
  client_of_.clear();
  runs_.clear();
  peers_.clear();
  order_.clear();
  received_.clear();
  received_bytes_ = 0;
  direct_.clear();
  direct_index_.clear();
  schedule(now);
}

void SimServer::loop(TimeNs now) {
  if (armed_ > now) return;  // an earlier wake-up came instead
  armed_ = kNever;
  if (!alive_) return;
  if (now < busy_until_) return schedule(busy_until_);
  TimeNs spent = 0;
  for (size_t i = 0; i < kTurnRequests && !received_.empty(); i++) {
    const SimRequest request = std::move(received_.front());
    received_.pop_front();
    received_bytes_ -= kSmallPacketBytes;
    spent += config_.request_cpu;
    handle(request, now);
  }
  TimeNs ready = kNever;
  const auto room = [&] { return network_->server_backlog_bytes() < config_.server_send_bytes; };
  if (config_.unicast) {
    for (size_t i = 0; i < kTurnPages && !direct_.empty() && room(); i++) {
      const auto [client, item] = direct_.front();
      direct_.pop_front();
      direct_index_.erase(direct_key(client, item.page));
      send_page(client, item, now);
      spent += config_.page_cpu;
    }
    if (!direct_.empty()) ready = now;
  } else {
    Policy::Item item;
    size_t pages = 0;
    size_t cheap = 0;
    const auto next = [&] {
      policy_->link_busy(network_->server_backlog_bytes() > Policy::kIdleBytes);
      return policy_->next(now, &item);
    };
    while (pages < kTurnPages && cheap < kTurnCheapPages && runs_.size() < kTurnRuns && room() &&
           next()) {
      (send(item, now) ? pages : cheap)++;
    }
    spent += static_cast<TimeNs>(pages) * config_.page_cpu;
    send_runs();
    if (!room()) policy_->waited();
    ready = policy_->ready_at(now);
  }
  result_->max_queued = std::max<uint64_t>(result_->max_queued, queued());
  busy_until_ = now + spent;
  if (!received_.empty()) schedule(busy_until_);
  if (ready == kNever) return;
  if (!room()) ready = std::max(ready, network_->server_room_at(config_.server_send_bytes / 2));
  schedule(std::max(ready, busy_until_));
}

void SimServer::welcome(uint32_t client, const Known& peer, TimeNs now) {
  SimAnswer answer;
  answer.type = Type::kWelcome;
  answer.to = client;
  answer.fragments = 1;
  answer.cookie = peer.cookie;
  answer.bytes = kLongOverheadBytes + kWelcomeBody + kUdpIpBytes;
  network_->answer(std::move(answer));
  result_->welcomes++;
  if (!config_.unicast) policy_->introduce(peer.id, now);
}

// As PeerTable and Server::handle(): the peer heard longest ago makes room.
void SimServer::handle(const SimRequest& request, TimeNs now) {
  auto found = peers_.find(request.client);
  if (found == peers_.end()) {
    if (peers_.size() >= config_.max_peers) {
      auto gone = peers_.find(order_.back());
      if (now - gone->second.heard < PeerTable::kKeep) {
        result_->refused_peers++;
        return;
      }
      order_.pop_back();
      policy_->forget(gone->second.id);
      client_of_.erase(gone->second.id);
      peers_.erase(gone);
      result_->evicted_peers++;
    }
    order_.push_front(request.client);
    ids_++;
    found =
        peers_.emplace(request.client, Known{life_ << 32 | ids_, ids_, now, order_.begin()}).first;
    client_of_[ids_] = request.client;
  } else {
    order_.splice(order_.begin(), order_, found->second.at);
    found->second.heard = now;
  }
  const Known& peer = found->second;
  const Request& body = request.body;
  if (body.cookie != peer.cookie) return welcome(request.client, peer, now);
  if (config_.unicast) {
    return body.runs.empty() ? welcome(request.client, peer, now) : take_direct(request);
  }
  policy_->heard(peer.id,
                 {body.receive_kbps * 1000.0, body.unicast_only, body.subscribe, body.history,
                  body.room * kRoomUnit},
                 now);
  if (body.runs.empty() && body.reports.empty()) return welcome(request.client, peer, now);
  take(peer.id, request, now);
}

void SimServer::take_direct(const SimRequest& request) {
  for (const Run& run : request.body.runs) {
    for (PageIndex page = run.first; page < run.first + run.count; page++) {
      if (!direct_index_.insert(direct_key(request.client, page)).second) {
        result_->merged++;
        continue;
      }
      Policy::Item item;
      item.page = page;
      item.fragments = run.fragments;
      direct_.emplace_back(request.client, item);
    }
  }
}

void SimServer::take(uint32_t peer, const SimRequest& request, TimeNs now) {
  bool full[2] = {false, false};
  size_t looked = 0;
  for (const Run& run : request.body.runs) {
    const Urgency urgency = run.urgent ? Urgency::kFault : Urgency::kPrefetch;
    for (uint32_t i = 0; i < run.count; i++) {
      if (full[static_cast<size_t>(urgency)] || ++looked > kPacketPages) {
        result_->queue_dropped += run.count - i;
        break;
      }
      switch (policy_->request(peer, run.first + i, urgency, run.retry, run.fragments, now)) {
        case Policy::Verdict::kQueued:
          break;
        case Policy::Verdict::kMerged:
          result_->merged++;
          break;
        case Policy::Verdict::kLockstep:
          result_->lockstep_ignored++;
          break;
        case Policy::Verdict::kQueueFull:
        case Policy::Verdict::kPeerFull:
          result_->queue_dropped++;
          full[static_cast<size_t>(urgency)] = true;
          break;
      }
    }
  }
  for (const BlockReport& report : request.body.reports) {
    result_->reports++;
    policy_->report(peer, report, now);
  }
}

void SimServer::served(PageIndex page) {
  if (page >= config_.pages) network_->violation("a page beyond the end was to be sent");
  if (served_[page]) return;
  served_[page] = true;
  result_->distinct_pages++;
}

bool SimServer::send(const Policy::Item& item, TimeNs now) {
  uint32_t to = kEverybody;
  if (item.peer != 0) {
    auto found = client_of_.find(item.peer);
    if (found == client_of_.end()) {  // evicted since it asked
      policy_->sent(item, Policy::Outcome::kRefused, 0, now);
      return false;
    }
    to = found->second;
  }
  if (item.kind == Policy::Item::Kind::kAnnounce) {
    announce(to, item, now);
    return false;
  }
  if (item.kind == Policy::Item::Kind::kParity) {
    send_parity(item, now);
    return true;
  }
  if (item.pushed && item.page < config_.pages) {
    if (pushed_[item.page]) {
      // A push that begins anew, for somebody who took part in none, may.
      if (config_.policy.push == PushMode::kBehind || policy_->subscribers() > 1) {
        network_->violation("page " + std::to_string(item.page) + " was pushed twice");
      }
    }
    pushed_[item.page] = true;
    result_->pages_pushed++;
  }
  if (!network_->zero(item.page)) {
    send_page(to, item, now);
    return true;
  }
  served(item.page);
  result_->zero_pages_served++;
  tell(to, item, Type::kZero);
  policy_->sent(item, Policy::Outcome::kZero, kRunBytes, now);
  return false;
}

void SimServer::send_page(uint32_t to, const Policy::Item& item, TimeNs now) {
  served(item.page);
  if (config_.unicast && network_->zero(item.page)) {
    result_->zero_pages_served++;
    tell(to, item, Type::kZero);
    return send_runs();
  }
  const auto all = static_cast<uint8_t>((1 << config_.fragments) - 1);
  SimAnswer answer;
  answer.to = to;
  answer.page = item.page;
  answer.fragments = item.fragments == 0 ? all : item.fragments & all;
  answer.pushed = item.pushed;
  answer.sum = network_->sum_of(item.page);
  answer.bytes = symbol_bytes(config_.fragments) + kOverheadBytes + kUdpIpBytes;
  const auto symbols = static_cast<unsigned>(__builtin_popcount(answer.fragments));
  const uint64_t wire_bytes = answer.bytes * symbols;
  network_->answer(std::move(answer));
  result_->pages_served++;
  if (item.repair) result_->repair_symbols += symbols;
  if (to != kEverybody) result_->unicast_answers++;
  if (!config_.unicast) policy_->sent(item, Policy::Outcome::kData, wire_bytes, now);
}

void SimServer::send_parity(const Policy::Item& item, TimeNs now) {
  // Eight at most to an answer: a bit each.
  unsigned left = item.parities;
  uint64_t bytes = 0;
  while (left > 0) {
    const unsigned some = std::min(left, 8U);
    SimAnswer answer;
    answer.type = Type::kParity;
    answer.page = item.page;
    answer.parity = item.parity;
    answer.fragments = static_cast<uint8_t>((1U << some) - 1);
    answer.bytes = symbol_bytes(config_.fragments) + kParityFixed + kOverheadBytes + kUdpIpBytes;
    bytes += answer.bytes * some;
    network_->answer(std::move(answer));
    left -= some;
  }
  result_->parity_symbols += item.parities;
  policy_->sent(item, Policy::Outcome::kData, bytes, now);
}

void SimServer::announce(uint32_t to, const Policy::Item& item, TimeNs now) {
  send_runs();  // as server.cc: zeros that were passed are told first
  SimAnswer answer;
  answer.type = Type::kAnnounce;
  answer.to = to;
  answer.fragments = 1;
  answer.pushing = item.pushed;
  answer.position = item.position;
  answer.peers = std::bit_ceil(std::max(1U, item.peers));  // as encode_announce()
  answer.bytes = kLongOverheadBytes + kAnnounceBody + kUdpIpBytes;
  policy_->sent(item, Policy::Outcome::kData, answer.bytes, now);
  network_->answer(std::move(answer));
  result_->announces++;
}

void SimServer::tell(uint32_t to, const Policy::Item& item, Type type) {
  for (Runs& some : runs_) {
    if (some.type != type || some.to != to || some.pushed != item.pushed) continue;
    Run& last = some.runs.back();
    if (last.first + last.count == item.page && last.count < kMaxRunPages) {
      last.count++;
      return;
    }
    if (some.runs.size() >= kTurnRuns) continue;
    some.runs.emplace_back().first = item.page;
    return;
  }
  runs_.push_back({type, to, item.pushed, {}});
  runs_.back().runs.emplace_back().first = item.page;
}

void SimServer::send_runs() {
  for (Runs& some : runs_) {
    SimAnswer answer;
    answer.type = some.type;
    answer.to = some.to;
    answer.page = some.runs.front().first;
    answer.pushed = some.pushed;
    answer.fragments = 1;
    answer.bytes = kOverheadBytes + some.runs.size() * kRunBytes + kUdpIpBytes;
    answer.runs = std::move(some.runs);
    network_->answer(std::move(answer));
  }
  runs_.clear();
}

void SimServer::finish() const {
  result_->cuts = policy_->cuts();
  result_->cuts_undone = policy_->cuts_undone();
}

void SimServer::check() const {
  if (received_bytes_ > config_.server_receive_bytes) network_->violation("receive buffer overrun");
  if (config_.unicast) return;
  if (policy_->queued() > 2 * size_t{config_.policy.queue_pages}) {
    network_->violation("the server's queue holds " + std::to_string(policy_->queued()) + " pages");
  }
  const double rate = policy_->rate();
  if (!(rate >= config_.policy.min_rate && rate <= config_.policy.max_rate)) {
    network_->violation("the rate limit is " + std::to_string(rate) + " bytes a second");
  }
}

}  // namespace sf::mcdist
