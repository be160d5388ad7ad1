// fuzz_guided, by scripts/fuzz: one reader on files that libFuzzer derives from those that reached
// new code. libFuzzer starts itself again with its own arguments alone, so ours are in the
// environment: GATELOOP_FUZZ_READER names the reader; in GATELOOP_FUZZ_FOLDER lie seeds/ and the
// file that it reads.
//
// A reader may refuse a file by an exception derived from std::exception and by nothing else.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>

#include "readers.h"

namespace {

using gateloop::fuzz::Reader;
using std::filesystem::path;

const Reader* reader = nullptr;
path directory;

const Reader& named(const std::string& name) {
  for (const Reader& each : gateloop::fuzz::readers()) {
    if (each.name == name) return each;
  }
  std::fprintf(stderr, "fuzz_guided: GATELOOP_FUZZ_READER is '%s', expected one of:", name.c_str());
  for (const Reader& each : gateloop::fuzz::readers()) std::fprintf(stderr, " %s", each.name);
  std::fprintf(stderr, "\n");
  std::exit(2);
}

std::string variable(const char* name) {
  const char* const value = std::getenv(name);
  return value == nullptr ? "" : value;
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int* /*argc*/, char*** /*argv*/) {
  reader = &named(variable("GATELOOP_FUZZ_READER"));
  directory = variable("GATELOOP_FUZZ_FOLDER");
  std::filesystem::remove_all(directory / "seeds");
  std::filesystem::create_directories(directory / "seeds");
  reader->write_seeds(directory / "seeds");
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  gateloop::fuzz::accepts(*reader, directory, {reinterpret_cast<const char*>(data), size});
  return 0;
}
