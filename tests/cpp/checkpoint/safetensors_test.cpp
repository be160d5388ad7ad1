#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cstdint>
#include <fstream>
#include <string>

#include "gateloop/checkpoint.h"
#include "temporary_directory.h"

namespace gateloop::checkpoint {
namespace {

using test::TemporaryDirectory;

/// A safetensors file put together by hand: header length, header, data.
std::string file_of(const std::string& header, const std::string& data) {
  const std::uint64_t length = header.size();
  return std::string(reinterpret_cast<const char*>(&length), sizeof length) + header + data;
}

void write(const std::filesystem::path& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

std::string read_bytes(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

TEST(SafeTensors, RoundTripsEveryDtypeAndShape) {
  const TemporaryDirectory dir;
  SafeTensors content;
  for (const auto type :
       {torch::kFloat64, torch::kFloat32, torch::kFloat16, torch::kBFloat16, torch::kInt64,
        torch::kInt32, torch::kInt16, torch::kInt8, torch::kUInt8, torch::kUInt16,
        torch::kComplexFloat, torch::kFloat8_e4m3fn, torch::kFloat8_e5m2}) {
    content.tensors[std::string("t.") + c10::toString(type)] =
        torch::arange(-3, 4).abs().to(type).view({7, 1});
  }
  content.tensors["bool"] = torch::tensor({true, false, true});
  content.tensors["scalar"] = torch::tensor(2.5F);
  content.tensors["empty"] = torch::empty({3, 0, 2});
  content.tensors["a \"quoted\" name"] = torch::ones({2, 3});
  content.metadata = {{"step", "17"}, {"text", "line\nbreak"}};
  save_safetensors(dir / "x.safetensors", content);

  const SafeTensors loaded = load_safetensors(dir / "x.safetensors");
  EXPECT_EQ(loaded.metadata, content.metadata);
  ASSERT_EQ(loaded.tensors.size(), content.tensors.size());
  for (const auto& [name, tensor] : content.tensors) {
    const torch::Tensor& read_back = loaded.tensors.at(name);
    EXPECT_EQ(read_back.scalar_type(), tensor.scalar_type()) << name;
    EXPECT_EQ(read_back.sizes(), tensor.sizes()) << name;
    const auto bytes = [](const torch::Tensor& t) { return t.reshape(-1).view(torch::kUInt8); };
    EXPECT_TRUE(torch::equal(bytes(read_back), bytes(tensor))) << name;
  }
}

TEST(SafeTensors, AlignsDataToTheElementSize) {
  const TemporaryDirectory dir;
  save_safetensors(
      dir / "x",
      {{{"a", torch::ones({3}, torch::kUInt8)}, {"b", torch::ones({2}, torch::kFloat64)}}, {}});
  const std::string bytes = read_bytes(dir / "x");
  std::uint64_t header = 0;
  std::copy_n(bytes.data(), sizeof header, reinterpret_cast<char*>(&header));
  EXPECT_EQ(header % 8, 0U);
  // The float64 tensor comes first though its name comes second.
  EXPECT_EQ(bytes.size(), 8 + header + 16 + 3);
  EXPECT_NE(bytes.find("\"b\":{\"data_offsets\":[0,16]"), std::string::npos) << bytes;
}

TEST(SafeTensors, SavesViewsByValue) {
  const TemporaryDirectory dir;
  const torch::Tensor matrix = torch::arange(6, torch::kFloat32).view({2, 3});
  save_safetensors(dir / "x", {{{"t", matrix.t()}, {"column", matrix.select(1, 1)}}, {}});
  const SafeTensors loaded = load_safetensors(dir / "x");
  EXPECT_TRUE(torch::equal(loaded.tensors.at("t"), matrix.t()));
  EXPECT_TRUE(torch::equal(loaded.tensors.at("column"), matrix.select(1, 1)));
}

TEST(SafeTensors, RefusesComplexAndKeepsTheOldFile) {
  const TemporaryDirectory dir;
  save_safetensors(dir / "x", {{{"t", torch::ones({2})}}, {}});
  const std::string before = read_bytes(dir / "x");
  try {
    save_safetensors(dir / "x", {{{"h", torch::zeros({2}, torch::kComplexDouble)}}, {}});
    FAIL() << "complex128 has no safetensors dtype";
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find("\"h\""), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("view_as_real"), std::string::npos) << error.what();
  }
  EXPECT_EQ(read_bytes(dir / "x"), before);
}

struct Corruption {
  const char* name;
  std::string bytes;
  const char* expected;  // a part of the message
};

std::vector<Corruption> corruptions() {
  const std::string four = "\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[0,4]";
  const std::string data(4, '\0');
  return {
      {"Empty", "", "truncated"},
      {"ShorterThanItsLength", "\x02\x00", "truncated"},
      {"HugeHeader", std::string(8, '\xff') + "{}", "claims"},
      {"HeaderBeyondTheEnd", file_of("{}", "").replace(0, 1, "\x03"), "claims"},
      {"BadJson", file_of("{\"a\":", ""), "bad JSON"},
      // The message printed the value by recursion: 100,000 levels overflow the stack.
      {"DeepHeader",
       file_of("{\"a\":{\"dtype\":" + std::string(300'000, '[') + std::string(300'000, ']') +
                   ",\"shape\":[1],\"data_offsets\":[0,4]}}",
               data),
       "nests too deeply"},
      {"NotAnObject", file_of("[]", ""), "not a JSON object"},
      {"NotUtf8", file_of("{\"\xff\":{" + four + "}}", data), "bad JSON"},
      {"DuplicateName", file_of("{\"a\":{" + four + "},\"a\":{" + four + "}}", data),
       "two tensors are named \"a\""},
      {"EntryIsNoObject", file_of("{\"a\":3}", ""), "\"a\" has no \"dtype\""},
      {"NoShape", file_of("{\"a\":{\"dtype\":\"F32\",\"data_offsets\":[0,4]}}", data),
       "has no \"shape\""},
      {"UnknownDtype",
       file_of("{\"a\":{\"dtype\":\"F7\",\"shape\":[4],\"data_offsets\":[0,4]}}", data),
       "unknown dtype \"F7\""},
      {"NegativeSize",
       file_of("{\"a\":{\"dtype\":\"F32\",\"shape\":[-1],\"data_offsets\":[0,4]}}", data),
       "not a non-negative integer"},
      {"FractionalSize",
       file_of("{\"a\":{\"dtype\":\"F32\",\"shape\":[1.5],\"data_offsets\":[0,4]}}", data),
       "not a non-negative integer"},
      {"SizeOverflows",
       file_of("{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],"
               "\"data_offsets\":[0,4]}}",
               data),
       "overflows"},
      {"ShapeAndOffsetsDisagree",
       file_of("{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}", data),
       "its shape and dtype need 8"},
      {"EndBeforeBegin",
       file_of("{\"a\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[4,0]}}", data),
       "its offsets span"},
      {"Truncated", file_of("{\"a\":{" + four + "}}", "\1\2\3"), "truncated"},
      {"Overlap",
       file_of(
           "{\"a\":{" + four + "},\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[2,6]}}",
           std::string(6, '\0')),
       "overlap"},
      {"Hole",
       file_of(
           "{\"a\":{" + four + "},\"b\":{\"dtype\":\"F32\",\"shape\":[1],\"data_offsets\":[8,12]}}",
           std::string(12, '\0')),
       "a hole"},
      {"TrailingBytes", file_of("{\"a\":{" + four + "}}", data + "more"), "4 bytes follow"},
      {"MetadataIsNoObject", file_of("{\"__metadata__\":3}", ""), "not an object"},
      {"MetadataIsNoString", file_of("{\"__metadata__\":{\"k\":3}}", ""), "not a string"},
  };
}

TEST(SafeTensors, NamesWhatIsWrongWithAFile) {
  const TemporaryDirectory dir;
  const std::filesystem::path path = dir / "broken.safetensors";
  for (const Corruption& corruption : corruptions()) {
    write(path, corruption.bytes);
    try {
      load_safetensors(path);
      ADD_FAILURE() << corruption.name << " was read without an error";
    } catch (const std::runtime_error& error) {
      const std::string message = error.what();
      EXPECT_NE(message.find(path.string()), std::string::npos) << corruption.name << message;
      EXPECT_NE(message.find(corruption.expected), std::string::npos)
          << corruption.name << ": " << message;
    }
  }
}

TEST(SafeTensors, EveryTruncationIsAnError) {
  const TemporaryDirectory dir;
  save_safetensors(dir / "x", {{{"a", torch::ones({5})}, {"b", torch::ones({3})}}, {{"k", "v"}}});
  const std::string whole = read_bytes(dir / "x");
  for (std::size_t size = 0; size < whole.size(); ++size) {
    write(dir / "y", whole.substr(0, size));
    EXPECT_THROW(load_safetensors(dir / "y"), std::runtime_error) << size << " bytes";
  }
}

TEST(SafeTensors, MissingFileAndFolder) {
  const TemporaryDirectory dir;
  EXPECT_THROW(load_safetensors(dir / "none"), std::runtime_error);
  EXPECT_THROW(load_safetensors(dir.path()), std::runtime_error);
  EXPECT_THROW(save_safetensors(dir / "no" / "such" / "folder", {}), std::runtime_error);
}

}  // namespace
}  // namespace gateloop::checkpoint
