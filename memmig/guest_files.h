// SPDX-License-Identifier: Apache-2.0
//
// All files that the guests of this host name, in both of their definitions, and changing the names
// of those that are no disk: the media of CD-ROM drives, the NVRAM of UEFI guests.
//
//   DROVER_ASSIGN(auto files, connect_guest_files("qemu:///system"));
//   DROVER_ASSIGN(std::vector<FileUse> uses, files->uses());
//   DROVER_TRY(files->change_medium(use, "/mnt/b/debian.iso"));
//
// Threads: every method blocks, and may be called from any thread. Errors: Unreachable, Denied,
// NotFound (the guest has gone), Busy (a drive whose tray the guest keeps locked), Io.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/result.h"

namespace drover::memmig {

// One guest's definition names a file.
struct FileUse {
  enum class Kind {
    Disk,
    Backing,  // below a disk's image, as far as the definition says
    Medium,   // in a CD-ROM drive
    Floppy,
    Nvram,
    Other,       // kernel, firmware, ACPI table, persistent memory, a shared directory, ...
    Remembered,  // a snapshot or the saved state names it, whatever the definitions say
  };
  Kind kind = Kind::Disk;
  std::string guest;
  std::string uuid;
  std::string disk;      // "sda"; of the last three what it is: "NVRAM", "kernel", "saved state"
  std::string path;      // of a pool's volume, too
  std::string format;    // of a disk; may be empty
  bool live = false;     // the running guest's definition; else the persistent one
  bool running = false;  // the guest runs, or stands still
  // A disk that relocation does not take ("is shareable"); empty: it does.
  std::string stays;
  // The guest has what remembers its present files: "a saved state", "snapshots"; empty: nothing.
  std::string remembered;
};

class GuestFiles {
 public:
  virtual ~GuestFiles() = default;
  GuestFiles(const GuestFiles&) = delete;
  GuestFiles& operator=(const GuestFiles&) = delete;

  // By guest. A guest that runs and persists is in it with both definitions. An error if that can't
  // be said of all guests: Incompatible for a volume of a pool that is not defined.
  virtual Result<std::vector<FileUse>> uses() = 0;
  // Has that definition's drive hold another file. In a running guest the tray opens and closes:
  // Busy if the guest does not let it.
  virtual Status change_medium(const FileUse& use, const std::string& path) = 0;
  // Has the persistent definition name another NVRAM file. The guest is off.
  virtual Status change_nvram(const FileUse& use, const std::string& path) = 0;

 protected:
  GuestFiles() = default;
};

// A hypervisor on this host. InvalidArgument for another one.
Result<std::unique_ptr<GuestFiles>> connect_guest_files(const std::string& uri);

// ---- pure, on text (memmig/domain_xml.h has the rest) -------------------------------------------

// What one definition names; `guest`, `uuid`, `live` and so on are left to the caller, and volumes
// of pools are left out. InvalidArgument.
Result<std::vector<FileUse>> files_of_definition(const std::string& xml);
// All absolute paths that it has anywhere, whatever they are: of a snapshot or a saved state. By
// name. InvalidArgument: no XML.
Result<std::vector<std::string>> paths_in(const std::string& xml);
// The drive's <disk> element with another file in it, for virDomainUpdateDeviceFlags. NotFound.
Result<std::string> medium_element(const std::string& xml, const std::string& disk,
                                   const std::string& path);
// NotFound: it has no NVRAM file of its own.
Result<std::string> with_nvram(const std::string& xml, const std::string& path);

}  // namespace drover::memmig
