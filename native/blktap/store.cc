#include "blktap/store.h"

#include <algorithm>
#include <iterator>
#include <set>
#include <shared_mutex>

#include "blktap/files.h"
#include "blktap/map_file.h"
#include "blktap/merge.h"
#include "blktap/view.h"

namespace sf {
namespace {

constexpr auto kStopLimit = std::chrono::seconds(10);

// Ends chains of any length without recursion: a node's end gives its parent to whoever is ending
// nodes on this thread.
void let_go(NodePtr node) {
  thread_local std::vector<NodePtr>* ending = nullptr;
  if (node == nullptr) return;
  if (ending != nullptr) {
    ending->push_back(std::move(node));
    return;
  }
  std::vector<NodePtr> queue;
  ending = &queue;
  queue.push_back(std::move(node));
  while (!queue.empty()) {
    NodePtr next = std::move(queue.back());
    queue.pop_back();
    next.reset();
  }
  ending = nullptr;
}

}  // namespace

Node::~Node() {
  ImagePtr unneeded;
  {
    std::lock_guard lock(store->mutex);
    for (auto number : numbers) store->table_->point(number, nullptr);
    auto found = store->nodes_.find(id);
    if (found != store->nodes_.end() && found->second.raw == this) store->nodes_.erase(found);
    if (store->closed_ && store->nodes_.empty()) store->lock_.release(false);
    if (parent != nullptr && --parent->children < 2 && !parent->shared) {
      unneeded = std::move(parent->kept);
    }
  }
  kept.reset();
  slice.reset();
  let_go(std::move(parent));
}

Status Store::Open(const std::string& directory, std::shared_ptr<Store>* out) {
  std::shared_ptr<Store> store(new Store(directory));
  Status status = store->lock_.take(directory);
  if (status.ok()) *out = std::move(store);
  return status;
}

Status Store::close() {
  std::vector<NodePtr> nodes;  // let go after the lock
  std::unique_lock lock(mutex);
  if (closed_) return Status::Ok();
  // Clean-ups that were told to stop need a moment.
  if (disks_ == 0) {
    released_.wait_for(lock, kStopLimit, [&] { return claimed_.empty(); });
  }
  if (disks_ > 0 || !claimed_.empty()) {
    return Status::Error(
        "E_IN_USE", "store " + directory_ + ": close its disks and end its clean-ups before it");
  }
  closed_ = true;
  nodes.swap(buried_nodes_);
  buried_.clear();
  buried_bases_.clear();
  lock_.release(!nodes_.empty());
  return Status::Ok();
}

NodePtr Store::find(const std::string& id) {
  auto found = nodes_.find(id);
  return found == nodes_.end() ? nullptr : found->second.node.lock();
}

Status Store::resolve(const std::vector<SliceRef>& slices, uint64_t size_bytes, bool top,
                      NodePtr* out) {
  if (slices.empty() || size_bytes == 0 || size_bytes > kMaxDiskBytes) {
    return Status::Error("E_ARGUMENT", "store " + directory_ + ": a chain without slices or size");
  }
  std::vector<NodePtr> held;  // let go after `lock`
  std::lock_guard lock(mutex);
  if (closed_) return Status::Error("E_CLOSED", "store " + directory_ + " is closed");
  // The journal names a merge's result already, and apply() is on its way.
  auto pending = [&](const SliceRef& ref) {
    auto found = std::find_if(merges_.begin(), merges_.end(),
                              [&](const Merge* merge) { return merge->prepared_as(ref); });
    return found == merges_.end() ? nullptr : *found;
  };
  if (!top && vanishing_.contains(slices.back().id) && pending(slices.back()) == nullptr) {
    return Status::Error("E_IN_USE", "slice " + slices.back().id + " is being cleaned up");
  }
  NodePtr node;
  size_t from = slices.size();  // slices[from..] have no node yet
  for (; from > 0; from--) {
    const SliceRef& ref = slices[from - 1];
    const Merge* merge = pending(ref);
    node = find(merge == nullptr ? ref.id : merge->last().id);
    if (node == nullptr) continue;
    held.push_back(node);
    if (merge == nullptr && node->map != ref.map) {
      return Status::Error("E_STATE", "slice " + ref.id + " of " + directory_ + " has map " +
                                          std::to_string(node->map) + " in this store, not " +
                                          std::to_string(ref.map));
    }
    if (node->size_bytes != size_bytes) {
      return Status::Error("E_CORRUPT", "slice " + ref.id + " has another size than its chain");
    }
    if (node->top || (top && from == slices.size())) {
      return Status::Error("E_IN_USE", "slice " + ref.id + " is in use");
    }
    break;
  }
  for (; from < slices.size(); from++) {
    auto made = std::make_shared<Node>(shared_from_this());
    held.push_back(made);
    made->id = slices[from].id;
    made->map = slices[from].map;
    made->size_bytes = size_bytes;
    made->parent = node;
    if (node != nullptr) node->children++;
    made->height = node == nullptr ? 1 : node->height + 1;
    nodes_[made->id] = {made.get(), made};
    node = std::move(made);
  }
  for (const auto& ref : slices) {
    if (!ref.shared) continue;
    if (NodePtr known = find(ref.id)) {
      known->shared = true;
      held.push_back(std::move(known));
    }
  }
  if (top) {
    node->top = true;
    disks_++;
  }
  *out = std::move(node);
  return Status::Ok();
}

Status Store::open_node(const NodePtr& node) {
  if (node->slice != nullptr) return Status::Ok();
  std::shared_ptr<Slice> slice;
  Status status =
      Slice::Open(directory_, node->id, node->map, node->size_bytes, file_errors_, &slice);
  if (!status.ok()) return status;
  if (!slice->settled()) {
    return Status::Error("E_CORRUPT", "slice " + node->id + " of " + directory_ +
                                          " is not sealed, and something lies on it");
  }
  return give_slice(node, std::move(slice));
}

Status Store::give_slice(const NodePtr& node, std::shared_ptr<Slice> slice) {
  std::lock_guard lock(mutex);
  const auto number = table_->add(slice.get(), node->height);
  if (number == 0) {
    return Status::Error("E_CAPACITY",
                         "store " + directory_ + ": too many slices were opened; open it again");
  }
  node->numbers.insert(node->numbers.begin(), number);
  node->slice = std::move(slice);
  return Status::Ok();
}

Status Store::open_base_of(const NodePtr& node, const OpenBase& open_base) {
  std::shared_ptr<Base> base;
  std::vector<Node*> without;
  {
    std::lock_guard lock(mutex);
    for (Node* at = node.get(); at != nullptr && base == nullptr; at = at->parent.get()) {
      if (at->base == nullptr) without.push_back(at);
      base = at->base;
    }
  }
  if (base == nullptr) {
    Status status = open_base(&base);
    if (!status.ok()) return status;
  }
  std::lock_guard lock(mutex);
  for (Node* each : without) each->base = base;
  return Status::Ok();
}

Status Store::build(const NodePtr& node, ImagePtr* out) {
  {
    std::lock_guard lock(mutex);
    // Resolved before, and a clean-up was quicker.
    if (node->merged_away) {
      return Status::Error("E_IN_USE", "slice " + node->id + " is being cleaned up");
    }
  }
  std::vector<NodePtr> todo;
  ImagePtr image;
  auto keep = [](const NodePtr& at, const ImagePtr& made) {
    at->image = made;
    if (at->shared || at->children >= 2) at->kept = made;
  };
  {
    std::lock_guard lock(mutex);
    for (NodePtr at = node; at != nullptr; at = at->parent) {
      image = at->image.lock();
      if (image != nullptr) {
        keep(at, image);
        break;
      }
      todo.push_back(at);
    }
  }
  SliceIndex index = image == nullptr ? SliceIndex(pages_of(node->size_bytes)) : *image;
  while (!todo.empty()) {
    const NodePtr at = std::move(todo.back());
    todo.pop_back();
    Status status = open_node(at);
    if (!status.ok()) return status;
    const auto number = at->numbers.front();
    status = at->slice->scan([&](PageIndex first, uint64_t count, PageState state) {
      index.set(first, count, state == PageState::kZero ? SliceIndex::kZero : number);
    });
    if (!status.ok()) return status;
    std::lock_guard lock(mutex);
    if (at != node && !at->shared && at->children < 2) continue;
    image = std::make_shared<const SliceIndex>(index);
    keep(at, image);
  }
  *out = std::move(image);
  return Status::Ok();
}

Status Store::image(const NodePtr& node, const OpenBase& open_base, ImagePtr* out) {
  std::lock_guard build_lock(build_mutex);
  Status status = open_base_of(node, open_base);
  return status.ok() ? build(node, out) : status;
}

std::shared_ptr<View> Store::view_if_alive(const NodePtr& node) {
  std::shared_ptr<View> view;
  std::lock_guard lock(mutex);
  view = node->view.lock();
  if (view != nullptr) return view;
  ImagePtr image = node->image.lock();
  if (image == nullptr || node->base == nullptr || node->merged_away ||
      vanishing_.contains(node->id)) {
    return nullptr;
  }
  view =
      std::make_shared<View>(Chain{node->size_bytes, node->base, table_}, node, std::move(image));
  node->view = view;
  return view;
}

Status Store::view(const NodePtr& node, const OpenBase& open_base, std::shared_ptr<View>* out) {
  ImagePtr held;
  Status status = image(node, open_base, &held);
  if (status.ok()) *out = view_if_alive(node);
  if (status.ok() && *out == nullptr) {
    return Status::Error("E_IN_USE", "a slice of the generation is being cleaned up");
  }
  return status;
}

Status Store::adopt(const std::shared_ptr<Slice>& slice, NodePtr* out) {
  auto node = std::make_shared<Node>(shared_from_this());
  node->id = slice->id();
  node->size_bytes = slice->size_bytes();
  Status status = give_slice(node, slice);
  if (status.ok()) *out = std::move(node);
  return status;
}

void Store::put_on(const NodePtr& spare, const NodePtr& below, ImagePtr image) {
  std::lock_guard lock(mutex);
  below->top = false;
  below->image = std::move(image);
  below->children++;
  spare->parent = below;
  spare->base = below->base;
  spare->height = below->height + 1;
  spare->top = true;
  table_->set_height(spare->numbers.front(), spare->height);
  nodes_[spare->id] = {spare.get(), spare};
}

void Store::release_top(const NodePtr& node) {
  std::lock_guard lock(mutex);
  if (!node->top) return;
  node->top = false;
  disks_--;
}

bool Store::in_use(const std::string& id) {
  NodePtr node;
  std::lock_guard lock(mutex);
  node = find(id);
  return node != nullptr && (node->top || !node->view.expired());
}

Status Store::check_children(const std::string& id, const std::vector<SliceRef>& children) {
  std::unordered_set<std::string> known;
  for (const auto& child : children) known.insert(child.id);
  std::lock_guard lock(mutex);
  for (const auto& [other, entry] : nodes_) {
    const Node* below = entry.raw->parent.get();
    if (below == nullptr || below->id != id || known.contains(other)) continue;
    return Status::Error("E_STATE", "slice " + other + " lies on slice " + id + " too");
  }
  return Status::Ok();
}

void Store::bury(std::vector<std::shared_ptr<Slice>> slices) {
  std::lock_guard lock(mutex);
  for (auto& slice : slices) buried_.push_back(std::move(slice));
}

void Store::keep_for_readers(NodePtr node, std::shared_ptr<Base> base) {
  std::lock_guard lock(mutex);
  buried_nodes_.push_back(std::move(node));
  buried_bases_.push_back(std::move(base));
}

NodePtr Store::cut_loose(const NodePtr& top) {
  ImagePtr unneeded;
  NodePtr below;
  std::lock_guard lock(mutex);
  below = std::move(top->parent);
  top->parent = nullptr;
  top->base = make_zero_base();
  if (below != nullptr && --below->children < 2 && !below->shared) {
    unneeded = std::move(below->kept);
  }
  set_heights();
  return below;
}

Status Store::remove_slices(const std::vector<std::string>& ids,
                            std::vector<std::string>* removed) {
  {
    std::lock_guard lock(mutex);
    std::set<std::string> buried;
    for (const auto& slice : buried_) buried.insert(slice->id());
    std::ranges::copy_if(ids, std::back_inserter(*removed), [&](const std::string& id) {
      return find(id) == nullptr && !buried.contains(id) && !claimed_.contains(id);
    });
  }
  if (removed->empty()) return Status::Ok();
  return Slice::Remove(directory_, *removed);
}

Status Store::slice_info(const SliceRef& ref, uint64_t* pages, uint64_t* zeros,
                         uint64_t* allocated_bytes) {
  std::shared_ptr<Slice> slice;
  NodePtr used;
  {
    std::lock_guard lock(mutex);
    used = find(ref.id);
    if (used != nullptr) slice = used->slice;
  }
  if (slice == nullptr) {
    // Not opened as a disk's would be: that makes live maps.
    uint64_t size_bytes = 0;
    Status status = size_in_header(directory_ + "/" + ref.id + map_suffix(ref.map), &size_bytes);
    if (status.ok()) {
      status = Slice::OpenSealed(directory_, ref.id, ref.map, size_bytes, file_errors_, &slice);
    }
    if (!status.ok()) return status;
  }
  *pages = *zeros = *allocated_bytes = 0;
  Status status = slice->allocated_bytes(allocated_bytes);
  if (!status.ok()) return status;
  return slice->scan([&](PageIndex, uint64_t count, PageState state) {
    *pages += count;
    if (state == PageState::kZero) *zeros += count;
  });
}

// Of all nodes, after a merge or a detached disk. Mutex held.
void Store::set_heights() {
  std::unordered_map<const Node*, uint32_t> heights;
  std::vector<Node*> path;
  std::unique_lock shape(table_->shape());
  for (auto& [id, known] : nodes_) {
    Node* at = known.raw;
    for (; at != nullptr && !heights.contains(at); at = at->parent.get()) path.push_back(at);
    uint32_t height = at == nullptr ? 0 : heights[at];
    for (; !path.empty(); path.pop_back()) {
      path.back()->height = ++height;
      heights[path.back()] = height;
      for (auto number : path.back()->numbers) table_->set_height(number, height);
    }
  }
}

}  // namespace sf
