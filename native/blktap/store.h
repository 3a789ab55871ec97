// A store: the slices of one folder that are in use, as trees of nodes.
//
// A node is a place in a tree: one slice, the node below it, the base below the oldest. Who uses a
// place holds its node, and with it all below: a disk holds that of its top, a view that of its
// generation. A node that nobody holds closes its slice. The journal (TypeScript) says what lies on
// what; nodes are made from the chains it gives, and a chain is followed down only to the first
// node that is there already: what lies below that one this store knows itself.
//
// An image is the merged index up to and including a node, never changed once made. A node holds
// its image weakly; strongly hold it
//   - a view, as long as somebody reads the generation,
//   - a disk: that of the node below its top, until its next fork,
//   - a node that the chain calls `shared`, or that has two nodes on it, for as long as it is used.
// An image is made from the nearest one below that is there, and the maps from there up. So disks
// on common ancestors share their index, and a thousand generations nobody reads cost none.
//
// Invariant: whoever holds an image holds the node, so the numbers in it keep their meaning.
//
// Locks: build_mutex (files are opened, images made, merges put in force, one at a time; held for
// long) > a disk's gate > mutex (the nodes; held for moments, also at a fork).
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "blktap/chain.h"
#include "blktap/slice.h"
#include "blktap/store_lock.h"

namespace sf {

class Merge;
class Store;
class View;

struct SliceRef {
  std::string id;
  uint32_t map = 0;     // edition
  bool shared = false;  // keep its image while it is used: others will need it
};

struct Node {
  explicit Node(std::shared_ptr<Store> of) : store(std::move(of)) {}
  ~Node();

  const std::shared_ptr<Store> store;
  // All guarded by the store's mutex; `slice`, `base` change under build_mutex only.
  std::string id;
  uint32_t map = 0;
  uint64_t size_bytes = 0;
  bool shared = false;
  bool merged_away = false;                 // no place any more
  bool top = false;                         // of an open disk
  std::shared_ptr<Node> parent;             // null: on the base
  std::shared_ptr<Slice> slice;             // null: not opened yet
  std::shared_ptr<Base> base;               // null: not opened yet
  std::vector<SliceTable::Number> numbers;  // of slices whose pages are here, its own first
  uint32_t height = 0;
  size_t children = 0;
  std::weak_ptr<const SliceIndex> image;
  std::shared_ptr<const SliceIndex> kept;
  std::weak_ptr<View> view;
};
using NodePtr = std::shared_ptr<Node>;
using ImagePtr = std::shared_ptr<const SliceIndex>;

class Store : public std::enable_shared_from_this<Store> {
 public:
  using OpenBase = std::function<Status(std::shared_ptr<Base>*)>;

  static Status Open(const std::string& directory, std::shared_ptr<Store>* out);
  // E_IN_USE while a disk is open, or if a clean-up goes on for 10 s more. Views stay readable.
  Status close();

  const std::string& directory() const { return directory_; }
  const std::shared_ptr<SliceTable>& table() const { return table_; }
  const StoreLock& lock() const { return lock_; }
  // What went wrong with data files of its slices while they were read.
  const std::shared_ptr<FileErrors>& file_errors() const { return file_errors_; }

  // The node of the last slice of a chain, oldest first. Quick: opens nothing. E_STATE if the chain
  // is not what this store knows (a merge was put in force), E_IN_USE if the last slice is being
  // merged into another.
  Status resolve(const std::vector<SliceRef>& slices, uint64_t size_bytes, bool top, NodePtr* out);
  // Opens a sealed (or settling) chain's base and image. Takes build_mutex.
  Status image(const NodePtr& node, const OpenBase& open_base, ImagePtr* out);
  Status view(const NodePtr& node, const OpenBase& open_base, std::shared_ptr<View>* out);
  std::shared_ptr<View> view_if_alive(const NodePtr& node);

  // A node for a slice that was opened already, not on anything yet. E_CAPACITY.
  Status adopt(const std::shared_ptr<Slice>& slice, NodePtr* out);
  // At a fork: `spare` lies on `below` now, whose image is `image`.
  void put_on(const NodePtr& spare, const NodePtr& below, ImagePtr image);
  void release_top(const NodePtr& node);

  // True while a view of this very slice is read, or it is the top of an open disk.
  bool in_use(const std::string& id);
  // E_STATE if a slice lies on this one that is not among `children`, as far as they are in use.
  Status check_children(const std::string& id, const std::vector<SliceRef>& children);
  // Removes the files of those slices that are in no use; `removed` says which.
  Status remove_slices(const std::vector<std::string>& ids, std::vector<std::string>* removed);
  // What a slice's map says now. `map` counts only if the slice is not in use here.
  Status slice_info(const SliceRef& ref, uint64_t* pages, uint64_t* zeros,
                    uint64_t* allocated_bytes);
  // What reads under way did not let go of in time, until the store is closed.
  void bury(std::vector<std::shared_ptr<Slice>> slices);
  void keep_for_readers(NodePtr node, std::shared_ptr<Base> base);

  // With build_mutex held: a disk's top lies on nothing from now on. What it lay on until now.
  NodePtr cut_loose(const NodePtr& top);

  std::mutex build_mutex;
  std::mutex mutex;

 private:
  friend class Claim;
  friend class Merge;
  friend struct Node;
  friend class Disk;
  explicit Store(std::string directory) : directory_(std::move(directory)) {}
  // All four with build_mutex held.
  Status open_node(const NodePtr& node);
  Status give_slice(const NodePtr& node, std::shared_ptr<Slice> slice);
  Status open_base_of(const NodePtr& node, const OpenBase& open_base);
  Status build(const NodePtr& node, ImagePtr* out);
  NodePtr find(const std::string& id);  // mutex held; let go only after it
  void set_heights();                   // mutex held

  const std::string directory_;
  StoreLock lock_;
  std::shared_ptr<SliceTable> table_ = std::make_shared<SliceTable>();
  const std::shared_ptr<FileErrors> file_errors_ = std::make_shared<FileErrors>();

  struct Known {
    Node* raw = nullptr;
    std::weak_ptr<Node> node;
  };
  std::unordered_map<std::string, Known> nodes_;  // mutex
  std::condition_variable released_;              // of a claim
  std::unordered_set<std::string> claimed_;       // mutex: one clean-up has them
  std::unordered_set<std::string> vanishing_;     // mutex: of these, those nobody may read
  std::vector<std::shared_ptr<Slice>> buried_;    // mutex: reads of them did not end in time
  std::vector<NodePtr> buried_nodes_;             // likewise
  std::vector<std::shared_ptr<Base>> buried_bases_;
  std::vector<Merge*> merges_;  // mutex: under way
  size_t disks_ = 0;            // mutex: open
  bool closed_ = false;         // mutex
};

}  // namespace sf
