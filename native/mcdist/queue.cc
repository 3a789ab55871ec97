#include "mcdist/queue.h"

namespace sf::mcdist {

bool PageQueue::merge(const Target& target, Urgency urgency, uint8_t fragments) {
  auto found = index_.find(target);
  if (found == index_.end()) return false;
  Entry& entry = *found->second;
  entry.fragments = entry.fragments == 0 || fragments == 0 ? 0 : entry.fragments | fragments;
  if (urgency == Urgency::kFault && entry.urgency == Urgency::kPrefetch) {
    Share& share = shares_[entry.owner];
    share.queued[1]--;
    share.queued[0]++;
    entry.urgency = Urgency::kFault;
    queue_[0].splice(queue_[0].end(), queue_[1], found->second);
  }
  return true;
}

PageQueue::Verdict PageQueue::add(const Entry& entry) {
  if (merge(entry.target, entry.urgency, entry.fragments)) return Verdict::kMerged;
  const size_t kind = static_cast<size_t>(entry.urgency);
  if (queue_[kind].size() >= queue_pages_) return Verdict::kQueueFull;
  auto share = shares_.try_emplace(entry.owner).first;
  if (share->second.queued[kind] >= peer_pages_) return Verdict::kPeerFull;
  share->second.queued[kind]++;
  queue_[kind].push_back(entry);
  index_[entry.target] = std::prev(queue_[kind].end());
  return Verdict::kQueued;
}

bool PageQueue::pop(Urgency urgency, Entry* out) {
  const size_t kind = static_cast<size_t>(urgency);
  if (queue_[kind].empty()) return false;
  *out = queue_[kind].front();
  queue_[kind].pop_front();
  index_.erase(out->target);
  release(out->owner, kind);
  return true;
}

void PageQueue::release(uint32_t owner, size_t kind) {
  auto share = shares_.find(owner);
  if (share == shares_.end()) return;
  share->second.queued[kind]--;
  if (share->second.queued[0] == 0 && share->second.queued[1] == 0) shares_.erase(share);
}

}  // namespace sf::mcdist
