// SPDX-License-Identifier: Apache-2.0
//
// What a DiskHost of libvirt's does (memmig/disk_host.h): functions on its handles, for
// memmig/libvirt_hypervisor.cc. Internal to memmig.
//
// Threads: any; they block.
#pragma once

#include <libvirt/libvirt.h>

#include <string>
#include <vector>

#include "base/result.h"
#include "memmig/disk_host.h"

namespace drover::memmig {

// The disk of a copy job of libvirt's, by the job's name in QEMU ("copy-vda-libvirt-2-format");
// empty: it is none.
std::string disk_of_copy_job(std::string_view job);

// Adds to each disk what the live definition and libvirt say of its copy.
void look_at_copies(virDomainPtr domain, const std::string& live, GuestPlaces& places);

Status start_block_copy(virDomainPtr domain, const DiskCopySpec& spec);
Status set_block_copy_bandwidth(virDomainPtr domain, const std::string& disk, Length per_second);
Status pivot_block_copy(virDomainPtr domain, const std::string& disk);
Status abort_block_copy(virDomainPtr domain, const std::string& disk);
// The nodes of that image that libvirt does not know, those first that stand on others.
Result<std::vector<std::string>> stray_nodes(virDomainPtr domain, const std::string& live,
                                             const std::string& path);
Status flush_block_node(virDomainPtr domain, const std::string& disk);
Status point_persistent_disks(virDomainPtr domain, const std::vector<TargetDisk>& disks);

Result<std::vector<ImageUse>> images_of_guests(virConnectPtr connection);
std::vector<ImageUse> backing_files_of_volumes(virConnectPtr connection);

Result<std::string> directory_of_pool(virConnectPtr connection, const std::string& pool);
void refresh_pools_with(virConnectPtr connection, const std::vector<std::string>& paths);

}  // namespace drover::memmig
