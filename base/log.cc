// SPDX-License-Identifier: Apache-2.0
#include "base/log.h"

#include <memory>
#include <utility>

#include <spdlog/sinks/basic_file_sink.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>
#include <sys/stat.h>

namespace drover {

namespace {

std::shared_ptr<spdlog::logger>& logger() {
  static std::shared_ptr<spdlog::logger> instance = [] {
    auto made = std::make_shared<spdlog::logger>(
        "drover", std::make_shared<spdlog::sinks::stderr_sink_mt>());
    made->set_level(spdlog::level::warn);
    return made;
  }();
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
  try {
    const mode_t before = ::umask(0077);
    auto sink = std::make_shared<spdlog::sinks::basic_file_sink_mt>(path);
    ::umask(before);
    auto made = std::make_shared<spdlog::logger>("drover", sink);
    made->set_level(logger()->level() < spdlog::level::info ? logger()->level()
                                                            : spdlog::level::info);
    made->set_pattern("%Y-%m-%dT%H:%M:%S.%f %^%l%$ [%t] %v", spdlog::pattern_time_type::utc);
    made->flush_on(spdlog::level::info);
    logger() = made;
  } catch (const spdlog::spdlog_ex& error) {
    return fail(Code::Io, "opening the log " + path + ": " + error.what());
  }
  return {};
}

void set_log_level(LogLevel level) { logger()->set_level(spdlog_level(level)); }

void log_to(std::function<void(LogLevel, std::string_view)> other) { sink() = std::move(other); }

void log_line(LogLevel level, std::string_view text) {
  if (sink()) return sink()(level, text);
  logger()->log(spdlog_level(level), spdlog::string_view_t(text.data(), text.size()));
}

}  // namespace drover
