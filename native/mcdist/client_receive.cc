// The client's receiving side: what comes is opened, checked, stored, and told to the Requester.
#include <sodium.h>

#include <algorithm>
#include <bit>

#include "mcdist/client.h"
#include "mcdist/pack.h"

namespace sf::mcdist {
namespace {

// A page present already need not be opened, as long as the server was heard this recently.
constexpr TimeNs kWordFresh = 100 * kMillisecond;
// How old the knowledge may be of which pages the replica's users still need.
constexpr TimeNs kNeededFresh = kSecond;
// Greetings answered though the group was not heard, before it is taken for not reaching us.
constexpr unsigned kProbes = 3;

Status with_page(const char* code, PageIndex page, const char* what) {
  return Status::Error(code, "page " + std::to_string(page) + ": " + what);
}

}  // namespace

void Client::handle(const uint8_t* data, size_t size, bool group, TimeNs now) {
  Header header;
  if (!decode_header(data, size, &header) || header.type == Type::kRequest) {
    return count(counters_.bad_packets);
  }
  if (header.generation != tag_of(options_.generation)) return count(counters_.wrong_generation);
  if (header.page >= replica_->pages()) return count(counters_.bad_packets);
  if (has_long_header(header.type)) {
    Sender* sender = open_long(header, data, size);
    if (sender == nullptr) return;
    const bool fresh = header.counter > sender->counter;
    const size_t bytes = size - kLongOverheadBytes;
    if (header.type == Type::kWelcome) {
      Welcome welcome;
      if (!decode_welcome(clear_, bytes, &welcome)) return count(counters_.bad_packets);
      handle_welcome(sender, header, welcome, now);
    } else {
      Announce announce;
      if (!decode_announce(clear_, bytes, replica_->pages(), &announce)) {
        return count(counters_.bad_packets);
      }
      if (fresh) handle_announce(sender, announce, now);
    }
    return heard(sender, header, group, now);
  }
  Sender* sender = senders_.find(header.sender);
  if (sender == nullptr) return count(counters_.unknown_sender);
  if (header.type == Type::kPage) return handle_page(sender, header, data, size, group, now);
  if (!sender->key->open(data, size, clear_)) return count(counters_.auth_failures);
  heard(sender, header, group, now);
  if (header.type == Type::kParity) return handle_parity(sender, header, size, now);
  if (header.type == Type::kPacked) return handle_packed(header, size, now);
  if (header.type != Type::kZero && header.type != Type::kNegative) {
    return count(counters_.bad_packets);
  }
  if (!decode_runs(clear_, size - kOverheadBytes, replica_->pages(), &runs_)) {
    return count(counters_.bad_packets);
  }
  if (header.type == Type::kZero) return handle_zero(runs_, now);
  handle_negative(sender, runs_, now);
}

// The sender of an authentic packet with a long header, now known; nullptr otherwise.
Sender* Client::open_long(const Header& header, const uint8_t* data, size_t size) {
  Sender* sender = senders_.find(header.boot);
  if (sender != nullptr) {
    if (sender->key->open(data, size, clear_)) return sender;
    count(counters_.auth_failures);
    return nullptr;
  }
  auto key =
      std::make_unique<SenderKey>(options_.generation, options_.key, header.boot, Side::kServer);
  if (!key->open(data, size, clear_)) {
    count(counters_.auth_failures);
    return nullptr;
  }
  sender = senders_.admit(std::move(key), current_);
  if (sender == nullptr) count(counters_.unknown_sender);
  servers_.store(senders_.size(), std::memory_order_relaxed);
  return sender;
}

void Client::heard(Sender* sender, const Header& header, bool group, TimeNs now) {
  const bool fresh = header.counter > sender->counter;
  if (fresh) {
    sender->counter = header.counter;
    sender->heard = now;
    if (group && !group_heard_.exchange(true)) {
      std::lock_guard lock(mutex_);
      unicast_only_ = false;
    }
  }
  if (sender != current_) return;
  if (fresh) last_word_ = now;
  if (!header.pushed) return;
  if (header.page / kBlockPages != pushed_page_ / kBlockPages) tell_pushed(now);
  pushed_page_ = header.page;
  pushed_packets_++;
}

// Packets of a push are told block by block: the lock is for those who wait.
void Client::tell_pushed(TimeNs now) {
  if (pushed_packets_ == 0) return;
  count(counters_.pushed_packets, pushed_packets_);
  std::lock_guard lock(mutex_);
  requester_.pushed(pushed_page_, now, std::exchange(pushed_packets_, 0));
}

// What a batch of packets left to be done together.
void Client::settle(TimeNs now) {
  tell_pushed(now);
  land(now);
}

// Fills in the pages of the push's block that came whole.
void Client::land(TimeNs now) {
  if (!reassembly_.landed()) return;
  PageIndex first;
  unsigned pages;
  for (unsigned at = 0; reassembly_.take_run(&at, &first, &pages);) {
    const uint8_t* bytes = reassembly_.landed_bytes(first);
    if (pages == 1 || !replica_->fill(first, pages, bytes).ok()) {
      for (unsigned i = 0; i < pages; i++) store(first + i, bytes + i * kPageBytes, now);
      continue;
    }
    unsigned asked = 0;
    {
      std::lock_guard lock(mutex_);
      for (unsigned i = 0; i < pages; i++) asked += requester_.arrived(first + i, now) ? 1 : 0;
    }
    count(counters_.pages_filled, pages);
    count(counters_.payload_bytes, pages * kPageBytes);
    count(counters_.pages_overheard, pages - asked);
  }
}

void Client::handle_page(Sender* sender, const Header& header, const uint8_t* data, size_t size,
                         bool group, TimeNs now) {
  const bool known = replica_->state(header.page) != PageState::kAbsent || reassembly_.has(header);
  if (known && now - last_word_ < kWordFresh) return count(counters_.duplicates);
  uint8_t* place = known ? nullptr : reassembly_.place(header);
  if (place == nullptr) place = clear_;
  if (!sender->key->open(data, size, place)) return count(counters_.auth_failures);
  if (sender == current_) fragments_ = header.fragments;
  heard(sender, header, group, now);
  if (known) return count(counters_.duplicates);
  if (reassembly_.leaves_block(header)) {
    land(now);
    reassembly_.begin_block(header);
  }
  const uint8_t* page = reassembly_.add(header, place);
  if (page != nullptr) store(header.page, page, now);
  repair(header.page / kBlockPages, now);
}

void Client::handle_packed(const Header& header, size_t size, TimeNs now) {
  if (replica_->state(header.page) != PageState::kAbsent) return count(counters_.duplicates);
  if (!unpack_page(clear_, size - kOverheadBytes, unpacked_)) return count(counters_.bad_packets);
  count(counters_.packed_pages);
  reassembly_.forget(header.page);
  store(header.page, unpacked_, now);
  repair(header.page / kBlockPages, now);
}

void Client::handle_parity(const Sender* sender, const Header& header, size_t size, TimeNs now) {
  Parity parity;
  const size_t bytes = size - kOverheadBytes;
  if (!decode_parity(header, clear_, bytes, &parity)) return count(counters_.bad_packets);
  count(counters_.parities_received);
  if (sender == current_) fragments_ = header.fragments;
  if (header.fragments != fragments_) return;  // cut otherwise than what is gathered here
  BlockReport block;
  block.block = header.page / kBlockPages;
  look(&block);
  const Cover cover{header.sender, parity.cover_id, header.fragments, parity.cover};
  if (parities_.add(block.block, cover, parity.index, clear_ + kParityFixed, bytes - kParityFixed,
                    block.missing) == ParityTable::Added::kHeld) {
    repair(block.block, now);
  }
}

// Whatever the parities held for a block give now.
void Client::repair(uint64_t block, TimeNs now) {
  if (repairing_ || parities_.rows(block) == 0) return;
  repairing_ = true;
  const unsigned fragments = fragments_;
  const PageIndex first = block * kBlockPages;
  for (;;) {
    BlockReport state;
    state.block = block;
    look(&state);
    SymbolSet repaired;
    symbol_read_ = false;
    const auto outcome = parities_.repair(
        block, fragments, state.missing,
        [&](unsigned at) { return symbol(first + at / fragments, at % fragments); },
        [&](unsigned at, const uint8_t* bytes, size_t) {
          Header header;
          header.page = first + at / fragments;
          header.fragment = static_cast<uint8_t>(at % fragments);
          header.fragments = static_cast<uint8_t>(fragments);
          const uint8_t* page = reassembly_.add(header, bytes);
          if (page != nullptr) store(header.page, page, now);
          if (page != nullptr || reassembly_.missing(header.page) == 0) {
            count(counters_.pages_repaired);
          }
        },
        &repaired);
    if (outcome == ParityTable::Repair::kRepaired) continue;
    parities_.settle(block, fragments, state.missing);
    break;
  }
  repairing_ = false;
}

// The bytes of a symbol that is held; nullptr: it cannot be read.
const uint8_t* Client::symbol(PageIndex page, unsigned fragment) {
  if (!symbol_read_ || symbol_page_ != page) {
    symbol_read_ = true;
    symbol_page_ = page;
    const uint8_t* gathered = reassembly_.bytes(page);
    switch (replica_->read(page, symbols_)) {
      case ReadResult::kData:
        break;
      case ReadResult::kZero:
        std::memset(symbols_, 0, sizeof symbols_);
        break;
      case ReadResult::kAbsent:
        if (gathered != nullptr) std::memcpy(symbols_, gathered, sizeof symbols_);
        symbol_read_ = gathered != nullptr;
        break;
      case ReadResult::kError:
        symbol_read_ = false;
        break;
    }
  }
  return symbol_read_ ? symbols_ + fragment_offset(fragment, fragments_) : nullptr;
}

void Client::store(PageIndex page, const uint8_t* bytes, TimeNs now) {
  const Status status = replica_->fill(page, bytes);
  bool asked;
  {
    std::lock_guard lock(mutex_);
    // After the fill: from then on nobody asks for it, so no want falls between the two.
    asked = requester_.arrived(page, now);
  }
  if (!status.ok()) {
    count(counters_.fill_errors);
    if (!asked) return;
    count(counters_.pages_failed);
    return replica_->fail_page(page, status);
  }
  count(counters_.pages_filled);
  count(counters_.payload_bytes, kPageBytes);
  if (!asked) count(counters_.pages_overheard);
}

void Client::handle_zero(const std::vector<Run>& runs, TimeNs now) {
  for (const Run& run : runs) {
    const PageIndex end = run.first + run.count;
    uint64_t fresh = 0;
    for (PageIndex page = run.first; page < end; page++) {
      if (replica_->state(page) != PageState::kAbsent) continue;
      reassembly_.forget(page);
      fresh++;
    }
    count(counters_.duplicates, run.count - fresh);
    if (fresh == 0) continue;
    // Fails only beyond the end, which decode_runs() checked.
    (void)replica_->fill_zero(run.first, run.count);
    count(counters_.zero_pages_filled, fresh);
    uint64_t asked = 0;
    std::lock_guard lock(mutex_);
    for (PageIndex page = run.first; requester_.expects() && page < end; page++) {
      asked += requester_.arrived(page, now) ? 1 : 0;
    }
    count(counters_.pages_overheard, fresh - std::min(fresh, asked));
  }
}

void Client::handle_negative(const Sender* sender, const std::vector<Run>& runs, TimeNs now) {
  if (sender != current_) return;  // not an answer to us
  uint32_t servers;
  {
    std::lock_guard lock(mutex_);
    servers = static_cast<uint32_t>(servers_usable());
  }
  bool elsewhere = false;
  for (const Run& run : runs) {
    for (PageIndex page = run.first; page < run.first + run.count; page++) {
      Requester::Refusal refusal;
      {
        std::lock_guard lock(mutex_);
        refusal = requester_.refused(page, now, servers);
      }
      if (refusal == Requester::Refusal::kUnknown) continue;
      count(counters_.negative_answers);
      elsewhere = true;
      if (refusal == Requester::Refusal::kAgain) continue;
      count(counters_.pages_failed);
      replica_->fail_page(
          page, run.error ? with_page("E_IO", page, "the source cannot read it")
                          : with_page("E_SOURCE_LOST", page, "the source does not hold it"));
    }
  }
  if (elsewhere && servers > 1) turn_to_other(now, false);
}

void Client::handle_welcome(Sender* sender, const Header& header, const Welcome& welcome,
                            TimeNs now) {
  if (welcome.client != sealer_.boot()) return;  // misdirected; nothing to us
  bool wrong_size;
  {
    std::lock_guard lock(mutex_);
    // An answer to a question of ours to this server, not answered before, so not a replay.
    if (welcome.echo <= std::max(last_echo_, asked_from_) || welcome.echo > last_counter_) return;
    last_echo_ = welcome.echo;
    if (welcome.echo == last_counter_) requester_.round_trip(now - last_sent_);
    wrong_size = welcome.pages != replica_->pages();
    sender->address = server_;
    if (!group_heard_ && cookie_ == welcome.cookie && ++probes_ >= kProbes) unicast_only_ = true;
    if (welcome.cookie != cookie_) {
      cookie_ = welcome.cookie;
      greetings_ = 0;
      greet_due_ = now;
      if (current_ != nullptr && current_ != sender) {
        requester_.new_server(now);
      } else {
        requester_.ask_again(now);
      }
    }
  }
  count(counters_.welcomes);
  sender->cookie = welcome.cookie;
  sender->held = std::max<uint64_t>(sender->held, 1);
  sender->counter = std::max(sender->counter, header.counter);
  sender->heard = now;
  current_ = sender;
  senders_.settle(sender);
  servers_.store(senders_.size(), std::memory_order_relaxed);
  last_word_ = now;
  if (wrong_size) {
    lose(Status::Error("E_REPLICA_MISMATCH",
                       "the source's generation has " + std::to_string(welcome.pages) +
                           " pages, the replica " + std::to_string(replica_->pages())));
  }
}

void Client::handle_announce(Sender* sender, const Announce& announce, TimeNs now) {
  count(counters_.announces);
  // The current one takes requests where we ask it, whatever it calls that place.
  if (sender != current_) {
    sender->address.sin_family = AF_INET;
    sender->address.sin_addr = announce.address;
    sender->address.sin_port = htons(announce.port);
  }
  sender->held = announce.held;
  sender->complete = announce.complete;
  if (sender != current_) return;
  settle(now);  // what was pushed before it: after the push's end it would be another push
  std::lock_guard lock(mutex_);
  requester_.announced(announce.pushing, announce.position, now);
  requester_.crowd(announce.peers);
}

void Client::look(BlockReport* report) const {
  const PageIndex first = report->block * kBlockPages;
  const PageIndex word = first / 64 * 64;
  const auto absent = static_cast<uint32_t>(replica_->absent_mask(word) >> (first - word));
  const uint64_t needed = needed_.empty() ? ~uint64_t{0} : needed_[word / 64];
  report->fragments = fragments_;
  report->wanted = absent & static_cast<uint32_t>(needed >> (first - word));
  for (uint32_t left = absent; left != 0; left &= left - 1) {
    const auto page = static_cast<unsigned>(std::countr_zero(left));
    const uint8_t held = reassembly_.held(first + page, fragments_);
    for (unsigned i = 0; i < fragments_; i++) {
      if (((held >> i) & 1) == 0) report->missing.add(page * fragments_ + i);
    }
  }
  const uint32_t sender = current_ == nullptr ? 0 : tag_of(current_->key->boot());
  const ParityTable::Need need = parities_.need(report->block, fragments_, sender, report->missing,
                                                SymbolSet::Pages(report->wanted, fragments_));
  report->need = static_cast<uint8_t>(need.symbols);
  report->cover = need.cover_id;
}

// Without mutex_: asks the replica's users, which have locks of their own.
void Client::refresh_needed(TimeNs now) {
  {
    std::lock_guard lock(mutex_);
    if (!requester_.subscribed()) return;
  }
  const uint64_t version = replica_->users_version();
  if (version == needed_version_ && now - needed_at_ < kNeededFresh && needed_at_ != 0) return;
  needed_version_ = version;
  needed_at_ = now;
  bool all = true;
  needed_.resize((replica_->pages() + 63) / 64);
  for (size_t i = 0; i < needed_.size(); i++) {
    needed_[i] = replica_->absent_mask(i * 64) == 0 ? ~uint64_t{0} : replica_->needed_mask(i * 64);
    all = all && needed_[i] == ~uint64_t{0};
  }
  if (all) needed_.clear();
}

}  // namespace sf::mcdist
