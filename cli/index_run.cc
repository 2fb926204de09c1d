// SPDX-License-Identifier: Apache-2.0
#include "cli/index_run.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "base/clock.h"
#include "base/priority.h"
#include "cli/exit_codes.h"
#include "cli/json_events.h"
#include "cli/output.h"
#include "cli/render.h"
#include "cli/text.h"
#include "mirror/content_index.h"

namespace drover::cli {

namespace {

using Json = nlohmann::ordered_json;
using mirror::IndexedImage;
using mirror::IndexWriter;

// Of a directory: what is smaller is no disk.
constexpr std::uintmax_t kSmallestImage = std::uintmax_t{1} << 20;
constexpr std::chrono::milliseconds kRedraw{250};

std::string line_of(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
}

class Indexing {
 public:
  Indexing(const IndexCommand& command, const Surroundings& surroundings)
      : command_(command),
        directory_(surroundings.index_directory),
        terminal_(!command.json && ::isatty(surroundings.out) == 1),
        output_({.out = surroundings.out, .err = surroundings.err, .redraw = terminal_}) {}

  int run() {
    const Status done = command_.list ? list() : change();
    if (!done) failed(done.error());
    output_.finish();
    return exit_;
  }

 private:
  Status list() {
    auto index = mirror::IndexReader::open(directory_);
    if (!index && index.error().code == Code::NotFound) {
      if (!command_.json) output_.out("there is no content index on this host\n");
      return {};
    }
    if (!index) return fail(index.error());
    for (const IndexedImage& image : (*index)->images()) tell(image.path, "known", &image);
    if ((*index)->images().empty() && !command_.json) output_.out("no image is in the index\n");
    return {};
  }

  Status change() {
    stay_behind();
    DROVER_ASSIGN(index_, IndexWriter::open(directory_));
    for (const std::string& path : command_.remove) {
      DROVER_ASSIGN(const bool removed, index_->remove(path));
      tell(path, removed ? "removed" : "not in it", nullptr);
    }
    DROVER_ASSIGN(const auto missing, index_->remove_missing());
    for (const std::string& path : missing) tell(path, "gone", nullptr);
    for (const std::string& path : command_.paths) add(path);
    return index_->finish();
  }

  void add(const std::string& path) {
    std::error_code error;
    if (!std::filesystem::is_directory(path, error)) return add_image(path);
    std::vector<std::string> files;
    for (std::filesystem::directory_iterator at(path, error), end; !error && at != end;
         at.increment(error)) {
      std::error_code ignored;
      const bool hidden = at->path().filename().string().starts_with(".");
      if (!hidden && at->is_regular_file(ignored) && at->file_size(ignored) >= kSmallestImage) {
        files.push_back(at->path().string());
      }
    }
    if (error) return failed(error_from_errno(error.value(), "reading the directory " + path));
    std::ranges::sort(files);
    for (const std::string& file : files) add_image(file);
  }

  void add_image(const std::string& path) {
    IndexWriter::AddOptions options;
    if (terminal_) {
      options.progress = [&](const IndexWriter::Progress& progress) {
        if (now() < next_drawing_) return;
        next_drawing_ = now() + kRedraw;
        output_.status(fmt::format("reading {}: {} of {}", printable(path),
                                   format_length(progress.done), format_length(progress.size)));
      };
    }
    const auto added = index_->add(path, options);
    if (!added) return failed(added.error());
    std::error_code error;
    const std::string real = std::filesystem::canonical(path, error).string();
    const auto image = std::ranges::find(index_->images(), real, &IndexedImage::path);
    tell(path, *added ? "read" : "unchanged", image != index_->images().end() ? &*image : nullptr);
  }

  // `image` null: it is not in the index (any more).
  void tell(const std::string& path, const std::string& what, const IndexedImage* image) {
    if (command_.json) {
      Json json = {{"event", "image"}, {"path", path}, {"state", what}};
      if (image != nullptr) {
        json["size_bytes"] = image->size.bytes();
        json["pieces"] = image->pieces;
      }
      return output_.out(line_of(json));
    }
    std::string line = fmt::format("{}: {}", printable(path), what);
    if (image != nullptr) {
      line += fmt::format(", {} of data", format_length(mirror::kPiece * image->pieces));
    }
    output_.out(line + "\n");
  }

  void failed(const Error& error) {
    exit_ = exit_code(error.code);
    if (command_.json) return output_.out(json_error(error) + "\n");
    output_.err(render_error(error, Style()));
  }

  const IndexCommand& command_;
  const std::string directory_;
  const bool terminal_;
  Output output_;
  std::unique_ptr<IndexWriter> index_;
  Instant next_drawing_{};
  int exit_ = kExitOk;
};

}  // namespace

int run_index(const IndexCommand& command, const Surroundings& surroundings) {
  return Indexing(command, surroundings).run();
}

}  // namespace drover::cli
