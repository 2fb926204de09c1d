// SPDX-License-Identifier: Apache-2.0
//
// Reaching the target host over SSH, as rsync does: to start the receiver there (SSH then returns
// and everything else goes over the link), and to run small commands for the pre-flight.
//
//   Ssh ssh{.host = "root@hostb"};
//   DROVER_ASSIGN(auto receiver, start_receiver(ssh, {.session = id, .key = key}));
//   Link::connect(loop, {.address = receiver.address, .port = receiver.port, ...}, answers);
//
// The key travels on SSH's standard input, never on a command line. SSH asks no questions when
// standard input is no terminal (BatchMode).
//
// Threads: any; every call blocks (at most Ssh::timeout). Errors: NotFound (no ssh here, or no
// drover there), Unreachable, Denied (ssh's own words are quoted), Incompatible (another version
// there), Protocol (what answered is no drover), or the receiver's own error.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/subprocess.h"
#include "base/unique_fd.h"
#include "mirror/tls.h"

namespace drover::mirror {

struct Ssh {
  std::string host;  // an SSH destination: [user@]host or ssh://[user@]host[:port]
  // The program and its options; empty: the words of $DROVER_SSH, or "ssh".
  std::vector<std::string> command;
  std::chrono::milliseconds timeout{30000};
  int cancel_fd = -1;        // readable: give up (Cancelled)
  std::string control_path;  // a SharedSsh's
  struct Socket {
    std::string local;
    std::string there;
  };
  std::vector<Socket> sockets;  // a SharedSsh's
  // A SharedSsh's: held by the command that opens the connection. (Two at once would take the sockets from each other.)
  std::shared_ptr<std::timed_mutex> opening;
};

// Several commands over one SSH connection (ssh's ControlMaster): the first opens it, the others
// save the handshake. It is closed when this object goes, or by ssh itself 2 s after its last use
// (whoever is connected to one of `sockets` uses it), or once the target has said nothing for 8 s: the next command
// opens another then. Of one that is open when the network goes away for minutes, sshd hears nothing any more, and
// keeps its session. One whose process was killed is ended by the next SharedSsh on this host.
class SharedSsh {
 public:
  // `sockets`: Unix sockets of the target that the connection leads to as well.
  explicit SharedSsh(Ssh ssh, const std::vector<std::string>& sockets = {});
  ~SharedSsh();
  SharedSsh(const SharedSsh&) = delete;
  SharedSsh& operator=(const SharedSsh&) = delete;
  [[nodiscard]] const Ssh& ssh() const { return ssh_; }
  // Where the target's sockets are here, in the order in which they were given, once a command has run. One that is
  // not there, or that sshd leads nobody to (AllowStreamLocalForwarding), accepts and hangs up.
  [[nodiscard]] std::vector<std::string> local_sockets() const;

 private:
  Ssh ssh_;
  std::string directory_;  // empty: none could be made, every command connects by itself
  UniqueFd lock_;          // of the directory, as long as we live
};

// Runs argv on the target (each argument arrives as it is, whatever characters it has) with `input`
// as its standard input. A program that ran and failed is no Error: see exit_code; 127 means that
// it is not there. That SSH itself failed (its exit code 255) is an Error.
Result<ProcessResult> run_on_target(const Ssh& ssh, const std::vector<std::string>& argv,
                                    const std::string& input = {});

// The name or address that SSH connects to for ssh.host, by the user's configuration (`ssh -G`).
Result<std::string> target_address(const Ssh& ssh);

struct ReceiverRequest {
  std::string session;
  LinkKey key{};
  std::string address;          // of the target for the link; empty: target_address()
  std::string listen;           // address to listen on there; empty: all
  std::uint16_t port = 0;       // 0: any
  std::uint16_t last_port = 0;  // with port: the first free one of the range
  std::string jobs_directory;   // there; empty: the default
  std::vector<std::string> program = {"drover"};  // there
  bool resumable = false;                         // see ReceiverOptions
  bool resume = false;
};

struct ReceiverInfo {
  std::string address;
  std::uint16_t port = 0;
  std::string version;
  std::int64_t pid = 0;  // there
  // With ReceiverRequest::resume: the job's receiver was alive. It has the key with which it was
  // started; if this source has another one: stop_receiver_there(), then again.
  bool was_running = false;
};

// With `resume`, also: NotFound if no receiver left anything there, Denied if what it left can't be
// resumed, Busy if a file has taken an image's place or QEMU has it.
Result<ReceiverInfo> start_receiver(const Ssh& ssh, const ReceiverRequest& request);

// Has the job's receiver there end in order (`drover receive --stop`): a resumable one flushes and
// keeps its images. Ok also if none is alive.
Status stop_receiver_there(const Ssh& ssh, const std::string& session,
                           const std::vector<std::string>& program = {"drover"});

}  // namespace drover::mirror
