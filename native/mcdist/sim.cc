#include "mcdist/sim.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace sf::mcdist {
namespace {

constexpr TimeNs kRateMemory = 100 * kMillisecond;  // client.cc
constexpr uint64_t kStopEvery = 4096;               // events between looks at the stop flag

struct Violation : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// As client.cc estimates what it receives.
struct Rate {
  double bytes_per_s = 0;
  TimeNs at = 0;
  double now(TimeNs now) const {
    return bytes_per_s * std::exp(-static_cast<double>(now - at) / kRateMemory);
  }
  void add(uint64_t bytes, TimeNs now_ns) {
    bytes_per_s =
        now(now_ns) + static_cast<double>(bytes) / (static_cast<double>(kRateMemory) / kSecond);
    at = now_ns;
  }
};

// Things under way, named by a number while their event is in the heap.
template <class T>
class Slots {
 public:
  uint32_t put(T what) {
    if (free_.empty()) {
      slots_.push_back(std::move(what));
      return static_cast<uint32_t>(slots_.size() - 1);
    }
    const uint32_t slot = free_.back();
    free_.pop_back();
    slots_[slot] = std::move(what);
    return slot;
  }
  T take(uint32_t slot) {
    free_.push_back(slot);
    return std::move(slots_[slot]);
  }

 private:
  std::vector<T> slots_;
  std::vector<uint32_t> free_;
};

uint32_t count_of(const SimConfig& config) {
  uint32_t clients = 0;
  for (const SimSegment& segment : config.segments) clients += segment.clients;
  return clients;
}

class Simulation final : public SimNetwork {
 public:
  Simulation(const SimConfig& config, SimResult* result)
      : config_(config),
        result_(result),
        random_(config.seed),
        count_(count_of(config)),
        image_(config.pages, count_, config.fragments),
        up_(count_),
        unicast_rate_(count_) {
    seed_ = config.seed;
    zero_share_ = config.zero_share;
    result->start.assign(count_, kNever);
    result->first_page = result->finished = result->start;
    result->at_speed.assign(count_, 0);
    result->waited.assign(count_, 0);
    result->faults.assign(count_, 0);
    result->outcome.assign(count_, 0);
    ingress_.bytes_per_s = egress_.bytes_per_s = config.server_bytes_per_s;
    ingress_.queue_bytes = 512 * 1024;  // the switch's port
    for (const SimSegment& segment : config.segments) {
      const uint32_t first = segments_.empty() ? 0 : segments_.back().end;
      Segment made{first, first + segment.clients, segment.loss, {}, {}, segment.delay};
      made.link.bytes_per_s = segment.bytes_per_s;
      made.link.delay = segment.delay;
      made.link.queue_bytes = segment.queue_bytes;
      segments_.push_back(made);
    }
    server_ = std::make_unique<SimServer>(config_, this, result);
    clients_ = std::make_unique<SimClients>(config_, this, &image_, result);
  }

  void run(const std::atomic<bool>& stop);

  TimeNs now() const override { return now_; }
  void wake(SimEvent::Kind kind, uint32_t subject, TimeNs at) override {
    events_.at(std::max(at, now_), kind, subject);
  }
  void request(SimRequest request) override;
  void answer(SimAnswer answer) override;
  uint64_t server_backlog_bytes() const override { return egress_.backlog_bytes(now_); }
  TimeNs server_room_at(uint64_t bytes) const override { return egress_.drained_to(bytes); }
  double receive_rate(uint32_t client) const override {
    return segments_[clients_->segment_of(client)].rate.now(now_) + unicast_rate_[client].now(now_);
  }
  bool reached(uint32_t client) const override { return up_.has(client); }
  [[noreturn]] void violation(const std::string& what) const override {
    throw Violation("seed " + std::to_string(config_.seed) + ", at " +
                    std::to_string(static_cast<double>(now_) / 1e6) + " ms: " + what);
  }

 private:
  struct Segment {
    uint32_t first;
    uint32_t end;
    double loss;
    SimLink link;
    Rate rate;
    TimeNs delay;
  };
  struct Delivery {
    SimAnswer answer;
    uint32_t segment;
  };
  void schedule();
  void handle(const SimEvent& event);
  void deliver(Delivery delivery);
  void deliver_page(const SimAnswer& answer, uint32_t first, uint32_t end);
  void deliver_runs(const SimAnswer& answer, uint32_t first, uint32_t end);
  void deliver_parity(const SimAnswer& answer, uint32_t first, uint32_t end);
  void change(const SimChange& change);
  void check();

  const SimConfig& config_;
  SimResult* const result_;
  SimRandom random_;
  const uint32_t count_;
  SimImage image_;
  SimSet up_;
  std::vector<Rate> unicast_rate_;
  SimEvents events_;
  TimeNs now_ = 0;
  SimLink ingress_, egress_;
  std::vector<Segment> segments_;
  Slots<SimRequest> requests_;
  Slots<Delivery> deliveries_;
  std::vector<SimLoss> losses_;
  std::unique_ptr<SimServer> server_;
  std::unique_ptr<SimClients> clients_;
};

void Simulation::request(SimRequest request) {
  const Segment& segment = segments_[clients_->segment_of(request.client)];
  if (!up_.has(request.client) || (segment.loss > 0 && random_.unit() < segment.loss)) {
    result_->requests_dropped++;
    return;
  }
  const TimeNs at = now_ + segment.delay;
  wake(SimEvent::Kind::kRequest, requests_.put(std::move(request)), at);
}

void Simulation::answer(SimAnswer answer) {
  const auto packets = static_cast<unsigned>(__builtin_popcount(answer.fragments));
  const TimeNs left = egress_.send(answer.bytes * packets, now_);
  result_->sent_bytes += answer.bytes * packets;
  result_->sent_packets += packets;
  for (uint32_t s = 0; s < segments_.size(); s++) {
    Segment& segment = segments_[s];
    if (answer.to != kEverybody && clients_->segment_of(answer.to) != s) continue;
    SimAnswer here = answer;
    TimeNs at = left + segment.delay;
    // Its link matters only if it is slower than the server's; one of several alike carries little
    // of what goes to one client, see SimSegment.
    const bool narrow = segment.link.bytes_per_s > 0 &&
                        segment.link.bytes_per_s < config_.server_bytes_per_s &&
                        (answer.to == kEverybody || segment.end - segment.first == 1);
    if (narrow) {
      at = kNever;
      for (unsigned i = 0; i < 8; i++) {
        if (((here.fragments >> i) & 1) == 0) continue;
        const TimeNs arrival = segment.link.send(here.bytes, left);
        if (arrival == kNever) {
          here.dropped |= static_cast<uint8_t>(1 << i);
          result_->dropped_bytes += here.bytes;
        } else {
          at = arrival;
        }
      }
    }
    if (at != kNever) wake(SimEvent::Kind::kDelivery, deliveries_.put({std::move(here), s}), at);
  }
}

void Simulation::deliver(Delivery delivery) {
  Segment& segment = segments_[delivery.segment];
  const SimAnswer& answer = delivery.answer;
  const bool all = answer.to == kEverybody;
  const uint32_t first = all ? segment.first : answer.to;
  const uint32_t end = all ? segment.end : answer.to + 1;
  if (!all && !up_.has(answer.to)) return;
  const auto came = static_cast<uint8_t>(answer.fragments & ~answer.dropped);
  const auto bytes = answer.bytes * static_cast<unsigned>(__builtin_popcount(came));
  result_->received_bytes += bytes * (end - first);
  draw_losses(&random_, segment.loss, came, first, end, &losses_);
  if (all) {
    segment.rate.add(static_cast<uint64_t>(static_cast<double>(bytes) * (1 - segment.loss)), now_);
    clients_->heard_segment(delivery.segment, now_);
  } else {
    if (!losses_.empty() && losses_.front().second == came) return;
    unicast_rate_[answer.to].add(bytes, now_);
    clients_->heard(answer.to, now_);
  }
  if (all && answer.pushed) {
    clients_->pushed(delivery.segment, answer.page, came, losses_, now_);
  }
  switch (answer.type) {
    case Type::kPage:
      return deliver_page(answer, first, end);
    case Type::kParity:
      return deliver_parity(answer, first, end);
    case Type::kZero:
    case Type::kNegative:
      return deliver_runs(answer, first, end);
    case Type::kAnnounce:
      return clients_->announced(first, end, answer, now_);
    default:
      clients_->welcomed(answer.to, answer.cookie, now_);
  }
}

void Simulation::deliver_runs(const SimAnswer& answer, uint32_t first, uint32_t end) {
  // One packet: who lost it lost all of it.
  const auto all = static_cast<uint8_t>((1 << config_.fragments) - 1);
  for (SimLoss& loss : losses_) loss.second = 0xff;
  const std::vector<SimLoss> losses = losses_;
  for (const Run& run : answer.runs) {
    for (PageIndex page = run.first; page < run.first + run.count; page++) {
      if (answer.type == Type::kNegative) {
        clients_->refused(page, run, first, end, now_);
        continue;
      }
      image_.deliver(page, all, first, end, up_, losses);
      clients_->delivered(page, sum_of(page), first, end, now_);
    }
  }
}

void Simulation::deliver_parity(const SimAnswer& answer, uint32_t first, uint32_t end) {
  const auto came = static_cast<uint8_t>(answer.fragments & ~answer.dropped);
  SimSet lacking(count_);
  std::vector<PageIndex> pages;
  for (unsigned i = 0; i < kBlockPages; i++) {
    for (unsigned f = 0; f < config_.fragments; f++) {
      if (!answer.parity.cover.has(i * config_.fragments + f)) continue;
      pages.push_back(answer.page + i);
      image_.lacking(answer.page + i, first, end, up_, &lacking);
      break;
    }
  }
  bool repaired = false;
  size_t next = 0;
  for (uint32_t client = first; client < end; client++) {
    if (!lacking.has(client)) continue;
    while (next < losses_.size() && losses_[next].first < client) next++;
    const uint8_t lost =
        next < losses_.size() && losses_[next].first == client ? losses_[next].second : 0;
    const int count = __builtin_popcount(came & ~lost);
    if (count == 0) continue;
    const unsigned whole =
        image_.parity(client, answer.page, answer.parity, static_cast<unsigned>(count));
    result_->pages_repaired += whole;
    repaired = repaired || whole > 0;
  }
  if (!repaired) return;
  for (const PageIndex page : pages) clients_->delivered(page, sum_of(page), first, end, now_);
}

void Simulation::deliver_page(const SimAnswer& answer, uint32_t first, uint32_t end) {
  image_.deliver(answer.page, answer.fragments & ~answer.dropped, first, end, up_, losses_);
  clients_->delivered(answer.page, answer.sum, first, end, now_);
  const PageIndex block = answer.page / kBlockPages * kBlockPages;
  for (const uint32_t client : image_.holders(answer.page)) {
    if (client < first || client >= end) continue;
    const unsigned whole = image_.settle(client, block);
    result_->pages_repaired += whole;
    for (PageIndex page = block; whole > 0 && page < block + kBlockPages; page++) {
      clients_->delivered(page, sum_of(page), client, client + 1, now_);
    }
  }
}

void Simulation::change(const SimChange& change) {
  using Kind = SimChange::Kind;
  if (change.kind == Kind::kServerDie) return server_->die();
  if (change.kind == Kind::kServerRestart) return server_->restart(now_);
  for (uint32_t i = change.first; i < change.first + change.count && i < count_; i++) {
    up_.set(i, change.kind == Kind::kHeal);
    if (change.kind == Kind::kDie) clients_->die(i);
  }
}

void Simulation::check() {
  server_->check();
  clients_->check(now_);
  if (egress_.backlog_bytes(now_) > config_.server_send_bytes + 65536) {
    violation("the server sends without regard to its send buffer");
  }
  if (config_.max_bytes_ratio > 0) {
    const double page = static_cast<double>(
        config_.fragments * (symbol_bytes(config_.fragments) + kOverheadBytes + kUdpIpBytes));
    // Retries of a few pages, welcomes and announces are no matter of ratio.
    const double most =
        config_.max_bytes_ratio * page * result_->distinct_pages + 1000.0 * count_ + 1e6;
    if (static_cast<double>(result_->sent_bytes) > most) {
      violation(std::to_string(result_->sent_bytes) + " bytes were sent for " +
                std::to_string(result_->distinct_pages) + " pages");
    }
  }
  SimSample sample;
  sample.at = now_;
  sample.sent_bytes = result_->sent_bytes;
  sample.dropped_bytes = result_->dropped_bytes;
  sample.rate = server_->rate();
  sample.queued = server_->queued();
  sample.done = clients_->over();
  result_->samples.push_back(sample);
}

void Simulation::handle(const SimEvent& event) {
  switch (event.kind) {
    case SimEvent::Kind::kStart:
      if (!up_.has(event.subject)) up_.set(event.subject, true);
      return clients_->start(event.subject);
    case SimEvent::Kind::kRun:
      return clients_->run(event.subject, now_);
    case SimEvent::Kind::kTimer:
      return clients_->timer(event.subject, now_);
    case SimEvent::Kind::kRequest: {
      SimRequest request = requests_.take(event.subject);
      // The switch's queue towards the server: thousands that fault at once meet here.
      const TimeNs at = ingress_.send(request.bytes, now_);
      if (at == kNever) {
        result_->requests_dropped++;
        return;
      }
      return server_->arrived(std::move(request), at);
    }
    case SimEvent::Kind::kServer:
      return server_->loop(now_);
    case SimEvent::Kind::kDelivery:
      return deliver(deliveries_.take(event.subject));
    case SimEvent::Kind::kChange:
      return change(config_.changes[event.subject]);
    case SimEvent::Kind::kCheck:
      check();
      if (!clients_->all_over()) wake(SimEvent::Kind::kCheck, 0, now_ + config_.check_interval);
      return;
  }
}

void Simulation::schedule() {
  SimRandom random(config_.seed + 1);
  std::vector<TimeNs> starts(count_);
  for (TimeNs& at : starts) at = static_cast<TimeNs>(random.unit() * config_.join_spread);
  for (const auto& [client, at] : config_.joins) starts[client] = at;
  for (uint32_t i = 0; i < count_; i++) wake(SimEvent::Kind::kStart, i, starts[i]);
  for (uint32_t i = 0; i < config_.changes.size(); i++) {
    wake(SimEvent::Kind::kChange, i, config_.changes[i].at);
  }
  wake(SimEvent::Kind::kCheck, 0, config_.check_interval);
}

void Simulation::run(const std::atomic<bool>& stop) {
  schedule();
  while (!clients_->all_over()) {
    if (events_.empty()) violation("nothing is under way and some have not ended");
    const SimEvent event = events_.pop();
    now_ = event.at;
    if (now_ > config_.max_time) violation(clients_->describe_first() + " has not ended");
    if (++result_->events % kStopEvery == 0 && stop.load(std::memory_order_relaxed)) return;
    handle(event);
  }
  check();
  server_->finish();
  result_->end = now_;
  for (const TimeNs at : result_->finished) {
    if (at != kNever) result_->end = std::max(result_->end, at);
  }
}

}  // namespace

Status simulate(const SimConfig& config, const std::atomic<bool>& stop, SimResult* result) {
  try {
    Simulation(config, result).run(stop);
  } catch (const Violation& violation) {
    return Status::Error("E_INTERNAL", std::string("simulation: ") + violation.what());
  }
  return stop.load() ? Status::Error("E_INTERRUPTED", "simulation") : Status::Ok();
}

}  // namespace sf::mcdist
