// SPDX-License-Identifier: Apache-2.0
//
// Standard output and standard error, written by a thread of their own: a terminal that was stopped
// with Ctrl-S, or a reader of a pipe that is slow, must never hold up a move.
//
//   Output output({.out = 1, .err = 2, .redraw = true});
//   output.status("[ 27%] copying disks");       // the line that is redrawn, at the bottom
//   output.out("a block of text\n");             // scrolls above it
//   output.finish();                             // status line gone, all is written
//
// Order is kept over both streams. While the reader is slow only the newest status is kept, and
// droppable text is dropped once kMostQueued bytes wait. A reader that went away (EPIPE, EIO) ends
// the output, not the move.
//
// Threads: any, before finish(). finish() blocks until all is written or the readers have gone.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>

namespace drover::cli {

// Writes all of `text`, waiting where a descriptor doesn't block; false when that can't be done.
bool write_all(int fd, std::string_view text);

class Output {
 public:
  static constexpr std::size_t kMostQueued = std::size_t{1} << 20;

  struct Options {
    int out = 1;
    int err = 2;
    bool redraw =
        false;  // `out` is a terminal that understands "\r" and "erase to the end of line"
  };
  explicit Output(const Options& options);
  ~Output();  // finishes
  Output(const Output&) = delete;
  Output& operator=(const Output&) = delete;

  enum class Keep { Always, IfRoom };
  void out(std::string text, Keep keep = Keep::Always);
  void err(std::string text);
  // One line without its new line; only with `redraw`.
  void status(std::string line);
  void finish();

 private:
  enum class Kind { Out, Err, Status };
  struct Item {
    Kind kind;
    std::string text;
  };
  void post(Item item);
  void run();
  void write(const Item& item);
  void erase_status();

  const Options options_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Item> queue_;  // guarded by mutex_, as the next two
  std::size_t queued_ = 0;  // bytes in it
  bool finishing_ = false;
  std::string shown_status_;  // the thread's own, as the next two
  bool out_gone_ = false;
  bool err_gone_ = false;
  std::thread thread_;  // last: it uses all the others
};

}  // namespace drover::cli
