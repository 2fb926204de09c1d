// SPDX-License-Identifier: Apache-2.0
//
// StorageDaemon: a qemu-storage-daemon process of ours that has one image file open and exports it
// over NBD on a Unix socket in a private directory. Internal to blockcopy (and its tests).
//
// The image and the listening socket are handed over as descriptors: no name is looked up again,
// and clients may connect at once; the first answer comes when the daemon is up.
//
// Threads: one, which must live as long as the daemon shall.
#pragma once

#include <memory>
#include <string>

#include "base/result.h"
#include "base/subprocess.h"
#include "base/unique_fd.h"
#include "blockcopy/nbd_connection.h"

namespace drover::blockcopy {

struct StorageDaemonOptions {
  int image_fd = -1;              // stays the caller's
  std::string image;              // its path, for messages
  bool by_name = false;           // opens `image` itself, and finds the backing files that it names
  std::string driver;             // QEMU's name of the format: "qcow2"
  std::string protocol = "file";  // of what lies below: "host_device" for a block device
  bool writable = false;
  bool direct = false;         // O_DIRECT; see takes_direct()
  std::string work_directory;  // for the socket; must exist
  Duration stop_grace = std::chrono::seconds(10);
};

// Whether the file takes O_DIRECT.
bool takes_direct(int fd);

class StorageDaemon {
 public:
  static constexpr unsigned kMaxConnections = 40;

  static Result<std::unique_ptr<StorageDaemon>> start(const StorageDaemonOptions& options);
  ~StorageDaemon();  // kills it if stop() was not called; removes the socket
  StorageDaemon(const StorageDaemon&) = delete;
  StorageDaemon& operator=(const StorageDaemon&) = delete;

  [[nodiscard]] const NbdAddress& address() const { return address_; }
  [[nodiscard]] pid_t pid() const { return child_.pid(); }
  [[nodiscard]] bool running() { return child_.running(); }
  // Connects; if that fails because the daemon has ended, the error says why it did.
  Result<std::shared_ptr<NbdConnection>> connect();
  // Lets the daemon close the image and waits for its end: no lock is left. Unreachable when it had
  // to be killed, Io when it ended with an error.
  Status stop();

 private:
  StorageDaemon(ChildProcess child, UniqueFd directory, std::string socket,
                const StorageDaemonOptions& options);

  ChildProcess child_;
  UniqueFd directory_;  // the address goes through it: any length of path fits a socket's address
  std::string socket_;  // its name there
  std::string image_;
  Duration stop_grace_;
  NbdAddress address_;
  bool stopped_ = false;
};

}  // namespace drover::blockcopy
