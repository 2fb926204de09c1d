// SPDX-License-Identifier: Apache-2.0
#include "blockcopy/storage_daemon.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

namespace drover::blockcopy {
namespace {

constexpr const char* kExport = "disk";

// An option's value: QEMU takes a doubled comma for one.
std::string escaped(std::string_view value) {
  std::string result;
  for (const char c : value) {
    result += c;
    if (c == ',') result += c;
  }
  return result;
}

Result<UniqueFd> listen_at(const std::string& address) {
  UniqueFd socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (!socket) return fail_errno(errno, "creating a socket");
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  if (address.size() >= sizeof name.sun_path) {
    return fail(Code::InvalidArgument, "a socket's address can't be as long as " + address);
  }
  std::memcpy(name.sun_path, address.data(), address.size());
  if (::bind(socket.get(), reinterpret_cast<const sockaddr*>(&name), sizeof name) != 0) {
    return fail_errno(errno, "creating the socket " + address);
  }
  if (::listen(socket.get(), StorageDaemon::kMaxConnections) != 0) {
    return fail_errno(errno, "listening at " + address);
  }
  return socket;
}

}  // namespace

bool takes_direct(int fd) {
  const std::string self = "/proc/self/fd/" + std::to_string(fd);
  return static_cast<bool>(UniqueFd(::open(self.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC)));
}

Result<std::unique_ptr<StorageDaemon>> StorageDaemon::start(const StorageDaemonOptions& options) {
  static std::atomic<unsigned> counter{0};
  UniqueFd directory(::open(options.work_directory.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
  if (!directory) return fail_errno(errno, "opening the directory " + options.work_directory);
  std::string name = fmt::format("storage-{}-{}.sock", ::getpid(), ++counter);
  const std::string path = fmt::format("/proc/self/fd/{}/{}", directory.get(), name);
  // From a process of the same id, which is no more.
  if (::unlinkat(directory.get(), name.c_str(), 0) != 0 && errno != ENOENT) {
    return fail_errno(errno, "removing " + options.work_directory + "/" + name);
  }
  DROVER_ASSIGN(const UniqueFd listening, listen_at(path));

  const char* const direct = options.direct ? "on" : "off";
  const char* const read_only = options.writable ? "off" : "on";
  const std::string file = options.by_name ? escaped(options.image)
                                           : fmt::format("/proc/self/fd/{}", options.image_fd);
  const std::vector<std::string> argv = {
      "qemu-storage-daemon",
      "--blockdev",
      fmt::format("driver={},node-name=file,filename={},cache.direct={},"
                  "discard=unmap,read-only={}",
                  options.protocol, file, direct, read_only),
      "--blockdev",
      fmt::format("driver={},node-name=image,file=file,cache.direct={},discard=unmap,read-only={}",
                  escaped(options.driver), direct, read_only),
      "--nbd-server",
      fmt::format("addr.type=fd,addr.str={},max-connections={}", listening.get(), kMaxConnections),
      "--export",
      fmt::format("type=nbd,id=export,node-name=image,name={},writable={}", kExport,
                  options.writable ? "on" : "off")};
  ChildOptions child_options;
  child_options.descriptors = {listening.get()};
  if (!options.by_name) child_options.descriptors.push_back(options.image_fd);
  auto child = ChildProcess::start(argv, child_options);
  if (!child) {
    ::unlinkat(directory.get(), name.c_str(), 0);
    return fail(std::move(child.error()));
  }
  return std::unique_ptr<StorageDaemon>(
      new StorageDaemon(std::move(*child), std::move(directory), std::move(name), options));
}

StorageDaemon::StorageDaemon(ChildProcess child, UniqueFd directory, std::string socket,
                             const StorageDaemonOptions& options)
    : child_(std::move(child)),
      directory_(std::move(directory)),
      socket_(std::move(socket)),
      image_(options.image),
      stop_grace_(options.stop_grace),
      address_{fmt::format("/proc/self/fd/{}/{}", directory_.get(), socket_), kExport} {}

StorageDaemon::~StorageDaemon() {
  if (!stopped_) ::unlinkat(directory_.get(), socket_.c_str(), 0);
}

Result<std::shared_ptr<NbdConnection>> StorageDaemon::connect() {
  NbdOpenOptions options;
  options.image = image_;
  auto connection = NbdConnection::open(address_, options);
  if (connection) return connection;
  // Its end of the socket is closed a moment before it is gone.
  const auto code = child_.wait(std::chrono::seconds(1));
  if (!code) return fail(std::move(connection.error()));
  std::string said = child_.error_output();
  while (!said.empty() && said.back() == '\n') said.pop_back();
  return fail(Code::Io, fmt::format("qemu-storage-daemon for {} ended with {}: {}", image_, *code,
                                    said.empty() ? "it did not say why" : said));
}

Status StorageDaemon::stop() {
  if (stopped_) return {};
  stopped_ = true;
  const bool was_running = child_.running();
  const auto code = child_.terminate(stop_grace_);
  ::unlinkat(directory_.get(), socket_.c_str(), 0);
  if (!code) {
    return fail(Code::Unreachable, fmt::format("closing {}: {}", image_, code.error().message));
  }
  if (*code != 0 || !was_running) {
    return fail(Code::Io,
                fmt::format("qemu-storage-daemon for {} ended with {}{}: {}", image_, *code,
                            was_running ? "" : " before it was asked to", child_.error_output()));
  }
  return {};
}

}  // namespace drover::blockcopy
