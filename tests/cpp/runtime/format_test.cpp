// Weights in every format, mapped and converted.
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <string>

#include "gateloop/runtime.h"
#include "models.h"
#include "temporary_directory.h"

namespace gateloop::test {
namespace {

using runtime::Format;
using runtime::Model;
using runtime::Session;

struct Stored {
  Format format;
  std::string dtype;
};
const Stored kStored[] = {{Format::kFloat32, "F32"},
                          {Format::kBFloat16, "BF16"},
                          {Format::kFloat16, "F16"},
                          {Format::kInt8, "I8"}};

/// Against the definition with the weights as stored, only the products' own error is left. It is
/// float32 arithmetic, and for int8 rows of inputs rounded by 2^-16 of their largest number. That
/// number is some four standard deviations. Relative to a sum of n products the error is 4 · 2^-16
/// / √3, below 4e-5. There are some 10 products on the way. With bfloat16 the definition rounds
/// what products read too; where float32 lies on the other side of a half, a number is 2^-8 of
/// itself away, and of a sum that cancels more.
double tolerance(Format format) {
  return format == Format::kInt8 ? 4e-4 : format == Format::kBFloat16 ? 1e-2 : 5e-5;
}
Inputs inputs_of(Format format) {
  return format == Format::kBFloat16 ? Inputs::kBFloat16 : Inputs::kExact;
}

const Case kCases[] = {case_of("polar"),  case_of("sub_ln"),    case_of("uneven"),
                       case_of("taylor"), case_of("attention"), case_of("tied")};

TEST(Formats, OfFilesGiveWhatTheDefinitionGivesOnWhatWasStored) {
  std::mt19937_64 random(1);
  for (const Case& one : kCases) {
    for (const auto& [format, dtype] : kStored) {
      SCOPED_TRACE(one.name + " " + dtype);
      const TemporaryDirectory dir;
      const auto spec = model::resolve(one.options);
      Weights weights = random_weights(spec, random);
      std::filesystem::create_directory(dir / "from");
      write_model(dir / "from", one.options, weights);
      runtime::quantize(dir / "from", dir / "to", format);
      const auto ids = random_ids(spec, 19, random);
      const auto expected = oracle_logits(spec, read_weights(dir / "to"), ids, inputs_of(format));

      const Model model(dir / "to");
      Session session(model, {.threads = 2});
      EXPECT_EQ(model.copied_bytes(), 0);
      const auto all = session.read_all(ids);
      EXPECT_LT(distance(all, expected, spec.num_tokens), tolerance(format));
      session.set_state({});
      std::vector<float> steps;
      for (const std::int64_t id : ids) {
        const auto next = session.step(std::span(&id, 1));
        steps.insert(steps.end(), next.begin(), next.end());
      }
      EXPECT_LT(distance(steps, expected, spec.num_tokens), tolerance(format));

      // Converted while opening, the weights are the same ones.
      Session converted(Model(dir / "from", {.format = format}), {.threads = 2});
      EXPECT_EQ(converted.read_all(ids), all);
      // And back to float32: products of equal numbers.
      Session widened(Model(dir / "to", {.format = Format::kFloat32}), {.threads = 2});
      const auto exact = oracle_logits(spec, read_weights(dir / "to"), ids);
      EXPECT_LT(distance(widened.read_all(ids), exact, spec.num_tokens),
                tolerance(Format::kFloat32));
    }
  }
}

TEST(Formats, OfOtherProgramsAreRead) {
  std::mt19937_64 random(2);
  for (const auto& [format, dtype] :
       {Stored{Format::kFloat32, "F64"}, {Format::kBFloat16, "BF16"}, {Format::kFloat16, "F16"}}) {
    const TemporaryDirectory dir;
    const auto spec = model::resolve(kCases[1].options);
    Weights weights = random_weights(spec, random);
    write_model(dir.path(), kCases[1].options, weights, dtype);
    const auto ids = random_ids(spec, 19, random);
    const auto expected = oracle_logits(spec, weights, ids, inputs_of(format));
    Session session(Model(dir.path()), {.threads = 2});
    EXPECT_LT(distance(session.read_all(ids), expected, spec.num_tokens), tolerance(format))
        << dtype;
  }
}

TEST(Formats, RoundToTheNearestWithinTheirBounds) {
  std::mt19937_64 random(3);
  const auto spec = model::resolve(kCases[0].options);
  const TemporaryDirectory dir;
  Weights weights = random_weights(spec, random);
  std::filesystem::create_directory(dir / "from");
  write_model(dir / "from", kCases[0].options, weights);
  for (const auto& [format, dtype] : kStored) {
    runtime::quantize(dir / "from", dir / dtype, format);
    const Weights stored = read_weights(dir / dtype);
    for (const model::Weight& weight : model::weight_table(spec)) {
      const auto& exact = weights.at(weight.name);
      const auto& rounded = stored.at(weight.name);
      const bool is_matrix = weight.shape.size() == 2;
      const auto columns = static_cast<std::size_t>(weight.shape.back());
      for (std::size_t i = 0; i < exact.size(); ++i) {
        double most = 0;  // of its row
        for (std::size_t c = 0; c < columns; ++c)
          most = std::max(most, std::fabs(exact[i / columns * columns + c]));
        // Half a unit in the last of 8 or 11 bits; half of a 127th of the largest, the scale itself
        // rounded to 24 bits.
        const double bound = !is_matrix || dtype == "F32" ? 0
                             : dtype == "BF16"            ? std::fabs(exact[i]) * 0x1p-8
                             : dtype == "F16" ? std::max(std::fabs(exact[i]) * 0x1p-11, 0x1p-25)
                                              : most / 254 * 1.0001;
        ASSERT_LE(std::fabs(rounded[i] - exact[i]), bound) << weight.name << " " << dtype;
      }
    }
  }
}

TEST(Formats, QuantizeKeepsTheBestModelAndRefusesItsOwnDirectory) {
  std::mt19937_64 random(4);
  const auto spec = model::resolve(kCases[0].options);
  const TemporaryDirectory dir;
  Weights weights = random_weights(spec, random);
  std::filesystem::create_directory(dir / "from");
  write_model(dir / "from", kCases[0].options, weights);
  std::filesystem::copy_file(dir / "from" / "model.safetensors",
                             dir / "from" / "model.best.safetensors");
  runtime::quantize(dir / "from", dir / "to", Format::kInt8);
  EXPECT_EQ(Model(dir / "to", {.weights = model::Weights::kBest}).spec(), spec);
  EXPECT_LT(std::filesystem::file_size(dir / "to" / "model.best.safetensors"),
            std::filesystem::file_size(dir / "from" / "model.best.safetensors") / 2);
  EXPECT_THROW(runtime::quantize(dir / "from", dir / "from", Format::kInt8), std::invalid_argument);
  std::filesystem::remove(dir / "from" / "model.best.safetensors");
  runtime::quantize(dir / "from", dir / "to", Format::kBFloat16);
  EXPECT_FALSE(std::filesystem::exists(dir / "to" / "model.best.safetensors"));
}

/// Kilobytes of `field` in the mapping of `file`, from /proc/self/smaps.
std::int64_t mapped_kilobytes(const std::string& file, const std::string& field) {
  std::ifstream maps("/proc/self/smaps");
  bool inside = false;
  std::int64_t sum = 0;
  for (std::string line; std::getline(maps, line);) {
    if (line.find('-') < line.find(' ')) inside = line.ends_with(file);
    if (inside && line.starts_with(field + ":")) sum += std::stoll(line.substr(field.size() + 1));
  }
  return sum;
}

TEST(Formats, AsInTheFileAreReadInPlace) {
  std::mt19937_64 random(5);
  model::ModelOptions options{.num_tokens = 256, .dim = 256, .depth = 2};
  const auto spec = model::resolve(options);
  const TemporaryDirectory dir;
  Weights weights = random_weights(spec, random);
  write_model(dir.path(), options, weights, "BF16");
  const std::string file = (dir / "model.safetensors").string();
  const Model model(dir.path());
  Session session(model, {.threads = 2});
  session.prefill(random_ids(spec, 100, random));
  session.step(random_ids(spec, 1, random));
  const auto kilobytes = static_cast<std::int64_t>(std::filesystem::file_size(file) / 1024);
  EXPECT_GE(mapped_kilobytes(file, "Size"), kilobytes);
  EXPECT_GE(mapped_kilobytes(file, "Rss"), kilobytes);
  EXPECT_EQ(mapped_kilobytes(file, "Private_Dirty"), 0);
  EXPECT_EQ(mapped_kilobytes(file, "Anonymous"), 0);
  // Of vectors alone: the file has them in bfloat16.
  EXPECT_LT(model.copied_bytes(), 64 * 1024);
}

}  // namespace
}  // namespace gateloop::test
