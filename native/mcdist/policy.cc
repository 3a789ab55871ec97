#include "mcdist/policy.h"

#include <algorithm>

namespace sf::mcdist {
namespace {

// Announces: while a push runs; its end, in case the announce of it is lost; otherwise while
// anything happens; and never more often than the last.
constexpr TimeNs kAnnouncePush = 20 * kMillisecond;
constexpr TimeNs kAnnounceEnd = 5 * kMillisecond;
constexpr uint32_t kAnnouncesOfEnd = 3;
constexpr TimeNs kAnnounceIdle = 250 * kMillisecond;
constexpr TimeNs kAnnounceLeast = 5 * kMillisecond;
constexpr TimeNs kAnnounceMemory = 2 * kSecond;   // "anything happens": somebody was heard
constexpr TimeNs kLinkLook = 100 * kMicrosecond;  // some 12 KB at 1 Gbit/s
constexpr size_t kIntroductions = 256;
// Where there is no room a page is pushed nevertheless, each: a thousand a second, see min_rate.
constexpr TimeNs kTrickle = kMillisecond;
constexpr TimeNs kCreditLook = 200 * kMicrosecond;
// A client that has not reported for this long is no longer part of the mean.
constexpr TimeNs kReportMemory = 300 * kMillisecond;

}  // namespace

Policy::Policy(const PolicyConfig& config, uint64_t pages)
    : config_(config),
      pages_(pages),
      queue_(config.queue_pages, config.peer_pages),
      memory_(config),
      audience_(std::max(config.subscriber_silence, kReportMemory)),
      flow_(config),
      push_(config_, pages),
      repair_(config_),
      history_(config.history_pages, pages, config.history),
      unusual_((pages + 63) / 64) {}

void Policy::heard(uint32_t id, const PeerReport& report, TimeNs now) {
  advance(now);
  Audience::Peer& peer = audience_.heard(id, report, now);
  if (report.history && !peer.history) {
    peer.history = true;
    history_.replay(id, config_.push_delay, now);
  }
  peer.credit = report.room_bytes == 0 ? UINT64_MAX : group_bytes_ + report.room_bytes;
  if (!peer.subscribed || config_.push != PushMode::kSubscribers) return;
  if (!push_.running()) {
    if (peer.round == push_.round() && peer.round != 0) {
      push_.resume();
    } else if (peer.round == 0 && audience_.subscribers() == 1) {
      push_.begin(now, push_.round() > 0);
      announce_at_ = std::min(announce_at_, push_.starts());
    }
  }
  peer.round = push_.round();
  if (!push_.running() || now >= push_.starts()) return;
  // Nobody new came for a while, and all who are there have subscribed: who would be waited for?
  if (audience_.subscribers() < audience_.present()) {
    push_.start_at(push_.begun() + 2 * config_.push_delay);
  } else {
    const TimeNs met = std::max(now, audience_.newest_met() + config_.push_delay);
    push_.start_at(std::min(met, push_.begun() + config_.push_delay));
  }
  announce_at_ = std::min(announce_at_, push_.starts());
}

// Have those who are pushed to room for more? If only a few have not (a liar, a host that hangs),
// half the rate lets them catch up, and holds up the others no further; see kTrickle.
bool Policy::window_open(TimeNs now) {
  if (group_bytes_ >= credit_.all && now >= credit_look_) {  // walks all peers
    const auto peers = static_cast<TimeNs>(audience_.peers());
    credit_look_ = now + std::max(kCreditLook, peers * kMicrosecond);
    credit_ = audience_.credit(now - kReportMemory);
  }
  push_wait_ = 0;
  if (group_bytes_ < credit_.all) return true;
  flow_.waited();
  push_wait_ = kTrickle;
  if (group_bytes_ < credit_.most) {
    push_wait_ = std::min(kTrickle, static_cast<TimeNs>(2e9 * kPageBytes / flow_.rate()));
  }
  return now - pushed_at_ >= push_wait_;
}

bool Policy::endgame(uint32_t peer, PageIndex page, bool lost, TimeNs now) const {
  // Whoever subscribed lacks something, so others want what one of them asks for.
  if (audience_.subscribers() > 1) return false;
  // Most was sent, and this page long ago: the others have it. What was lost a moment ago was lost
  // on the way to others as well, perhaps; and a page that was never sent is news to all.
  const bool most =
      static_cast<double>(push_.sent_count()) > config_.endgame_share * static_cast<double>(pages_);
  if (most && !lost && push_.was_sent(page)) return true;
  return config_.endgame_silence != kNever && !audience_.others(peer, config_.endgame_silence, now);
}

Policy::Verdict Policy::request(uint32_t id, PageIndex page, Urgency urgency, bool retry,
                                uint8_t fragments, TimeNs now) {
  advance(now);
  Audience::Peer* peer = audience_.find(id);
  const bool unreached = peer != nullptr && peer->unicast_only;
  if (urgency == Urgency::kFault) history_.faulted(page);
  if (!unreached && queue_.merge({page, 0}, urgency, fragments)) return Verdict::kMerged;
  SentMemory::Verdict known = SentMemory::Verdict::kUnknown;
  const SentMemory::Question question = {retry, fragments,
                                         fragments != 0 && (peer == nullptr || !peer->subscribed),
                                         peer == nullptr ? 0 : peer->met};
  const size_t peers = audience_.peers();
  if (!unreached) known = memory_.ask({page, 0}, question, peers, now);
  if (known != SentMemory::Verdict::kIgnore) {
    const auto alone = memory_.ask({page, id}, question, peers, now);
    if (alone != SentMemory::Verdict::kUnknown) known = alone;
  }
  if (known == SentMemory::Verdict::kIgnore) return Verdict::kLockstep;
  if (known == SentMemory::Verdict::kLost && peer != nullptr) {
    const unsigned lost =
        fragments == 0 ? symbols_ : static_cast<unsigned>(__builtin_popcount(fragments));
    audience_.lose(*peer, lost, flow_.window());
  }
  const bool unicast = unreached || push_.disjoint(page) ||
                       endgame(id, page, known == SentMemory::Verdict::kLost, now);
  if (!unicast) push_.requested(page);
  switch (queue_.add({{page, unicast ? id : 0}, fragments, id, urgency})) {
    case PageQueue::Verdict::kQueued:
      return Verdict::kQueued;
    case PageQueue::Verdict::kMerged:
      return Verdict::kMerged;
    case PageQueue::Verdict::kQueueFull:
      return Verdict::kQueueFull;
    case PageQueue::Verdict::kPeerFull:
      break;
  }
  return Verdict::kPeerFull;
}

Repair::Verdict Policy::report(uint32_t id, const BlockReport& report, TimeNs now) {
  advance(now);
  Audience::Peer* peer = audience_.find(id);
  symbols_ = report.fragments;
  const bool unreached = peer != nullptr && peer->unicast_only;
  BlockReport rest = report;
  // What parity cannot repair is asked page by page.
  const PageIndex first = report.block * kBlockPages;
  for (uint32_t left = report.wanted; left != 0; left &= left - 1) {
    const unsigned i = static_cast<unsigned>(__builtin_ctz(left));
    const PageIndex page = first + i;
    const bool unusual = (unusual_[page / 64] >> (page % 64) & 1) != 0;
    if (!unreached && !unusual) continue;
    rest.wanted &= ~(1U << i);
    unsigned mask = 0;
    for (unsigned f = 0; f < report.fragments; f++) {
      mask |= report.missing.has(i * report.fragments + f) ? 1U << f : 0;
    }
    if (mask == 0) continue;
    request(id, page, Urgency::kPrefetch, true, unusual ? 0 : static_cast<uint8_t>(mask), now);
  }
  const auto verdict = repair_.report(rest, audience_.subscribers() <= 1, now);
  if (verdict == Repair::Verdict::kTaken && report.cover == 0 && peer != nullptr) {
    audience_.lose(*peer, report.missing.count(), flow_.window());
  }
  return verdict;
}

void Policy::forget(uint32_t peer) { audience_.forget(peer); }

void Policy::introduce(uint32_t id, TimeNs now) {
  const Audience::Peer* peer = audience_.find(id);
  if (peer != nullptr && peer->unicast_only) {
    if (introductions_.size() < kIntroductions) introductions_.push_back(id);
    return;
  }
  announce_at_ = std::min(announce_at_, std::max(now, announced_ + kAnnounceLeast));
}

bool Policy::next(TimeNs now, Item* out) {
  advance(now);
  *out = Item{};
  if (next_announce(now, out)) return true;
  if (!flow_.allows()) return false;
  PageQueue::Entry entry;
  const auto take = [&](Urgency urgency) {
    if (!queue_.pop(urgency, &entry)) return false;
    out->page = entry.target.page;
    out->peer = entry.target.peer;
    out->fragments = entry.fragments;
    out->urgency = urgency;
    return true;
  };
  if (take(Urgency::kFault) || next_repair(now, out)) return true;
  // In turn: a late joiner that asks for what it missed and those who are pushed to.
  if (++turn_ % 2 == 0) return take(Urgency::kPrefetch) || next_idle(now, out);
  return next_idle(now, out) || take(Urgency::kPrefetch);
}

bool Policy::next_repair(TimeNs now, Item* out) {
  if (order_.symbols.empty() && !repair_.next(now, &order_)) return false;
  const unsigned per_page = order_.fragments;
  out->repair = true;
  if (order_.parity) {
    out->kind = Item::Kind::kParity;
    out->page = order_.block * kBlockPages;
    out->fragments = static_cast<uint8_t>(per_page);
    out->parity = Parity{order_.first, order_.cover_id, order_.symbols};
    out->parities = order_.count;
    order_.symbols = {};
    return true;
  }
  for (unsigned i = 0; i < kBlockPages; i++) {
    unsigned mask = 0;
    for (unsigned f = 0; f < per_page; f++) {
      if (!order_.symbols.has(i * per_page + f)) continue;
      order_.symbols.remove(i * per_page + f);
      mask |= 1U << f;
    }
    if (mask == 0) continue;
    out->page = order_.block * kBlockPages + i;
    out->fragments = mask == (1U << per_page) - 1 ? 0 : static_cast<uint8_t>(mask);
    break;
  }
  return true;
}

bool Policy::next_idle(TimeNs now, Item* out) {
  // To the only one that asked, alone: the others asked before, or hold what they want of it.
  const uint32_t asker = history_.peer();
  while (now >= history_.starts() && history_.next(&out->page)) {
    if (asker == 0 && push_.disjoint(out->page)) continue;
    const TimeNs since = history_.asked_at();
    if (memory_.sent_since({out->page, 0}, since)) continue;
    if (asker != 0 && memory_.sent_since({out->page, asker}, since)) continue;
    out->peer = asker;
    out->replayed = true;
    return true;
  }
  if (push_.running() && now >= push_.starts()) {
    if (audience_.subscribers() == 0) {
      push_.stop();
    } else if (!window_open(now)) {
      return false;
    } else if (push_.next(&out->page)) {
      out->pushed = true;
      pushed_at_ = now;
      return true;
    }
    farewells_ = kAnnouncesOfEnd;
    announce_at_ = now;
    return next_announce(now, out);
  }
  // Idle time only.
  uint8_t counter = 0;
  if (link_busy_ || !queue_.empty(Urgency::kPrefetch) || !push_.next_behind(&out->page, &counter))
    return false;
  out->pushed = true;
  out->cursor = static_cast<uint8_t>(counter + 1);
  return true;
}

bool Policy::wants_announces(TimeNs now) const { return audience_.anybody(kAnnounceMemory, now); }

bool Policy::next_announce(TimeNs now, Item* out) {
  if (!introductions_.empty()) {
    out->peer = introductions_.front();
    introductions_.pop_front();
  } else if (announce_at_ <= now) {
    announced_ = now;
    if (farewells_ > 0) farewells_--;
    announce_at_ = push_.running()                      ? now + kAnnouncePush
                   : farewells_ > 0                     ? now + kAnnounceEnd
                   : wants_announces(now)               ? now + kAnnounceIdle
                   : config_.announce_unheard != kNever ? now + config_.announce_unheard
                                                        : kNever;
  } else {
    return false;
  }
  out->kind = Item::Kind::kAnnounce;
  out->pushed = push_.running() && now >= push_.starts();
  out->position = push_.position();
  out->peers = static_cast<uint32_t>(audience_.present());
  return true;
}

void Policy::sent(const Item& item, Outcome outcome, uint64_t wire_bytes, TimeNs now) {
  if (item.kind == Item::Kind::kAnnounce) return flow_.sent(wire_bytes, 0, false);
  const bool group = item.peer == 0;
  uint64_t symbols = item.parities;
  if (item.kind == Item::Kind::kParity && outcome == Outcome::kRefused) {
    // One of these cannot be read: each on its own, so that the client hears which.
    for (unsigned i = 0; i < kBlockPages; i++) {
      if ((item.parity.cover & SymbolSet::Page(i, item.fragments)).empty()) continue;
      queue_.add({{item.page + i, 0}, 0, 0, Urgency::kPrefetch});
    }
    return;
  }
  if (item.kind == Item::Kind::kPage) {
    symbols = outcome != Outcome::kData ? 0
              : item.fragments == 0     ? symbols_
                                        : static_cast<unsigned>(__builtin_popcount(item.fragments));
    uint64_t& word = unusual_[item.page / 64];
    const uint64_t bit = uint64_t{1} << (item.page % 64);
    word = outcome == Outcome::kData ? word & ~bit : word | bit;
    if (outcome != Outcome::kRefused || !(item.pushed || item.replayed)) {
      memory_.sent({item.page, item.peer}, item.fragments, now);
    }
    if (group && outcome != Outcome::kRefused && item.fragments == 0) push_.sent(item.page);
  }
  if (group) group_bytes_ += wire_bytes;
  flow_.sent(wire_bytes, symbols, group);
}

TimeNs Policy::ready_at(TimeNs now) const {
  if (!introductions_.empty()) return now;
  TimeNs at = repair_.ready_at();
  if (queue_.size() > 0 || !order_.symbols.empty()) {
    at = now;
  } else if (push_.counting()) {
    at = link_busy_ ? now + kLinkLook : now;
  }
  if (push_.running()) {
    const TimeNs look = std::min(now + kCreditLook, pushed_at_ + push_wait_);
    at = std::min(at, push_wait_ > 0 ? look : push_.starts());
  }
  if (history_.replaying()) at = std::min(at, history_.starts());
  if (at != kNever) at = std::max(at, flow_.ready_at(now));
  return std::max(now, std::min(at, announce_at_));
}

double Policy::mean_receive_rate(TimeNs now) {
  return audience_.summary(0, 0, config_.max_rate, now - 2 * kSecond).receive_rate;
}

void Policy::advance(TimeNs now) {
  flow_.advance(now);
  audience_.expire(now);
  if (announce_at_ == kNever) {
    if (wants_announces(now) || (announced_ == 0 && config_.announce_unheard != kNever)) {
      announce_at_ = now;
    }
  }
  if (!flow_.window_over(now)) return;
  flow_.judge(audience_.summary(flow_.window(), flow_.window_symbols(), flow_.group_rate(),
                                now - kReportMemory),
              now);
}

}  // namespace sf::mcdist
