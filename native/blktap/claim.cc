// What clean-ups and everybody else agree on.
#include <algorithm>

#include "blktap/merge.h"
#include "blktap/view.h"

namespace sf {

namespace {
constexpr auto kReadersLimit = std::chrono::seconds(30);
}

Status Claim::take(const std::shared_ptr<Store>& store, const std::vector<SliceRef>& slices,
                   size_t vanishing) {
  std::vector<NodePtr> nodes;
  std::vector<std::shared_ptr<View>> views;
  std::unordered_set<std::string> ids;
  std::vector<ImagePtr> images;  // all let go after the lock
  {
    std::lock_guard lock(store->mutex);
    if (store->closed_) return Status::Error("E_CLOSED", "the store is closed");
    for (size_t i = 0; i < slices.size(); i++) {
      const std::string name = "slice " + slices[i].id;
      if (!ids.insert(slices[i].id).second) return Status::Error("E_ARGUMENT", name + " twice");
      if (store->claimed_.contains(slices[i].id)) {
        return Status::Error("E_IN_USE", name + " is being cleaned up already");
      }
      NodePtr node = store->find(slices[i].id);
      const NodePtr below = nodes.empty() ? nullptr : nodes.back();
      nodes.push_back(node);
      if (node == nullptr) continue;
      if (node->top) return Status::Error("E_IN_USE", name + " is the top of an open disk");
      if (node->map != slices[i].map || (i > 0 && node->parent != below)) {
        return Status::Error("E_STATE", name + " is not where the run says, or has another map");
      }
      if (node->slice != nullptr && !node->slice->settled()) {
        return Status::Error("E_STATE", name + " is not sealed yet");
      }
      if (i >= vanishing) continue;
      if (auto view = node->view.lock()) {
        views.push_back(std::move(view));
        return Status::Error("E_IN_USE", name + " is being read");
      }
      if (slices.size() > 1 && node->children > 1) {
        return Status::Error("E_STATE", name + " has several slices on it");
      }
      images.push_back(std::move(node->kept));
    }
    store_ = store;
    slices_ = slices;
    for (size_t i = 0; i < slices.size(); i++) {
      store->claimed_.insert(slices[i].id);
      if (i < vanishing) store->vanishing_.insert(slices[i].id);
    }
  }
  if (store->table()->readers().synchronize(kReadersLimit)) return Status::Ok();
  release();
  return Status::Error("E_IN_USE", "reads of the store do not end: its device may be stuck");
}

void Claim::release() {
  if (store_ == nullptr) return;
  {
    std::lock_guard lock(store_->mutex);
    for (const auto& slice : slices_) {
      store_->claimed_.erase(slice.id);
      store_->vanishing_.erase(slice.id);
    }
    store_->released_.notify_all();
  }
  store_.reset();
}

}  // namespace sf
