// Every kernel against a plain elementwise pass over the same arrays: same bytes, same threads, the
// better of ordinary and non-temporal stores. Rounds alternate and the smallest of each counts.
// `ratio` is the kernel's time over the pass's; `cpu_ratio` the same in processor time, which other
// programs on the machine disturb less.
//
// Fields of an entry of the JSON, by the name `<Op>/<B>x<T>x<D>/...`: ms, floor_ms (smallest wall
// time of the kernel and of the pass), threads, ratio, cpu_ratio, speedup (over one thread).
// Forward
// + backward against its floor is (ms + ms of <Op>Backward) / (floor_ms + its floor_ms).
//
//   build/release/recurrence_benchmark --benchmark_filter=GateLoop
//   GATELOOP_BENCHMARK_THREADS=4 build/release/recurrence_benchmark
#include "gateloop/recurrence.h"

#include <benchmark/benchmark.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <complex>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <functional>
#include <limits>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "host/output_memory.h"
#include "oracle.h"
#include "recurrence/scratch.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "benchmarks/recurrence.cpp"
#include <hwy/cache_control.h>
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace gateloop::bench {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

/// Every output becomes the sum of all inputs; `n` is a multiple of every vector length.
void Elementwise(const float* const* in, int inputs, float* const* out, int outputs,
                 std::int64_t begin, std::int64_t end, bool stream) {
  const hn::ScalableTag<float> d;
  for (std::int64_t i = begin; i < end; i += static_cast<std::int64_t>(hn::Lanes(d))) {
    auto sum = hn::Load(d, in[0] + i);
    for (int k = 1; k < inputs; ++k) sum = hn::Add(sum, hn::Load(d, in[k] + i));
    for (int k = 0; k < outputs; ++k) {
      stream ? hn::Stream(sum, d, out[k] + i) : hn::Store(sum, d, out[k] + i);
    }
  }
  hwy::FlushStream();
}

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::bench
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gateloop::bench {
HWY_EXPORT(Elementwise);
namespace {

using recurrence::ConstSequence;
using recurrence::DType;
using recurrence::Sequence;
using recurrence::Shape;

int thread_count() {
  const char* text = std::getenv("GATELOOP_BENCHMARK_THREADS");
  return text == nullptr ? 2 : std::atoi(text);
}

/// Workers that sleep between calls.
class Pool {
 public:
  explicit Pool(int threads) {
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this] { work(); });
  }
  ~Pool() {
    stop_ = true;
    round_.fetch_add(1);
    round_.notify_all();
    for (std::thread& worker : workers_) worker.join();
  }
  void parallel_for(std::int64_t n, const std::function<void(std::int64_t)>& body) {
    body_ = &body;
    n_ = n;
    next_ = 0;
    busy_ = static_cast<int>(workers_.size());
    round_.fetch_add(1);
    round_.notify_all();
    drain();
    for (int busy; (busy = busy_.load()) != 0;) busy_.wait(busy);
  }

 private:
  void drain() {
    for (std::int64_t i; (i = next_.fetch_add(1)) < n_;) (*body_)(i);
  }
  void work() {
    for (std::int64_t seen = 0;;) {
      round_.wait(seen);
      seen = round_.load();
      if (stop_) return;
      drain();
      if (busy_.fetch_sub(1) == 1) busy_.notify_one();
    }
  }

  std::vector<std::thread> workers_;
  std::atomic<std::int64_t> round_{0}, next_{0};
  std::atomic<int> busy_{0};
  std::atomic<bool> stop_{false};
  std::int64_t n_ = 0;
  const std::function<void(std::int64_t)>* body_ = nullptr;
};

class Floats {
 public:
  explicit Floats(std::int64_t n)
      : n_(n),
        data_(static_cast<float*>(
            ::operator new (static_cast<std::size_t>(n + 16) * 4, std::align_val_t{4096}))) {
    host::ready_output(data_, static_cast<std::size_t>(n + 16) * 4, 1, {});  // as operators do
    for (std::int64_t i = 0; i < n; ++i) data_[i] = 0;
  }
  ~Floats() { ::operator delete (data_, std::align_val_t{4096}); }
  Floats(Floats&& other) noexcept : n_(other.n_), data_(std::exchange(other.data_, nullptr)) {}
  void fill(unsigned seed, float low, float high) {
    std::minstd_rand engine(seed);
    std::vector<float> tile(8191);  // drawing every number takes longer than the benchmark
    for (float& x : tile) x = std::uniform_real_distribution<float>(low, high)(engine);
    for (std::int64_t i = 0; i < n_; ++i) data_[i] = tile[static_cast<std::size_t>(i % 8191)];
  }
  float* get() const { return data_; }
  std::int64_t size() const { return n_; }
  std::vector<double> doubles() const { return {data_, data_ + n_}; }
  std::vector<std::complex<double>> pairs() const {
    std::vector<std::complex<double>> out;
    for (std::int64_t i = 0; i + 1 < n_; i += 2) out.emplace_back(data_[i], data_[i + 1]);
    return out;
  }

 private:
  std::int64_t n_;
  float* data_;
};

/// A kernel bound to its arrays: inputs and outputs of n floats (2n for complex ones).
struct Bound {
  Shape shape;
  std::vector<Floats> in, out;
  std::vector<Floats> states;  // saved states and such, not counted as traffic
  std::function<void(const recurrence::Executor&, void*)> run;
  std::function<std::size_t(int)> scratch_bytes;
  std::function<double()> error;  // against the oracle, relative to the largest value
};

template <class Params>
void bind(Bound& bound, const Params& p) {
  bound.run = [p](const recurrence::Executor& e, void* s) { recurrence::run(p, e, s); };
  bound.scratch_bytes = [p](int threads) { return recurrence::scratch_bytes(p, threads); };
}

/// On the calling thread, with scratch of its own.
template <class Params>
void run_once(const Params& p) {
  recurrence::run(p, {}, recurrence::Scratch().bytes(recurrence::scratch_bytes(p, 1)));
}

double difference(const std::vector<double>& a, const std::vector<double>& b) {
  double worst = 0, scale = 1e-30;
  for (std::size_t i = 0; i < a.size(); ++i) {
    worst = std::max(worst, std::fabs(a[i] - b[i]));
    scale = std::max(scale, std::fabs(b[i]));
  }
  return worst / scale;
}
std::vector<double> reals(const std::vector<std::complex<double>>& pairs) {
  std::vector<double> out;
  for (const auto& x : pairs) out.insert(out.end(), {x.real(), x.imag()});
  return out;
}

Bound arrays(Shape s, std::vector<int> in_parts, std::vector<int> out_parts) {
  Bound bound;
  bound.shape = s;
  const std::int64_t n = s.batch * s.time * s.channels;
  unsigned seed = 0;
  for (const int parts : in_parts) {
    bound.in.emplace_back(n * parts);
    bound.in.back().fill(++seed, -1, 1);
  }
  for (const int parts : out_parts) bound.out.emplace_back(n * parts);
  return bound;
}
ConstSequence in(const Bound& b, std::size_t i, std::int64_t parts = 1) {
  const std::int64_t row = b.shape.channels * parts;
  return {b.in[i].get(), row * b.shape.time, row};
}
Sequence out(const Bound& b, std::size_t i, std::int64_t parts = 1) {
  const std::int64_t row = b.shape.channels * parts;
  return {b.out[i].get(), row * b.shape.time, row};
}
oracle::Dims dims(Shape s) { return {s.batch, s.time, s.channels}; }

Bound linear_forward(Shape s) {
  Bound b = arrays(s, {1, 1}, {1});
  b.in[0].fill(1, 0.9f, 1);
  bind(b, recurrence::LinearRecurrence{DType::kFloat32, s, false, in(b, 0), in(b, 1), nullptr,
                                       out(b, 0), nullptr});
  b.error = [&b = b.in, &o = b.out, s] {
    return difference(
        o[0].doubles(),
        oracle::linear_recurrence<double>(dims(s), false, b[0].doubles(), b[1].doubles(), {}).h);
  };
  return b;
}

Bound linear_backward(Shape s) {
  Bound b = arrays(s, {1, 1, 1}, {1, 1});
  b.in[0].fill(1, 0.9f, 1);
  recurrence::LinearRecurrenceBackward p;
  p.shape = s;
  p.a = in(b, 0);
  p.h = in(b, 1);
  p.dh = in(b, 2);
  p.da = out(b, 0);
  p.dx = out(b, 1);
  bind(b, p);
  b.error = [&b = b.in, &o = b.out, s] {
    const auto g = oracle::linear_recurrence_backward<double>(
        dims(s), false, b[0].doubles(), b[1].doubles(), {}, b[2].doubles(), {});
    return std::max(difference(o[0].doubles(), g.da), difference(o[1].doubles(), g.dx));
  };
  return b;
}

std::int64_t saved_state_floats(Shape s, std::int64_t parts) {
  return s.batch * recurrence::saved_state_count(s.time) * s.channels * parts;
}

oracle::PolarGateLoopInputs polar_gate_loop_inputs(const std::vector<Floats>& in) {
  return {in[0].doubles(), in[1].doubles(), in[2].doubles(), in[3].pairs(), {}};
}

Bound polar_gate_loop_forward(Shape s) {
  Bound b = arrays(s, {1, 1, 1, 2}, {1});
  b.in[3].fill(9, -4, 4);
  recurrence::PolarGateLoop p;
  p.shape = s;
  p.q = in(b, 0);
  p.k = in(b, 1);
  p.v = in(b, 2);
  p.z = in(b, 3, 2);
  p.y = out(b, 0);
  bind(b, p);
  b.error = [&b = b.in, &o = b.out, s] {
    return difference(o[0].doubles(),
                      oracle::polar_gate_loop(dims(s), false, polar_gate_loop_inputs(b)).y);
  };
  return b;
}

Bound polar_gate_loop_backward(Shape s) {
  Bound b = arrays(s, {1, 1, 1, 2, 1}, {1, 1, 1, 2});
  b.in[3].fill(9, -4, 4);
  b.states.emplace_back(saved_state_floats(s, 2));
  recurrence::PolarGateLoop forward;
  forward.shape = s;
  forward.q = in(b, 0);
  forward.k = in(b, 1);
  forward.v = in(b, 2);
  forward.z = in(b, 3, 2);
  forward.y = out(b, 0);
  forward.saved_states = b.states[0].get();
  run_once(forward);
  recurrence::PolarGateLoopBackward p;
  p.shape = s;
  p.q = forward.q;
  p.k = forward.k;
  p.v = forward.v;
  p.z = forward.z;
  p.dy = in(b, 4);
  p.saved_states = forward.saved_states;
  p.dq = out(b, 0);
  p.dk = out(b, 1);
  p.dv = out(b, 2);
  p.dz = out(b, 3, 2);
  bind(b, p);
  b.error = [&b = b.in, &o = b.out, s] {
    const auto g = oracle::polar_gate_loop_backward(dims(s), false, polar_gate_loop_inputs(b),
                                                    b[4].doubles(), {});
    return std::max({difference(o[0].doubles(), g.dq), difference(o[1].doubles(), g.dk),
                     difference(o[2].doubles(), g.dv), difference(o[3].doubles(), reals(g.dz))});
  };
  return b;
}

oracle::SimpleInputs simple_inputs(const std::vector<Floats>& in) {
  return {in[0].doubles(), in[1].doubles(), in[2].doubles(), {}};
}

Bound simple_forward(Shape s) {
  Bound b = arrays(s, {1, 1, 1}, {1});
  b.in[2].fill(9, -2, 6);
  recurrence::SimpleGateLoop p;
  p.shape = s;
  p.q = in(b, 0);
  p.kv = in(b, 1);
  p.z = in(b, 2);
  p.y = out(b, 0);
  bind(b, p);
  b.error = [&b = b.in, &o = b.out, s] {
    return difference(o[0].doubles(),
                      oracle::simple_gate_loop(dims(s), false, false, simple_inputs(b)).y);
  };
  return b;
}

Bound simple_backward(Shape s) {
  Bound b = arrays(s, {1, 1, 1, 1}, {1, 1, 1});
  b.in[2].fill(9, -2, 6);
  b.states.emplace_back(saved_state_floats(s, 1));
  recurrence::SimpleGateLoop forward;
  forward.shape = s;
  forward.q = in(b, 0);
  forward.kv = in(b, 1);
  forward.z = in(b, 2);
  forward.y = out(b, 0);
  forward.saved_states = b.states[0].get();
  run_once(forward);
  recurrence::SimpleGateLoopBackward p;
  p.shape = s;
  p.q = forward.q;
  p.kv = forward.kv;
  p.z = forward.z;
  p.dy = in(b, 3);
  p.saved_states = forward.saved_states;
  p.dq = out(b, 0);
  p.dkv = out(b, 1);
  p.dz = out(b, 2);
  bind(b, p);
  b.error = [&b = b.in, &o = b.out, s] {
    const auto g = oracle::simple_gate_loop_backward(dims(s), false, false, simple_inputs(b),
                                                     b[3].doubles(), {});
    return std::max({difference(o[0].doubles(), g.dq), difference(o[1].doubles(), g.dkv),
                     difference(o[2].doubles(), g.dz)});
  };
  return b;
}

// ---------------------------------------------------------------- measuring

/// Smallest wall and processor time of the rounds so far.
struct Best {
  double wall = 1e9, cpu = 1e9;

  template <class F>
  double round(const F& f) {
    const auto start = std::chrono::steady_clock::now();
    const std::clock_t cpu_start = std::clock();
    f();
    const double used = static_cast<double>(std::clock() - cpu_start) / CLOCKS_PER_SEC;
    const double taken =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    cpu = std::min(cpu, used);
    wall = std::min(wall, taken);
    return taken;
  }
};

/// Complex arrays count as two of n floats.
void elementwise(const Bound& b, const recurrence::Executor& executor, bool stream) {
  const std::int64_t n = b.shape.batch * b.shape.time * b.shape.channels;
  std::vector<const float*> in;
  std::vector<float*> out;
  for (const Floats& f : b.in) {
    for (std::int64_t i = 0; i < f.size(); i += n) in.push_back(f.get() + i);
  }
  for (const Floats& f : b.out) {
    for (std::int64_t i = 0; i < f.size(); i += n) out.push_back(f.get() + i);
  }
  const std::int64_t threads = executor.threads, part = n / threads / 16 * 16;
  executor.parallel_for(threads, [&](std::int64_t i) {
    HWY_DYNAMIC_DISPATCH(Elementwise)
    (in.data(), static_cast<int>(in.size()), out.data(), static_cast<int>(out.size()), i * part,
     i + 1 == threads ? n : (i + 1) * part, stream);
  });
}

using Maker = Bound (*)(Shape);

void measure(benchmark::State& state, Maker make, Shape shape) {
  const int threads = thread_count();
  Pool pool(threads);
  const recurrence::Executor executor{
      threads, [&](std::int64_t n, const std::function<void(std::int64_t)>& body) {
        pool.parallel_for(n, body);
      }};
  {
    const Bound small = make({3, 131, 48});
    small.run(executor, recurrence::Scratch().bytes(small.scratch_bytes(threads)));
    if (!(small.error() < 1e-4)) {
      state.SkipWithError("differs from the oracle");
      return;
    }
  }
  const Bound bound = make(shape);
  recurrence::Scratch memory, memory_of_one;
  void* const scratch = memory.bytes(bound.scratch_bytes(threads));
  void* const single = memory_of_one.bytes(bound.scratch_bytes(1));
  Best kernel, one, ordinary, streaming;
  for (auto _ : state) {
    state.SetIterationTime(kernel.round([&] { bound.run(executor, scratch); }));
    ordinary.round([&] { elementwise(bound, executor, false); });
    one.round([&] { bound.run({}, single); });
  }
  // Apart: it throws the outputs out of the cache, where the others would look for them.
  for (int i = 0; i < 15; ++i) streaming.round([&] { elementwise(bound, executor, true); });
  state.counters["ms"] = 1e3 * kernel.wall;
  state.counters["floor_ms"] = 1e3 * std::min(ordinary.wall, streaming.wall);
  state.counters["threads"] = threads;
  state.counters["ratio"] = kernel.wall / std::min(ordinary.wall, streaming.wall);
  state.counters["cpu_ratio"] = kernel.cpu / std::min(ordinary.cpu, streaming.cpu);
  state.counters["speedup"] = one.wall / kernel.wall;  // over one thread
}

void add(const std::string& op, Maker make, Shape s) {
  const std::string name = op + "/" + std::to_string(s.batch) + "x" + std::to_string(s.time) + "x" +
                           std::to_string(s.channels);
  benchmark::RegisterBenchmark(name.c_str(), measure, make, s)
      ->UseManualTime()
      ->Unit(benchmark::kMillisecond)
      ->Iterations(15);
}

}  // namespace
}  // namespace gateloop::bench

int main(int argc, char** argv) {
  using namespace gateloop::bench;
  const std::pair<const char*, Maker> ops[] = {
      {"LinearRecurrence", linear_forward},  {"LinearRecurrenceBackward", linear_backward},
      {"GateLoop", polar_gate_loop_forward}, {"GateLoopBackward", polar_gate_loop_backward},
      {"SimpleGateLoop", simple_forward},    {"SimpleGateLoopBackward", simple_backward}};
  const Shape shapes[] = {{1, 65536, 512}, {4, 256, 512},   {16, 16384, 128},
                          {8192, 8, 64},   {8, 4096, 1536}, {1, 1 << 20, 8}};
  for (const auto& [name, make] : ops) {
    for (const Shape& shape : shapes) add(name, make, shape);
  }
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
#endif
