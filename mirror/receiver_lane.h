// SPDX-License-Identifier: Apache-2.0
//
// The target's end of one data connection: a thread with a Loop of its own that receives, decrypts,
// checks and applies frames, and answers them in batches.
//
// Bounds: payloads lie in buffers of a pool; when none is free, when too many frames are in flight
// or when the source does not read its answers, nothing more is received until that changes, and
// TCP tells the source.
//
// Threads: its own; everything public but frame counters is called from the receiver's worker
// thread and blocks until the lane's thread has done it. start() first, finish() last.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "base/buffer.h"
#include "base/loop.h"
#include "base/result.h"
#include "base/unique_fd.h"
#include "blockcopy/image.h"
#include "mirror/apply.h"
#include "mirror/content_index.h"
#include "mirror/frame.h"
#include "mirror/relay.h"
#include "mirror/session.h"
#include "mirror/tls.h"

namespace drover::mirror {

// A payload of the largest size, placed so that its data blocks are aligned for O_DIRECT.
inline constexpr Length kLaneBuffer = Length((std::uint64_t{1} << 20) + 2 * 4096);

struct ReceiverTotals {
  std::atomic<std::uint64_t> frames{0};
  std::atomic<std::uint64_t> bytes_received{0};  // headers and payloads
  std::atomic<std::uint64_t> bytes_written{0};   // to the images
  std::atomic<std::uint64_t> bytes_zeroed{0};
  std::atomic<std::uint64_t> bytes_found{0};     // of offers, in other images of this host
  std::atomic<std::uint64_t> failed{0};
  RelayTotals memory;
};

class LaneReceiver {
 public:
  struct Options {
    unsigned index = 0;
    FrameLimits limits;
    std::chrono::milliseconds silence{kSilence};
    std::size_t buffers = 16;
    Applier::Options applier;
    std::shared_ptr<IndexReader> content;  // null: this host has none
  };
  // On the lane's thread, once, when the connection broke or the source broke the protocol.
  using Lost = std::function<void(LaneReceiver& lane, const Error& error)>;

  // The session is past its handshake; its output (the welcome) is sent first.
  LaneReceiver(Options options, UniqueFd fd, std::unique_ptr<Tls> tls, ReceiverTotals& totals,
               Lost lost);
  ~LaneReceiver();  // finish() was called, or start() failed
  LaneReceiver(const LaneReceiver&) = delete;
  LaneReceiver& operator=(const LaneReceiver&) = delete;

  // With the session's images if there are any already: the source may send as soon as it is
  // welcome.
  Status start(const std::vector<std::unique_ptr<blockcopy::TargetImage>>& images);
  [[nodiscard]] unsigned index() const { return options_.index; }

  // From now on frames are applied to these images. The images stay until detach().
  Status attach(const std::vector<std::unique_ptr<blockcopy::TargetImage>>& images);
  // Waits until nothing is in flight, lets go of the images; what was taken up to then. Frames that
  // come afterwards break the protocol.
  LaneDigest detach();
  // Closes the connection, detaches, ends the thread.
  void finish();

 private:
  Status open_images(const std::vector<std::unique_ptr<blockcopy::TargetImage>>& images);
  void run_parked(const std::function<void()>& work);
  void receive();
  void wait_for_more();
  void on_received(int count);
  Status process();
  Result<bool> take_frame();
  Status begin_payload();
  std::size_t payload_offset() const;
  void answer(std::uint64_t sequence, Result<BlockMask> differing);
  void schedule_turn();
  void turn();
  void send_output();
  void beat_later();
  void lose(const Error& error);
  void close_connection();

  const Options options_;
  const UniqueFd fd_;
  const std::unique_ptr<Tls> tls_;
  ReceiverTotals& totals_;
  const Lost lost_;
  BufferPool pool_;
  std::unique_ptr<Loop> loop_;  // before the pool and the session go
  std::thread thread_;

  // The thread's own.
  struct OpenImage {
    std::unique_ptr<blockcopy::ImageWriter> writer;
    std::unique_ptr<blockcopy::ImageReader> reader;
  };
  std::vector<OpenImage> images_;
  std::unique_ptr<KnownContent> known_;  // what offers are looked up in
  std::unique_ptr<Applier> applier_;
  Length found_;  // by it, and added to the totals
  LaneDigest digest_;
  std::uint64_t sequence_ = 0;
  std::array<std::byte, kHeaderSize> head_{};
  std::size_t head_size_ = 0;
  std::optional<FrameHeader> header_;  // of the frame whose payload is being received
  Buffer payload_;
  std::size_t payload_size_ = 0;
  std::vector<Run> runs_;
  std::vector<std::byte> answers_;  // not yet encrypted
  bool receiving_ = false;
  int receive_at_least_ = 1;  // bytes; what the socket was told
  bool polling_ = false;      // for room to send
  bool turn_scheduled_ = false;
  bool closed_ = false;
};

}  // namespace drover::mirror
