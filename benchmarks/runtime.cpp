// Milliseconds a token of the runtime against a plain read of the weights, on the enwik8 shape: dim
// 512, depth 6, max heads, a feed-forward of 4 times dim, post-norm.
#include "gateloop/runtime.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <iterator>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "model/config_file.h"
#include "model/file.h"
#include "recurrence/inference.h"
#include "temporary_directory.h"

namespace {

using namespace gateloop;

const model::ModelOptions kShape{.post_ln_norm = true};
constexpr const char* kFormats[] = {"float32", "bfloat16", "float16", "int8"};

/// The shortest of many runs: what the machine can do where others leave it alone.
template <class F>
double shortest_ms(int runs, const F& f) {
  double best = 1e30;
  for (int i = 0; i < runs; ++i) {
    const auto start = std::chrono::steady_clock::now();
    f();
    best = std::min(
        best, std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start)
                  .count());
  }
  return best;
}

void write_random_model(const std::filesystem::path& dir) {
  const model::ModelSpec spec = model::resolve(kShape);
  std::mt19937 random(1);
  std::vector<std::vector<float>> memory;
  std::vector<model::TensorBytes> tensors;
  for (const model::Weight& weight : model::weight_table(spec)) {
    auto& numbers = memory.emplace_back(static_cast<std::size_t>(weight.numel()));
    for (float& value : numbers)
      value = (static_cast<float>(random() >> 8) * 0x1p-24f - 0.5f) * 0.1f;
    tensors.push_back({weight.name, "F32", weight.shape, numbers.data()});
  }
  model::write_safetensors(dir / "model.safetensors", tensors, {});
  model::save_text(dir / "config.json",
                   "{\"format\": 1, \"model\": " + model::to_json(kShape) + "}");
}

/// Calls read(thread) again and again in every thread at once. The shortest read of each thread
/// counts, and of those the longest.
template <class F>
double read_ms(int threads, const F& read) {
  std::vector<double> shortest(static_cast<std::size_t>(threads));
  std::vector<std::thread> readers;
  for (int i = 0; i < threads; ++i) {
    readers.emplace_back(
        [&, i] { shortest[static_cast<std::size_t>(i)] = shortest_ms(20, [&] { read(i); }); });
  }
  for (std::thread& reader : readers) reader.join();
  return *std::max_element(shortest.begin(), shortest.end());
}

/// Reads the bytes once, an equal share to each thread, in the faster of two ways. A sum of
/// integers is all loads; products with a row in L1 have wider loads.
double floor_ms(const std::vector<std::byte>& bytes, int threads) {
  const auto shares = static_cast<std::size_t>(threads);
  const std::size_t share = bytes.size() / shares / 2048 * 2048;
  const auto sum = [&](int i) {
    const auto* const words = reinterpret_cast<const std::uint64_t*>(bytes.data()) +
                              share / 8 * static_cast<std::size_t>(i);
    std::uint64_t sums[16] = {};
    for (std::size_t w = 0; w < share / 8; w += 16) {
      for (std::size_t k = 0; k < 16; ++k) sums[k] += words[w + k];
    }
    static std::atomic<std::uint64_t> sink;
    sink += std::accumulate(std::begin(sums), std::end(sums), std::uint64_t{0});
  };
  const std::vector<float> row(512, 1.0f);
  const auto rows = static_cast<std::int64_t>(share / 2048);
  std::vector<float> results(static_cast<std::size_t>(rows) * shares);
  const auto multiply = [&](int i) {
    const auto begin = static_cast<std::size_t>(i);
    const recurrence::Matrix matrix{
        .rows = rows, .columns = 512, .data = bytes.data() + share * begin};
    recurrence::multiply_rows(matrix, row.data(), 0, rows, nullptr,
                              results.data() + static_cast<std::size_t>(rows) * begin);
  };
  return std::min(read_ms(threads, sum), read_ms(threads, multiply));
}

void measure(const std::filesystem::path& dir, runtime::Format format, const char* name,
             int threads) {
  const runtime::Model model(dir, {.format = format});
  const std::int64_t bytes = model.weight_bytes();
  const std::vector<std::byte> memory(static_cast<std::size_t>(bytes), std::byte{1});
  runtime::Session session(model, {.threads = threads});
  const auto ids = [&](std::int64_t n) {
    return std::vector<std::int64_t>(static_cast<std::size_t>(n), 65);
  };
  const auto one = ids(1), many = ids(64), text = ids(1024);
  double floor = 1e30, step = 1e30, steps = 1e30, prefill = 1e30;
  // In turns, so that what else runs on the machine slows all of them.
  for (int round = 0; round < 8; ++round) {
    floor = std::min(floor, floor_ms(memory, threads));
    session.set_state({});
    step = std::min(step, shortest_ms(40, [&] { session.step(one); }));
    session.set_state({});
    steps = std::min(steps, shortest_ms(5, [&] { session.step(many); }));
    session.set_state({});
    prefill = std::min(prefill, shortest_ms(1, [&] { session.prefill(text); }));
  }
  const double flops = static_cast<double>(model::flops_per_token(model.spec(), 1024));
  std::printf(
      "%-9s %d threads: weights %5.1f MB, read in %.3f ms; a token %.3f ms (%.2f of it); "
      "64 sequences %.2f ms, %.0f bytes/s, %.1f times one; prefill 1024 %.1f ms, %.0f GFLOP/s\n",
      name, threads, static_cast<double>(bytes) * 1e-6, floor, step, step / floor, steps,
      64e3 / steps, 64 * step / steps, prefill, 1024 * flops / prefill * 1e-6);
}

}  // namespace

int main() {
  const test::TemporaryDirectory dir;
  write_random_model(dir.path());
  for (const int threads : {1, 2}) {
    for (int i = 0; i < 4; ++i) {
      const auto format = static_cast<runtime::Format>(i + 1);
      const std::filesystem::path converted = dir / kFormats[i];
      runtime::quantize(dir.path(), converted, format);
      measure(converted, runtime::Format::kFile, kFormats[i], threads);
    }
  }
}
