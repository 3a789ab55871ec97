// What client.cc does around Requester, and a processor that touches the pages of a trace.
#include <algorithm>
#include <cmath>

#include "mcdist/sim.h"

namespace sf::mcdist {
namespace {

// As in client.cc.
constexpr size_t kDirectFaults = 4;
constexpr TimeNs kGreetFirst = 20 * kMillisecond;
constexpr TimeNs kGreetLast = 250 * kMillisecond;
constexpr size_t kMtuBytes = 1500;

}  // namespace

SimClients::SimClients(const SimConfig& config, SimNetwork* network, SimImage* image,
                       SimResult* result)
    : config_(config),
      network_(network),
      image_(image),
      result_(result),
      max_runs_(max_request_runs(kMtuBytes)),
      segment_heard_(config.segments.size()) {
  for (size_t s = 0; s < config.segments.size(); s++) {
    segment_.insert(segment_.end(), config.segments[s].clients, static_cast<uint8_t>(s));
  }
  clients_.reserve(segment_.size());
  for (uint32_t i = 0; i < segment_.size(); i++) {
    clients_.emplace_back(std::make_unique<Requester>(
        config.requester, [image, i](PageIndex page) { return image->has(i, page); },
        [image, i](PageIndex page) { return image->missing(i, page); }));
    const double spread = 2 * unit_of(mix64(mix64(config.seed) ^ i)) - 1;
    clients_.back().pace = 1 + config.speed_spread * spread;
  }
}

void SimClients::start(uint32_t client) {
  const TimeNs now = network_->now();
  Client& state = clients_[client];
  if (state.state != State::kAbsent) return;
  state.state = State::kComputing;
  state.busy_since = state.last_word = now;
  result_->start[client] = now;
  flush(client, now);  // greets
  if (config_.prefetch_all) state.requester->prefetch(0, config_.pages);
  go_on(client, now);
}

// The next touch of its trace: jittered, partly its own. False: the trace has ended.
bool SimClients::next_touch(uint32_t client, Client& state, TimeNs* compute) {
  const SimTrace& trace = config_.traces[client % config_.traces.size()];
  const uint32_t window = std::max(1U, config_.jitter_pages);
  for (;;) {
    if (state.position >= trace.pages.size()) return false;
    uint32_t at = state.position++;
    if (window > 1) {
      const uint32_t number = at / window;
      const auto size =
          std::min<uint32_t>(window, static_cast<uint32_t>(trace.pages.size()) - number * window);
      if (number != state.order_window) {
        state.order_window = number;
        state.order.resize(size);
        for (uint32_t i = 0; i < size; i++) state.order[i] = static_cast<uint8_t>(i);
        SimRandom random(mix64(config_.seed ^ client) ^ number);
        for (uint32_t i = size; i > 1; i--)
          std::swap(state.order[i - 1], state.order[random.next() % i]);
      }
      at = number * window + state.order[at % window];
    }
    *compute += static_cast<TimeNs>(trace.compute_ns[at] * state.pace);
    const uint64_t dice = mix64(mix64(config_.seed + client) + at);
    const double chance = unit_of(dice);
    if (chance < config_.skip_share) continue;
    state.page = chance < config_.skip_share + config_.private_share ? mix64(dice) % config_.pages
                                                                     : trace.pages[at];
    return true;
  }
}

void SimClients::touched(uint32_t client, Client& state, TimeNs waited, TimeNs now) {
  state.block_waited += waited;
  result_->waited[client] += waited;
  result_->max_wait = std::max(result_->max_wait, waited);
  if (++state.touches % kSpeedTouches != 0) return;
  if (state.block_waited > kSpeedWaitShare * (state.block_waited + state.block_computed)) {
    result_->at_speed[client] = now;
  }
  state.block_waited = state.block_computed = 0;
}

// Computes up to the next page that is absent when its time comes. Pages come and do not go, so
// what is present now need not be waited for to be looked at.
void SimClients::go_on(uint32_t client, TimeNs now) {
  Client& state = clients_[client];
  TimeNs ahead = 0;
  for (;;) {
    TimeNs compute = 0;
    if (!next_touch(client, state, &compute)) {
      result_->finished[client] = now + ahead + compute;
      if (!config_.prefetch_all) return over(client, SimOutcome::kFinished, now);
      state.state = State::kFilling;
      return filled(client, now);
    }
    ahead += compute;
    state.block_computed += compute;
    if (!image_->has(client, state.page)) break;
    touched(client, state, 0, now + ahead);
  }
  state.state = State::kComputing;
  network_->wake(SimEvent::Kind::kRun, client, now + ahead);
}

// The trace has ended; so has the client once nothing it prefetches is under way.
void SimClients::filled(uint32_t client, TimeNs now) {
  if (!clients_[client].requester->idle()) return;
  for (PageIndex page = 0; page < config_.pages; page++) {
    if (image_->has(client, page)) continue;
    network_->violation(describe(client) + " has stopped without page " + std::to_string(page));
  }
  result_->finished[client] = std::max(result_->finished[client], now);
  over(client, SimOutcome::kFinished, now);
}

void SimClients::run(uint32_t client, TimeNs now) {
  Client& state = clients_[client];
  if (state.state != State::kComputing) return;
  if (image_->has(client, state.page)) {
    touched(client, state, 0, now);
    return go_on(client, now);
  }
  state.state = State::kWaiting;
  state.wait_since = now;
  result_->faults[client]++;
  if (state.requester->idle()) state.busy_since = now;
  if (!state.requester->want(state.page, Urgency::kFault, now)) return;  // asked for already
  interest_[state.page].push_back(client);
  Run run;
  if (state.cookie != 0 && state.requester->faults_asked() < kDirectFaults &&
      state.requester->ask_now(state.page, now, &run)) {
    send(client, {run}, now);
    return arm(client, state.requester->due_at());
  }
  flush(client, now);
}

void SimClients::timer(uint32_t client, TimeNs now) {
  Client& state = clients_[client];
  if (state.armed > now || state.state == State::kOver) return;
  state.armed = kNever;
  flush(client, now);
  watch_source(client, now);
}

void SimClients::arm(uint32_t client, TimeNs at) {
  Client& state = clients_[client];
  if (at == kNever || at >= state.armed) return;
  state.armed = at;
  network_->wake(SimEvent::Kind::kTimer, client, at);
}

// As Client::flush() and Client::greet().
void SimClients::flush(uint32_t client, TimeNs now) {
  Client& state = clients_[client];
  Requester& requester = *state.requester;
  if (state.cookie == 0) {
    if (now >= state.greet_due) {
      send(client, {}, now);
      state.greeted_at = now;
      state.greet_due = now + std::min(kGreetFirst << std::min(state.greetings, 8U), kGreetLast);
      state.greetings++;
    }
    return arm(client, state.greet_due);
  }
  for (;;) {
    runs_.clear();
    requester.collect(now, true, max_runs_, &runs_);
    if (!runs_.empty()) {
      for (const Run& run : runs_) {
        if (run.retry || run.urgent) continue;  // in the table since it was wanted
        for (uint32_t i = 0; i < run.count; i++) interest_[run.first + i].push_back(client);
      }
      send(client, runs_, now);
    } else if (!requester.more()) {
      return requester.idle() ? void() : arm(client, requester.due_at());
    }
  }
}

void SimClients::send(uint32_t client, std::vector<Run> runs, TimeNs now) {
  SimRequest request;
  request.client = client;
  request.body.cookie = clients_[client].cookie;
  request.body.receive_kbps = static_cast<uint32_t>(network_->receive_rate(client) / 1000);
  const size_t body = std::max(kMinRequestBody, kRequestFixed + runs.size() * kRunBytes);
  request.bytes = kLongOverheadBytes + body + kUdpIpBytes;
  result_->requests++;
  result_->request_bytes += request.bytes;
  for (const Run& run : runs) {
    result_->pages_requested += run.count;
    if (run.retry) result_->retries += run.count;
  }
  request.body.runs = std::move(runs);
  network_->request(std::move(request));
}

void SimClients::welcomed(uint32_t client, uint64_t cookie, TimeNs now) {
  Client& state = clients_[client];
  if (state.state == State::kOver || state.state == State::kAbsent) return;
  if (state.greetings > 0) state.requester->round_trip(now - state.greeted_at);
  if (cookie == state.cookie) return;
  state.cookie = cookie;
  state.greetings = 0;
  state.requester->ask_again(now);
  flush(client, now);
}

void SimClients::delivered(PageIndex page, uint64_t sum, uint32_t first, uint32_t end, TimeNs now) {
  auto found = interest_.find(page);
  if (found == interest_.end()) return;
  if (sum != network_->sum_of(page))
    network_->violation("page " + std::to_string(page) + " is wrong");
  // Whoever goes on may want other pages, and the table move: taken out first.
  std::vector<uint32_t> there = std::move(found->second);
  std::vector<uint32_t> stay;
  std::vector<uint32_t> here;
  for (uint32_t client : there) {
    (client >= first && client < end && image_->has(client, page) ? here : stay).push_back(client);
  }
  if (stay.empty()) {
    interest_.erase(found);
  } else {
    found->second = std::move(stay);
  }
  for (uint32_t client : here) {
    Client& state = clients_[client];
    if (state.state == State::kOver) continue;
    state.requester->arrived(page, now);
    if (state.state == State::kWaiting && state.page == page) {
      const TimeNs waited = now + config_.wake - state.wait_since;
      if (result_->first_page[client] == kNever) result_->first_page[client] = now;
      touched(client, state, waited, now + config_.wake);
      go_on(client, now + config_.wake);
    }
    // More of a prefetch may be asked for: as the client's thread does after each batch.
    if (config_.prefetch_all && state.state != State::kOver) flush(client, now);
    if (state.state == State::kFilling) filled(client, now);
  }
}

void SimClients::refused(PageIndex page, const Run& run, uint32_t first, uint32_t end, TimeNs now) {
  auto found = interest_.find(page);
  if (found == interest_.end()) return;
  const std::vector<uint32_t> there = found->second;
  for (uint32_t client : there) {
    if (client < first || client >= end || clients_[client].state == State::kOver) continue;
    if (clients_[client].requester->refused(page, now) == Requester::Refusal::kGiveUp) {
      over(client, run.error ? SimOutcome::kPageFailed : SimOutcome::kSourceLost, now);
    } else {
      arm(client, clients_[client].requester->due_at());
    }
  }
}

void SimClients::heard(uint32_t client, TimeNs now) { clients_[client].last_word = now; }

TimeNs SimClients::last_word(uint32_t client) const {
  return std::max(
      {clients_[client].last_word, segment_heard_[segment_[client]], clients_[client].busy_since});
}

void SimClients::watch_source(uint32_t client, TimeNs now) {
  Client& state = clients_[client];
  if (state.state == State::kOver || state.requester->idle()) return;
  if (now - last_word(client) <= config_.source_timeout) return;
  over(client, SimOutcome::kSourceLost, now);
}

void SimClients::die(uint32_t client) {
  if (clients_[client].state == State::kOver) return;
  over(client, SimOutcome::kDied, network_->now());
}

void SimClients::over(uint32_t client, SimOutcome outcome, TimeNs now) {
  Client& state = clients_[client];
  state.state = State::kOver;
  state.requester->clear();
  result_->outcome[client] = static_cast<uint8_t>(outcome);
  if (outcome != SimOutcome::kFinished) {
    result_->finished[client] = result_->at_speed[client] = kNever;
  }
  over_++;
}

std::string SimClients::describe(uint32_t client) const {
  const Client& state = clients_[client];
  return "client " + std::to_string(client) + ", touch " + std::to_string(state.touches) +
         ", page " + std::to_string(state.page);
}

void SimClients::check(TimeNs now) const {
  const size_t most =
      size_t{config_.requester.prefetch_window_max} + config_.requester.fault_window;
  for (uint32_t i = 0; i < clients_.size(); i++) {
    const Client& state = clients_[i];
    if (state.state == State::kOver || state.state == State::kAbsent) continue;
    if (state.requester->under_way() > most) {
      network_->violation(describe(i) + ": " + std::to_string(state.requester->under_way()) +
                          " pages are under way");
    }
    if (state.state == State::kWaiting && now - state.wait_since > config_.max_wait &&
        now - last_word(i) < config_.source_timeout / 2) {
      network_->violation(describe(i) + " waited for " +
                          std::to_string((now - state.wait_since) / kMillisecond) + " ms");
    }
    if (state.state == State::kWaiting && image_->has(i, state.page)) {
      network_->violation(describe(i) + " waits for a page that is here");
    }
  }
}

}  // namespace sf::mcdist
