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
constexpr unsigned kGreetIdle = 8;
constexpr unsigned kProbes = 3;
constexpr size_t kMaxReports = 24;
constexpr size_t kRunsOfReport = kReportBytes / kRunBytes;

}  // namespace

SimClients::SimClients(const SimConfig& config, SimNetwork* network, SimImage* image,
                       SimResult* result)
    : config_(config),
      network_(network),
      image_(image),
      result_(result),
      max_runs_(max_request_runs(kMtuBytes)),
      segment_heard_(config.segments.size(), -1),
      subscribers_(config.segments.size()) {
  for (size_t s = 0; s < config.segments.size(); s++) {
    segment_.insert(segment_.end(), config.segments[s].clients, static_cast<uint8_t>(s));
  }
  clients_.reserve(segment_.size());
  for (uint32_t i = 0; i < segment_.size(); i++) {
    RequesterConfig requester = config.requester;
    requester.seed = mix64(mix64(config.seed + 1) ^ i);
    clients_.emplace_back(std::make_unique<Requester>(
        requester, [image, i](PageIndex page) { return image->has(i, page); },
        [image, i](PageIndex page) { return image->missing(i, page); }, config.pages,
        [image, i](BlockReport* report) { image->look(i, report); }));
    const double spread = 2 * unit_of(mix64(mix64(config.seed) ^ i)) - 1;
    clients_.back().pace = 1 + config.speed_spread * spread;
  }
}

void SimClients::start(uint32_t client) {
  const TimeNs now = network_->now();
  Client& state = clients_[client];
  if (state.state != State::kAbsent) return;
  state.state = State::kComputing;
  state.busy_since = state.last_word = state.started = now;
  result_->start[client] = now;
  if (config_.prefetch_all) {
    state.requester->subscribe(true, now);
    std::vector<uint32_t>& there = subscribers_[segment_[client]];
    there.insert(std::lower_bound(there.begin(), there.end(), client), client);
  }
  flush(client, now);  // greets
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

// The trace has ended; so has the client once it holds all it subscribed to.
void SimClients::filled(uint32_t client, TimeNs now) {
  Client& state = clients_[client];
  while (state.filled < config_.pages && image_->has(client, state.filled)) state.filled++;
  if (state.filled < config_.pages) {
    if (!state.requester->idle()) return;
    network_->violation(describe(client) + " has stopped without page " +
                        std::to_string(state.filled));
  }
  result_->finished[client] = std::max(result_->finished[client], now);
  state.requester->subscribe(false, now);
  std::erase(subscribers_[segment_[client]], client);
  if (state.cookie != 0) {
    request_.runs.clear();
    request_.reports.clear();
    send(client, now);  // or the server would go on pushing
  }
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
    request_.runs.assign(1, run);
    request_.reports.clear();
    send(client, now);
    return arm(client, state.requester->due_at());
  }
  flush(client, now);
}

void SimClients::timer(uint32_t client, TimeNs now) {
  Client& state = clients_[client];
  if (state.armed > now || state.state == State::kOver) return;
  state.armed = kNever;
  if (state.state == State::kFilling) filled(client, now);
  if (state.state == State::kOver) return;
  flush(client, now);
  watch_source(client, now);
}

void SimClients::arm(uint32_t client, TimeNs at) {
  Client& state = clients_[client];
  if (at == kNever || at >= state.armed) return;
  state.armed = at;
  network_->wake(SimEvent::Kind::kTimer, client, at);
}

bool SimClients::group_heard(uint32_t client) const {
  return segment_heard_[segment_[client]] >= clients_[client].started;
}

// As Client::greet().
void SimClients::greet(uint32_t client, TimeNs now) {
  Client& state = clients_[client];
  // Given up while nobody wanted anything.
  if (state.greet_due == kNever && !state.requester->idle()) state.greet_due = now;
  if (now < state.greet_due) return;
  if (state.greetings >= kGreetIdle && state.requester->idle()) {
    state.greet_due = kNever;
    return;
  }
  request_.runs.clear();
  request_.reports.clear();
  send(client, now);
  state.greeted_at = now;
  state.greet_due = now + std::min(kGreetFirst << std::min(state.greetings, 8U), kGreetLast);
  state.greetings++;
}

// As Client::flush().
void SimClients::flush(uint32_t client, TimeNs now) {
  Client& state = clients_[client];
  Requester& requester = *state.requester;
  for (;;) {
    if (state.cookie == 0 || (!config_.unicast && !group_heard(client) && !state.unicast_only)) {
      greet(client, now);
      arm(client, state.greet_due);
      if (state.cookie == 0) return;
    }
    request_.runs.clear();
    request_.reports.clear();
    const size_t most = std::min(kMaxReports, max_runs_ / kRunsOfReport / 2);
    requester.collect_reports(now, most, &request_.reports);
    requester.collect(now, true, max_runs_ - request_.reports.size() * kRunsOfReport,
                      &request_.runs);
    if (!request_.runs.empty() || !request_.reports.empty()) {
      for (const Run& run : request_.runs) {
        if (run.retry || run.urgent) continue;  // in the table since it was wanted
        for (uint32_t i = 0; i < run.count; i++) interest_[run.first + i].push_back(client);
      }
      for (const BlockReport& report : request_.reports) {
        for (unsigned i = 0; i < kBlockPages; i++) {
          if (((report.wanted >> i) & 1) == 0) continue;
          std::vector<uint32_t>& there = interest_[report.block * kBlockPages + i];
          if (there.empty() || there.back() != client) there.push_back(client);
        }
      }
      send(client, now);
    } else if (!requester.more()) {
      if (requester.keepalive(now)) send(client, now);
      if (!requester.idle()) arm(client, std::max(now, requester.due_at()));
      return;
    }
  }
}

void SimClients::send(uint32_t client, TimeNs now) {
  Client& state = clients_[client];
  request_.cookie = state.cookie;
  request_.receive_kbps = static_cast<uint32_t>(network_->receive_rate(client) / 1000);
  request_.loss_permille = state.requester->loss_permille();
  request_.unicast_only = state.unicast_only;
  request_.subscribe = state.requester->subscribed() && !state.unicast_only;
  request_.history = config_.history;
  state.requester->sent(now);
  const size_t body = std::max(kMinRequestBody, kRequestFixed + request_.runs.size() * kRunBytes +
                                                    request_.reports.size() * kReportBytes);
  SimRequest request{client, kLongOverheadBytes + body + kUdpIpBytes, request_};
  result_->requests++;
  result_->request_bytes += request.bytes;
  for (const Run& run : request_.runs) {
    result_->pages_requested += run.count;
    if (run.retry) result_->retries += run.count;
  }
  network_->request(std::move(request));
}

void SimClients::welcomed(uint32_t client, uint64_t cookie, TimeNs now) {
  Client& state = clients_[client];
  if (state.state == State::kOver || state.state == State::kAbsent) return;
  if (state.greetings > 0) state.requester->round_trip(now - state.greeted_at);
  if (!config_.unicast && !group_heard(client) && cookie == state.cookie &&
      ++state.probes >= kProbes) {
    state.unicast_only = true;
  }
  if (cookie == state.cookie) return;
  const bool another = state.cookie != 0 && cookie >> 32 != state.cookie >> 32;
  state.cookie = cookie;
  state.greetings = 0;
  state.greet_due = now;
  if (another) {
    state.requester->new_server(now);
  } else {
    state.requester->ask_again(now);
  }
  flush(client, now);
}

// A subscriber's thread wakes for each packet; it has something to do only now and then.
void SimClients::step(uint32_t client, TimeNs now) {
  const TimeNs due = clients_[client].requester->due_at();
  if (due <= now) {
    flush(client, now);
  } else {
    arm(client, due);
  }
}

void SimClients::pushed(uint32_t segment, PageIndex page, uint8_t packets,
                        const std::vector<SimLoss>& losses, TimeNs now) {
  size_t next = 0;
  for (uint32_t client : subscribers_[segment]) {
    if (clients_[client].state == State::kOver || !network_->reached(client)) continue;
    while (next < losses.size() && losses[next].first < client) next++;
    const uint8_t lost =
        next < losses.size() && losses[next].first == client ? losses[next].second : 0;
    const int count = __builtin_popcount(packets & ~lost);
    for (int i = 0; i < count; i++) clients_[client].requester->pushed(page, now);
    if (count > 0 && page % kBlockPages == 0) step(client, now);
  }
}

void SimClients::announced(uint32_t first, uint32_t end, const SimAnswer& answer, TimeNs now) {
  for (uint32_t client = first; client < end; client++) {
    Client& state = clients_[client];
    if (state.cookie == 0 || state.state == State::kOver || !network_->reached(client)) continue;
    state.requester->crowd(answer.peers);
    if (!config_.prefetch_all) continue;
    state.requester->announced(answer.pushing, answer.position, now);
    step(client, now);
  }
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
    if (config_.prefetch_all && state.state != State::kOver) step(client, now);
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

std::string SimClients::describe_first() const {
  for (uint32_t i = 0; i < clients_.size(); i++) {
    const Client& state = clients_[i];
    if (state.state == State::kOver) continue;
    static const char* const kStates[] = {"not started", "computing", "waiting", "filling"};
    return describe(i) + ", " + kStates[static_cast<size_t>(state.state)] + ", " +
           std::to_string(state.requester->under_way()) + " pages and " +
           std::to_string(state.requester->subscription().reported_blocks()) +
           " blocks under way, all pages here before " + std::to_string(state.filled) + ",";
  }
  return "nobody";
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
