// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/sim_target.h"
#include "tests/sim/sim_frame.h"

#include <algorithm>
#include <utility>

#include "base/buffer.h"
#include "mirror/known_filter.h"

namespace drover::sim {

using namespace std::chrono_literals;
using nlohmann::json;

Connection::Connection(Network& network, unsigned lanes)
    : control_up(network), control_down(network) {
  for (unsigned i = 0; i < lanes; ++i) {
    up.push_back(std::make_unique<Pipe>(network));
    down.push_back(std::make_unique<Pipe>(network));
  }
}

// --- the host's side of it ---

SimTarget::SimTarget(World& world, Network& network, Host& host, const TargetMutation& mutation)
    : world_(world), network_(network), host_(host), mutation_(mutation) {}

SimTarget::~SimTarget() { kill_receivers(); }

Result<std::shared_ptr<SimReceiver>> SimTarget::start(const std::string& session, bool resumable,
                                                      bool resume) {
  const auto record = records_.find(session);
  if (resume) {
    if (record == records_.end()) return fail(Code::NotFound, "no receiver left anything there");
    if (receivers_.contains(session)) return receivers_.at(session);
    if (!record->second.resumable || record->second.proved) {
      return fail(Code::Denied, "what is left there can't be resumed");
    }
    for (const Record::Image& image : record->second.images) {
      const auto file = host_.files.find(image.path);
      if (file == host_.files.end() || file->second != image.file) {
        return fail(Code::Busy, "another file has taken the place of " + image.path);
      }
    }
  } else if (record != records_.end()) {
    return fail(Code::AlreadyExists, "another receiver of this job is alive or has left debris");
  }
  if (!resume) records_[session].resumable = resumable;
  auto receiver = std::make_shared<SimReceiver>(*this, session);
  receivers_[session] = receiver;
  return receiver;
}

SimReceiver* SimTarget::receiver(const std::string& session) {
  const auto found = receivers_.find(session);
  return found == receivers_.end() ? nullptr : found->second.get();
}

std::optional<int> SimTarget::clean_up(const std::string& session, bool force, bool leave) {
  constexpr int kOk = 0;
  constexpr int kNothing = 3;
  constexpr int kRefused = 1;
  const auto found = records_.find(session);
  if (found == records_.end()) return kNothing;
  if (SimReceiver* const alive = receiver(session)) {
    if (force) alive->end(false);
    return std::nullopt;
  }
  const Record& record = found->second;
  if (record.keep && !force && !leave) return kRefused;
  if (!(record.keep && leave)) {
    for (const Record::Image& image : record.images) {
      const auto file = host_.files.find(image.path);
      if (file != host_.files.end() && file->second == image.file) host_.files.erase(file);
    }
  }
  records_.erase(found);
  return kOk;
}

bool SimTarget::stop(const std::string& session) {
  SimReceiver* const alive = receiver(session);
  if (alive != nullptr) alive->end(false);
  return alive == nullptr;
}

void SimTarget::kill_receivers() {
  for (const auto& [session, receiver] : std::exchange(receivers_, {})) receiver->kill();
}

void SimTarget::host_restarts() {
  kill_receivers();
  ++boots_;
  for (const auto& [path, file] : host_.files) file->lose_unsynced(world_.random);
}

bool SimTarget::no_image_left() const {
  return receivers_.empty() &&
         std::ranges::all_of(records_, [](const auto& one) { return one.second.images.empty(); });
}

// --- one receiver ---

SimReceiver::SimReceiver(SimTarget& target, std::string session)
    : target_(target),
      world_(target.world_),
      session_(std::move(session)),
      process_(std::make_shared<Process>("receiver")) {
  kept_ = record().keep;
  for (const SimTarget::Record::Image& image : record().images) images_.push_back(image.file);
  constexpr auto kFirstContact = 60s;
  world_.after(
      kFirstContact,
      [this] {
        if (epoch_ == 0) end(false);
      },
      process_);
}

SimReceiver::~SimReceiver() { kill(); }

void SimReceiver::kill() {
  if (!process_->alive) return;
  process_->alive = false;
  drop_lanes();
  if (connection_ != nullptr) {
    const ConnectionPtr gone = std::exchange(connection_, nullptr);
    gone->receiver.reset();
    for (const auto& pipe : gone->down) pipe->close();
    // The kernel says so; a host that restarts says it when it is asked next.
    gone->control_down.send([gone] {
      if (gone->source != nullptr)
        gone->source->lost({Code::Unreachable, "the target closed the connection", "", true});
    });
  }
}

void SimReceiver::Lane::drop() {
  while (applier && applier->in_flight() > 0) {
    for (const auto& writer : writers) writer->drop();
    for (const auto& reader : readers) reader->drop();
    if (known) known->drop();
  }
}

void SimReceiver::Lane::close() {
  applier.reset();
  writers.clear();
  readers.clear();
  known.reset();
}

// Of what is under way nothing comes of any more.
void SimReceiver::drop_lanes() {
  for (Lane& lane : lanes_) lane.drop();
  lanes_.clear();
}

// Runs what takes time one after the other.
void SimReceiver::work() {
  if (working_ || tasks_.empty() || !process_->alive) return;
  working_ = true;
  const auto task = std::move(tasks_.front());
  tasks_.pop_front();
  world_.after(
      world_.between(20us, 400us),
      [this, task] {
        task([this] {
          working_ = false;
          work();
        });
      },
      process_);
}

void SimReceiver::when_idle(Task task) {
  for (Lane& lane : lanes_) {
    if (lane.applier == nullptr || lane.applier->in_flight() == 0) continue;
    lane.applier->when_idle([this, task] {
      world_.after(
          0us, [this, task] { when_idle(task); }, process_);
    });
    return;
  }
  task();
}

void SimReceiver::hello(const ConnectionPtr& connection, Answer answer) {
  if (!process_->alive || ending_) return answer(fail(Code::Unreachable, "connection refused"));
  if (connection->epoch <= epoch_) return answer(fail(Code::Protocol, "this epoch is over"));
  epoch_ = connection->epoch;
  if (const ConnectionPtr old = std::exchange(connection_, connection)) {
    for (const auto& pipe : old->up) pipe->close();
    for (const auto& pipe : old->down) pipe->close();
  }
  tasks_.push_back([this, connection, answer = std::move(answer)](const Task& next) {
    when_idle([this, connection, answer, next] {
      drop_lanes();
      flush_failed_ = false;
      if (connection == connection_) attach(connection);
      answer(nlohmann::json{{"images", describe_images()}});
      next();
    });
  });
  work();
}

json SimReceiver::describe_images() {
  json list = json::array();
  for (const SimTarget::Record::Image& image : record().images) {
    list.push_back(
        {{"path", image.path},
         {"id", "image-" + std::to_string(image.file->number)},
         {"instance", std::to_string(target_.boots_) + "/" + std::to_string(image.losses)},
         {"initially_zero", true}});
  }
  return list;
}

// Once it failed, what was written before may be lost: none succeeds until the images are opened again
// (blockcopy/image.h), which the next epoch does.
Status SimReceiver::flush() {
  if (flush_failed_) return fail(Code::Io, "flushing: it failed before");
  if (target_.host_.write_errors) {
    flush_failed_ = true;
    for (SimTarget::Record::Image& image : record().images) ++image.losses;
    return fail(Code::Io, "flushing: I/O error");
  }
  for (const FilePtr& image : images_) image->sync();
  return {};
}

void SimReceiver::attach(const ConnectionPtr& connection) {
  lanes_.resize(connection->up.size());
  for (unsigned i = 0; i < lanes_.size(); ++i) {
    Lane& lane = lanes_[i];
    if (images_.empty() || barrier_passed_) continue;
    std::vector<mirror::Applier::Disk> disks;
    for (const FilePtr& file : images_) {
      lane.writers.push_back(std::make_unique<SimWriter>(world_, target_.host_, file));
      lane.writers.back()->share_with(target_.content.get());
      lane.readers.push_back(
          std::make_unique<SimReader>(world_, target_.host_, file, [] { return true; }));
      disks.push_back({lane.writers.back().get(), lane.readers.back().get()});
    }
    mirror::Applier::Options options;
    options.offers.mutation_unverified = target_.mutation_.unverified;
    if (target_.content) {
      lane.known = target_.content->open([this](Task task) {
        world_.after(world_.between(20us, 2000us), std::move(task), process_);
      });
      options.known = lane.known.get();
    }
    lane.applier = std::make_unique<mirror::Applier>(
        std::move(disks), [this, connection, i](std::uint64_t sequence, std::uint16_t,
                                                const Result<mirror::BlockMask>& differing) {
          if (!process_->alive) return;
          connection->down[i]->send([connection, i, sequence, differing] {
            if (connection->source != nullptr) connection->source->answered(i, sequence, differing);
          });
        },
        options);
  }
}

void SimReceiver::frame(const ConnectionPtr& connection, unsigned index, const Bytes& bytes) {
  if (!process_->alive || connection != connection_ || index >= lanes_.size()) return;
  Lane& lane = lanes_[index];
  if (!lane.applier) {
    // It breaks the protocol: the lane ends, and the source is told.
    connection->control_down.send([connection] {
      if (connection->source != nullptr) {
        connection->source->lost(
            {Code::Unreachable, "the target closed a data connection", "", true});
      }
    });
    return;
  }
  static thread_local BufferPool pool(Length(1U << 15), 4096);
  auto in = decode_frame(bytes, connection->limits, pool);
  if (!in) return world_.violate("a frame did not arrive: " + in.error().message);
  if (in->header.sequence != ++lane.sequence)
    return world_.violate("a lane lost a frame or doubled it");
  lane.digest.add(std::span(bytes).first<mirror::kHeaderSize>());
  lane.applier->apply(in->header, std::move(in->buffer), in->runs);
}

// --- control ---

void SimReceiver::request(const ConnectionPtr& connection, std::uint64_t id, const json& request) {
  if (!process_->alive || connection != connection_) return;
  const std::string op = request.at("op");
  const auto reply = [this, connection, id, op](const Result<json>& result) {
    world_.trace("receiver: {}: {}", op, result ? "ok" : result.error().message);
    connection->control_down.send([connection, id, result] {
      if (connection->source != nullptr) connection->source->replied(id, result);
    });
    if (op == "finish" && result) {
      world_.after(
          1ms, [this] { end(true); }, process_);
    }
  };
  if (op == "index") {
    // Some do not know the question.
    if (target_.content == nullptr && world_.random.one_in(2)) {
      return reply(fail(Code::InvalidArgument, "the receiver does not know \"index\""));
    }
    return reply(filter_part(target_.content ? target_.content->filter().get() : nullptr, request));
  }
  if (op == "ping" || op == "stats") return reply(json::object());
  tasks_.push_back([this, request, reply](const Task& next) {
    perform(request, [reply, next](const Result<json>& result) {
      reply(result);
      next();
    });
  });
  work();
}

void SimReceiver::perform(const json& request, Answer answer) {
  const std::string op = request.at("op");
  if (op == "reserve") return answer(reserve(request));
  if (op == "barrier") return barrier(request, answer);
  if (op == "flush") {
    if (barrier_passed_) return answer(fail(Code::Protocol, "the images are released already"));
    if (const Status flushed = flush(); !flushed) return answer(fail(flushed.error()));
    return answer(json::object());
  }
  if (op == "map") return answer(map(request));
  if (op == "images") return answer(json{{"disks", describe_images()}});
  if (op == "keep") {
    kept_ = true;
    if (!target_.mutation_.forget_keep) record().keep = true;
    return answer(json::object());
  }
  if (op == "remove") {
    if (kept_ && !request.value("force", false)) {
      return answer(fail(Code::Denied, "the handover had begun: the images are kept"));
    }
    return when_idle([this, answer] {
      remove_images();
      kept_ = barrier_passed_ = false;
      orderly_ = true;
      answer(json::object());
    });
  }
  if (op == "finish") {
    if (!images_.empty() && !barrier_passed_) {
      return answer(fail(Code::Protocol, "a job does not finish before its barrier is passed"));
    }
    images_.clear();
    finished_ = orderly_ = true;
    return answer(json::object());
  }
  answer(fail(Code::InvalidArgument, "the receiver does not know \"" + op + "\""));
}

Result<json> SimReceiver::map(const json& request) {
  if (barrier_passed_) return fail(Code::Protocol, "the images are released already");
  const auto disk = request.at("disk").get<std::size_t>();
  const auto from = request.at("offset").get<std::size_t>();
  if (disk >= images_.size()) return fail(Code::Protocol, "there is no such disk");
  DROVER_TRY(flush());
  const Bytes& content = images_[disk]->content;
  constexpr std::size_t kBlock = 4096;
  constexpr std::size_t kAtOnce = 4 * kBlock;
  const std::size_t end = std::min(content.size(), from + kAtOnce);
  json holes = json::array();
  for (std::size_t at = from; at < end; at += kBlock) {
    const auto block = std::span(content).subspan(at, std::min(kBlock, end - at));
    const bool hole = std::ranges::all_of(block, [](std::byte one) { return one == std::byte{0}; });
    if (!hole && !target_.mutation_.empty_map) continue;
    // Runs come in one piece.
    if (!holes.empty() &&
        holes.back()[0].get<std::size_t>() + holes.back()[1].get<std::size_t>() == at) {
      holes.back()[1] = holes.back()[1].get<std::size_t>() + block.size();
    } else {
      holes.push_back({at, block.size()});
    }
  }
  return json{{"holes", holes}, {"end", end}};
}

Result<json> SimReceiver::reserve(const json& request) {
  if (!images_.empty()) return fail(Code::AlreadyExists, "the images are reserved already");
  if (kept_) return fail(Code::Protocol, "nothing is reserved after the barrier");
  Status status;
  json disks = json::array();
  for (const json& disk : request.at("disks")) {
    const std::string path = disk.at("path");
    if (target_.host_.full)
      status = fail(Code::NoSpace, "creating " + path + ": no space left on device");
    if (target_.host_.files.contains(path) && !target_.mutation_.overwrite) {
      status = fail(Code::AlreadyExists, path + " is there already");
    }
    if (!status) break;
    const FilePtr file = new_file(disk.at("size").get<std::size_t>());
    file->of_the_job = true;
    file->number = ++target_.files_made_;
    target_.host_.files[path] = file;
    images_.push_back(file);
    record().images.push_back({path, file});
    disks.push_back({{"path", path}, {"initially_zero", true}});
  }
  if (!status) {
    remove_images();
    return fail(status.error());
  }
  drop_lanes();
  if (connection_ != nullptr) attach(connection_);
  return json{{"disks", disks}};
}

void SimReceiver::barrier(const json& request, const Answer& answer) {
  if (barrier_passed_) {
    // Asked again by a source that did not get the answer, on the same connections or on new ones.
    const bool nothing_new = std::ranges::all_of(request.at("lanes"), [](const json& lane) {
      return lane == mirror::LaneDigest().to_json();
    });
    if (request.at("lanes") == passed_ || nothing_new) return answer(json::object());
    return answer(fail(Code::Protocol, "the barrier is passed already, with other digests"));
  }
  if (images_.empty()) return answer(fail(Code::Protocol, "there is no image to prove"));
  kept_ = true;
  if (!target_.mutation_.forget_keep) record().keep = true;
  when_idle([this, request, answer] { answer(prove(request)); });
}

Result<json> SimReceiver::prove(const json& request) {
  const json& expected = request.at("lanes");
  for (unsigned i = 0; i < lanes_.size(); ++i) {
    lanes_[i].close();
  }
  for (unsigned i = 0; i < lanes_.size(); ++i) {
    if (lanes_[i].digest.to_json() != expected.at(i)) {
      return fail(Code::Protocol, "a data connection took other frames than were sent");
    }
  }
  if (!target_.mutation_.skip_flush) DROVER_TRY(flush());
  barrier_passed_ = record().proved = true;
  passed_ = expected;
  return json::object();
}

void SimReceiver::remove_images() {
  for (const SimTarget::Record::Image& image : record().images) {
    const auto file = target_.host_.files.find(image.path);
    if (file != target_.host_.files.end() && file->second == image.file)
      target_.host_.files.erase(file);
  }
  record().images.clear();
  record().keep = record().proved = false;
  for (Lane& lane : lanes_) {
    lane.drop();
    lane.close();
  }
  images_.clear();
}

// --- the end ---

void SimReceiver::lost(const ConnectionPtr& connection, const std::string& why) {
  if (!process_->alive || connection != connection_) return;
  world_.trace("receiver: {}", why);
  connection_.reset();
  // A session that can be resumed waits for the next epoch.
  constexpr auto kLinger = 24h;
  if (!record().resumable || ending_ || orderly_) return end(false);
  tasks_.push_back([this](const Task& next) {
    when_idle([this, next] {
      if (connection_ == nullptr) drop_lanes();
      next();
    });
  });
  work();
  world_.after(
      kLinger,
      [this, epoch = epoch_] {
        if (epoch == epoch_ && connection_ == nullptr) end(false);
      },
      process_);
}

void SimReceiver::end(bool orderly) {
  if (!process_->alive || std::exchange(ending_, true)) return;
  world_.trace("receiver: ends{}", orderly ? "" : " without a word of its source's");
  tasks_.push_back([this](const Task&) { when_idle([this] { finish_end(); }); });
  work();
}

void SimReceiver::finish_end() {
  const auto self = shared_from_this();
  const bool resumable = record().resumable && !record().images.empty();
  const bool keep = (kept_ || resumable) && !finished_ && !target_.mutation_.forget_keep;
  if (!keep) {
    if (!finished_) remove_images();
    target_.records_.erase(session_);
  } else {
    (void)flush();
  }
  target_.receivers_.erase(session_);
  kill();
}

}  // namespace drover::sim
