// SPDX-License-Identifier: Apache-2.0
#include "job/evacuate_items.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>

namespace drover::job {

using memmig::FilePlace;
using memmig::FileUse;
using Kind = FileUse::Kind;

// What `drover relocate` would say of the guest's disk.
std::string called(const FileUse& use) {
  switch (use.kind) {
    case Kind::Disk:
    case Kind::Backing: return fmt::format("disk {} of guest {}", use.disk, use.guest);
    case Kind::Medium:
    case Kind::Floppy: return fmt::format("drive {} of guest {}", use.disk, use.guest);
    case Kind::Nvram:
    case Kind::Other:
    case Kind::Remembered: return fmt::format("the {} of guest {}", use.disk, use.guest);
  }
  return use.guest;
}

Scope::Scope(const memmig::Storage& storage, memmig::LookAtPlace look)
    : storage_(storage),
      look_(std::move(look)),
      whole_(storage.whole_mount && storage.directory == storage.mount_point) {}

bool Scope::has(const FilePlace& place) const {
  return place.filesystem == storage_.filesystem && (whole_ || within(place.path));
}

bool Scope::has_name(const std::string& path) const {
  const auto parent = look_(path.substr(0, path.rfind('/') + 1));
  return parent && has(*parent);
}

bool Scope::within(const std::string& path) const {
  return path == storage_.directory || path.starts_with(storage_.directory + "/");
}

void add_use(UsedFiles& used, const Scope& scope, const FilePlace& place, FileUse use) {
  const auto [found, fresh] = used.try_emplace({place.device, place.inode});
  UsedFile& file = found->second;
  if (fresh || (!scope.has(file.place) && scope.has(place))) file.place = place;
  file.uses.push_back(std::move(use));
}

EvacuateItem named_elsewhere(const UsedFile& file, const std::string& path) {
  EvacuateItem out;
  out.kind = EvacuateKind::Medium;
  out.path = path;
  out.bytes = file.place.allocated;
  const FileUse& use = file.uses.front();
  out.users.push_back({use.guest, use.uuid, use.disk, use.running});
  out.stays = fmt::format("it is {}, which names it as {}", called(use), use.path);
  return out;
}

namespace {

// One file that guests use, on its way to be an item of the plan.
class Classifier {
 public:
  Classifier(const UsedFiles& used, const Scope& scope,
             const std::function<bool(const std::string&)>& is_link)
      : used_(used), scope_(scope), is_link_(is_link) {}

  std::optional<EvacuateItem> item(const UsedFile& file, std::vector<std::string>& notes) {
    UsedFile named{file.place, {}};  // by definitions
    const FileUse* remembers = nullptr;
    for (const FileUse& use : file.uses) {
      if (use.kind == Kind::Remembered) {
        remembers = &use;
      } else {
        named.uses.push_back(use);
      }
    }
    if (named.uses.empty()) return only_remembered(file);
    auto out = by_definitions(named, notes);
    // Relocation has its own word on what its guest remembers.
    const bool disk = named.uses.front().kind == Kind::Disk && remembers != nullptr &&
                      remembers->uuid == named.uses.front().uuid;
    if (out && out->stays.empty() && remembers != nullptr && !disk) {
      out->stays = called(*remembers) + " names it";
    }
    return out;
  }

 private:
  static EvacuateItem only_remembered(const UsedFile& file) {
    EvacuateItem out;
    out.kind = EvacuateKind::Medium;
    out.path = file.place.path;
    out.bytes = file.place.allocated;
    const FileUse& use = file.uses.front();
    out.users.push_back({use.guest, use.uuid, use.disk, use.running});
    out.stays = called(use) + " names it";
    return out;
  }

  std::optional<EvacuateItem> by_definitions(const UsedFile& file,
                                             std::vector<std::string>& notes) {
    EvacuateItem out;
    out.path = file.place.path;
    out.bytes = file.place.allocated;
    std::set<Kind> kinds;
    for (const FileUse& use : file.uses) {
      kinds.insert(use.kind);
      const EvacuateItem::User user{
          use.guest, use.uuid, use.kind == Kind::Nvram ? std::string() : use.disk, use.running};
      if (std::ranges::find(out.users, user) == out.users.end()) out.users.push_back(user);
    }
    if (kinds.size() > 1) {
      out.stays = fmt::format("it is used as {} and as {}", called(file.uses.front()),
                              called(*std::ranges::find_if(file.uses, [&](const FileUse& use) {
                                return use.kind != file.uses.front().kind;
                              })));
      return out;
    }
    switch (*kinds.begin()) {
      case Kind::Disk: disk(file, out); break;
      case Kind::Backing: return backing(file, std::move(out), notes);
      case Kind::Medium: medium(file, out); break;
      case Kind::Nvram: nvram(file, out); break;
      case Kind::Floppy:
        out.kind = EvacuateKind::Medium;
        out.stays = called(file.uses.front()) + " is a floppy: take it out or move it by hand";
        break;
      case Kind::Other:
      case Kind::Remembered:
        out.stays = fmt::format("it is {}: drover does not move that", called(file.uses.front()));
        break;
    }
    return out;
  }

  void disk(const UsedFile& file, EvacuateItem& out) const {
    const FileUse& first = file.uses.front();
    if (out.users.size() > 1) {
      const auto& other = out.users.back();
      out.stays = fmt::format("{} and disk {} of guest {} are the same file", called(first),
                              other.disk, other.guest);
      return;
    }
    for (const FileUse& use : file.uses) {
      if (is_link_(use.path)) out.stays = by_link(use);  // which relocation would change, not it
      if (!use.stays.empty()) out.stays = fmt::format("{} {}", called(use), use.stays);
    }
    const bool attached = !first.running || std::ranges::any_of(file.uses, [](const FileUse& use) {
      return use.live;
    });
    if (!attached) {
      out.stays = fmt::format(
          "{} is in its definition, but not attached: shut the guest down and run the same command "
          "again",
          called(first));
    }
    // Its copy is one image with the content of all.
    std::set<FileKey> counted;
    for (const auto& [key, below] : used_) {
      for (const FileUse& use : below.uses) {
        const bool its = use.kind == Kind::Backing && use.uuid == first.uuid &&
                         use.disk == first.disk && counted.insert(key).second;
        if (its) out.bytes += below.place.allocated;
      }
    }
  }

  // Relocation gives the disk above an image of its own; then nobody needs this one.
  std::optional<EvacuateItem> backing(const UsedFile& file, EvacuateItem out,
                                      std::vector<std::string>& notes) const {
    for (const FileUse& use : file.uses) {
      const bool leaves = std::ranges::any_of(used_, [&](const auto& one) {
        return scope_.has(one.second.place) &&
               std::ranges::any_of(one.second.uses, [&](const FileUse& top) {
                 return top.kind == Kind::Disk && top.uuid == use.uuid && top.disk == use.disk;
               });
      });
      if (leaves) continue;
      out.stays = fmt::format(
          "it is below {}, which is on another storage: 'drover relocate' makes that one image",
          called(use));
      return out;
    }
    notes.push_back(
        fmt::format("{} is below {}, which becomes one image with the content of all: it is left "
                    "alone",
                    out.path, called(file.uses.front())));
    return std::nullopt;
  }

  static std::string by_link(const FileUse& use) {
    return fmt::format("guest {} names it by a symbolic link, {}", use.guest, use.path);
  }

  void remembered(const UsedFile& file, EvacuateItem& out) const {
    for (const FileUse& use : file.uses) {
      if (!use.remembered.empty()) {
        out.stays =
            fmt::format("guest {} has {}, which would go on to name it", use.guest, use.remembered);
      } else if (is_link_(use.path)) {
        out.stays = by_link(use);
      }
    }
  }

  void medium(const UsedFile& file, EvacuateItem& out) const {
    out.kind = EvacuateKind::Medium;
    remembered(file, out);
  }

  void nvram(const UsedFile& file, EvacuateItem& out) const {
    out.kind = EvacuateKind::Nvram;
    remembered(file, out);
    const FileUse& first = file.uses.front();
    if (out.users.size() > 1) {
      out.stays = fmt::format("guests {} and {} both have it as their NVRAM", first.guest,
                              out.users.back().guest);
    } else if (first.running) {
      out.stays = fmt::format(
          "guest {} runs with it: shut the guest down and run the same command again", first.guest);
    }
  }

  const UsedFiles& used_;
  const Scope& scope_;
  const std::function<bool(const std::string&)>& is_link_;
};

}  // namespace

std::optional<EvacuateItem> evacuate_item(const UsedFile& file, const UsedFiles& used,
                                          const Scope& scope,
                                          const std::function<bool(const std::string&)>& is_link,
                                          std::vector<std::string>& notes) {
  return Classifier(used, scope, is_link).item(file, notes);
}

}  // namespace drover::job
