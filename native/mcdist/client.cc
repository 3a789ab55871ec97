#include "mcdist/client.h"

#include <poll.h>
#include <sodium.h>
#include <sys/eventfd.h>
#include <sys/timerfd.h>

#include <algorithm>
#include <cmath>

namespace sf::mcdist {
namespace {

// With fewer faults under way, a fault's own thread sends its request. More at once (a disk read of
// many pages) are gathered by the client's thread into one packet.
constexpr size_t kDirectFaults = 4;
constexpr TimeNs kGreetFirst = 20 * kMillisecond;
constexpr TimeNs kGreetLast = 250 * kMillisecond;
constexpr unsigned kGreetIdle = 8;  // greetings while nobody wants anything
// A page present already need not be opened, as long as the server was heard this recently.
constexpr TimeNs kWordFresh = 100 * kMillisecond;
constexpr TimeNs kRateMemory = 100 * kMillisecond;
// A page not answered for so many source time-outs, though the server speaks, is given up.
constexpr TimeNs kPageTimeouts = 4;

Status with_page(const char* code, PageIndex page, const char* what) {
  return Status::Error(code, "page " + std::to_string(page) + ": " + what);
}

}  // namespace

Client::Client(const Options& options, const BootId& boot, std::shared_ptr<Replica> replica)
    : options_(options),
      replica_(std::move(replica)),
      max_runs_(max_request_runs(options.mtu_bytes)),
      sealer_(options.generation, options.key, boot, Side::kClient),
      requester_(
          options.requester,
          [raw = replica_.get()](PageIndex page) { return raw->state(page) != PageState::kAbsent; },
          [this](PageIndex page) { return reassembly_.missing(page); }),
      server_(options.server),
      packet_(kMaxMtuBytes) {}

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
  }
  replica_->set_fetcher(nullptr);
  const uint64_t one = 1;
  (void)!::write(wake_.get(), &one, sizeof one);
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
    send_request({run}, now);
    arm(requester_.due_at());
    return;
  }
  if (wake_pending_) return;
  wake_pending_ = true;
  const uint64_t one = 1;
  (void)!::write(wake_.get(), &one, sizeof one);
}

bool Client::prefetch(PageIndex first, uint64_t pages) {
  if (first >= replica_->pages()) return true;
  pages = std::min(pages, replica_->pages() - first);
  std::lock_guard lock(mutex_);
  if (lost_ || closing_) return true;  // whoever waits hears of it from the replica
  busy(now_ns());
  if (!requester_.prefetch(first, pages)) {
    count(counters_.prefetch_dropped, pages);
    return false;
  }
  if (wake_pending_) return true;
  wake_pending_ = true;
  const uint64_t one = 1;
  (void)!::write(wake_.get(), &one, sizeof one);
  return true;
}

void Client::set_server(const sockaddr_in& server) {
  std::lock_guard reviving(lost_mutex_);
  bool revived;
  {
    std::lock_guard lock(mutex_);
    if (closing_) return;
    server_ = server;
    cookie_ = 0;
    greet_due_ = 0;
    greetings_ = 0;
    busy_since_ = now_ns();  // the new server gets the whole time-out
    revived = std::exchange(lost_, false);
    wake_pending_ = true;
    const uint64_t one = 1;
    (void)!::write(wake_.get(), &one, sizeof one);
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
          cookie_ != 0,
          lost_};
}

// --- with mutex_ held ---

void Client::arm(TimeNs at) {
  if (at >= armed_) return;
  armed_ = at;
  const TimeNs when = std::max<TimeNs>(at, 1);  // 0 would disarm
  itimerspec spec = {};
  spec.it_value = {when / kSecond, when % kSecond};
  ::timerfd_settime(timer_.get(), TFD_TIMER_ABSTIME, &spec, nullptr);
}

void Client::send_request(const std::vector<Run>& runs, TimeNs now) {
  const double quiet = static_cast<double>(now - rate_at_) / static_cast<double>(kRateMemory);
  Request request;
  request.cookie = cookie_;
  request.receive_kbps =
      static_cast<uint32_t>(std::min(receive_rate_ * std::exp(-std::max(quiet, 0.0)) / 1000, 4e9));
  request.runs = runs;
  encode_request(request, &body_);
  Header header;
  header.type = Type::kRequest;
  header.page = runs.empty() ? 0 : runs.front().first;
  const size_t bytes = sealer_.seal(&header, body_.data(), body_.size(), packet_.data());
  last_counter_ = header.counter;
  last_sent_ = now;
  count(counters_.requests);
  count(counters_.wire_bytes_sent, bytes + kUdpIpBytes);
  for (const Run& run : runs) {
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
  if (now >= greet_due_) {
    if (greetings_ >= kGreetIdle && requester_.idle()) {
      greet_due_ = kNever;
      return;
    }
    send_request({}, now);
    greet_due_ = now + std::min(kGreetFirst << std::min(greetings_, 8U), kGreetLast);
    greetings_++;
  }
}

// --- the thread ---

void Client::run() {
  pollfd watched[4] = {{member_.get(), POLLIN, 0},
                       {unicast_.get(), POLLIN, 0},
                       {timer_.get(), POLLIN, 0},
                       {wake_.get(), POLLIN, 0}};
  flush(true);
  for (;;) {
    if (::poll(watched, 4, -1) <= 0) continue;
    uint64_t drained;
    if (watched[2].revents != 0) {
      (void)!::read(timer_.get(), &drained, sizeof drained);
      std::lock_guard lock(mutex_);
      armed_ = kNever;
    }
    if (watched[3].revents != 0) {
      (void)!::read(wake_.get(), &drained, sizeof drained);
      std::lock_guard lock(mutex_);
      wake_pending_ = false;
      if (closing_) return;
    }
    // Whoever woke us: what has come is read before anything is taken for lost.
    const bool more_there = receive(member_);
    const bool more_here = receive(unicast_);
    flush(!more_there && !more_here);
    watch_source(now_ns());
  }
}

bool Client::receive(const Fd& fd) {
  const size_t n = received_.receive(fd);
  if (n == 0) return false;
  const TimeNs now = now_ns();
  uint64_t bytes = 0;
  for (size_t i = 0; i < n; i++) {
    bytes += received_.size(i) + kUdpIpBytes;
    handle(received_.data(i), received_.size(i), now);
  }
  count(counters_.wire_bytes_received, bytes);
  std::lock_guard lock(mutex_);
  const double gap = static_cast<double>(now - rate_at_) / static_cast<double>(kRateMemory);
  receive_rate_ = receive_rate_ * std::exp(-std::max(gap, 0.0)) +
                  static_cast<double>(bytes) / (static_cast<double>(kRateMemory) / kSecond);
  rate_at_ = now;
  return n == ReceiveBatch::kPackets;
}

void Client::handle(const uint8_t* data, size_t size, TimeNs now) {
  Header header;
  if (!decode_header(data, size, &header) || header.type == Type::kRequest) {
    return count(counters_.bad_packets);
  }
  if (header.generation != tag_of(options_.generation)) return count(counters_.wrong_generation);
  if (header.type == Type::kWelcome) {
    Welcome welcome;
    auto key =
        std::make_unique<SenderKey>(options_.generation, options_.key, header.boot, Side::kServer);
    if (!key->open(data, size, clear_)) return count(counters_.auth_failures);
    if (!decode_welcome(clear_, size - kLongOverheadBytes, &welcome)) {
      return count(counters_.bad_packets);
    }
    return handle_welcome(header, welcome, std::move(key), now);
  }
  if (server_key_ == nullptr || header.sender != tag_of(server_key_->boot())) {
    return count(counters_.unknown_sender);
  }
  if (header.type == Type::kPage) return handle_page(header, data, size, now);
  if (!server_key_->open(data, size, clear_)) return count(counters_.auth_failures);
  heard(header, now);
  if (header.type != Type::kZero && header.type != Type::kNegative) {
    return count(counters_.bad_packets);
  }
  if (!decode_runs(clear_, size - kOverheadBytes, replica_->pages(), &runs_)) {
    return count(counters_.bad_packets);
  }
  if (header.type == Type::kZero) return handle_zero(runs_, now);
  handle_negative(runs_, now);
}

void Client::heard(const Header& header, TimeNs now) {
  if (header.sender != tag_of(server_boot_) || header.counter <= server_counter_) return;
  server_counter_ = header.counter;
  last_word_ = now;
}

void Client::handle_page(const Header& header, const uint8_t* data, size_t size, TimeNs now) {
  if (header.page >= replica_->pages()) return count(counters_.bad_packets);
  const bool known = replica_->state(header.page) != PageState::kAbsent || reassembly_.has(header);
  if (known && now - last_word_ < kWordFresh) return count(counters_.duplicates);
  if (!server_key_->open(data, size, clear_)) return count(counters_.auth_failures);
  heard(header, now);
  if (known) return count(counters_.duplicates);
  const uint8_t* page = reassembly_.add(header, clear_);
  if (page == nullptr) return;
  const Status status = replica_->fill(header.page, page);
  bool asked;
  {
    std::lock_guard lock(mutex_);
    // After the fill: from then on nobody asks for it, so no want falls between the two.
    asked = requester_.arrived(header.page, now);
  }
  if (!status.ok()) {
    count(counters_.fill_errors);
    if (!asked) return;
    count(counters_.pages_failed);
    return replica_->fail_page(header.page, status);
  }
  count(counters_.pages_filled);
  count(counters_.payload_bytes, kPageBytes);
  if (!asked) count(counters_.pages_overheard);
}

void Client::handle_zero(const std::vector<Run>& runs, TimeNs now) {
  for (const Run& run : runs) {
    for (PageIndex page = run.first; page < run.first + run.count; page++) {
      if (replica_->state(page) != PageState::kAbsent) {
        count(counters_.duplicates);
        continue;
      }
      (void)replica_->fill_zero(page);  // fails only beyond the end, which decode_runs() checked
      reassembly_.forget(page);
      count(counters_.zero_pages_filled);
      std::lock_guard lock(mutex_);
      if (!requester_.arrived(page, now)) count(counters_.pages_overheard);
    }
  }
}

void Client::handle_negative(const std::vector<Run>& runs, TimeNs now) {
  for (const Run& run : runs) {
    for (PageIndex page = run.first; page < run.first + run.count; page++) {
      Requester::Refusal refusal;
      {
        std::lock_guard lock(mutex_);
        refusal = requester_.refused(page, now);
      }
      if (refusal == Requester::Refusal::kUnknown) continue;
      count(counters_.negative_answers);
      if (refusal == Requester::Refusal::kAgain) continue;
      count(counters_.pages_failed);
      replica_->fail_page(
          page, run.error ? with_page("E_IO", page, "the source cannot read it")
                          : with_page("E_SOURCE_LOST", page, "the source does not hold it"));
    }
  }
}

void Client::handle_welcome(const Header& header, const Welcome& welcome,
                            std::unique_ptr<SenderKey> key, TimeNs now) {
  if (welcome.client != sealer_.boot()) return;  // misdirected; nothing to us
  bool wrong_size;
  {
    std::lock_guard lock(mutex_);
    // An answer to a question of ours not answered before, so not a replay.
    if (welcome.echo <= last_echo_ || welcome.echo > last_counter_) return;
    last_echo_ = welcome.echo;
    if (welcome.echo == last_counter_) requester_.round_trip(now - last_sent_);
    wrong_size = welcome.pages != replica_->pages();
    if (welcome.cookie != cookie_) {
      cookie_ = welcome.cookie;
      greetings_ = 0;
      greet_due_ = kNever;
      requester_.ask_again(now);
    }
  }
  count(counters_.welcomes);
  if (server_key_ == nullptr || server_boot_ != header.boot) server_key_ = std::move(key);
  server_boot_ = header.boot;
  server_counter_ = header.counter;
  last_word_ = now;
  if (wrong_size) {
    lose(Status::Error("E_REPLICA_MISMATCH",
                       "the source's generation has " + std::to_string(welcome.pages) +
                           " pages, the replica " + std::to_string(replica_->pages())));
  }
}

void Client::flush(bool drained) {
  const TimeNs now = now_ns();
  for (;;) {
    std::lock_guard lock(mutex_);
    if (lost_) return;
    if (cookie_ == 0) {
      greet(now);
      TimeNs at = greet_due_;
      if (!requester_.idle()) at = std::min(at, now + kGreetLast);  // watch_source()
      if (at != kNever) arm(at);
      return;
    }
    sending_.clear();
    requester_.collect(now, drained, max_runs_, &sending_);
    if (!sending_.empty()) {
      send_request(sending_, now);
    } else if (!requester_.more()) {
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
    replica_->fail_page(page, with_page("E_SOURCE_LOST", page, "never answered by the source"));
  }
}

void Client::lose(const Status& status) {
  std::lock_guard losing(lost_mutex_);
  {
    std::lock_guard lock(mutex_);
    if (lost_ || closing_) return;
    lost_ = true;
    requester_.clear();
  }
  replica_->fail(status);
}

}  // namespace sf::mcdist
