// fuzz_readers [SECONDS [SEED]]: every reader on the files of corpus/ and on broken ones, for
// SECONDS each.
//
// A reader may refuse a file by an exception and by nothing else. A crash, a sanitizer's complaint
// or another exception ends the program. The file that did it is left where the last line says.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "mutate.h"
#include "readers.h"

namespace {

using gateloop::fuzz::Mutator;
using gateloop::fuzz::Reader;
using std::filesystem::path;

std::string bytes_of(const path& file) {
  std::ifstream in(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

std::vector<std::string> files_in(const path& directory) {
  const std::filesystem::directory_iterator files(directory);
  std::vector<path> paths(begin(files), end(files));
  std::sort(paths.begin(), paths.end());  // a directory has no order of its own
  std::vector<std::string> contents;
  for (const path& file : paths) contents.push_back(bytes_of(file));
  return contents;
}

bool fuzz(const Reader& reader, const path& directory, double seconds, std::uint64_t seed) {
  std::filesystem::create_directories(directory / "seeds");
  reader.write_seeds(directory / "seeds");
  std::vector<std::string> seeds = files_in(directory / "seeds");
  for (const std::string& bytes : seeds) {
    try {
      std::ofstream(directory / reader.file, std::ios::binary) << bytes;
      reader.read(directory);
    } catch (const std::exception& error) {
      std::printf("%s refuses a whole file: %s\n", reader.name, error.what());
      return false;
    }
  }
  std::printf("%s: broken files in %s\n", reader.name, (directory / reader.file).c_str());
  std::fflush(stdout);
  for (std::string& bytes : files_in(path(GATELOOP_FUZZ_CORPUS) / reader.name)) {
    accepts(reader, directory, bytes);
    seeds.push_back(std::move(bytes));
  }
  Mutator mutator(std::move(seeds), seed);
  using Clock = std::chrono::steady_clock;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  long runs = 0;
  long accepted = 0;
  for (; Clock::now() < end; ++runs) accepted += accepts(reader, directory, mutator.next());
  std::printf("%s: %ld files, %ld of them accepted\n", reader.name, runs, accepted);
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 1;
  const std::uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::string name = (std::filesystem::temp_directory_path() / "gateloop-fuzz-XXXXXX").string();
  if (::mkdtemp(name.data()) == nullptr) {
    std::perror(name.c_str());
    return 1;
  }
  bool passed = true;
  for (const Reader& reader : gateloop::fuzz::readers()) {
    const path directory = path(name) / reader.name;
    std::filesystem::create_directories(directory);
    passed = fuzz(reader, directory, seconds, seed) && passed;
  }
  if (passed) std::filesystem::remove_all(name);
  return passed ? 0 : 1;
}
