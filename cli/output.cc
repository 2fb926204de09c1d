// SPDX-License-Identifier: Apache-2.0
#include "cli/output.h"

#include <poll.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

namespace drover::cli {

namespace {
constexpr std::string_view kEraseLine = "\r\x1b[K";
}

bool write_all(int fd, std::string_view text) {
  while (!text.empty()) {
    const ssize_t written = ::write(fd, text.data(), text.size());
    if (written >= 0) {
      text.remove_prefix(static_cast<std::size_t>(written));
    } else if (errno == EAGAIN) {
      pollfd ready{fd, POLLOUT, 0};
      if (::poll(&ready, 1, -1) < 0 && errno != EINTR) return false;
    } else if (errno != EINTR) {
      return false;
    }
  }
  return true;
}

Output::Output(const Options& options) : options_(options), thread_([this] { run(); }) {}

Output::~Output() { finish(); }

void Output::out(std::string text, Keep keep) {
  {
    const std::lock_guard lock(mutex_);
    if (keep == Keep::IfRoom && queued_ + text.size() > kMostQueued) return;
  }
  post({Kind::Out, std::move(text)});
}

void Output::err(std::string text) { post({Kind::Err, std::move(text)}); }

void Output::status(std::string line) {
  if (options_.redraw) post({Kind::Status, std::move(line)});
}

void Output::post(Item item) {
  const std::lock_guard lock(mutex_);
  if (item.kind == Kind::Status && !queue_.empty() && queue_.back().kind == Kind::Status) {
    queued_ -= queue_.back().text.size();
    queue_.pop_back();
  }
  queued_ += item.text.size();
  queue_.push_back(std::move(item));
  changed_.notify_one();
}

void Output::finish() {
  {
    const std::lock_guard lock(mutex_);
    finishing_ = true;
    changed_.notify_one();
  }
  if (thread_.joinable()) thread_.join();
}

void Output::run() {
  for (;;) {
    Item item;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return finishing_ || !queue_.empty(); });
      if (queue_.empty()) break;
      item = std::move(queue_.front());
      queue_.pop_front();
      queued_ -= item.text.size();
    }
    write(item);
  }
  erase_status();
}

void Output::write(const Item& item) {
  switch (item.kind) {
    case Kind::Status: {
      if (item.text == shown_status_ || out_gone_) return;
      // In one write, and the old line erased only behind the new one: nothing flickers.
      out_gone_ = !write_all(options_.out, "\r" + item.text + "\x1b[K");
      shown_status_ = item.text;
      return;
    }
    case Kind::Out: {
      erase_status();
      if (!out_gone_) out_gone_ = !write_all(options_.out, item.text);
      return;
    }
    case Kind::Err: {
      erase_status();
      if (!err_gone_) err_gone_ = !write_all(options_.err, item.text);
      return;
    }
  }
}

void Output::erase_status() {
  if (shown_status_.empty()) return;
  shown_status_.clear();
  if (!out_gone_) out_gone_ = !write_all(options_.out, kEraseLine);
}

}  // namespace drover::cli
