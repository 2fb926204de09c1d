// SPDX-License-Identifier: Apache-2.0
#include "memmig/image_chain.h"

#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "base/log.h"
#include "base/subprocess.h"
#include "memmig/libvirt_support.h"

namespace drover::memmig {

Result<ImageLayout> look_at_image(const std::string& path, const std::string& format) {
  DROVER_ASSIGN(const ProcessResult info,
                run_process({"qemu-img", "info", "--force-share", "--backing-chain",
                             "--output=json", "-f", format, "--", path}));
  if (info.exit_code != 0) return fail(Code::Io, "reading the image " + path + ": " + info.err);
  const auto chain = nlohmann::json::parse(info.out, nullptr, false);
  if (!chain.is_array() || chain.empty()) {
    return fail(Code::Internal, "qemu-img's answer makes no sense");
  }
  ImageLayout out;
  out.virtual_size = Length(number_of(chain[0], "virtual-size"));
  out.cluster_size = format == "qcow2" ? Length(number_of(chain[0], "cluster-size")) : Length();
  for (const auto& image : chain) {
    out.allocation += Length(number_of(image, "actual-size"));
    if (bool_of(image, "encrypted")) out.encrypted = true;
    if (&image != &chain[0]) out.backing.push_back(string_of(image, "filename"));
  }
  return out;
}

void complete_chains(std::vector<ImageUse>& uses) {
  std::set<std::string> asked;
  std::vector<ImageUse> below;
  for (const ImageUse& use : uses) {
    if (use.running || use.format.empty() || use.format == "raw") continue;
    if (!asked.insert(use.path).second) continue;
    const auto layout = look_at_image(use.path, use.format);
    if (!layout) {
      log_debug("{}", layout.error().to_string());
      continue;
    }
    for (const std::string& file : layout->backing) {
      ImageUse link = use;
      link.path = file;
      link.format.clear();
      link.backing = true;
      below.push_back(std::move(link));
    }
  }
  uses.insert(uses.end(), std::make_move_iterator(below.begin()),
              std::make_move_iterator(below.end()));
}

}  // namespace drover::memmig
