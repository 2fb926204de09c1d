// SPDX-License-Identifier: Apache-2.0
//
// With what a lane compresses next, from what its thread sees: nothing where the CPU or the
// source's disk is the limit, the more the slower the wire is.
//
//   CompressionPolicy policy(now());
//   const EncodeOptions with = policy.choose(now());           // for each frame that has data
//   ... encode ...
//   policy.encoded(with, {.plain = ..., .wire = ..., .took = ...});
//   policy.blocked(waited);   // for room in the socket
//   policy.starved(waited, outstanding_before, outstanding_after);   // for something to send
//   if (policy.due(now())) policy.look(now(), bytes_that_have_left);   // at each turn
//
// It goes by windows of a quarter of a second. In each, the time in which the lane had something to
// send is divided: encoding, other work (encryption, sockets), waiting for the wire. From that,
// from the rate at which bytes left and from what single chunks that were tried with another
// encoding told ("probes", only while the lane waits for its wire), it knows what a byte of data
// takes with each encoding, and takes the cheapest. A step up must pay, or it is taken back and not
// tried again for a while; each time it fails that while doubles. A lane that never waits for its
// wire goes down, a step at a time, and sends plain in the end.
//
// Where compression brings nothing it is tried on a chunk in 64, or one each second, and not for
// more than a 50th of the lane's time.
//
// Pure: no clock, no I/O. One thread at a time.
#pragma once

#include <array>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "base/clock.h"
#include "mirror/frame.h"

namespace drover::mirror {

class CompressionPolicy {
 public:
  static constexpr std::size_t kSteps = 4;  // none, lz4, zstd:1, zstd:3
  static constexpr std::array<EncodeOptions, kSteps> kEncodings{
      EncodeOptions{Encoding::Plain, 0}, EncodeOptions{Encoding::Lz4, 0},
      EncodeOptions{Encoding::Zstd, 1}, EncodeOptions{Encoding::Zstd, 3}};
  // A guest's writes are compressed from this size on, if the copies are and the lane waits for its
  // wire.
  static constexpr std::size_t kLeastWrite = std::size_t{64} << 10;

  // `left`: as look()'s.
  explicit CompressionPolicy(Instant start, std::uint64_t left = 0)
      : window_{.begin = start, .left = left} {}

  // For the next chunk.
  [[nodiscard]] EncodeOptions choose(Instant now);
  // For a guest's write of `bytes`; never a probe.
  [[nodiscard]] EncodeOptions choose_write(std::size_t bytes) const;
  // What it is at now, apart from probes.
  [[nodiscard]] EncodeOptions current() const { return kEncodings[step_]; }

  struct Encoded {
    std::size_t plain = 0;  // bytes before and after
    std::size_t wire = 0;
    Duration took{0};
  };
  // Of frames that choose() or choose_write() was asked for.
  void encoded(const EncodeOptions& with, const Encoded& what);
  // The thread waited, with something that its socket would not take.
  void blocked(Duration time) { window_.blocked += time; }
  // The thread could have run and had no processor for so long, whatever else it was said to do:
  // not the wire was what it waited for.
  void delayed(Duration time) { window_.delayed += time; }
  // The thread waited with nothing to send; of what it had sent so much had not arrived yet at the
  // begin and at the end.
  void starved(Duration time, std::uint64_t outstanding_before, std::uint64_t outstanding_after);

  // True: look() has something to decide.
  [[nodiscard]] bool due(Instant now) const;
  // `left`: bytes that have arrived on the other side since the beginning.
  void look(Instant now, std::uint64_t left);

 private:
  using Step = std::size_t;
  struct Window {
    Instant begin;
    std::uint64_t left = 0;  // at its begin
    std::uint64_t frames = 0;
    std::uint64_t plain = 0;
    std::uint64_t wire = 0;
    Duration encoding{0};
    Duration blocked{0};
    Duration delayed{0};
    Duration idle{0};
  };
  // What an encoding was seen to do.
  struct Estimate {
    double ratio = 1;    // bytes on the wire per byte
    double seconds = 0;  // to encode a byte
    unsigned samples = 0;
    void add(const Encoded& what, double weight);
  };
  // A step that has to prove itself.
  struct Trial {
    Step from = 0;
    double before = 0;     // bytes of data per second
    double wire = 0;       // and what wire_ was
    bool settled = false;  // the window in which it began is over
  };
  struct Hold {
    Instant until{};
    std::chrono::milliseconds next{0};
    double wire = 0;  // bytes per second, when it was set
  };
  struct Share {
    double active = 0;   // seconds with something to send
    double waiting = 0;  // of them, for the wire
    double idle = 0;     // of the whole window, 0 to 1
    double goodput = 0;  // bytes of data per second
  };

  [[nodiscard]] Share measure(Instant now, std::uint64_t left);
  [[nodiscard]] double cost(Step step) const;
  [[nodiscard]] bool waits_for_wire(Instant now) const;
  [[nodiscard]] std::optional<Step> probe_of(Instant now) const;
  void begin_window(Instant now, std::uint64_t left);
  void decide(Instant now, const Share& share);
  bool judge(Instant now, const Share& share);
  void go(Step to, const Share& share);
  [[nodiscard]] bool held(const Hold& what, Instant now) const;

  Step step_ = 0;
  bool pressed_ = false;  // the last window's time went mostly to waiting for the wire
  Window window_;
  std::array<Estimate, kSteps> estimates_;
  double handling_ = 0;  // seconds per byte on the wire: encryption, sockets
  double wire_ = 0;      // bytes per second that the wire was seen to take; 0: not known
  std::optional<Trial> trial_;
  Hold up_;
  Hold down_;
  // Probes.
  std::uint64_t since_probe_ = 0;  // chunks
  std::uint64_t probe_every_ = 1;
  Instant last_probe_{};
  Duration probe_took_{0};
  std::array<std::uint64_t, kSteps> probed_{};  // when, counted in probes
  std::uint64_t probes_ = 0;
  std::optional<Step> probing_;
};

}  // namespace drover::mirror
