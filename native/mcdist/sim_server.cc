// What server.cc does around Policy: a thread that takes requests in batches, then sends a turn.
#include <algorithm>

#include "mcdist/sim.h"

namespace sf::mcdist {
namespace {

constexpr size_t kTurnPages = 16;      // server.cc: pages sent before new requests are looked at
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
      policy_(std::make_unique<Policy>(config.policy)),
      served_(config.pages) {}

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
  policy_ = std::make_unique<Policy>(config_.policy);
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
      send(client, item, now);
      spent += config_.page_cpu;
    }
    if (!direct_.empty()) ready = now;
  } else {
    Policy::Item item;
    for (size_t i = 0; i < kTurnPages && room() && policy_->next(now, &item); i++) {
      send(kEverybody, item, now);
      spent += config_.page_cpu;
    }
    send_runs(&zeros_, Type::kZero, kEverybody);
    ready = policy_->ready_at(now);
  }
  result_->max_queued = std::max<uint64_t>(result_->max_queued, queued());
  busy_until_ = now + spent;
  if (!received_.empty()) schedule(busy_until_);
  if (ready == kNever) return;
  if (!room()) ready = std::max(ready, network_->server_room_at(config_.server_send_bytes / 2));
  schedule(std::max(ready, busy_until_));
}

void SimServer::welcome(uint32_t client, uint64_t cookie) {
  SimAnswer answer;
  answer.type = Type::kWelcome;
  answer.to = client;
  answer.fragments = 1;
  answer.cookie = cookie;
  answer.bytes = kLongOverheadBytes + kWelcomeBody + kUdpIpBytes;
  network_->answer(std::move(answer));
  result_->welcomes++;
}

// As PeerTable and Server::handle(): the peer heard longest ago makes room.
void SimServer::handle(const SimRequest& request, TimeNs now) {
  auto found = peers_.find(request.client);
  if (found == peers_.end()) {
    if (peers_.size() >= config_.max_peers) {
      const uint32_t gone = order_.back();
      order_.pop_back();
      policy_->forget(peers_.find(gone)->second.id);
      peers_.erase(gone);
      result_->evicted_peers++;
    }
    order_.push_front(request.client);
    found = peers_.emplace(request.client, Known{++cookies_, ++ids_, order_.begin()}).first;
  } else {
    order_.splice(order_.begin(), order_, found->second.at);
  }
  Known& peer = found->second;
  if (request.body.cookie != peer.cookie) return welcome(request.client, peer.cookie);
  policy_->report(peer.id, request.body.receive_kbps * 1000.0, now);
  if (request.body.runs.empty()) return welcome(request.client, peer.cookie);
  take(peer.id, request, now);
}

void SimServer::take(uint32_t peer, const SimRequest& request, TimeNs now) {
  bool full[2] = {false, false};
  size_t looked = 0;
  for (const Run& run : request.body.runs) {
    const Urgency urgency = run.urgent ? Urgency::kFault : Urgency::kPrefetch;
    for (uint32_t i = 0; i < run.count; i++) {
      if (config_.unicast) {
        const PageIndex page = run.first + i;
        if (!direct_index_.insert(direct_key(request.client, page)).second) {
          result_->merged++;
          continue;
        }
        direct_.emplace_back(request.client, Policy::Item{page, run.fragments, peer, urgency});
        continue;
      }
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
}

void SimServer::send(uint32_t to, const Policy::Item& item, TimeNs now) {
  if (item.page >= config_.pages) network_->violation("a page beyond the end was to be sent");
  if (!served_[item.page]) {
    served_[item.page] = true;
    result_->distinct_pages++;
  }
  uint64_t wire_bytes = kRunBytes;
  if (network_->zero(item.page)) {
    Run run;
    run.first = item.page;
    result_->zero_pages_served++;
    zeros_.push_back(run);
    if (to != kEverybody) send_runs(&zeros_, Type::kZero, to);
  } else {
    const auto all = static_cast<uint8_t>((1 << config_.fragments) - 1);
    SimAnswer answer;
    answer.to = to;
    answer.page = item.page;
    answer.fragments = item.fragments == 0 ? all : item.fragments & all;
    answer.sum = network_->sum_of(item.page);
    answer.bytes = symbol_bytes(config_.fragments) + kOverheadBytes + kUdpIpBytes;
    wire_bytes = answer.bytes * static_cast<unsigned>(__builtin_popcount(answer.fragments));
    network_->answer(std::move(answer));
    result_->pages_served++;
  }
  if (!config_.unicast) policy_->sent(item, wire_bytes, now);
}

void SimServer::send_runs(std::vector<Run>* runs, Type type, uint32_t to) {
  if (runs->empty()) return;
  SimAnswer answer;
  answer.type = type;
  answer.to = to;
  answer.fragments = 1;
  answer.bytes = kOverheadBytes + runs->size() * kRunBytes + kUdpIpBytes;
  answer.runs = std::move(*runs);
  runs->clear();
  network_->answer(std::move(answer));
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
