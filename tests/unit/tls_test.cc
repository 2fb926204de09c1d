// SPDX-License-Identifier: Apache-2.0
#include "mirror/tls.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "base/random.h"

namespace drover::mirror {
namespace {

using Bytes = std::vector<std::byte>;

LinkKey key_of(int seed) {
  LinkKey key{};
  key.fill(static_cast<std::byte>(seed));
  return key;
}

std::unique_ptr<Tls> make(Tls::Role role, int key = 1, const std::string& identity = "job-1") {
  auto made = Tls::create({.role = role, .identity = identity, .key = key_of(key)});
  EXPECT_TRUE(made.has_value()) << made.error().to_string();
  return std::move(*made);
}

// Brings at most `most` bytes of what one end has for the other over to it. How many.
std::size_t carry(Tls& from, Tls& to, std::size_t most = SIZE_MAX) {
  const auto space = to.input_space();
  const auto output = from.output();
  const std::size_t count = std::min({space.size(), output.size(), most});
  std::copy_n(output.begin(), count, space.begin());
  to.input_received(count);
  from.output_sent(count);
  return count;
}

struct Pair {
  std::unique_ptr<Tls> client = make(Tls::Role::Client);
  std::unique_ptr<Tls> server = make(Tls::Role::Server);

  void connect(std::size_t step = SIZE_MAX) {
    bool client_done = false;
    bool server_done = false;
    for (int i = 0; i < 10000 && !(client_done && server_done); ++i) {
      if (!client_done) client_done = client->handshake().value();
      carry(*client, *server, step);
      if (!server_done) server_done = server->handshake().value();
      carry(*server, *client, step);
    }
    ASSERT_TRUE(client_done && server_done);
  }
};

Bytes random_bytes(Random& random, std::size_t count) {
  Bytes bytes(count);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random.next());
  return bytes;
}

// Sends `data` through in pieces of random sizes; what came out.
Bytes transfer(Tls& from, Tls& to, const Bytes& data, Random& random, std::size_t rekey_every = 0) {
  Bytes out;
  Bytes piece(100000);
  std::size_t written = 0;
  std::size_t next_rekey = rekey_every;
  while (out.size() < data.size()) {
    const std::size_t size = std::min<std::size_t>(data.size() - written, 1 + random.below(70000));
    const auto taken = from.write(std::span(data).subspan(written, size));
    EXPECT_TRUE(taken.has_value());
    if (!taken) return out;
    written += *taken;
    if (written == data.size() || random.one_in(3)) {
      EXPECT_TRUE(from.flush().has_value());
    }
    if (rekey_every > 0 && written >= next_rekey) {
      if (from.rekey()) next_rekey += rekey_every;
    }
    carry(from, to, 1 + random.below(50000));
    const auto read = to.read(std::span(piece).first(1 + random.below(piece.size())));
    EXPECT_TRUE(read.has_value()) << read.error().to_string();
    if (!read) return out;
    out.insert(out.end(), piece.begin(), piece.begin() + static_cast<std::ptrdiff_t>(*read));
  }
  return out;
}

TEST(TlsTest, BytesArriveInOrderWhateverThePieces) {
  Pair pair;
  ASSERT_NO_FATAL_FAILURE(pair.connect());
  Random random(1);
  const Bytes there = random_bytes(random, 5U << 20);
  EXPECT_TRUE(transfer(*pair.client, *pair.server, there, random) == there);
  pair.client->grow_buffers(1U << 18, 1U << 18);
  pair.server->grow_buffers(1U << 18, 1U << 18);
  EXPECT_TRUE(transfer(*pair.server, *pair.client, there, random) == there);
}

TEST(TlsTest, AHandshakeByteByByteWorks) {
  Pair pair;
  ASSERT_NO_FATAL_FAILURE(pair.connect(1));
}

TEST(TlsTest, KeysAreReplacedInTheMiddleOfAStream) {
  Pair pair;
  ASSERT_NO_FATAL_FAILURE(pair.connect());
  Random random(2);
  const Bytes there = random_bytes(random, 3U << 20);
  EXPECT_TRUE(transfer(*pair.client, *pair.server, there, random, 1U << 20) == there);
}

TEST(TlsTest, AfterOneGoodbyeTheOtherDirectionGoesOn) {
  Pair pair;
  ASSERT_NO_FATAL_FAILURE(pair.connect());
  ASSERT_TRUE(pair.client->close().value());
  carry(*pair.client, *pair.server);
  Bytes piece(1000);
  EXPECT_EQ(pair.server->read(piece).value(), 0U);
  EXPECT_TRUE(pair.server->closed());
  Random random(3);
  const Bytes back = random_bytes(random, 1U << 20);
  EXPECT_TRUE(transfer(*pair.server, *pair.client, back, random) == back);
}

TEST(TlsTest, AnEndWithoutGoodbyeIsALostConnection) {
  Pair pair;
  ASSERT_NO_FATAL_FAILURE(pair.connect());
  pair.server->input_ended();
  Bytes piece(1000);
  const auto read = pair.server->read(piece);
  ASSERT_FALSE(read.has_value());
  EXPECT_EQ(read.error().code, Code::Unreachable);
  EXPECT_FALSE(pair.server->closed());
}

void expect_denied(Tls& client, Tls& server) {
  Result<bool> client_says = false;
  Result<bool> server_says = false;
  for (int i = 0; i < 10 && client_says && server_says; ++i) {
    client_says = client.handshake();
    carry(client, server);
    if (client_says) server_says = server.handshake();
    carry(server, client);
  }
  ASSERT_FALSE(server_says.has_value());
  client_says = client.handshake();
  ASSERT_FALSE(client_says.has_value());
  EXPECT_EQ(client_says.error().code, Code::Denied) << client_says.error().to_string();
}

TEST(TlsTest, AnotherKeyIsDenied) {
  expect_denied(*make(Tls::Role::Client, 1), *make(Tls::Role::Server, 2));
}

TEST(TlsTest, AnotherIdentityIsDenied) {
  expect_denied(*make(Tls::Role::Client, 1, "job-2"), *make(Tls::Role::Server, 1, "job-1"));
}

// What comes before, in the middle of and after the handshake is noise or damaged: an error at some
// point, never bytes that were not sent.
TEST(TlsTest, NoiseAndDamageAreErrors) {
  for (std::uint64_t seed = 1; seed <= 300; ++seed) {
    SCOPED_TRACE(seed);
    Random random(seed);
    Pair pair;
    const Bytes sent(5000, std::byte{42});
    if (seed % 3 == 0) {
      ASSERT_NO_FATAL_FAILURE(pair.connect());
      ASSERT_TRUE(pair.client->write(sent).has_value());
      ASSERT_TRUE(pair.client->flush().has_value());
    } else if (seed % 3 == 1) {
      ASSERT_TRUE(pair.client->handshake().has_value());
    }
    const auto output = pair.client->output();
    Bytes bytes(output.begin(), output.end());
    if (bytes.empty()) bytes = random_bytes(random, 1 + random.below(20000));
    bytes[random.below(bytes.size())] ^= static_cast<std::byte>(1U << random.below(8));
    const auto space = pair.server->input_space();
    const std::size_t count = std::min(space.size(), bytes.size());
    std::copy_n(bytes.begin(), count, space.begin());
    pair.server->input_received(count);
    Bytes piece(6000);
    if (seed % 3 == 0) {
      const auto read = pair.server->read(piece);
      EXPECT_EQ(read.value_or(0), 0U);
    } else {
      const auto done = pair.server->handshake();
      EXPECT_FALSE(done.value_or(false));
    }
  }
}

}  // namespace
}  // namespace drover::mirror
