#include "mcdist/client.h"

#include <poll.h>
#include <sodium.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

namespace sf::mcdist {
namespace {

// With fewer faults under way, a fault's own thread sends its request. More at once (a disk read of
// many pages) are gathered by the client's thread into one packet.
constexpr size_t kDirectFaults = 4;
constexpr unsigned kServeBatches = 4;  // received in a row
constexpr TimeNs kGreetFirst = 20 * kMillisecond;
constexpr TimeNs kGreetLast = 250 * kMillisecond;
// 20 packets of 1 Gbit/s.
constexpr TimeNs kDoze = 250 * kMicrosecond;
constexpr size_t kDozePackets = 24;  // with as many at a time it is the processor that is short
constexpr unsigned kGreetIdle = 8;   // greetings while nobody wants anything
constexpr uint64_t kTellBytes = 1 << 20;
constexpr double kTellS = 0.008;
constexpr TimeNs kRateMemory = 100 * kMillisecond;
// A page not answered for so many source time-outs, though the server speaks, is given up.
constexpr TimeNs kPageTimeouts = 4;
constexpr size_t kMaxReports = 24;  // in one request; the rest of it is for runs
constexpr size_t kRunsOfReport = kReportBytes / kRunBytes;

RequesterConfig seeded(RequesterConfig config, const BootId& boot) {
  std::memcpy(&config.seed, boot.data(), sizeof config.seed);
  return config;
}

}  // namespace

Client::Client(const Options& options, const BootId& boot, std::shared_ptr<Replica> replica)
    : options_(options),
      replica_(std::move(replica)),
      max_runs_(max_request_runs(options.mtu_bytes)),
      sealer_(options.generation, options.key, boot, Side::kClient),
      requester_(
          seeded(options.requester, boot),
          [raw = replica_.get()](PageIndex page) { return raw->state(page) != PageState::kAbsent; },
          [this](PageIndex page) { return reassembly_.missing(page); }, replica_->pages(),
          [this](BlockReport* report) { look(report); }),
      server_(options.server),
      home_(options.server),
      packet_(kMaxMtuBytes),
      received_(true),
      fragments_(static_cast<uint8_t>(fragments_for(options.mtu_bytes))) {}

Status Client::Open(const Options& options, std::shared_ptr<Replica> replica,
                    std::shared_ptr<Client>* out) {
  if (::sodium_init() < 0) return Status::Error("E_INTERNAL", "libsodium does not initialize");
  if (options.mtu_bytes < kMinMtuBytes || options.mtu_bytes > kMaxMtuBytes) {
    return Status::Error(
        "E_ARGUMENT", "MTU " + std::to_string(options.mtu_bytes) + " is not between 1280 and 9216");
  }
  BootId boot;
  ::randombytes_buf(boot.data(), boot.size());
  std::shared_ptr<Client> client(new Client(options, boot, std::move(replica)));
  sockaddr_in local = {};
  local.sin_family = AF_INET;
  local.sin_addr = options.interface_address;
  Status status = open_member(options.group, options.interface_address, &client->member_);
  if (status.ok()) status = open_unicast(local, options.interface_address, 1, &client->unicast_);
  if (!status.ok()) return status;
  coalesce(client->member_);
  coalesce(client->unicast_);
  client->timer_ = Fd(::timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC));
  client->wake_ = Fd(::eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC));
  if (!client->timer_.valid() || !client->wake_.valid()) {
    return Status::Errno("E_INTERNAL", "timerfd or eventfd");
  }
  // Before the thread: a source that is refused at once would be forgotten, and waited for.
  client->replica_->set_fetcher(client.get());
  client->thread_ = std::thread([raw = client.get()] { raw->run(); });
  *out = std::move(client);
  return Status::Ok();
}

Client::~Client() { close(); }

void Client::close() {
  std::lock_guard closing(close_mutex_);
  if (!thread_.joinable()) return;
  {
    std::lock_guard reviving(lost_mutex_);
    std::lock_guard lock(mutex_);
    closing_ = true;
    end_subscription();
    give_back();
    const uint64_t one = 1;
    (void)!::write(wake_.get(), &one, sizeof one);  // stays: all are to see it
  }
  replica_->set_fetcher(nullptr);
  thread_.join();
}

// --- called by any thread ---

void Client::busy(TimeNs now) {
  if (requester_.idle()) busy_since_ = now;
}

void Client::want(PageIndex page, Urgency urgency) {
  const TimeNs now = now_ns();
  std::lock_guard lock(mutex_);
  if (lost_ || closing_) return;
  busy(now);
  if (!requester_.want(page, urgency, now)) return;
  Run run;
  if (urgency == Urgency::kFault && cookie_ != 0 && !wake_pending_ &&
      requester_.faults_asked() < kDirectFaults && requester_.ask_now(page, now, &run)) {
    request_.runs.assign(1, run);
    request_.reports.clear();
    send_request(now);
    arm(requester_.due_at());
    if (lent_ && !helping_) give_back();
    if (dozing_) wake();
    return;
  }
  wake();
}

bool Client::prefetch(PageIndex first, uint64_t pages) {
  if (first >= replica_->pages()) return true;
  pages = std::min(pages, replica_->pages() - first);
  if (pages == replica_->pages()) {
    subscribe(true);
    return true;
  }
  std::lock_guard lock(mutex_);
  if (lost_ || closing_) return true;  // whoever waits hears of it from the replica
  busy(now_ns());
  if (!requester_.prefetch(first, pages)) {
    count(counters_.prefetch_dropped, pages);
    return false;
  }
  wake();
  return true;
}

bool Client::subscribe(bool on) {
  const TimeNs now = now_ns();
  std::lock_guard lock(mutex_);
  if (lost_ || closing_) return false;
  if (!on) {
    end_subscription();
    return false;
  }
  if (replica_->complete()) return false;
  busy(now);
  requester_.subscribe(true, now);
  wake();
  return true;
}

bool Client::subscribed() const {
  std::lock_guard lock(mutex_);
  return requester_.subscribed();
}

void Client::set_server(const sockaddr_in& server, const std::vector<sockaddr_in>& others) {
  std::lock_guard reviving(lost_mutex_);
  bool revived;
  {
    std::lock_guard lock(mutex_);
    if (closing_) return;
    const TimeNs now = now_ns();
    home_ = server;
    named_.clear();
    for (const sockaddr_in& other : others) {
      const bool here = other.sin_addr.s_addr == options_.interface_address.s_addr;
      if (!here && named_.size() < SenderTable::kMaxSenders) named_.push_back({other, 0});
    }
    turn_to(server, 0, now);
    server_set_ = true;
    busy_since_ = now;  // the new server gets the whole time-out
    revived = std::exchange(lost_, false);
    wake();
  }
  if (revived) replica_->set_fetcher(this);  // takes back the failure
}

Client::Gauges Client::gauges() const {
  std::lock_guard lock(mutex_);
  return {requester_.under_way(),
          requester_.window(),
          static_cast<uint64_t>(receive_rate_),
          requester_.smoothed_rtt(Urgency::kFault),
          requester_.smoothed_rtt(Urgency::kPrefetch),
          requester_.timeout(Urgency::kFault),
          servers_.load(std::memory_order_relaxed),
          loss_permille_,
          requester_.subscription().reported_blocks(),
          server_,
          cookie_ != 0,
          requester_.subscribed(),
          unicast_only_,
          lost_};
}

// --- with mutex_ held ---

void Client::give_back() {
  if (!std::exchange(lent_, false)) return;
  role_changed_.notify_one();
}

void Client::wake() {
  if (lent_ && !helping_) give_back();
  if (std::exchange(wake_pending_, true)) return;
  const uint64_t one = 1;
  (void)!::write(wake_.get(), &one, sizeof one);
}

void Client::turn_to(const sockaddr_in& server, uint64_t cookie, TimeNs now) {
  server_ = server;
  cookie_ = cookie;
  asked_from_ = last_counter_;
  greet_due_ = now;
  greetings_ = 0;
}

// Tells the server, or it would go on pushing for a while.
void Client::end_subscription() {
  if (!requester_.subscribed()) return;
  requester_.subscribe(false, 0);
  if (cookie_ == 0) return;
  request_.runs.clear();
  request_.reports.clear();
  send_request(now_ns());
}

void Client::arm(TimeNs at) {
  if (at >= armed_) return;
  armed_ = at;
  const TimeNs when = std::max<TimeNs>(at, 1);  // 0 would disarm
  itimerspec spec = {};
  spec.it_value = {when / kSecond, when % kSecond};
  ::timerfd_settime(timer_.get(), TFD_TIMER_ABSTIME, &spec, nullptr);
}

void Client::send_request(TimeNs now) {
  const double quiet = static_cast<double>(now - rate_at_) / static_cast<double>(kRateMemory);
  request_.cookie = cookie_;
  request_.receive_kbps =
      static_cast<uint32_t>(std::min(receive_rate_ * std::exp(-std::max(quiet, 0.0)) / 1000, 4e9));
  request_.loss_permille = requester_.loss_permille();
  loss_permille_ = request_.loss_permille;
  request_.unicast_only = unicast_only_;
  request_.subscribe = requester_.subscribed() && !unicast_only_;
  request_.history = options_.history;
  untold_bytes_ = 0;
  request_.room = 0;
  if (request_.subscribe && !requester_.crowded()) {
    request_.room =
        static_cast<uint16_t>(std::min<uint64_t>(receive_room(member_) / kRoomUnit, UINT16_MAX));
  }
  encode_request(request_, &body_);
  Header header;
  header.type = Type::kRequest;
  header.page = request_.runs.empty() ? 0 : request_.runs.front().first;
  const size_t bytes = sealer_.seal(&header, body_.data(), body_.size(), packet_.data());
  last_counter_ = header.counter;
  last_sent_ = now;
  requester_.sent(now);
  count(counters_.requests);
  count(counters_.wire_bytes_sent, bytes + kUdpIpBytes);
  count(counters_.blocks_reported, request_.reports.size());
  for (const Run& run : request_.runs) {
    count(counters_.pages_requested, run.count);
    if (run.urgent) count(counters_.urgent_requested, run.count);
    if (run.retry) count(counters_.retries, run.count);
  }
  // What cannot be sent now is asked again after its time-out, like what is lost on the way.
  if (::sendto(unicast_.get(), packet_.data(), bytes, MSG_DONTWAIT,
               reinterpret_cast<const sockaddr*>(&server_), sizeof server_) < 0) {
    count(counters_.send_errors);
  }
}

void Client::greet(TimeNs now) {
  // Given up while nobody wanted anything.
  if (greet_due_ == kNever && !requester_.idle()) greet_due_ = now;
  if (now < greet_due_) return;
  if (greetings_ >= kGreetIdle && requester_.idle()) {
    greet_due_ = kNever;
    return;
  }
  request_.runs.clear();
  request_.reports.clear();
  send_request(now);
  greet_due_ = now + std::min(kGreetFirst << std::min(greetings_, 8U), kGreetLast);
  greetings_++;
}

// --- the thread ---

void Client::run() {
  ::pthread_setname_np(::pthread_self(), "mcdist-client");
  pollfd watched[4] = {{member_.get(), POLLIN, 0},
                       {unicast_.get(), POLLIN, 0},
                       {timer_.get(), POLLIN, 0},
                       {wake_.get(), POLLIN, 0}};
  {
    std::lock_guard role(role_mutex_);
    flush(true);
  }
  for (;;) {
    {
      std::unique_lock lock(mutex_);
      while (lent_) {
        role_changed_.wait_for(lock, std::chrono::nanoseconds(lent_for_));
        if (!helping_ && now_ns() - helped_at_ >= lent_for_) lent_ = false;
      }
    }
    doze(watched + 2);
    if (::poll(watched, 4, -1) <= 0) continue;
    std::unique_lock role(role_mutex_, std::try_to_lock);
    if (!role.owns_lock()) {
      std::lock_guard lock(mutex_);
      if (closing_) return;
      continue;
    }
    uint64_t drained;
    if (watched[2].revents != 0) {
      (void)!::read(timer_.get(), &drained, sizeof drained);
      std::lock_guard lock(mutex_);
      armed_ = kNever;
    }
    if (watched[3].revents != 0 && !clear_wake()) return;
    // Whoever woke us: what has come is read before anything is taken for lost.
    serve();
  }
}

// Between two reads of a push, while nobody waits: each packet would wake the thread alone, and
// many cost little more than one. Whoever starts to wait wakes it: want().
void Client::doze(pollfd* others) {
  {
    std::lock_guard lock(mutex_);
    dozing_ = last_batch_ < kDozePackets && requester_.subscription().pushing() &&
              requester_.faults() == 0 && !wake_pending_;
    if (!dozing_) return;
  }
  const timespec while_it_comes = {0, kDoze};
  ::ppoll(others, 2, &while_it_comes, nullptr);
  std::lock_guard lock(mutex_);
  dozing_ = false;
}

bool Client::clear_wake() {
  std::lock_guard lock(mutex_);
  if (closing_) return false;
  uint64_t drained;
  (void)!::read(wake_.get(), &drained, sizeof drained);
  wake_pending_ = false;
  return true;
}

void Client::serve() {
  bool group = true;
  bool unicast = true;
  // Bounded: what is to be sent, and whether to close, is looked at in between.
  for (unsigned i = 0; i < kServeBatches && (group || unicast); i++) {
    if (group) receive(member_, true, &group);
    if (unicast) receive(unicast_, false, &unicast);
  }
  tend(!group && !unicast);
}

// What is due is done. `drained`: the sockets were read empty.
void Client::tend(bool drained) {
  flush(drained);
  const TimeNs now = now_ns();
  watch_server(now);
  watch_source(now);
}

size_t Client::receive(const Fd& fd, bool group, bool* full) {
  const size_t n = received_.receive(fd, full);
  if (n == 0) return 0;
  const TimeNs now = now_ns();
  uint64_t bytes = 0;
  for (size_t i = 0; i < n; i++) {
    bytes += received_.size(i) + kUdpIpBytes;
    handle(received_.data(i), received_.size(i), group, now);
  }
  settle(now);
  count(counters_.wire_bytes_received, bytes);
  std::lock_guard lock(mutex_);
  last_batch_ = n;
  const double gap = static_cast<double>(now - rate_at_) / static_cast<double>(kRateMemory);
  receive_rate_ = receive_rate_ * std::exp(-std::max(gap, 0.0)) +
                  static_cast<double>(bytes) / (static_cast<double>(kRateMemory) / kSecond);
  rate_at_ = now;
  untold_bytes_ += bytes;
  return n;
}

// Is it time to say that there is room again? Each so many bytes of a push, not more often than a
// server with some peers can listen to.
bool Client::tells() const {
  if (!requester_.subscription().pushing() || requester_.crowded()) return false;
  const auto each = static_cast<uint64_t>(receive_rate_ * kTellS);
  return untold_bytes_ >= std::max(kTellBytes, each);
}

void Client::flush(bool drained) {
  const TimeNs now = now_ns();
  refresh_needed(now);
  for (;;) {
    std::lock_guard lock(mutex_);
    if (std::exchange(server_set_, false)) {
      current_ = nullptr;
      turned_at_ = now;
    }
    if (lost_) return;
    if (cookie_ == 0) {
      greet(now);
      TimeNs at = greet_due_;
      if (!requester_.idle()) at = std::min(at, now + kGreetLast);  // watch_source()
      if (at != kNever) arm(at);
      return;
    }
    // The probe: does the group reach us?
    if (!group_heard_ && !unicast_only_) {
      greet(now);
      if (greet_due_ != kNever) arm(greet_due_);
    }
    if (requester_.subscribed() && replica_->complete()) end_subscription();
    request_.runs.clear();
    request_.reports.clear();
    if (drained) {
      const size_t most = std::min(kMaxReports, max_runs_ / kRunsOfReport / 2);
      requester_.collect_reports(now, most, &request_.reports);
    }
    const size_t room = max_runs_ - request_.reports.size() * kRunsOfReport;
    requester_.collect(now, drained, room, &request_.runs);
    if (!request_.runs.empty() || !request_.reports.empty()) {
      send_request(now);
    } else if (!requester_.more()) {
      if (requester_.keepalive(now) || tells()) send_request(now);
      // Not drained: at once again, even if the packets read last were the last ones there.
      if (!requester_.idle()) arm(drained ? requester_.due_at() : now);
      return;
    }
  }
}

void Client::watch_source(TimeNs now) {
  bool silent;
  bool stuck;
  PageIndex page = 0;
  {
    std::lock_guard lock(mutex_);
    if (lost_ || requester_.idle()) return;
    silent = now - std::max(last_word_, busy_since_) > options_.source_timeout;
    TimeNs since;
    stuck = requester_.oldest_fault(&page, &since) &&
            now - since > kPageTimeouts * options_.source_timeout;
    if (stuck) requester_.forget(page);
  }
  if (silent) {
    lose(Status::Error("E_SOURCE_LOST", "no word from the source for " +
                                            std::to_string(options_.source_timeout / kMillisecond) +
                                            " ms"));
  } else if (stuck) {
    count(counters_.pages_failed);
    replica_->fail_page(page, Status::Error("E_SOURCE_LOST", "page " + std::to_string(page) +
                                                                 ": never answered by the source"));
  }
}

void Client::lose(const Status& status) {
  std::lock_guard losing(lost_mutex_);
  {
    std::lock_guard lock(mutex_);
    if (lost_ || closing_) return;
    lost_ = true;
    end_subscription();
    requester_.clear();
  }
  replica_->fail(status);
}

}  // namespace sf::mcdist
