// SPDX-License-Identifier: Apache-2.0
//
// The server on its loop and socket, with a pool of small buffers: whatever a client says, in
// pieces of any size, the server hands on what the bare session would (given all at once), keeps
// payloads untouched for as long as they are held, and lets go of every buffer.
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "base/buffer.h"
#include "base/loop.h"
#include "base/unique_fd.h"
#include "mirror/nbd_server.h"
#include "tests/fuzz/nbd_conversation.h"

namespace drover::mirror {
namespace {

// One for the process: nothing of it depends on the input.
struct Place {
  Place() {
    CHECK(::mkdtemp(directory.data()) != nullptr, "a temporary directory can be made");
    path = directory + "/s";
    auto made = Loop::create();
    CHECK(made.has_value(), "a loop can be made");
    loop = std::move(*made);
  }
  Place(const Place&) = delete;
  Place& operator=(const Place&) = delete;
  ~Place() { ::rmdir(directory.c_str()); }

  std::string directory = "/tmp/drover-fuzz-XXXXXX";
  std::string path;
  std::unique_ptr<Loop> loop;
};

class Run {
 public:
  Run(Place& place, const FuzzInput& input)
      : loop_(*place.loop),
        options_(input.options),
        hold_((input.choice & 2) != 0),
        random_(input.options.pace),
        buffers_(2 + input.choice / 4 % 8),
        pool_(options_.session.max_payload, buffers_) {
    pool_.on_available([this] {
      loop_.post([this] {
        if (server_) server_->buffers_available();
      });
    });
    auto server =
        NbdServer::listen(loop_, pool_,
                          {.socket_path = place.path,
                           .export_name = options_.session.export_name,
                           .size = options_.session.size,
                           .max_in_flight = options_.session.max_in_flight},
                          {.request = [this](NbdRequest request) { take(std::move(request)); }});
    CHECK(server.has_value(), "the server can be made");
    server_ = std::move(*server);
    client_ = UniqueFd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::strncpy(address.sun_path, place.path.c_str(), sizeof address.sun_path - 1);
    CHECK(
        ::connect(client_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0,
        "the server listens");
  }
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;
  ~Run() {
    held_.clear();
    server_.reset();
    // What the server had under way comes back; the pool's destructor checks that its buffer did.
    client_.reset();
    while (saying_ || pool_.available() < buffers_) {
      loop_.post([this] { loop_.stop(); });
      loop_.run();
    }
  }

  // Says everything, hears everything, until the server closes.
  Conversation talk(std::span<const std::byte> client) {
    unsaid_ = client;
    say();
    hear();
    loop_.run();
    return std::move(result_);
  }

 private:
  void say() {
    if (unsaid_.empty()) {
      ::shutdown(client_.get(), SHUT_WR);
      return;
    }
    const std::size_t piece =
        1 + random_.below(std::min<std::size_t>(unsaid_.size(), random_.one_in(3) ? 40 : 9000));
    saying_ = true;
    loop_.send(client_.get(), unsaid_.first(piece), [this](int sent) {
      saying_ = false;
      if (sent <= 0) return;  // the server has closed: hear() sees it too
      unsaid_ = unsaid_.subspan(static_cast<std::size_t>(sent));
      say();
    });
  }

  void hear() {
    loop_.receive(client_.get(), heard_, [this](int got) {
      if (got <= 0) {
        loop_.stop();
        return;
      }
      result_.output.insert(result_.output.end(), heard_, heard_ + got);
      hear();
    });
  }

  void take(NbdRequest request) {
    check_request(request, options_.session);
    result_.requests.push_back(
        {request.kind, request.extent, Bytes(request.payload.begin(), request.payload.end())});
    if (!hold_) {
      const std::uint64_t id = request.id;
      request = {};
      server_->complete(id, 0);
      return;
    }
    held_.push_back({result_.requests.size() - 1, std::move(request)});
    loop_.post([this] { answer_some(); });
  }

  void answer_some() {
    while (!held_.empty()) {
      const std::size_t nth = random_.below(held_.size());
      Held held = std::move(held_[nth]);
      held_.erase(held_.begin() + static_cast<std::ptrdiff_t>(nth));
      const Bytes& arrived = result_.requests.at(held.number).payload;
      CHECK(std::equal(arrived.begin(), arrived.end(), held.request.payload.begin(),
                       held.request.payload.end()),
            "a payload does not change while it is held");
      const std::uint64_t id = held.request.id;
      held.request = {};
      server_->complete(id, 0);
      if (random_.one_in(2)) break;
    }
    if (!held_.empty()) loop_.post([this] { answer_some(); });
  }

  struct Held {
    std::size_t number;
    NbdRequest request;
  };

  Loop& loop_;
  const ConversationOptions options_;
  const bool hold_;
  Random random_;
  const std::size_t buffers_;
  BufferPool pool_;
  std::unique_ptr<NbdServer> server_;
  UniqueFd client_;
  std::span<const std::byte> unsaid_;
  bool saying_ = false;
  std::byte heard_[4096];
  std::vector<Held> held_;
  Conversation result_;
};

}  // namespace
}  // namespace drover::mirror

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace drover::mirror;
  static Place place;
  FuzzInput input = read_input(data, size);
  Bytes client = handshake((input.choice & 1) != 0);
  client.insert(client.end(), input.client.begin(), input.client.end());

  ConversationOptions bare = input.options;
  bare.pace = 0;
  const Conversation expected = converse(bare, client);
  const Conversation seen = Run(place, input).talk(client);
  CHECK(seen.requests == expected.requests, "the server hands on what the session says");
  // Answers may be lost when the server closes first, and held requests are answered in any order.
  CHECK(seen.output.size() <= expected.output.size(), "the server says no more than the session");
  return 0;
}
