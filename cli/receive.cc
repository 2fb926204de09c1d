// SPDX-License-Identifier: Apache-2.0
#include "cli/receive.h"

#include <unistd.h>

#include <array>
#include <cerrno>
#include <string>

#include "cli/exit_codes.h"
#include "cli/output.h"
#include "cli/render.h"
#include "memmig/probe.h"
#include "mirror/receiver.h"
#include "mirror/receiver_record.h"

namespace drover::cli {

namespace {

constexpr int kInput = 0;
constexpr int kOutput = 1;
constexpr int kErrors = 2;
// A thousand paths of the longest kind are less.
constexpr std::size_t kLongestRequest = std::size_t{8} << 20;

Result<std::string> read_all(int fd) {
  std::string text;
  std::array<char, 65536> piece{};
  for (;;) {
    const ssize_t count = ::read(fd, piece.data(), piece.size());
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return fail_errno(errno, "reading the request from standard input");
    if (count == 0) return text;
    text.append(piece.data(), static_cast<std::size_t>(count));
    if (text.size() > kLongestRequest) {
      return fail(Code::Protocol, "what came on standard input is no request: it is too long");
    }
  }
}

Result<std::string> probe() {
  DROVER_ASSIGN(const std::string request, read_all(kInput));
  DROVER_ASSIGN(std::string answer, memmig::answer_probe(request));
  if (answer.empty() || answer.back() != '\n') answer += '\n';
  return answer;
}

Result<std::string> clean_up(const ReceiveCommand& command) {
  DROVER_ASSIGN(const mirror::CleanupReport report,
                mirror::cleanup_receiver(mirror::RunReceiverOptions{}.jobs_directory, command.job,
                                         command.kept));
  std::string out;
  for (const std::string& path : report.removed) out += "removed " + printable(path) + "\n";
  for (const std::string& path : report.kept) out += "kept " + printable(path) + "\n";
  return out;
}

Result<std::string> stop(const ReceiveCommand& command) {
  DROVER_TRY(mirror::stop_receiver(mirror::RunReceiverOptions{}.jobs_directory, command.job));
  return std::string();
}

Result<std::string> carry_out(const ReceiveCommand& command) {
  switch (command.mode) {
    case ReceiveCommand::Mode::Probe: return probe();
    case ReceiveCommand::Mode::Cleanup: return clean_up(command);
    case ReceiveCommand::Mode::Stop: return stop(command);
    case ReceiveCommand::Mode::Serve: break;
  }
  return std::string();
}

}  // namespace

int receive(const ReceiveCommand& command) {
  if (command.mode == ReceiveCommand::Mode::Serve) return mirror::run_receiver({});
  const Result<std::string> answer = carry_out(command);
  if (!answer) {
    write_all(kErrors, render_error(answer.error(), Style()));
    return exit_code(answer.error().code);
  }
  return write_all(kOutput, *answer) ? kExitOk : kExitFailed;
}

}  // namespace drover::cli
