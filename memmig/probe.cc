// SPDX-License-Identifier: Apache-2.0
#include "memmig/probe.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <grp.h>
#include <linux/fs.h>
#include <net/if.h>
#include <pwd.h>
#include <sys/fsuid.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <climits>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string_view>
#include <thread>

#include "base/unique_fd.h"

namespace drover::memmig {
namespace {

using nlohmann::json;

constexpr const char* kQemuConf = "/etc/libvirt/qemu.conf";
constexpr std::size_t kMaxRequest = std::size_t{8} << 20;

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// ---- QEMU's user --------------------------------------------------------------------------------

struct User {
  std::string name;
  uid_t uid = 0;
  gid_t gid = 0;
};

// libvirt's rule: user = "NAME", "+UID" or "UID"; without it what the distribution built in.
User qemu_user() {
  std::string name;
  std::ifstream file(kQemuConf);
  for (std::string line; std::getline(file, line);) {
    const auto start = line.find_first_not_of(" \t");
    if (start == std::string::npos || line.compare(start, 4, "user") != 0) continue;
    const auto equals = line.find_first_not_of(" \t", start + 4);
    if (equals == std::string::npos || line[equals] != '=') continue;
    const auto open = line.find('"', equals);
    const auto close = open == std::string::npos ? open : line.find('"', open + 1);
    if (close != std::string::npos) name = line.substr(open + 1, close - open - 1);
  }
  std::vector<std::string> names;
  if (!name.empty()) {
    names = {name};
  } else {
    names = {"libvirt-qemu", "qemu", "root"};
  }
  for (const std::string& candidate : names) {
    std::array<char, 4096> buffer{};
    struct passwd entry {};
    struct passwd* found = nullptr;
    if (::getpwnam_r(candidate.c_str(), &entry, buffer.data(), buffer.size(), &found) == 0 &&
        found != nullptr) {
      return {candidate, entry.pw_uid, entry.pw_gid};
    }
    const char* digits = candidate.c_str() + (candidate.starts_with('+') ? 1 : 0);
    uid_t uid = 0;
    const char* end = digits + std::strlen(digits);
    if (const auto [stop, error] = std::from_chars(digits, end, uid);
        error == std::errc() && stop == end && digits != end) {
      return {candidate, uid, 0};
    }
  }
  return {"root", 0, 0};
}

// The first directory on the way to `directory` that `user` may not enter, or empty. Asked of the
// kernel, in a thread that becomes that user for file access: it knows access lists too.
std::string first_closed(const std::string& directory, const User& user) {
  if (user.uid == 0) return {};
  std::string closed;
  std::thread([&] {
    const gid_t group = user.gid;
    if (::syscall(SYS_setgroups, 1, &group) != 0) return;
    ::setfsgid(user.gid);
    ::setfsuid(user.uid);
    for (std::size_t slash = 0; slash != std::string::npos && closed.empty();) {
      slash = directory.find('/', slash + 1);
      const std::string step = directory.substr(0, slash);
      // "/." makes it need the right to enter, not only to see.
      const UniqueFd fd(::open((step + "/.").c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
      if (fd.get() < 0 && errno == EACCES) closed = step;
    }
  }).join();
  return closed;
}

// ---- one path -----------------------------------------------------------------------------------

std::string directory_of(const std::string& path) {
  const auto slash = path.rfind('/');
  return slash == 0 ? "/" : path.substr(0, slash);
}

bool takes_direct_io(const std::string& directory) {
  // A file without a name, gone when it is closed.
  const UniqueFd plain(::open(directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
  if (plain.get() < 0) return true;  // cannot be tried
  const UniqueFd direct(::open(directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC | O_DIRECT, 0600));
  return direct.get() >= 0 || errno != EINVAL;
}

void look_at_directory(const User& user, PathFacts& facts) {
  const std::string directory = directory_of(facts.path);
  struct stat status {};
  if (::stat(directory.c_str(), &status) != 0) {
    if (errno != ENOENT && errno != ENOTDIR) {
      facts.problem = fmt::format("{}: {}", directory, std::strerror(errno));
    }
    return;
  }
  if (!S_ISDIR(status.st_mode)) return;
  facts.directory_exists = true;
  facts.filesystem = status.st_dev;
  facts.directory_writable = ::access(directory.c_str(), W_OK | X_OK) == 0;
  if (!facts.directory_writable && errno == EROFS) facts.read_only_filesystem = true;
  struct statvfs space {};
  if (::statvfs(directory.c_str(), &space) == 0) {
    facts.free = Length(static_cast<std::uint64_t>(space.f_bavail) * space.f_frsize);
    if ((space.f_flag & ST_RDONLY) != 0) facts.read_only_filesystem = true;
  }
  if (facts.directory_writable) facts.direct_io = takes_direct_io(directory);
  std::array<char, PATH_MAX> real{};
  if (::realpath(directory.c_str(), real.data()) != nullptr) {
    facts.unreachable_for_qemu = first_closed(real.data(), user);
  }
}

PathFacts look_at(const std::string& path, const User& user) {
  PathFacts facts;
  facts.path = path;
  if (!path.starts_with('/') || path.size() >= PATH_MAX || path.find('\0') != std::string::npos) {
    facts.problem = "not an absolute path";
    return facts;
  }
  look_at_directory(user, facts);
  struct stat status {};
  if (::lstat(path.c_str(), &status) != 0) return facts;
  facts.exists = true;
  facts.kind = PathFacts::Kind::Other;  // a link to nothing is something, too
  if (::stat(path.c_str(), &status) != 0) return facts;
  if (S_ISREG(status.st_mode)) {
    facts.kind = PathFacts::Kind::File;
    facts.size = Length(static_cast<std::uint64_t>(status.st_size));
  } else if (S_ISDIR(status.st_mode)) {
    facts.kind = PathFacts::Kind::Directory;
  } else if (S_ISBLK(status.st_mode)) {
    facts.kind = PathFacts::Kind::Block;
    facts.device = status.st_rdev;
    // On a block device O_EXCL fails if anything in the kernel uses it (open(2)).
    UniqueFd fd(::open(path.c_str(), O_RDONLY | O_EXCL | O_NONBLOCK | O_CLOEXEC));
    if (fd.get() < 0 && errno == EBUSY) {
      facts.in_use = true;
      fd = UniqueFd(::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC));
    }
    std::uint64_t bytes = 0;
    if (fd.get() < 0) {
      facts.problem = fmt::format("{}: {}", path, std::strerror(errno));
    } else if (::ioctl(fd.get(), BLKGETSIZE64, &bytes) == 0) {
      facts.size = Length(bytes);
    }
  }
  return facts;
}

bool program_exists(const std::string& name) {
  const char* variable = std::getenv("PATH");
  std::string path = variable == nullptr ? "" : variable;
  path += ":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
  for (std::size_t start = 0; start <= path.size();) {
    const auto end = std::min(path.find(':', start), path.size());
    std::string program = path.substr(start, end - start);
    if (!program.empty() && ::access(program.append("/").append(name).c_str(), X_OK) == 0)
      return true;
    start = end + 1;
  }
  return false;
}

// ---- JSON ---------------------------------------------------------------------------------------

constexpr std::array<const char*, 5> kKinds = {"nothing", "file", "block", "directory", "other"};

// Reads fields of an object that a peer sent; remembers whether anything was wrong.
class Reader {
 public:
  explicit Reader(const json& object) : object_(object) { ok = object.is_object(); }
  template <class T>
  void read(const char* name, T& value) {
    if (!ok) return;
    const auto found = object_.find(name);
    if (found == object_.end()) return;  // of another version: keeps its default
    if constexpr (std::is_same_v<T, bool>) {
      if (found->is_boolean())
        value = found->get<bool>();
      else
        ok = false;
    } else if constexpr (std::is_same_v<T, std::string>) {
      if (found->is_string())
        value = found->get<std::string>();
      else
        ok = false;
    } else if constexpr (std::is_same_v<T, Length>) {
      if (found->is_number_unsigned())
        value = Length(found->get<std::uint64_t>());
      else
        ok = false;
    } else if constexpr (std::is_same_v<T, std::vector<std::string>>) {
      if (!found->is_array()) {
        ok = false;
        return;
      }
      for (const json& entry : *found) {
        if (entry.is_string())
          value.push_back(entry.get<std::string>());
        else
          ok = false;
      }
    } else {
      if (found->is_number_unsigned())
        value = found->get<T>();
      else
        ok = false;
    }
  }
  bool ok = true;

 private:
  const json& object_;
};

json to_object(const PathFacts& facts) {
  return {{"path", facts.path},
          {"exists", facts.exists},
          {"kind", kKinds.at(static_cast<std::size_t>(facts.kind))},
          {"size", facts.size.bytes()},
          {"in-use", facts.in_use},
          {"directory-exists", facts.directory_exists},
          {"directory-writable", facts.directory_writable},
          {"read-only-filesystem", facts.read_only_filesystem},
          {"unreachable-for-qemu", facts.unreachable_for_qemu},
          {"direct-io", facts.direct_io},
          {"free", facts.free.bytes()},
          {"filesystem", facts.filesystem},
          {"device", facts.device},
          {"problem", facts.problem}};
}

std::string text_of(const json& object) {
  return object.dump(-1, ' ', false, json::error_handler_t::replace);
}

}  // namespace

const PathFacts* ProbeAnswer::path(const std::string& wanted) const {
  const auto found = std::find_if(paths.begin(), paths.end(),
                                  [&](const PathFacts& facts) { return facts.path == wanted; });
  return found == paths.end() ? nullptr : &*found;
}

std::string to_json(const ProbeRequest& request) {
  return text_of({{"paths", request.paths},
                  {"interfaces", request.interfaces},
                  {"programs", request.programs}});
}

Result<ProbeAnswer> parse_probe_answer(const std::string& text) {
  json object;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line) && !object.contains("drover-version");) {
    object = json::parse(line, nullptr, false);
  }
  Reader reader(object);
  ProbeAnswer answer;
  reader.read("drover-version", answer.drover_version);
  reader.read("hostname", answer.hostname);
  reader.read("machine-id", answer.machine_id);
  reader.read("host-id", answer.host_id);
  reader.read("cores", answer.cores);
  reader.read("qemu-user", answer.qemu_user);
  reader.read("interfaces-missing", answer.interfaces_missing);
  reader.read("programs-missing", answer.programs_missing);
  bool ok = reader.ok && !answer.drover_version.empty();
  if (ok && object.contains("paths")) {
    const json& paths = object["paths"];
    ok = paths.is_array() && paths.size() <= kMaxProbePaths;
    if (ok) {
      for (const json& entry : paths) {
        Reader path(entry);
        PathFacts facts;
        std::string kind;
        path.read("path", facts.path);
        path.read("exists", facts.exists);
        path.read("kind", kind);
        path.read("size", facts.size);
        path.read("in-use", facts.in_use);
        path.read("directory-exists", facts.directory_exists);
        path.read("directory-writable", facts.directory_writable);
        path.read("read-only-filesystem", facts.read_only_filesystem);
        path.read("unreachable-for-qemu", facts.unreachable_for_qemu);
        path.read("direct-io", facts.direct_io);
        path.read("free", facts.free);
        path.read("filesystem", facts.filesystem);
        path.read("device", facts.device);
        path.read("problem", facts.problem);
        facts.kind = facts.exists ? PathFacts::Kind::Other : PathFacts::Kind::Nothing;
        for (std::size_t i = 0; i < kKinds.size(); ++i) {
          if (kind == kKinds.at(i)) facts.kind = static_cast<PathFacts::Kind>(i);
        }
        ok = ok && path.ok;
        answer.paths.push_back(std::move(facts));
      }
    }
  }
  if (!ok) {
    return fail(Code::Protocol, "what drover on the target answers to the probe makes no sense",
                "is the same version of drover installed there?");
  }
  return answer;
}

Result<ProbeAnswer> probe_here(const ProbeRequest& request) {
  if (request.paths.size() > kMaxProbePaths) {
    return fail(Code::InvalidArgument, fmt::format("a probe of {} paths; {} are allowed",
                                                   request.paths.size(), kMaxProbePaths));
  }
  ProbeAnswer answer;
  answer.drover_version = DROVER_VERSION;
  std::array<char, HOST_NAME_MAX + 1> hostname{};
  if (::gethostname(hostname.data(), hostname.size() - 1) == 0) answer.hostname = hostname.data();
  answer.machine_id = first_line("/etc/machine-id");
  struct stat space {};
  if (::stat("/proc/self/ns/pid", &space) == 0) {
    answer.host_id =
        fmt::format("{}/{}", first_line("/proc/sys/kernel/random/boot_id"), space.st_ino);
  }
  answer.cores = std::thread::hardware_concurrency();
  const User user = qemu_user();
  answer.qemu_user = user.name;
  for (const std::string& path : request.paths) answer.paths.push_back(look_at(path, user));
  for (const std::string& name : request.interfaces) {
    if (::if_nametoindex(name.c_str()) == 0) answer.interfaces_missing.push_back(name);
  }
  for (const std::string& name : request.programs) {
    if (name.find('/') != std::string::npos || !program_exists(name)) {
      answer.programs_missing.push_back(name);
    }
  }
  return answer;
}

Result<std::string> answer_probe(const std::string& text) {
  if (text.size() > kMaxRequest) {
    return fail(Code::InvalidArgument, "the probe's request is too large");
  }
  const json object = json::parse(text, nullptr, false);
  Reader reader(object);
  ProbeRequest request;
  reader.read("paths", request.paths);
  reader.read("interfaces", request.interfaces);
  reader.read("programs", request.programs);
  if (!reader.ok) return fail(Code::InvalidArgument, "the probe's request makes no sense");
  DROVER_ASSIGN(const ProbeAnswer answer, probe_here(request));
  json paths = json::array();
  for (const PathFacts& facts : answer.paths) paths.push_back(to_object(facts));
  return text_of({{"drover-version", answer.drover_version},
                  {"hostname", answer.hostname},
                  {"machine-id", answer.machine_id},
                  {"host-id", answer.host_id},
                  {"cores", answer.cores},
                  {"qemu-user", answer.qemu_user},
                  {"paths", std::move(paths)},
                  {"interfaces-missing", answer.interfaces_missing},
                  {"programs-missing", answer.programs_missing}});
}

}  // namespace drover::memmig
