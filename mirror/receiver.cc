// SPDX-License-Identifier: Apache-2.0
#include "mirror/receiver.h"

#include <fmt/format.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <deque>
#include <fstream>
#include <list>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/log.h"
#include "base/loop.h"
#include "base/priority.h"
#include "mirror/connect.h"
#include "mirror/known_filter.h"
#include "mirror/receiver_lane.h"
#include "mirror/relay.h"
#include "mirror/session.h"

namespace drover::mirror {

namespace {

// Connections that have not proved that they have the key. One more: the oldest goes.
constexpr std::size_t kMaxHalfOpen = 16;
constexpr std::size_t kMaxRequests = 64;  // control requests being carried out or waiting
constexpr std::size_t kMaxControlOutput = 4 * kMaxMessage;
constexpr std::size_t kMaxLaneBuffers = 32;
// The source notices a dead link first: its silence_timeout; ours is longer.
constexpr int kSilenceFactor = 3;
constexpr std::chrono::milliseconds kGoodbye{5000};
constexpr std::chrono::milliseconds kAcceptRetry{100};

// Runs tasks one after the other on a thread of its own.
class Worker {
 public:
  Worker() : thread_([this] { run(); }) {}
  ~Worker() {
    post(nullptr);
    thread_.join();
  }
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  void post(std::function<void()> task) {
    {
      const std::lock_guard lock(mutex_);
      tasks_.push_back(std::move(task));
    }
    wake_.notify_one();
  }

 private:
  void run() {
    while (true) {
      std::unique_lock lock(mutex_);
      wake_.wait(lock, [this] { return !tasks_.empty(); });
      const std::function<void()> task = std::move(tasks_.front());
      tasks_.pop_front();
      lock.unlock();
      if (!task) return;
      task();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::function<void()>> tasks_;
  std::thread thread_;  // last: it uses the others
};

std::uint64_t peak_memory() {
  std::ifstream status("/proc/self/status");
  std::string word;
  while (status >> word) {
    if (word != "VmHWM:") continue;
    std::uint64_t kib = 0;
    status >> kib;
    return kib * 1024;
  }
  return 0;
}

// Another one after each start of this host: what was not flushed is lost with it.
std::string boot_id() {
  std::ifstream in("/proc/sys/kernel/random/boot_id");
  std::string id;
  in >> id;
  return id;
}

// The images and lanes of a session: all that takes time. On the worker's thread only, but for what
// is atomic.
class Store {
 public:
  Store(const ReceiverOptions& options, ReceiverRecord& record, ReceiverTotals& totals)
      : options_(options), record_(record), totals_(totals) {}

  [[nodiscard]] bool kept() const { return kept_; }

  // The images that the record lists.
  Status open_recorded() {
    kept_ = record_.keep();
    for (std::size_t i = 0; i < record_.images().size(); ++i) {
      images_.emplace_back();
      DROVER_TRY(open_again(i));
    }
    return {};
  }

  // No lane is there. Images whose process has died meanwhile are opened again.
  Result<nlohmann::json> begin_epoch() {
    drop_lanes();
    for (std::size_t i = 0; i < images_.size() && !barrier_passed_; ++i) {
      if (images_[i] == nullptr || !images_[i]->alive()) DROVER_TRY(open_again(i));
    }
    return describe_images();
  }

  [[nodiscard]] nlohmann::json describe_images() const {
    nlohmann::json list = nlohmann::json::array();
    for (std::size_t i = 0; i < images_.size(); ++i) {
      const ReceiverRecord::Image& recorded = record_.images().at(i);
      list.push_back(
          {{"path", recorded.spec.path},
           {"id", recorded.id},
           {"instance", fmt::format("{}/{}/{}", boot_id_, recorded.losses, images_[i]->holder())},
           {"initially_zero", images_[i]->initially_zero()},
           {"reads_storage", images_[i]->reads_storage()}});
    }
    return list;
  }

  void set_limits(FrameLimits limits, unsigned lanes) {
    limits_ = std::move(limits);
    lane_count_ = lanes;
  }

  void add_lane(std::shared_ptr<LaneReceiver> lane) {
    if (auto status = lane->start(images_); !status) {
      log_error("starting lane {}: {}", lane->index(), status.error().message);
      return;
    }
    lanes_.push_back(std::move(lane));
  }

  void drop_lane(const LaneReceiver* lane) {
    const auto found = std::ranges::find(lanes_, lane, &std::shared_ptr<LaneReceiver>::get);
    if (found == lanes_.end()) return;
    (*found)->finish();
    lanes_.erase(found);
  }

  void drop_lanes() {
    for (const auto& lane : lanes_) lane->finish();
    lanes_.clear();
  }

  Result<nlohmann::json> reserve(const nlohmann::json& request) {
    if (!images_.empty()) return fail(Code::AlreadyExists, "the images are reserved already");
    if (kept_) return fail(Code::Protocol, "nothing is reserved after the barrier");
    DROVER_ASSIGN(const std::vector<blockcopy::TargetSpec> specs, read_specs(request));
    Status status = create_images(specs);
    for (const auto& lane : lanes_) {
      if (status) status = lane->attach(images_);
    }
    if (!status) {
      Error error = std::move(status).error();
      if (auto removed = remove_images(); !removed) error.hint = removed.error().message;
      return fail(std::move(error));
    }
    return nlohmann::json{{"disks", describe_images()}};
  }

  // Lanes go on meanwhile: what they had acknowledged before is what counts.
  Result<nlohmann::json> flush() {
    if (barrier_passed_) return fail(Code::Protocol, "the images are released already");
    for (std::size_t i = 0; i < images_.size(); ++i) DROVER_TRY(flush(i));
    return nlohmann::json::object();
  }

  // Where an image reads as zeroes, durably. The source sends nothing meanwhile.
  Result<nlohmann::json> map(const nlohmann::json& request) {
    if (barrier_passed_) return fail(Code::Protocol, "the images are released already");
    DROVER_ASSIGN(const std::uint64_t disk, get_unsigned(request, "disk"));
    DROVER_ASSIGN(const std::uint64_t offset, get_unsigned(request, "offset"));
    if (disk >= images_.size() || offset >= images_[disk]->spec().size.bytes()) {
      return fail(Code::Protocol, "there is no such disk, or it ends before that");
    }
    DROVER_TRY(flush(disk));
    const Offset size(images_[disk]->spec().size.bytes());
    Offset end(offset);
    nlohmann::json holes = nlohmann::json::array();
    for (const blockcopy::MappedExtent& run : images_[disk]->map({end, size - end})) {
      if (!run.data) holes.push_back({run.extent.offset.bytes(), run.extent.length.bytes()});
      end = run.extent.end();
    }
    return nlohmann::json{{"holes", holes}, {"end", end.bytes()}};
  }

  // Durably, once the answer is under way: the guest stands still until it comes. Until then QEMU's
  // lock on the images keeps another receiver from writing to them.
  void note_barrier() {
    if (!barrier_passed_) return;
    if (auto status = record_.barrier_passed(); !status) log_error("{}", status.error().message);
  }

  // The guest's memory is about to move: from here on the images are kept, whatever happens to the
  // link or to this process.
  Result<nlohmann::json> keep() {
    if (!kept_) DROVER_TRY(record_.keep_images());
    kept_ = true;
    return nlohmann::json::object();
  }

  Result<nlohmann::json> barrier(const nlohmann::json& request) {
    DROVER_ASSIGN(const std::vector<LaneDigest> expected, read_digests(request));
    if (barrier_passed_) {
      // Asked again by a source that did not get the answer, on the same connections or on new
      // ones.
      const bool nothing_new =
          std::ranges::all_of(expected, [](const LaneDigest& lane) { return lane.frames() == 0; });
      if (expected == passed_ || nothing_new) return nlohmann::json::object();
      return fail(Code::Protocol, "the barrier is passed already, with other digests");
    }
    if (images_.empty()) return fail(Code::Protocol, "there is no image to prove");
    DROVER_TRY(keep());  // the source has asked for it before, so that nobody waits for it now
    log_info("the barrier begins");
    const Instant begin = now();
    DROVER_TRY(compare(expected));
    const Instant compared = now();
    DROVER_TRY(all_images(&blockcopy::TargetImage::flush));
    const Instant flushed = now();
    DROVER_TRY(all_images(&blockcopy::TargetImage::release));
    barrier_passed_ = true;
    passed_ = expected;
    const auto took = [](Instant from, Instant until) {
      return std::chrono::duration_cast<std::chrono::microseconds>(until - from).count();
    };
    const nlohmann::json times = {{"compare_us", took(begin, compared)},
                                  {"flush_us", took(compared, flushed)},
                                  {"release_us", took(flushed, now())}};
    log_info("the barrier is passed: {}", times.dump());
    return times;
  }

  Result<nlohmann::json> remove(const nlohmann::json& request) {
    DROVER_ASSIGN(const bool force, get_bool(request, "force", false));
    if (kept_ && !force) {
      return fail(Code::Denied, "the handover had begun: the images are kept",
                  "only a source that knows its guest runs again may insist");
    }
    DROVER_TRY(remove_images());
    kept_ = barrier_passed_ = false;
    return nlohmann::json::object();
  }

  // The job is over: whatever happens now, the images stay.
  Result<nlohmann::json> finish() {
    if (!images_.empty() && !barrier_passed_) {
      return fail(Code::Protocol, "a job does not finish before its barrier is passed");
    }
    images_.clear();
    finished_ = true;
    return nlohmann::json::object();
  }

  // True: all that belongs to the job here may go (but the images of a passed barrier).
  bool end() {
    drop_lanes();
    if (finished_) return true;
    if (kept_ || (options_.resumable && !record_.images().empty())) {
      for (std::size_t i = 0; i < images_.size(); ++i) {
        if (images_[i] == nullptr) continue;
        if (auto status = release(i); !status) log_error("{}", status.error().message);
      }
      images_.clear();
      log_warning("{}: the images are kept, see record.json",
                  kept_ ? "the handover had begun" : "the session can be resumed");
      return false;
    }
    if (auto status = remove_images(); !status) {
      log_error("{}", status.error().to_string());
      return false;
    }
    return true;
  }

 private:
  Result<std::vector<blockcopy::TargetSpec>> read_specs(const nlohmann::json& request) {
    const auto disks = request.find("disks");
    if (disks == request.end() || !disks->is_array() ||
        disks->size() != limits_.disk_sizes.size()) {
      return fail(Code::Protocol, fmt::format("\"disks\" does not list the session's {} disks",
                                              limits_.disk_sizes.size()));
    }
    std::vector<blockcopy::TargetSpec> specs;
    for (const nlohmann::json& disk : *disks) {
      if (!disk.is_object()) return fail(Code::Protocol, "a disk is not an object");
      blockcopy::TargetSpec spec;
      DROVER_ASSIGN(spec.path, get_string(disk, "path"));
      if (spec.path.empty() || spec.path.front() != '/' ||
          spec.path.find('\0') != std::string::npos) {
        return fail(Code::InvalidArgument,
                    fmt::format("the target path \"{}\" is not absolute", spec.path));
      }
      DROVER_ASSIGN(const std::string format, get_string(disk, "format", 16));
      if (format != "raw" && format != "qcow2") {
        return fail(
            Code::Incompatible,
            fmt::format("{}: the target can't write images of format {}", spec.path, format));
      }
      spec.format = format == "raw" ? blockcopy::Format::Raw : blockcopy::Format::Qcow2;
      DROVER_ASSIGN(spec.block_device, get_bool(disk, "block_device", false));
      DROVER_ASSIGN(spec.cached, get_bool(disk, "cached", false));
      DROVER_ASSIGN(const std::uint64_t size, get_unsigned(disk, "size"));
      spec.size = Length(size);
      if (spec.size != limits_.disk_sizes[specs.size()]) {
        return fail(Code::Protocol, spec.path + ": its size is not that of the session's disk");
      }
      if (disk.contains("cluster_size")) {
        DROVER_ASSIGN(const std::uint64_t cluster,
                      get_unsigned(disk, "cluster_size", std::uint64_t{2} << 20));
        spec.cluster_size = Length(cluster);
      }
      spec.work_directory = record_.work_directory();
      specs.push_back(std::move(spec));
    }
    return specs;
  }

  // What can't be written any more may be lost, whatever a later flush says.
  Status flush(std::size_t index) {
    auto status = images_[index]->flush();
    if (!status) DROVER_TRY(record_.note_loss(index));
    return status;
  }
  Status release(std::size_t index) {
    auto status = images_[index]->release();
    if (!status) DROVER_TRY(record_.note_loss(index));
    return status;
  }

  // All images at once, each on a thread of its own: the guest waits for the slowest, not for their
  // sum.
  Status all_images(Status (blockcopy::TargetImage::*what)()) {
    std::vector<Status> done(images_.size());
    {
      std::vector<std::jthread> threads;
      for (std::size_t i = 1; i < images_.size(); ++i) {
        threads.emplace_back([&, i] { done[i] = (*images_[i].*what)(); });
      }
      done[0] = (*images_[0].*what)();
    }
    for (std::size_t i = 0; i < images_.size(); ++i) {
      if (!done[i]) DROVER_TRY(record_.note_loss(i));
    }
    for (Status& status : done) DROVER_TRY(std::move(status));
    return {};
  }

  Status open_again(std::size_t index) {
    images_[index].reset();
    blockcopy::TargetSpec spec = record_.images()[index].spec;
    spec.work_directory = record_.work_directory();
    auto image = options_.open_image(spec, record_.images()[index].identity);
    if (image) {
      log_info("opened {} again", spec.path);
      images_[index] = std::move(*image);
      return {};
    }
    // Nobody needs a damaged image, unless it may be the guest's only one.
    if (kept_ || !blockcopy::is_corrupt(image.error())) return fail(std::move(image).error());
    log_warning("{}: it is made anew", image.error().message);
    DROVER_TRY(record_.discard(index));
    DROVER_ASSIGN(images_[index], options_.create_image(spec));
    return record_.replace_image(index, *images_[index]);
  }

  Status create_images(const std::vector<blockcopy::TargetSpec>& specs) {
    for (const blockcopy::TargetSpec& spec : specs) {
      DROVER_ASSIGN(auto image, options_.create_image(spec));
      images_.push_back(std::move(image));
      DROVER_TRY(record_.add_image(*images_.back()));
      log_info("reserved {} ({})", spec.path, format_length(spec.size));
    }
    return {};
  }

  Status remove_images() {
    for (const auto& lane : lanes_) lane->detach();
    Status first;
    while (!images_.empty()) {
      auto status = images_.back() != nullptr ? images_.back()->remove()
                                              : record_.discard(images_.size() - 1);
      if (!status && first) first = std::move(status);
      images_.pop_back();
    }
    if (!first) return first;
    return record_.images_removed();
  }

  Result<std::vector<LaneDigest>> read_digests(const nlohmann::json& request) const {
    const auto lanes = request.find("lanes");
    if (lanes == request.end() || !lanes->is_array() || lanes->size() != lane_count_) {
      return fail(Code::Protocol,
                  fmt::format("\"lanes\" does not list the session's {} lanes", lane_count_));
    }
    std::vector<LaneDigest> digests;
    for (const nlohmann::json& lane : *lanes) {
      DROVER_ASSIGN(LaneDigest digest, LaneDigest::from_json(lane));
      digests.push_back(digest);
    }
    return digests;
  }

  // Every lane is drained, and took what the source sent on it.
  Status compare(const std::vector<LaneDigest>& expected) {
    std::vector<std::optional<LaneDigest>> seen(expected.size());
    for (const auto& lane : lanes_) seen.at(lane->index()) = lane->detach();
    for (std::size_t i = 0; i < expected.size(); ++i) {
      if (!seen[i]) {
        return fail(Code::Unreachable, fmt::format("data connection {} is lost", i));
      }
      if (*seen[i] == expected[i]) continue;
      return fail(Code::Protocol,
                  fmt::format("data connection {}: the source sent {} frames (digest {:016x}), the "
                              "target took {} ({:016x})",
                              i, expected[i].frames(), expected[i].value(), seen[i]->frames(),
                              seen[i]->value()));
    }
    return {};
  }

  const ReceiverOptions& options_;
  ReceiverRecord& record_;
  ReceiverTotals& totals_;
  FrameLimits limits_;
  unsigned lane_count_ = 0;
  std::vector<std::unique_ptr<blockcopy::TargetImage>> images_;
  std::vector<std::shared_ptr<LaneReceiver>> lanes_;
  std::vector<LaneDigest> passed_;
  const std::string boot_id_ = boot_id();
  std::atomic<bool> kept_{false};
  bool barrier_passed_ = false;
  bool finished_ = false;
};

class ReceiverImpl final : public Receiver {
 public:
  explicit ReceiverImpl(ReceiverOptions options) : options_(std::move(options)) {
    if (!options_.create_image) options_.create_image = blockcopy::create_target;
    if (!options_.open_image) options_.open_image = blockcopy::open_target;
    options_.resumable = options_.resumable || options_.resume;
  }

  Status open() {
    DROVER_ASSIGN(loop_, Loop::create());
    DROVER_ASSIGN(listener_, listen_tcp(options_.listen));
    if (options_.resume) {
      DROVER_ASSIGN(record_, ReceiverRecord::resume(options_.jobs_directory, options_.session));
    } else {
      DROVER_ASSIGN(record_, ReceiverRecord::create(options_.jobs_directory, options_.session,
                                                    options_.resumable));
    }
    store_ = std::make_unique<Store>(options_, *record_, totals_);
    if (options_.resume) DROVER_TRY(store_->open_recorded());
    open_index();
    for (const ReceiverRecord::Image& image : record_->images()) {
      limits_.disk_sizes.push_back(image.spec.size);
    }
    return record_->announce(listener_.port);
  }

  ~ReceiverImpl() override {
    if (record_ != nullptr && !ran_ && !options_.resume) record_->remove();
  }

  [[nodiscard]] std::uint16_t port() const override { return listener_.port; }
  [[nodiscard]] const ReceiverRecord& record() const override { return *record_; }

  Status run() override {
    ran_ = true;
    {
      Worker worker;
      worker_ = &worker;
      accept_next();
      watch_signals();
      contact_timer_ = loop_->at(now() + options_.first_contact, [this] {
        end(fail(Code::Unreachable, "the source never connected"));
      });
      loop_->run();
    }
    worker_ = nullptr;
    for (Relay& one : relays_) one.thread.join();
    relays_.clear();
    peers_.clear();
    return why_;
  }

  void stop() override {
    loop_->post([this] { end(fail(Code::Cancelled, "the receiver was told to end")); });
  }

 private:
  // A connection that this thread serves: until its hello, or as the control connection.
  struct Peer : std::enable_shared_from_this<Peer> {
    enum class State { Handshake, Hello, Joining, Control, Closed };
    State state = State::Handshake;
    UniqueFd fd;
    std::unique_ptr<Tls> tls;
    MessageReader reader{kMaxHello};
    std::string out;  // not yet encrypted
    Loop::Handle deadline = 0;
    bool polling = false;
    bool close_when_sent = false;
    Instant heard;
    std::size_t requests = 0;
  };
  using PeerPtr = std::shared_ptr<Peer>;
  struct Relay {
    UniqueFd stop;  // readable: it shall end
    std::thread thread;
    std::atomic<bool> done{false};
  };

  // Without it everything is sent.
  void open_index() {
    if (options_.index_directory.empty()) return;
    auto index = IndexReader::open(options_.index_directory);
    if (!index) {
      if (index.error().code != Code::NotFound) log_warning("{}", index.error().to_string());
      return;
    }
    auto filter = (*index)->filter();
    if (!filter) return log_warning("{}", filter.error().to_string());
    if (*filter == nullptr) return;
    filter_ = std::move(*filter);
    index_ = std::move(*index);
    log_info("the content index knows {} images", index_->images().size());
  }

  // --- connections ---

  void accept_next() {
    loop_->accept(listener_.fd.get(), [this](int result) {
      if (ending_) {
        if (result >= 0) ::close(result);
        return;
      }
      if (result >= 0) {
        welcome(UniqueFd(result));
        return accept_next();
      }
      log_warning("accepting a connection: {}", error_from_errno(-result, "accept").message);
      loop_->at(now() + kAcceptRetry, [this] {
        if (!ending_) accept_next();
      });
    });
  }

  void welcome(UniqueFd fd) {
    const auto half_open = [](const PeerPtr& peer) {
      return peer->state == Peer::State::Handshake || peer->state == Peer::State::Hello;
    };
    if (static_cast<std::size_t>(std::ranges::count_if(peers_, half_open)) >= kMaxHalfOpen) {
      log_warning("too many connections without a hello: the oldest is closed");
      drop(*std::ranges::find_if(peers_, half_open));
    }
    auto tls =
        Tls::create({.role = Tls::Role::Server, .identity = options_.session, .key = options_.key});
    if (!tls) return log_error("{}", tls.error().message);
    tune_socket(fd.get(), options_.handshake);
    auto peer = std::make_shared<Peer>();
    peer->fd = std::move(fd);
    peer->tls = std::move(*tls);
    peer->deadline = loop_->at(now() + options_.handshake, [this, weak = std::weak_ptr(peer)] {
      const PeerPtr late = weak.lock();
      if (!late) return;
      late->deadline = 0;
      log_warning("a connection sent no hello in time: closed");
      drop(late);
    });
    peers_.push_back(peer);
    receive(peer);
  }

  void drop(PeerPtr peer) {
    if (peer->state == Peer::State::Closed) return;
    peer->state = Peer::State::Closed;
    loop_->cancel(peer->deadline);
    if (peer->fd) ::shutdown(peer->fd.get(), SHUT_RDWR);
    std::erase(peers_, peer);  // its memory goes with its last callback
  }

  // The connection is gone, by the peer's doing.
  void lost(const PeerPtr& peer, const Error& error) {
    if (peer->state == Peer::State::Closed) return;
    const bool control = peer == control_;
    log_warning("{}: {}", control ? "the control connection" : "a connection", error.message);
    if (!control && peer->state == Peer::State::Handshake) (void)push(peer);  // the alert
    drop(peer);
    if (!control) return;
    control_.reset();
    // Once its images are removed there is nothing to wait for.
    if (options_.linger.count() == 0 || ending_ || orderly_) return end(fail(error));
    end_relays();
    worker_->post([this] { store_->drop_lanes(); });
    linger_timer_ = loop_->at(now() + options_.linger, [this, error] { end(fail(error)); });
  }

  void receive(const PeerPtr& peer) {
    loop_->receive(peer->fd.get(), peer->tls->input_space(), [this, peer](int count) {
      if (peer->state == Peer::State::Closed) return;
      if (count < 0 && count != -EINTR && count != -EAGAIN) {
        return lost(peer, error_from_errno(-count, "receiving"));
      }
      if (count == 0) peer->tls->input_ended();
      if (count > 0) peer->tls->input_received(static_cast<std::size_t>(count));
      peer->heard = now();
      auto more = process(peer);
      if (!more) return lost(peer, more.error());
      if (*more && peer->state != Peer::State::Closed) receive(peer);
    });
  }

  // False: the connection is not this thread's any longer.
  Result<bool> process(const PeerPtr& peer) {
    if (peer->state == Peer::State::Handshake) {
      DROVER_ASSIGN(const bool done, peer->tls->handshake());
      send(peer);
      if (!done) return true;
      peer->state = Peer::State::Hello;
    }
    while (peer->state != Peer::State::Closed) {
      DROVER_ASSIGN(const std::size_t count, peer->tls->read(peer->reader.space()));
      if (count == 0) {
        if (!peer->tls->closed()) return true;
        return fail(Code::Unreachable, "the source closed the connection");
      }
      DROVER_ASSIGN(auto message, peer->reader.received(count));
      if (!message) continue;
      DROVER_ASSIGN(const nlohmann::json json, parse_object(*message, "a message"));
      switch (peer->state) {
        case Peer::State::Hello: {
          DROVER_ASSIGN(const bool stays, greet(peer, json));
          if (!stays) return false;
          break;
        }
        case Peer::State::Joining:
          return fail(Code::Protocol, "a control message came before the welcome");
        case Peer::State::Control: DROVER_TRY(take_request(peer, json)); break;
        case Peer::State::Handshake:
        case Peer::State::Closed: break;
      }
    }
    return false;
  }

  // Encrypts and sends what can be sent now. An error is found by receive(), too.
  Result<bool> push(const PeerPtr& peer) {
    Tls& tls = *peer->tls;
    while (true) {
      if (!peer->out.empty() || tls.unflushed()) {
        DROVER_ASSIGN(const std::size_t taken, tls.write(std::as_bytes(std::span(peer->out))));
        peer->out.erase(0, taken);
        DROVER_TRY(tls.flush());
      }
      const std::span<const std::byte> bytes = tls.output();
      if (bytes.empty()) return true;
      const ssize_t sent =
          ::send(peer->fd.get(), bytes.data(), bytes.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
      if (sent > 0) {
        tls.output_sent(static_cast<std::size_t>(sent));
      } else if (errno == EAGAIN || errno == EWOULDBLOCK) {
        return false;
      } else if (errno != EINTR) {
        return fail_errno(errno, "sending");
      }
    }
  }

  void send(const PeerPtr& peer) {
    if (peer->polling || peer->state == Peer::State::Closed) return;
    auto sent = push(peer);
    if (!sent) {
      // Not from here: callers are in the middle of something.
      loop_->post([this, peer, error = sent.error()] { lost(peer, error); });
      return;
    }
    if (*sent) {
      if (peer->close_when_sent) goodbye(peer);
      return;
    }
    peer->polling = true;
    loop_->poll(peer->fd.get(), POLLOUT, [this, peer](int) {
      peer->polling = false;
      send(peer);
    });
  }

  // --- hello ---

  Result<bool> greet(const PeerPtr& peer, const nlohmann::json& json) {
    auto hello = hello_from_json(json);
    if (!hello) return refuse(peer, hello.error());
    if (hello->session != options_.session) {
      return refuse(peer, {Code::Protocol, "this is the receiver of another job", "", false});
    }
    switch (hello->kind) {
      case ConnectionKind::Control: return greet_control(peer, *hello);
      case ConnectionKind::Lane: return greet_lane(peer, *hello);
      case ConnectionKind::Memory: return greet_memory(peer, *hello);
    }
    return false;
  }

  // Tells why, and closes.
  bool refuse(const PeerPtr& peer, const Error& error) {
    log_warning("a connection is refused: {}", error.message);
    if (auto message = encode_message({{"error", error_to_json(error)}})) peer->out += *message;
    (void)push(peer);
    if (peer->tls->close()) (void)push(peer);
    drop(peer);
    return false;
  }

  bool greet_control(const PeerPtr& peer, const Hello& hello) {
    if (hello.epoch <= epoch_) {
      return refuse(peer, {control_ ? Code::Busy : Code::Protocol,
                           fmt::format("epoch {} of this session has a control connection, or had "
                                       "one",
                                       epoch_),
                           "", false});
    }
    const bool sizes_known = epoch_ > 0 || !limits_.disk_sizes.empty();
    if ((sizes_known && hello.limits.disk_sizes != limits_.disk_sizes) ||
        (epoch_ > 0 && hello.limits.chunk_size != limits_.chunk_size)) {
      return refuse(peer, {Code::Protocol, "the session's disks have changed", "", false});
    }
    loop_->cancel(contact_timer_);
    loop_->cancel(linger_timer_);
    loop_->cancel(peer->deadline);
    // What is left of an older epoch goes first; its frames are applied or dropped by then.
    if (control_) drop(control_);
    drop_hellos_of_older_epochs(peer);
    end_relays();
    epoch_ = hello.epoch;
    limits_ = hello.limits;
    lanes_ = hello.lanes;
    silence_ = hello.silence;
    lane_seen_.assign(lanes_, false);
    control_ = peer;
    peer->state = Peer::State::Joining;
    peer->reader.set_limit(kMaxMessage);
    tune_socket(peer->fd.get(), give_up_after(hello.kind, silence_ * kSilenceFactor));
    worker_->post([this, peer, limits = limits_, lanes = lanes_]() mutable {
      auto images = store_->begin_epoch();
      store_->set_limits(std::move(limits), lanes);
      loop_->post([this, peer, images = std::move(images)] { joined(peer, images); });
    });
    return true;
  }

  void drop_hellos_of_older_epochs(const PeerPtr& except) {
    const auto all = peers_;
    for (const PeerPtr& peer : all) {
      if (peer != except && peer->state == Peer::State::Joining) drop(peer);
    }
  }

  void joined(const PeerPtr& peer, const Result<nlohmann::json>& images) {
    if (peer->state != Peer::State::Joining) return;
    if (!images) {
      Error error = images.error();
      error.retryable = true;
      auto message = encode_message({{"error", error_to_json(error)}});
      if (message) peer->out += *message;
      (void)push(peer);
      return lost(peer, error);
    }
    peer->state = Peer::State::Control;
    log_info("epoch {}: {} lanes, {} disks", epoch_, lanes_, limits_.disk_sizes.size());
    nlohmann::json welcome = welcome_json();
    welcome["images"] = *images;
    say(peer, welcome);
    watch_silence(peer);
  }

  [[nodiscard]] nlohmann::json welcome_json() const {
    return {{"ok", true}, {"protocol", kProtocolVersion}, {"version", DROVER_VERSION}};
  }

  Result<bool> greet_lane(const PeerPtr& peer, const Hello& hello) {
    if (auto status = check_epoch(hello); !status) return refuse(peer, status.error());
    if (hello.lane >= lanes_ || lane_seen_[hello.lane]) {
      return refuse(peer, {Code::Protocol,
                           fmt::format("data connection {} is taken or does not exist", hello.lane),
                           "", false});
    }
    lane_seen_[hello.lane] = true;
    DROVER_ASSIGN(const std::string message, encode_message(welcome_json()));
    DROVER_TRY(peer->tls->write(std::as_bytes(std::span(message))));
    DROVER_TRY(peer->tls->flush());
    tune_socket(peer->fd.get(), give_up_after(hello.kind, silence_ * kSilenceFactor));
    LaneReceiver::Options options;
    options.index = hello.lane;
    options.limits = limits_;
    options.silence = silence_;
    options.buffers =
        std::clamp<std::size_t>(options_.buffers / kLaneBuffer / lanes_, 2, kMaxLaneBuffers);
    options.applier = options_.applier;
    options.content = index_;
    auto lane = std::make_shared<LaneReceiver>(
        std::move(options), std::move(peer->fd), std::move(peer->tls), totals_,
        [this](LaneReceiver& gone, const Error& error) {
          log_warning("lane {}: {}", gone.index(), error.message);
          worker_->post([this, which = &gone] { store_->drop_lane(which); });
        });
    worker_->post([this, lane = std::move(lane)]() mutable { store_->add_lane(std::move(lane)); });
    drop(peer);
    return false;
  }

  Status check_epoch(const Hello& hello) const {
    if (!control_ || control_->state != Peer::State::Control) {
      return fail(Code::Protocol, "a connection came before the control connection");
    }
    if (hello.epoch != epoch_) {
      return fail(Code::Protocol,
                  fmt::format("a connection of epoch {} came in epoch {}", hello.epoch, epoch_));
    }
    return {};
  }

  Result<bool> greet_memory(const PeerPtr& peer, const Hello& hello) {
    if (auto status = check_epoch(hello); !status) return refuse(peer, status.error());
    for (auto it = relays_.begin(); it != relays_.end();) {
      if (!it->done) {
        ++it;
        continue;
      }
      it->thread.join();
      it = relays_.erase(it);
    }
    if (relays_.size() >= kMaxRelays) {
      return refuse(peer, {Code::Busy, "there are too many memory connections", "", false});
    }
    tune_socket(peer->fd.get(), give_up_after(hello.kind, silence_ * kSilenceFactor));
    UniqueFd stop(::eventfd(0, EFD_CLOEXEC));
    if (!stop) return fail_errno(errno, "creating an eventfd");
    Relay& entry = relays_.emplace_back();
    entry.stop = std::move(stop);
    entry.thread = std::thread(
        [this, &entry, path = hello.path, blocks = hello.blocks,
         link = std::make_shared<TlsSocket>(std::move(peer->fd), std::move(peer->tls))] {
          if (const Status status = carry_memory(*link, path, blocks, entry.stop.get()); !status) {
            log_warning("memory connection: {}", status.error().message);
          }
          ::shutdown(link->fd(), SHUT_RDWR);
          entry.done = true;
        });
    drop(peer);
    return false;
  }

  // On a thread of its own.
  Status carry_memory(TlsSocket& link, const std::string& path, bool blocks, int stop_fd) {
    give_way();
    link.set_cancel_fd(stop_fd);
    const Instant deadline = now() + options_.handshake;
    const auto plain = connect_unix(path);
    nlohmann::json welcome = welcome_json();
    welcome["blocks"] = blocks;
    DROVER_ASSIGN(
        const std::string message,
        encode_message(plain ? welcome : nlohmann::json{{"error", error_to_json(plain.error())}}));
    DROVER_TRY(link.write_all(message, deadline));
    if (!plain) return fail(plain.error());
    return relay(link, plain->get(), stop_fd, totals_.memory, nullptr, {.inward = blocks});
  }

  // They end soon, by themselves.
  void end_relays() {
    for (const Relay& one : relays_) {
      const std::uint64_t wake = 1;
      (void)!::write(one.stop.get(), &wake, sizeof wake);
    }
  }

  // --- control ---

  void say(const PeerPtr& peer, const nlohmann::json& json) {
    if (peer->state == Peer::State::Closed) return;
    auto message = encode_message(json);
    if (!message)
      message =
          encode_message({{"id", json.value("id", 0U)}, {"error", error_to_json(message.error())}});
    peer->out += *message;
    send(peer);
  }

  void answer(const PeerPtr& peer, std::uint64_t id, const Result<nlohmann::json>& result) {
    if (result) {
      say(peer, {{"id", id}, {"ok", true}, {"result", *result}});
    } else {
      log_warning("answering a request: {}", result.error().message);
      say(peer, {{"id", id}, {"error", error_to_json(result.error())}});
    }
  }

  Status take_request(const PeerPtr& peer, const nlohmann::json& request) {
    DROVER_ASSIGN(const std::uint64_t id, get_unsigned(request, "id"));
    DROVER_ASSIGN(const std::string op, get_string(request, "op", 64));
    if (peer->out.size() > kMaxControlOutput) {
      return fail(Code::Protocol, "the source does not read its answers");
    }
    if (op == "ping") {
      say(peer, {{"id", id}, {"ok", true}});
      return {};
    }
    if (op == "stats") {
      answer(peer, id, stats());
      return {};
    }
    if (op == "index") {
      answer(peer, id, filter_part(filter_.get(), request));
      return {};
    }
    if (peer->requests >= kMaxRequests) return fail(Code::Protocol, "too many requests at once");
    ++peer->requests;
    worker_->post([this, peer, id, op, request] {
      auto result = perform(op, request);
      loop_->post([this, peer, id, op, result = std::move(result)] {
        --peer->requests;
        answer(peer, id, result);
        if (op == "finish" && result) finish(peer);
        if (op == "remove" && result) orderly_ = true;
        if (op == "reserve" && result) orderly_ = false;
      });
      if (op == "barrier") store_->note_barrier();
    });
    return {};
  }

  Result<nlohmann::json> perform(const std::string& op, const nlohmann::json& request) {
    if (op == "reserve") return store_->reserve(request);
    if (op == "images") return nlohmann::json{{"disks", store_->describe_images()}};
    if (op == "flush") return store_->flush();
    if (op == "map") return store_->map(request);
    if (op == "keep") return store_->keep();
    if (op == "barrier") return store_->barrier(request);
    if (op == "remove") return store_->remove(request);
    if (op == "finish") return store_->finish();
    return fail(Code::InvalidArgument, fmt::format("the receiver does not know \"{}\"", op));
  }

  [[nodiscard]] nlohmann::json stats() const {
    return {{"peak_memory", peak_memory()},
            {"frames", totals_.frames.load()},
            {"bytes_received", totals_.bytes_received.load()},
            {"bytes_written", totals_.bytes_written.load()},
            {"bytes_zeroed", totals_.bytes_zeroed.load()},
            {"bytes_found", totals_.bytes_found.load()},
            {"frames_failed", totals_.failed.load()},
            {"memory_bytes", totals_.memory.passed.load()},
            {"memory_loaded", totals_.memory.loaded.load()},
            {"kept", store_->kept()}};
  }

  void watch_silence(const PeerPtr& peer) {
    const auto limit = silence_ * kSilenceFactor;
    loop_->at(peer->heard + limit, [this, weak = std::weak_ptr(peer), limit] {
      const PeerPtr watched = weak.lock();
      if (!watched || watched->state != Peer::State::Control) return;
      if (now() < watched->heard + limit) return watch_silence(watched);
      lost(watched, {Code::Unreachable,
                     fmt::format("the source was silent for {} ms", limit.count()), "", true});
    });
  }

  // --- the end ---

  // The answer to "finish" goes out, then all ends.
  void finish(const PeerPtr& peer) {
    orderly_ = true;
    peer->close_when_sent = true;
    loop_->at(now() + kGoodbye, [this] { end({}); });
    send(peer);
  }

  void goodbye(const PeerPtr& peer) {
    if (peer->tls->close()) (void)push(peer);
    loop_->post([this] { end({}); });
  }

  void watch_signals() {
    if (options_.signal_fd < 0) return;
    loop_->poll(options_.signal_fd, POLLIN,
                [this](int) { end(fail(Code::Cancelled, "the receiver was told to end")); });
  }

  void end(Status why) {
    if (ending_) return;
    ending_ = true;
    if (!orderly_) why_ = std::move(why);
    if (!why_) log_warning("the session ends: {}", why_.error().message);
    ::shutdown(listener_.fd.get(), SHUT_RDWR);
    end_relays();
    control_.reset();
    const auto all = peers_;
    for (const PeerPtr& peer : all) drop(peer);
    worker_->post([this] {
      const bool all_gone = store_->end();
      remove_memory_socket(options_.session);
      if (all_gone) record_->remove();
      loop_->stop();
    });
  }

  ReceiverOptions options_;
  std::unique_ptr<Loop> loop_;
  Listener listener_;
  std::unique_ptr<ReceiverRecord> record_;
  ReceiverTotals totals_;
  std::shared_ptr<IndexReader> index_;  // null: nothing is known
  std::shared_ptr<const PieceFilter> filter_;
  std::unique_ptr<Store> store_;
  Worker* worker_ = nullptr;
  bool ran_ = false;

  std::vector<PeerPtr> peers_;
  PeerPtr control_;
  std::uint64_t epoch_ = 0;
  FrameLimits limits_;
  unsigned lanes_ = 0;
  std::vector<bool> lane_seen_;
  std::chrono::milliseconds silence_{kSilence};
  std::list<Relay> relays_;
  Loop::Handle contact_timer_ = 0;
  Loop::Handle linger_timer_ = 0;
  bool ending_ = false;
  bool orderly_ = false;  // finished or removed: what comes now is no failure
  Status why_;
};

}  // namespace

Result<std::unique_ptr<Receiver>> Receiver::create(ReceiverOptions options) {
  DROVER_TRY(check_session_id(options.session));
  auto receiver = std::make_unique<ReceiverImpl>(std::move(options));
  DROVER_TRY(receiver->open());
  return receiver;
}

}  // namespace drover::mirror
