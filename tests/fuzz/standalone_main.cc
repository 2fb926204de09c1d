// SPDX-License-Identifier: Apache-2.0
//
// Runs a fuzz target without libFuzzer: every file given (or in a directory given), then a number
// of mutations of them, from a seed. Blind, but the same every time, and with any compiler.
//
//   nbd_request_fuzz [--runs N] [--seed S] [--first I] FILE_OR_DIRECTORY...
//
// When an input brings the target down, the command that repeats it is printed.
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "base/random.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

using drover::Random;
using Input = std::vector<std::uint8_t>;

constexpr std::size_t kMaxInput = 16384;
constexpr std::size_t kMaxMutations = 8;

// What a signal's handler prints: formatted beforehand, for it may not.
char replay[8192];

void print_replay(int signal) {
  const char intro[] = "\nthis input brought the target down; repeat it with\n  ";
  [[maybe_unused]] ssize_t ignored = ::write(STDERR_FILENO, intro, sizeof intro - 1);
  ignored = ::write(STDERR_FILENO, replay, std::strlen(replay));
  ::signal(signal, SIG_DFL);
  ::raise(signal);
}

Input read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  Input input((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  input.resize(std::min(input.size(), kMaxInput));
  return input;
}

std::ptrdiff_t position(Random& random, std::size_t size) {
  return static_cast<std::ptrdiff_t>(random.below(size + 1));
}

void mutate(Input& input, const std::vector<Input>& seeds, Random& random) {
  // Limits of fields, and numbers around them.
  static constexpr std::uint64_t kInteresting[] = {
      0,          1,          2,      27,      28,         4095,  4096,      4097,
      0x7fffffff, 0x80000000, 0xffff, 0x10000, 0xffffffff, ~0ULL, 1ULL << 63};
  const std::size_t size = input.size();
  switch (random.below(9)) {
    case 0:  // a bit
      if (size > 0) input[random.below(size)] ^= static_cast<std::uint8_t>(1U << random.below(8));
      break;
    case 1:  // a byte
      if (size > 0) input[random.below(size)] = static_cast<std::uint8_t>(random.next());
      break;
    case 2: {  // a number, big- or little-endian
      const std::size_t width = std::size_t{1} << random.below(4);
      if (size < width) break;
      std::uint64_t value = kInteresting[random.below(std::size(kInteresting))];
      const std::size_t at = random.below(size - width + 1);
      const bool big = random.one_in(2);
      for (std::size_t i = 0; i < width; ++i) {
        input[at + (big ? width - 1 - i : i)] = static_cast<std::uint8_t>(value);
        value >>= 8;
      }
      break;
    }
    case 3: {  // something inserted
      const std::size_t count = 1 + random.below(random.one_in(8) ? 5000 : 32);
      const auto value = static_cast<std::uint8_t>(random.one_in(2) ? 0 : random.next());
      input.insert(input.begin() + position(random, size), count, value);
      break;
    }
    case 4: {  // something missing
      if (size == 0) break;
      const std::size_t at = random.below(size);
      const std::size_t count = 1 + random.below(std::min<std::size_t>(size - at, 64));
      input.erase(input.begin() + static_cast<std::ptrdiff_t>(at),
                  input.begin() + static_cast<std::ptrdiff_t>(at + count));
      break;
    }
    case 5:  // cut off
      input.resize(random.below(size + 1));
      break;
    case 6: {  // a part of itself again
      if (size == 0) break;
      const std::size_t at = random.below(size);
      const std::size_t count = 1 + random.below(std::min<std::size_t>(size - at, 256));
      const Input part(input.begin() + static_cast<std::ptrdiff_t>(at),
                       input.begin() + static_cast<std::ptrdiff_t>(at + count));
      input.insert(input.begin() + position(random, size), part.begin(), part.end());
      break;
    }
    case 7: {  // followed by another
      const Input& other = seeds[random.below(seeds.size())];
      input.resize(random.below(size + 1));
      const std::size_t from = random.below(other.size() + 1);
      input.insert(input.end(), other.begin() + static_cast<std::ptrdiff_t>(from), other.end());
      break;
    }
    default: {  // noise
      const std::size_t count = random.below(64);
      for (std::size_t i = 0; i < count; ++i) {
        input.push_back(static_cast<std::uint8_t>(random.next()));
      }
      break;
    }
  }
  input.resize(std::min(input.size(), kMaxInput));
}

}  // namespace

int main(int argc, char** argv) {
  std::uint64_t runs = 1000;
  std::uint64_t seed = 1;
  std::uint64_t first = 0;
  std::vector<std::filesystem::path> files;
  std::string paths;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const bool number = argument == "--runs" || argument == "--seed" || argument == "--first";
    if (number && i + 1 < argc) {
      const std::uint64_t value = std::strtoull(argv[++i], nullptr, 0);
      (argument == "--runs" ? runs : argument == "--seed" ? seed : first) = value;
      continue;
    }
    paths += " " + argument;
    if (std::filesystem::is_directory(argument)) {
      for (const auto& entry : std::filesystem::directory_iterator(argument)) {
        files.push_back(entry.path());
      }
    } else if (std::filesystem::is_regular_file(argument)) {
      files.emplace_back(argument);
    } else {
      std::fprintf(stderr, "there is no file or directory %s\n", argument.c_str());
      return 2;
    }
  }
  std::sort(files.begin(), files.end());  // a directory has no order
  for (const int signal : {SIGABRT, SIGSEGV, SIGBUS, SIGFPE, SIGILL})
    ::signal(signal, print_replay);

  std::vector<Input> seeds;
  for (const auto& file : files) {
    std::snprintf(replay, sizeof replay, "%s --runs 0 %s\n", argv[0], file.c_str());
    seeds.push_back(read_file(file));
    LLVMFuzzerTestOneInput(seeds.back().data(), seeds.back().size());
  }
  if (seeds.empty()) seeds.emplace_back();
  for (std::uint64_t run = first; run < first + runs; ++run) {
    std::snprintf(replay, sizeof replay, "%s --seed %llu --first %llu --runs 1%s\n", argv[0],
                  static_cast<unsigned long long>(seed), static_cast<unsigned long long>(run),
                  paths.c_str());
    Random random(seed * 0x9e3779b97f4a7c15ULL + run);
    Input input = seeds[random.below(seeds.size())];
    const std::size_t mutations = 1 + random.below(kMaxMutations);
    for (std::size_t i = 0; i < mutations; ++i) mutate(input, seeds, random);
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  std::printf("%zu inputs and %llu mutations (seed %llu)\n", files.size(),
              static_cast<unsigned long long>(runs), static_cast<unsigned long long>(seed));
  return 0;
}
