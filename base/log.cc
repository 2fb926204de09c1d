// SPDX-License-Identifier: Apache-2.0
#include "base/log.h"

#include <spdlog/sinks/basic_file_sink.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>
#include <sys/stat.h>

#include <algorithm>
#include <memory>
#include <mutex>
#include <utility>

namespace drover {

namespace {

using Logger = std::shared_ptr<spdlog::logger>;

// Several jobs in one process each have a log, on threads of their own: a thread writes to the one
// that it opened, and one that has opened none to the one that was opened last.
class Loggers {
 public:
  Logger mine() {
    if (own()) return own();
    const std::lock_guard lock(mutex_);
    return last_;
  }
  void set(Logger made) {
    own() = made;
    const std::lock_guard lock(mutex_);
    last_ = std::move(made);
  }
  void leave() { own() = first_; }

 private:
  static Logger& own() {
    thread_local Logger instance;
    return instance;
  }
  static Logger to_stderr() {
    auto made = std::make_shared<spdlog::logger>("drover",
                                                 std::make_shared<spdlog::sinks::stderr_sink_mt>());
    made->set_level(spdlog::level::warn);
    return made;
  }
  const Logger first_ = to_stderr();
  std::mutex mutex_;  // guards the next
  Logger last_ = first_;
};

Loggers& loggers() {
  static Loggers instance;
  return instance;
}

std::function<void(LogLevel, std::string_view)>& sink() {
  static std::function<void(LogLevel, std::string_view)> instance;
  return instance;
}

spdlog::level::level_enum spdlog_level(LogLevel level) {
  switch (level) {
    case LogLevel::Debug: return spdlog::level::debug;
    case LogLevel::Info: return spdlog::level::info;
    case LogLevel::Warning: return spdlog::level::warn;
    case LogLevel::Error: return spdlog::level::err;
  }
  return spdlog::level::err;
}

}  // namespace

Status log_to_file(const std::string& path) {
  // One at a time: the umask is the process's.
  static std::mutex opening;
  const std::lock_guard lock(opening);
  try {
    const mode_t before = ::umask(0077);
    auto sink = std::make_shared<spdlog::sinks::basic_file_sink_mt>(path);
    ::umask(before);
    auto made = std::make_shared<spdlog::logger>("drover", sink);
    made->set_level(std::min(loggers().mine()->level(), spdlog::level::info));
    made->set_pattern("%Y-%m-%dT%H:%M:%S.%f %^%l%$ [%t] %v", spdlog::pattern_time_type::utc);
    made->flush_on(spdlog::level::info);
    loggers().set(std::move(made));
  } catch (const spdlog::spdlog_ex& error) {
    return fail(Code::Io, "opening the log " + path + ": " + error.what());
  }
  return {};
}

void log_to_stderr() { loggers().leave(); }

void set_log_level(LogLevel level) { loggers().mine()->set_level(spdlog_level(level)); }

void log_to(std::function<void(LogLevel, std::string_view)> other) { sink() = std::move(other); }

void log_line(LogLevel level, std::string_view text) {
  if (sink()) return sink()(level, text);
  loggers().mine()->log(spdlog_level(level), spdlog::string_view_t(text.data(), text.size()));
}

}  // namespace drover
