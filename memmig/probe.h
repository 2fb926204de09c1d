// SPDX-License-Identifier: Apache-2.0
//
// What only the target host itself can say before a move: its paths, space, devices, bridges.
// `drover receive --probe` reads a request from standard input and writes the answer to standard
// output, both one JSON object; nothing is changed by it.
//
//   source:  to_json(probe_request(guest, plan)) -> over SSH -> parse_probe_answer(text)
//   target:  DROVER_ASSIGN(std::string answer, answer_probe(standard_input));
//
// Threads: any; answer_probe() blocks on the filesystem.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "base/result.h"
#include "base/units.h"

namespace drover::memmig {

struct ProbeRequest {
  std::vector<std::string> paths;       // anything to be known about; at most kMaxProbePaths
  std::vector<std::string> interfaces;  // bridges and network interfaces
  std::vector<std::string> programs;    // "swtpm"
};
inline constexpr std::size_t kMaxProbePaths = 1000;

struct PathFacts {
  std::string path;
  bool exists = false;
  enum class Kind { Nothing, File, Block, Directory, Other };
  Kind kind = Kind::Nothing;
  Length size;  // of the file or device
  bool in_use =
      false;  // a block device that is mounted, part of something, or held open exclusively
  // Of the directory it is in (links followed):
  bool directory_exists = false;
  bool directory_writable = false;
  bool read_only_filesystem = false;
  std::string
      unreachable_for_qemu;      // the first directory on the way that QEMU's user may not enter
  bool direct_io = true;         // the filesystem takes O_DIRECT
  Length free;                   // of the filesystem, for root
  std::uint64_t filesystem = 0;  // paths with the same number share the free space
  std::uint64_t device = 0;      // Block: its number, to find two names of one device
  std::string problem;           // why it could not be looked at
};

struct ProbeAnswer {
  std::string drover_version;
  std::string hostname;
  std::string machine_id;
  // The same only for processes of one and the same host (boot and process namespace).
  std::string host_id;
  unsigned cores = 0;
  std::string qemu_user;         // as libvirt is configured there
  std::vector<PathFacts> paths;  // in the request's order
  std::vector<std::string> interfaces_missing;
  std::vector<std::string> programs_missing;

  [[nodiscard]] const PathFacts* path(const std::string& path) const;
};

std::string to_json(const ProbeRequest& request);
// Other lines around it are what login scripts print. Protocol: not what drover's probe says.
Result<ProbeAnswer> parse_probe_answer(const std::string& text);

// Looks at this host. InvalidArgument: `request` makes no sense.
Result<ProbeAnswer> probe_here(const ProbeRequest& request);
// The whole of `drover receive --probe`: JSON in, JSON out.
Result<std::string> answer_probe(const std::string& request);

}  // namespace drover::memmig
