// SPDX-License-Identifier: Apache-2.0
//
// `drover receive` in the simulation: a model of mirror/receiver.cc, without its sockets and
// threads, over the real frame codec, Applier and LaneDigest. What it keeps to are
// docs/protocol.md's rules: requests one after the other, epochs, what becomes of the images, the
// barrier's proof, the record on disk.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/result.h"
#include "mirror/apply.h"
#include "mirror/frame.h"
#include "mirror/session.h"
#include "tests/sim/sim_content.h"
#include "tests/sim/sim_host.h"
#include "tests/sim/sim_world.h"

namespace drover::sim {

class SimReceiver;

// All connections of one epoch.
struct Connection {
  Connection(Network& network, unsigned lanes);
  std::uint64_t epoch = 1;
  mirror::FrameLimits limits;
  std::chrono::milliseconds silence{10000};
  std::vector<std::unique_ptr<Pipe>> up;    // frames, to the target
  std::vector<std::unique_ptr<Pipe>> down;  // answers
  Pipe control_up;
  Pipe control_down;
  std::weak_ptr<SimReceiver> receiver;
  // On the source.
  struct Source {
    virtual ~Source() = default;
    virtual void answered(unsigned lane, std::uint64_t sequence, const Result<mirror::BlockMask>& differing) = 0;
    virtual void replied(std::uint64_t id, const Result<nlohmann::json>& result) = 0;
    virtual void lost(const Error& error) = 0;
  };
  Source* source = nullptr;  // null: closed there
};
using ConnectionPtr = std::shared_ptr<Connection>;

// For the proof that the simulation notices.
struct TargetMutation {
  bool skip_flush = false;   // the barrier does not flush
  bool forget_keep = false;  // images go with the link although they were to be kept
  bool overwrite = false;    // an existing file is taken for the job's
  bool unverified = false;   // takes of other images what was not compared
  bool empty_map = false;    // says that there is nothing in its images
};

class SimTarget {
 public:
  SimTarget(World& world, Network& network, Host& host, const TargetMutation& mutation);
  ~SimTarget();
  // Its other images and their index; null: it has none.
  std::unique_ptr<SimContent> content;

  // JOBS/ID/receiver on the target: survives its receiver, and the host's restart.
  struct Record {
    struct Image {
      std::string path;
      FilePtr file;
      std::uint64_t losses = 0;  // how often flushing it failed
    };
    std::vector<Image> images;
    bool keep = false;
    bool resumable = false;
    bool proved = false;
  };

  // What SSH does. The network is the caller's business.
  // `resume`: the one that is alive, or a new one with what the last one left.
  Result<std::shared_ptr<SimReceiver>> start(const std::string& session, bool resumable,
                                             bool resume);
  // `drover receive --stop`: false while it is still ending.
  bool stop(const std::string& session);
  // `drover receive --cleanup`: its exit code; nothing while the receiver is still ending.
  std::optional<int> clean_up(const std::string& session, bool force, bool leave);

  void kill_receivers();
  void host_restarts();
  [[nodiscard]] bool nothing_left() const { return records_.empty() && receivers_.empty(); }
  // Of one that was killed a record may be left, with no image in it.
  [[nodiscard]] bool no_image_left() const;
  [[nodiscard]] SimReceiver* receiver(const std::string& session);

 private:
  friend class SimReceiver;
  World& world_;
  Network& network_;
  Host& host_;
  const TargetMutation mutation_;
  std::map<std::string, Record> records_;
  std::uint64_t boots_ = 1;
  std::uint64_t files_made_ = 0;
  std::map<std::string, std::shared_ptr<SimReceiver>> receivers_;
};

class SimReceiver : public std::enable_shared_from_this<SimReceiver> {
 public:
  // With the images that the record lists.
  SimReceiver(SimTarget& target, std::string session);
  ~SimReceiver();

  // Arrived from the source.
  using Answer = std::function<void(Result<nlohmann::json>)>;
  // Answers when what is left of the older epoch is applied or dropped.
  void hello(const ConnectionPtr& connection, Answer answer);
  void frame(const ConnectionPtr& connection, unsigned lane, const Bytes& bytes);
  void request(const ConnectionPtr& connection, std::uint64_t id, const nlohmann::json& request);
  void lost(const ConnectionPtr& connection, const std::string& why);
  // Told to end.
  void end(bool orderly);
  void kill();
  [[nodiscard]] bool ending() const { return ending_; }
  [[nodiscard]] bool barrier_passed() const { return barrier_passed_; }

 private:
  struct Lane {
    void drop();   // nothing of what is under way happens any more
    void close();
    std::vector<std::unique_ptr<SimWriter>> writers;
    std::vector<std::unique_ptr<SimReader>> readers;
    std::unique_ptr<SimContent::Reader> known;
    std::unique_ptr<mirror::Applier> applier;
    mirror::LaneDigest digest;
    std::uint64_t sequence = 0;
  };
  void work();
  [[nodiscard]] nlohmann::json describe_images();
  Status flush();
  void perform(const nlohmann::json& request, Answer answer);
  Result<nlohmann::json> map(const nlohmann::json& request);
  Result<nlohmann::json> reserve(const nlohmann::json& request);
  void barrier(const nlohmann::json& request, const Answer& answer);
  Result<nlohmann::json> prove(const nlohmann::json& request);
  void attach(const ConnectionPtr& connection);
  void when_idle(Task task);
  void remove_images();
  void finish_end();
  void drop_lanes();
  SimTarget::Record& record() { return target_.records_[session_]; }

  SimTarget& target_;
  World& world_;
  const std::string session_;
  ProcessPtr process_;
  ConnectionPtr connection_;
  std::uint64_t epoch_ = 0;
  std::vector<Lane> lanes_;
  std::vector<FilePtr> images_;
  std::deque<std::function<void(Task next)>> tasks_;
  bool working_ = false;
  bool kept_ = false;
  bool barrier_passed_ = false;
  bool flush_failed_ = false;  // since the images were opened
  bool finished_ = false;
  bool ending_ = false;
  bool orderly_ = false;  // finished or removed
  nlohmann::json passed_;
};

}  // namespace drover::sim
