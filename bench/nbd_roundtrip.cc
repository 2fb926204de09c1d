// SPDX-License-Identifier: Apache-2.0
//
// What a mirrored write costs: drover's NBD server and nbdkit's memory plugin, both storing into
// memory, written to by the same libnbd client over a unix socket; rounds alternate.
//
//   nbd_roundtrip [ROUNDS]
//   nbd_roundtrip --only drover|nbdkit [ROUNDS]     for a profiler
#include <libnbd.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/buffer.h"
#include "base/check.h"
#include "base/loop.h"
#include "mirror/nbd_server.h"

namespace {

using namespace drover;
using Clock = std::chrono::steady_clock;

constexpr Length kDisk = 256_MiB;
constexpr int kRoundTrips = 20000;

void must(bool good) {
  if (good) return;
  std::fprintf(stderr, "nbd_roundtrip: %s\n", nbd_get_error());
  std::exit(1);
}

// The server on a thread of its own, answering each request as it comes.
class DroverServer {
 public:
  DroverServer() : pool_(1_MiB, 40), disk_(kDisk.bytes()) {
    CHECK(::mkdtemp(directory_.data()) != nullptr, "a temporary directory can be made");
    auto loop = Loop::create();
    CHECK(loop.has_value(), "a loop can be made");
    loop_ = std::move(*loop);
    auto server = mirror::NbdServer::listen(
        *loop_, pool_,
        {.socket_path = directory_ + "/nbd.sock", .export_name = "vda", .size = kDisk},
        {.request = [this](const mirror::NbdRequest& request) {
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
  std::unique_ptr<mirror::NbdServer> server_;
  std::thread thread_;
};

struct Figures {
  double mean = 0;  // of one 4 KiB write after the other, microseconds
  double median = 0;
  double p99 = 0;
  double deep = 0;  // 4 KiB writes a second, 16 in flight
  double bulk = 0;  // MiB a second, 1 MiB writes, 4 in flight
};

// Writes `count` times `size` bytes, `depth` in flight; returns the seconds it took.
double write_many(nbd_handle* client, int count, std::size_t size, int depth) {
  const std::vector<std::byte> data(size, std::byte{0x42});
  const std::uint64_t slots = kDisk.bytes() / size;
  const auto start = Clock::now();
  for (int i = 0; i < count; ++i) {
    while (nbd_aio_in_flight(client) >= depth) must(nbd_poll(client, -1) >= 0);
    const nbd_completion_callback retire{[](void*, int* error) {
                                           must(*error == 0);
                                           return 1;
                                         },
                                         nullptr, nullptr};
    must(nbd_aio_pwrite(client, data.data(), size,
                        static_cast<std::uint64_t>(i) * 7919 % slots * size, retire, 0) >= 0);
  }
  while (nbd_aio_in_flight(client) > 0) must(nbd_poll(client, -1) >= 0);
  return std::chrono::duration<double>(Clock::now() - start).count();
}

Figures measure(nbd_handle* client) {
  // nbdkit takes memory as it is first written to.
  write_many(client, static_cast<int>(kDisk / 1_MiB), std::size_t{1} << 20, 4);
  const std::vector<std::byte> data(4096, std::byte{0x17});
  const std::uint64_t slots = kDisk.bytes() / data.size();
  std::vector<double> taken;
  taken.reserve(kRoundTrips);
  for (int i = 0; i < kRoundTrips; ++i) {
    const std::uint64_t offset = static_cast<std::uint64_t>(i) * 7919 % slots * data.size();
    const auto start = Clock::now();
    must(nbd_pwrite(client, data.data(), data.size(), offset, 0) == 0);
    taken.push_back(std::chrono::duration<double, std::micro>(Clock::now() - start).count());
  }
  std::sort(taken.begin(), taken.end());
  Figures figures;
  for (const double each : taken) figures.mean += each / kRoundTrips;
  figures.median = taken[taken.size() / 2];
  figures.p99 = taken[taken.size() * 99 / 100];
  figures.deep = kRoundTrips / write_many(client, kRoundTrips, 4096, 16);
  figures.bulk = 1000 / write_many(client, 1000, std::size_t{1} << 20, 4);
  return figures;
}

Figures measure_drover() {
  const DroverServer server;
  nbd_handle* client = nbd_create();
  must(nbd_connect_uri(client, server.uri().c_str()) == 0);
  const Figures figures = measure(client);
  nbd_close(client);
  return figures;
}

Figures measure_nbdkit() {
  nbd_handle* client = nbd_create();
  // libnbd makes the socket and starts nbdkit on it; it goes with the handle.
  std::string program = "nbdkit";
  std::string plugin = "memory";
  std::string size = std::to_string(kDisk.bytes());
  char* argv[] = {program.data(), plugin.data(), size.data(), nullptr};
  must(nbd_connect_systemd_socket_activation(client, argv) == 0);
  const Figures figures = measure(client);
  nbd_close(client);
  return figures;
}

double median_of(const std::vector<Figures>& rounds, double Figures::*what) {
  std::vector<double> values;
  for (const Figures& each : rounds) values.push_back(each.*what);
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

void print(const char* name, const std::vector<Figures>& rounds) {
  if (rounds.empty()) return;
  std::printf("%-8s %8.1f %8.1f %8.1f %12.0f %10.0f\n", name, median_of(rounds, &Figures::median),
              median_of(rounds, &Figures::mean), median_of(rounds, &Figures::p99),
              median_of(rounds, &Figures::deep), median_of(rounds, &Figures::bulk));
}

}  // namespace

int main(int argc, char** argv) {
  std::string only;
  int rounds = 5;
  for (int i = 1; i < argc; ++i) {
    if (std::string(argv[i]) == "--only" && i + 1 < argc) {
      only = argv[++i];
    } else {
      rounds = std::max(1, std::atoi(argv[i]));
    }
  }
  std::vector<Figures> drover;
  std::vector<Figures> nbdkit;
  for (int round = 0; round < rounds; ++round) {
    if (only != "nbdkit") drover.push_back(measure_drover());
    if (only != "drover") nbdkit.push_back(measure_nbdkit());
  }
  std::printf("%d rounds, medians; 4 KiB writes one by one (microseconds), 16 deep, 1 MiB 4 deep\n",
              rounds);
  std::printf("%-8s %8s %8s %8s %12s %10s\n", "", "median", "mean", "p99", "writes/s", "MiB/s");
  print("drover", drover);
  print("nbdkit", nbdkit);
  return 0;
}
