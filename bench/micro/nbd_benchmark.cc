// SPDX-License-Identifier: Apache-2.0
//
// What a mirrored write costs: drover's NBD server and nbdkit's memory plugin, both storing into
// memory, written to by the same libnbd client over a unix socket. Times are the wall clock's.
#include <benchmark/benchmark.h>
#include <libnbd.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "base/buffer.h"
#include "base/check.h"
#include "base/loop.h"
#include "mirror/nbd_server.h"

namespace drover::mirror {
namespace {

using Clock = std::chrono::steady_clock;

constexpr Length kDisk = 64_MiB;

// The server on a thread of its own, answering each request as it comes.
class DroverServer {
 public:
  DroverServer() : pool_(1_MiB, 40), disk_(kDisk.bytes()) {
    CHECK(::mkdtemp(directory_.data()) != nullptr, "a temporary directory can be made");
    auto loop = Loop::create();
    CHECK(loop.has_value(), "a loop can be made");
    loop_ = std::move(*loop);
    auto server = NbdServer::listen(
        *loop_, pool_,
        {.socket_path = directory_ + "/nbd.sock", .export_name = "vda", .size = kDisk},
        {.request = [this](const NbdRequest& request) {
          if (!request.payload.empty()) {
            std::memcpy(disk_.data() + request.extent.offset.bytes(), request.payload.data(),
                        request.payload.size());
          }
          server_->complete(request.id, 0);
        }});
    CHECK(server.has_value(), "the server can be made");
    server_ = std::move(*server);
    thread_ = std::thread([this] { loop_->run(); });
  }
  DroverServer(const DroverServer&) = delete;
  DroverServer& operator=(const DroverServer&) = delete;
  ~DroverServer() {
    loop_->post([this] {
      server_.reset();
      loop_->stop();
    });
    thread_.join();
    loop_.reset();
    ::rmdir(directory_.c_str());
  }
  [[nodiscard]] std::string uri() const {
    return "nbd+unix:///vda?socket=" + directory_ + "/nbd.sock";
  }

 private:
  std::string directory_ = "/tmp/drover-bench-XXXXXX";
  BufferPool pool_;
  std::vector<std::byte> disk_;
  std::unique_ptr<Loop> loop_;
  std::unique_ptr<NbdServer> server_;
  std::thread thread_;
};

// A connection to one of the two servers, which goes with it.
class Connection {
 public:
  Connection() = default;
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;
  ~Connection() { nbd_close(client_); }

  bool to_drover() {
    server_ = std::make_unique<DroverServer>();
    return nbd_connect_uri(client_, server_->uri().c_str()) == 0;
  }
  bool to_nbdkit() {
    // libnbd makes the socket and starts nbdkit on it.
    std::string program = "nbdkit";
    std::string plugin = "memory";
    std::string size = std::to_string(kDisk.bytes());
    char* argv[] = {program.data(), plugin.data(), size.data(), nullptr};
    return nbd_connect_systemd_socket_activation(client_, argv) == 0;
  }

  // One more write, once there are fewer than `depth` in flight.
  bool write(std::span<const std::byte> data, std::uint64_t at, int depth) {
    while (nbd_aio_in_flight(client_) >= depth) {
      if (nbd_poll(client_, -1) < 0) return false;
    }
    const nbd_completion_callback retire{[](void* self, int* error) {
                                           if (*error != 0)
                                             static_cast<Connection*>(self)->failed_ = true;
                                           return 1;
                                         },
                                         this, nullptr};
    return nbd_aio_pwrite(client_, data.data(), data.size(), at, retire, 0) >= 0 && !failed_;
  }
  bool wait() {
    while (nbd_aio_in_flight(client_) > 0) {
      if (nbd_poll(client_, -1) < 0) return false;
    }
    return !failed_;
  }
  // nbdkit takes memory as it is first written to.
  bool fill() {
    const std::vector<std::byte> data(std::size_t{1} << 20, std::byte{0x42});
    for (std::uint64_t at = 0; at < kDisk.bytes(); at += data.size()) {
      if (!write(data, at, 4)) return false;
    }
    return wait();
  }

 private:
  std::unique_ptr<DroverServer> server_;  // outlives the client (which ~Connection() closes first)
  nbd_handle* client_ = nbd_create();
  bool failed_ = false;
};

using Connect = bool (Connection::*)();

// This thread, and with it the threads and processes that it starts, on one processor.
class OneProcessor {
 public:
  OneProcessor() {
    CHECK(::sched_getaffinity(0, sizeof before_, &before_) == 0, "a thread has an affinity");
    const int here = ::sched_getcpu();
    CHECK(here >= 0, "the kernel knows where a thread runs");
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(here, &one);
    CHECK(::sched_setaffinity(0, sizeof one, &one) == 0, "a thread may stay where it is");
  }
  OneProcessor(const OneProcessor&) = delete;
  OneProcessor& operator=(const OneProcessor&) = delete;
  ~OneProcessor() { ::sched_setaffinity(0, sizeof before_, &before_); }

 private:
  cpu_set_t before_{};
};

// Writes of `size` bytes, `depth` in flight. One at a time: with the latencies' median and p99.
// On one processor the servers' own cost shows; else also what it costs to wake a processor that
// sleeps, and where the scheduler happened to put the two.
void write_to(benchmark::State& state, Connect connect, std::size_t size, int depth,
              bool one_processor) {
  std::optional<OneProcessor> here;
  if (one_processor) here.emplace();
  Connection connection;
  if (!(connection.*connect)() || !connection.fill()) {
    state.SkipWithError(nbd_get_error());
    return;
  }
  const std::vector<std::byte> data(size, std::byte{0x17});
  const std::uint64_t slots = kDisk.bytes() / size;
  std::vector<double> taken;
  std::uint64_t i = 0;
  for (auto _ : state) {
    const auto start = Clock::now();
    if (!connection.write(data, i++ * 7919 % slots * size, depth) ||
        (depth == 1 && !connection.wait())) {
      state.SkipWithError(nbd_get_error());
      break;
    }
    if (depth == 1) {
      taken.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count());
    }
  }
  connection.wait();
  state.SetItemsProcessed(state.iterations());
  if (size > 4096) state.SetBytesProcessed(static_cast<std::int64_t>(size) * state.iterations());
  if (!taken.empty()) {
    std::ranges::sort(taken);
    state.counters["p50_us"] = taken[taken.size() / 2];
    state.counters["p99_us"] = taken[taken.size() * 99 / 100];
  }
}

#define DROVER_NBD_BENCHMARK(name, ...)                                           \
  BENCHMARK_CAPTURE(write_to, name##_drover, &Connection::to_drover, __VA_ARGS__) \
      ->Name("nbd/" #name "/drover")                                              \
      ->UseRealTime()                                                             \
      ->Unit(benchmark::kMicrosecond);                                            \
  BENCHMARK_CAPTURE(write_to, name##_nbdkit, &Connection::to_nbdkit, __VA_ARGS__) \
      ->Name("nbd/" #name "/nbdkit")                                              \
      ->UseRealTime()                                                             \
      ->Unit(benchmark::kMicrosecond)

DROVER_NBD_BENCHMARK(write_4_KiB_round_trip, 4096, 1, false);
DROVER_NBD_BENCHMARK(write_4_KiB_on_one_processor, 4096, 1, true);
DROVER_NBD_BENCHMARK(write_4_KiB_16_deep, 4096, 16, false);
DROVER_NBD_BENCHMARK(write_1_MiB_4_deep, std::size_t{1} << 20, 4, false);

}  // namespace
}  // namespace drover::mirror
