// SPDX-License-Identifier: Apache-2.0
//
// What the link costs: copies through TLS on loopback to a receiver process whose images throw
// everything away; throughput, CPU of either side, the time that small writes take to be applied
// beside the copies, the barrier.
//
//   link_throughput [--lanes N] [--mib N] [--writes-per-second N]
//                   [--compress auto|none|lz4|zstd:LEVEL]
//                   [--data random|mixed|FILE]   mixed: every second block of 4 KiB is text
//                   [--rate MBIT]     through a relay that carries so much, in a process of its own
//                   [--to PATH]       write to a new file there instead (removed afterwards)
//                   [--address A]     of this host to connect to (default 127.0.0.1)
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <thread>

#include "base/random.h"
#include "mirror/link.h"
#include "mirror/receiver.h"
#include "mirror/session.h"
#include "mirror/socket.h"

namespace {

using namespace drover;
using namespace drover::mirror;
using namespace std::chrono_literals;

struct Arguments {
  unsigned lanes = 2;
  std::uint64_t mib = 8192;
  std::string compress = "none";
  std::string data = "random";
  std::uint64_t rate = 0;  // Mbit/s
  unsigned writes_per_second = 1000;
  std::string to;
  std::string address = "127.0.0.1";
};

template <class T>
T must(Result<T> result) {
  if (result) return std::move(*result);
  std::fprintf(stderr, "link_throughput: %s\n", result.error().to_string().c_str());
  std::exit(1);
}
void must(const Status& status) {
  if (status) return;
  std::fprintf(stderr, "link_throughput: %s\n", status.error().to_string().c_str());
  std::exit(1);
}

double seconds(const timeval& time) {
  return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) * 1e-6;
}
double cpu_seconds(const rusage& usage) {
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

// Completes every write at the loop's next turn.
class NullWriter final : public blockcopy::ImageWriter {
 public:
  NullWriter(Loop& loop, Length size) : loop_(loop), size_(size) {}
  [[nodiscard]] Length size() const override { return size_; }
  [[nodiscard]] Length alignment() const override { return Length(512); }
  void write(Offset, std::span<const std::byte>, blockcopy::Done done) override {
    add(std::move(done));
  }
  void write_zeroes(Extent, blockcopy::Done done) override { add(std::move(done)); }

 private:
  void add(blockcopy::Done done) {
    done_.push_back(std::move(done));
    if (done_.size() > 1) return;
    loop_.at(Instant(), [this] {
      for (const auto& one : std::exchange(done_, {})) one({});
    });
  }
  Loop& loop_;
  Length size_;
  std::vector<blockcopy::Done> done_;
};

// Nobody asks it for anything: nothing is compared here.
class NullReader final : public blockcopy::ImageReader {
 public:
  explicit NullReader(Length size) : size_(size) {}
  [[nodiscard]] Length size() const override { return size_; }
  [[nodiscard]] Length alignment() const override { return Length(512); }
  void read(Offset, std::span<std::byte>, blockcopy::Done done) override { done(nothing()); }
  void extents(Extent, blockcopy::ExtentsDone done) override { done(nothing()); }

 private:
  static tl::unexpected<Error> nothing() {
    return fail(Code::Incompatible, "what was written to nothing can't be read");
  }
  Length size_;
};

class NullImage final : public blockcopy::TargetImage {
 public:
  explicit NullImage(blockcopy::TargetSpec spec) : spec_(std::move(spec)) {}
  [[nodiscard]] const blockcopy::TargetSpec& spec() const override { return spec_; }
  [[nodiscard]] bool initially_zero() const override { return true; }
  [[nodiscard]] blockcopy::ImageIdentity identity() const override { return {}; }
  Result<std::unique_ptr<blockcopy::ImageReader>> open_reader(Loop&) override {
    return std::unique_ptr<blockcopy::ImageReader>(new NullReader(spec_.size));
  }
  Result<std::unique_ptr<blockcopy::ImageWriter>> open_writer(Loop& loop) override {
    return std::unique_ptr<blockcopy::ImageWriter>(new NullWriter(loop, spec_.size));
  }
  Status flush() override { return {}; }
  Status release() override { return {}; }
  Status remove() override { return {}; }

 private:
  blockcopy::TargetSpec spec_;
};

// The receiver's process: tells its port, serves until the end.
int receive(const Arguments& arguments, const LinkKey& key, const std::string& directory, int out) {
  ReceiverOptions options;
  options.session = "bench";
  options.key = key;
  options.jobs_directory = directory;
  if (arguments.to.empty()) {
    options.create_image = [](const blockcopy::TargetSpec& spec) {
      return Result<std::unique_ptr<blockcopy::TargetImage>>(std::make_unique<NullImage>(spec));
    };
  }
  const auto receiver = must(Receiver::create(options));
  const std::uint16_t port = receiver->port();
  if (::write(out, &port, sizeof port) != sizeof port) return 1;
  return receiver->run() ? 0 : 1;
}

// A wire that all connections share. What is on its way in it is little: 128 KiB of each.
class Wire {
 public:
  explicit Wire(double bytes_per_second) : rate_(bytes_per_second) {}
  void pass(std::size_t bytes) {
    Instant until;
    {
      const std::lock_guard lock(mutex_);
      free_ = std::max(free_, now()) + std::chrono::duration_cast<Duration>(std::chrono::duration<double>(
                                           static_cast<double>(bytes) / rate_));
      until = free_;
    }
    std::this_thread::sleep_until(until);
  }

 private:
  const double rate_;
  std::mutex mutex_;
  Instant free_{};
};

void carry(int from, int to, Wire* wire) {
  constexpr int kYes = 1;
  ::setsockopt(to, IPPROTO_TCP, TCP_NODELAY, &kYes, sizeof kYes);
  std::vector<char> buffer(64U << 10);
  for (ssize_t got = 0; (got = ::recv(from, buffer.data(), buffer.size(), 0)) > 0;) {
    if (wire != nullptr) wire->pass(static_cast<std::size_t>(got));
    for (ssize_t sent = 0; sent < got;) {
      const ssize_t more = ::send(to, buffer.data() + sent, static_cast<std::size_t>(got - sent), MSG_NOSIGNAL);
      if (more <= 0) return;
      sent += more;
    }
  }
  ::shutdown(to, SHUT_WR);
}

// The relay's process: tells its port, carries until it is ended.
int carry_slowly(const Arguments& arguments, std::uint16_t target, int out) {
  ::prctl(PR_SET_PDEATHSIG, SIGTERM);
  const Listener listener = must(listen_tcp({.address = arguments.address}));
  constexpr int kOnItsWay = 128 << 10;
  ::setsockopt(listener.fd.get(), SOL_SOCKET, SO_RCVBUF, &kOnItsWay, sizeof kOnItsWay);
  if (::write(out, &listener.port, sizeof listener.port) != sizeof listener.port) return 1;
  Wire wire(static_cast<double>(arguments.rate) * 1e6 / 8);
  while (true) {
    const int source = ::accept(listener.fd.get(), nullptr, nullptr);
    if (source < 0) return 1;
    const int receiver = must(connect_tcp(arguments.address, target, now() + 10s)).release();
    std::thread([=, &wire] { carry(source, receiver, &wire); }).detach();
    std::thread([=] { carry(receiver, source, nullptr); }).detach();
  }
}

class Source final : public Answers {
 public:
  Source(const Arguments& arguments, Loop& loop)
      : arguments_(arguments),
        loop_(loop),
        chunks_(arguments.mib),
        copies_(1_MiB, 32),
        writes_(4_KiB, 256),
        data_(64U << 20) {
    Random random(1);
    for (std::size_t i = 0; i < data_.size(); i += 8) {
      const std::uint64_t value = random.next();
      std::memcpy(data_.data() + i, &value, sizeof value);
    }
    if (arguments.data == "mixed") mix(random);
    if (arguments.data == "random" || arguments.data == "mixed") return;
    std::FILE* const file = std::fopen(arguments.data.c_str(), "rb");
    if (file == nullptr) must(Status(fail_errno(errno, "opening " + arguments.data)));
    const std::size_t size = std::fread(data_.data(), 1, data_.size(), file);
    std::fclose(file);
    for (std::size_t at = size; size > 0 && at < data_.size(); ++at) data_[at] = data_[at - size];
  }

  void run(Link& link) {
    link_ = &link;
    start_ = now();
    loop_.post([this] {
      copy();
      if (arguments_.writes_per_second > 0) write();
    });
    loop_.run();
    loop_.cancel(timer_);
  }
  [[nodiscard]] const std::vector<double>& latencies() const { return latencies_; }

 private:
  // Words of a small vocabulary in every second block.
  void mix(Random& random) {
    for (std::size_t block = 0; block < data_.size(); block += 8192) {
      for (std::size_t at = block; at < block + 4096; at += 8) {
        const std::uint64_t word = 0x2061626364650000U + random.below(300) * 7919;
        std::memcpy(data_.data() + at, &word, sizeof word);
      }
    }
  }

  static constexpr std::uint64_t kWrite = std::uint64_t{1} << 63;

  void copy() {
    while (next_ < chunks_) {
      OutFrame frame;
      frame.buffer = copies_.try_take();
      if (!frame.buffer) return;
      frame.type = FrameType::Copy;
      frame.extent = {Offset(next_ << 20), 1_MiB};
      frame.fresh = true;
      frame.content = std::span(data_).subspan((next_ % 64) << 20, 1U << 20);
      frame.token = next_;
      link_->send(static_cast<std::uint32_t>(next_ % arguments_.lanes), std::move(frame));
      ++next_;
    }
  }
  void write() {
    if (copied_ == chunks_) return;  // what is on its way is the last
    const std::uint64_t chunk = random_.below(chunks_);
    OutFrame frame;
    frame.buffer = writes_.try_take();
    if (frame.buffer) {
      frame.type = FrameType::Write;
      frame.extent = {Offset((chunk << 20) + 8192), 4_KiB};
      frame.content = std::span(data_).first(4096);
      frame.token = kWrite | ++write_id_;
      sent_[frame.token] = now();
      link_->send(static_cast<std::uint32_t>(chunk % arguments_.lanes), std::move(frame));
    }
    timer_ = loop_.at(now() + std::chrono::nanoseconds(1s) / arguments_.writes_per_second,
                      [this] { write(); });
  }
  void applied(std::uint32_t, std::uint16_t, std::uint64_t token) override {
    if ((token & kWrite) != 0) {
      const auto found = sent_.find(token);
      latencies_.push_back(
          std::chrono::duration<double, std::milli>(now() - found->second).count());
      sent_.erase(found);
    } else {
      ++copied_;
      copy();
    }
    if (copied_ == chunks_ && sent_.empty()) loop_.stop();
  }
  void differs(std::uint32_t, std::uint16_t, std::uint64_t, const BlockMask&) override {}
  void refused(std::uint32_t, std::uint16_t, std::uint64_t, const Error& error) override {
    must(Status(fail(error)));
  }
  void link_down(const Error& error) override { must(Status(fail(error))); }
  void link_up(const std::vector<TargetDisk>&) override {}
  void link_failed(const Error& error) override { must(Status(fail(error))); }

  const Arguments& arguments_;
  Loop& loop_;
  Link* link_ = nullptr;
  const std::uint64_t chunks_;
  BufferPool copies_;
  BufferPool writes_;
  std::vector<std::byte> data_;
  Random random_{2};
  std::uint64_t next_ = 0;
  std::uint64_t copied_ = 0;
  std::uint64_t write_id_ = 0;
  std::map<std::uint64_t, Instant> sent_;
  std::vector<double> latencies_;
  Loop::Handle timer_ = 0;
  Instant start_;
};

void report(const Arguments& arguments, Duration elapsed, double source_cpu, double receiver_cpu,
            std::vector<double> latencies, Duration barrier, const nlohmann::json& stats,
            const LinkCounters& counters) {
  const double gigabytes = static_cast<double>(arguments.mib << 20) / 1e9;
  std::ranges::sort(latencies);
  double sum = 0;
  for (const double one : latencies) sum += one;
  const auto count = static_cast<double>(std::max<std::size_t>(1, latencies.size()));
  std::printf(
      "%u lanes, %s of %s data: %.3f GB/s, %.2f times less on the wire, at the end %s; CPU source "
      "%.2f s/GB, receiver %.2f s/GB; receiver's peak %.0f MiB\n"
      "  %zu writes beside it: mean %.2f ms, worst %.2f ms; barrier %.1f ms\n",
      arguments.lanes, arguments.compress.c_str(), arguments.data.c_str(),
      gigabytes / std::chrono::duration<double>(elapsed).count(),
      static_cast<double>(counters.bytes_sent + counters.bytes_saved) / static_cast<double>(counters.bytes_sent),
      encoding_name(counters.encoding).c_str(), source_cpu / gigabytes,
      receiver_cpu / gigabytes, stats["peak_memory"].get<double>() / (1 << 20), latencies.size(),
      sum / count, latencies.empty() ? 0 : latencies.back(),
      std::chrono::duration<double, std::milli>(barrier).count());
}

int measure(const Arguments& arguments, const LinkKey& key, std::uint16_t port, pid_t receiver) {
  const Length size(arguments.mib << 20);
  const auto loop = must(Loop::create());
  Source source(arguments, *loop);
  LinkOptions options;
  options.address = arguments.address;
  options.port = port;
  options.session = "bench";
  options.key = key;
  options.lanes = arguments.lanes;
  options.disk_sizes = {size};
  options.compression = must(parse_compression(arguments.compress));
  auto link = must(Link::connect(*loop, options, source));
  must(link->call({{"op", "reserve"},
                   {"disks",
                    {{{"path", arguments.to.empty() ? "/null" : arguments.to},
                      {"format", "raw"},
                      {"block_device", arguments.to.empty()},
                      {"size", size.bytes()}}}}},
                  60s));
  rusage before{};
  rusage after{};
  ::getrusage(RUSAGE_SELF, &before);
  const Instant start = now();
  source.run(*link);
  const Duration elapsed = now() - start;
  ::getrusage(RUSAGE_SELF, &after);
  const LinkCounters counters = link->counters();
  const nlohmann::json stats = must(link->call({{"op", "stats"}}, 60s));
  const Instant stopped = now();
  must(link->barrier(60s));
  const Duration barrier = now() - stopped;
  must(link->call({{"op", "finish"}}, 60s));
  link.reset();
  rusage theirs{};
  ::wait4(receiver, nullptr, 0, &theirs);
  if (!arguments.to.empty()) ::unlink(arguments.to.c_str());
  report(arguments, elapsed, cpu_seconds(after) - cpu_seconds(before), cpu_seconds(theirs),
         source.latencies(), barrier, stats, counters);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  Arguments arguments;
  CLI::App app("What the link costs.");
  app.add_option("--lanes", arguments.lanes)->check(CLI::Range(1, 16));
  app.add_option("--mib", arguments.mib)->check(CLI::PositiveNumber);
  app.add_option("--compress", arguments.compress);
  app.add_option("--data", arguments.data);
  app.add_option("--rate", arguments.rate);
  app.add_option("--writes-per-second", arguments.writes_per_second);
  app.add_option("--to", arguments.to);
  app.add_option("--address", arguments.address);
  CLI11_PARSE(app, argc, argv);
  const LinkKey key = must(random_key());
  std::string directory = "/tmp/drover-bench.XXXXXX";
  int ends[2];
  if (::mkdtemp(directory.data()) == nullptr || ::pipe(ends) != 0) return 1;
  const pid_t receiver = ::fork();
  if (receiver == 0) return receive(arguments, key, directory, ends[1]);
  std::uint16_t port = 0;
  int code = 1;
  if (::read(ends[0], &port, sizeof port) == sizeof port) {
    pid_t relay = -1;
    if (arguments.rate > 0) {
      const std::uint16_t target = port;
      relay = ::fork();
      if (relay == 0) return carry_slowly(arguments, target, ends[1]);
      if (::read(ends[0], &port, sizeof port) != sizeof port) return 1;
    }
    code = measure(arguments, key, port, receiver);
    if (relay > 0) {
      ::kill(relay, SIGTERM);
      ::waitpid(relay, nullptr, 0);
    }
  }
  std::filesystem::remove_all(directory);
  return code;
}
