// SPDX-License-Identifier: Apache-2.0
//
// The target's side of a job: `drover receive`, one process per job, started over SSH by
// mirror/bootstrap.h. It creates the target's images, applies the frames that come over the link,
// proves at the barrier that nothing is missing, and ends.
//
//   Idle --first contact--> Session --keep--> Kept --barrier--> Proved --finish--> gone, images
//   stay
//     |                        |
//     60 s                     remove, connection lost, SIGTERM: images removed
//
// A resumable one waits for its source when the connection is lost, and when it waited in vain, or
// on SIGTERM, it flushes and releases its images and leaves them with their record, from which
// another one goes on (ReceiverOptions::resume).
//
// Once they are to be kept (the guest's memory begins to move), images are only removed by an
// explicit, forced "remove" of the source: from then on they may be the guest's only disks
// (invariants 4 and 7).
//
// docs/protocol.md describes what travels. Memory: buffers are bounded (96 MiB), whatever peers
// send.
//
// Threads of a Receiver: the one in run() (signals, connections' handshakes, control messages), one
// that carries out what takes time (images), one per lane, one per memory connection.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "base/result.h"
#include "blockcopy/image.h"
#include "mirror/apply.h"
#include "mirror/content_index.h"
#include "mirror/receiver_record.h"
#include "mirror/socket.h"
#include "mirror/tls.h"

namespace drover::mirror {

struct ReceiverOptions {
  std::string session;  // the job's id
  LinkKey key{};
  ListenOptions listen;
  std::string jobs_directory = "/var/lib/drover/jobs";
  // Nobody came, or a peer did not finish its handshake: given up after this.
  std::chrono::milliseconds first_contact{60000};
  std::chrono::milliseconds handshake{10000};
  // How long a session outlives its control connection, for a connect with the next epoch.
  std::chrono::milliseconds linger{0};
  bool resumable = false;  // at its end, images that nobody removed stay, with their record
  bool resume = false;     // go on with what a resumable one left; implies resumable
  // Where this host's content index is, if it has one; empty: it is not looked for.
  std::string index_directory;
  // Receive buffers of all lanes together.
  Length buffers = Length(std::uint64_t{96} << 20);
  // Readable (a signalfd): end as on SIGTERM. -1: none.
  int signal_fd = -1;

  // For tests: what creates and opens images (default: blockcopy's), and the appliers' switches.
  using CreateImage =
      std::function<Result<std::unique_ptr<blockcopy::TargetImage>>(const blockcopy::TargetSpec&)>;
  CreateImage create_image;
  using OpenImage = std::function<Result<std::unique_ptr<blockcopy::TargetImage>>(
      const blockcopy::TargetSpec&, const blockcopy::ImageIdentity&)>;
  OpenImage open_image;
  Applier::Options applier;
};

class Receiver {
 public:
  // Makes the job's directory, or takes over the one that is to be resumed and opens its images
  // (errors: ReceiverRecord::resume(), blockcopy::open_target(); nothing is changed then), and
  // listens. From the thread that calls run(), or one that outlives it.
  static Result<std::unique_ptr<Receiver>> create(ReceiverOptions options);
  virtual ~Receiver() = default;
  [[nodiscard]] virtual std::uint16_t port() const = 0;
  [[nodiscard]] virtual const ReceiverRecord& record() const = 0;
  // Serves until the session ends, on this thread. Ok: finished, or removed because the source said
  // so. Otherwise why the session ended. Nothing of it is left then, except images that are to be
  // kept and what can be resumed.
  virtual Status run() = 0;
  virtual void stop() = 0;  // any thread: ends as on SIGTERM
};

// Of resumable ones, unless the bootstrap document says something else.
inline constexpr std::chrono::milliseconds kResumableLinger = std::chrono::minutes(10);

// The bootstrap document: one JSON object, see docs/protocol.md. Untrusted.
Result<ReceiverOptions> receiver_options_from_json(std::string_view text);

struct RunReceiverOptions {
  int input = 0;
  int output = 1;
  std::string jobs_directory = "/var/lib/drover/jobs";
  bool detach = true;  // false: serves in the foreground (debugging)
};
// `drover receive`: reads the document, answers with one line of JSON, and serves in the
// background. Where there is a content index beside the directory of jobs (`index`), the session's
// images are added to it after a finished move, when nothing of the session is left. Returns the exit code: in the foreground process 0 once the receiver is up, 1 after
// an error (which the line tells); in the background process when the session has ended. Call it
// before any thread is started.
int run_receiver(const RunReceiverOptions& options);

}  // namespace drover::mirror
