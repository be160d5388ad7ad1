#pragma once

/// What a training step does to rows beside recurrences and products, one pass each way. Wide
/// numbers are those of states: float32, and float64 beside float64.
#include <cstddef>
#include <cstdint>

#include "gateloop/recurrence.h"

namespace gateloop::recurrence {

/// RmsNorm's, or torch's LayerNorm with its ε of 1e-5 and a bias.
enum class Norm : std::uint8_t { kRms, kLayer };

/// A residual connection and a norm of it: sum = x + y, normalised = norm(sum), row by row.
/// All of (rows, columns), contiguous; gain and bias (columns), wide.
struct ResidualNorm {
  DType dtype = DType::kFloat32;  ///< of y and normalised, not complex; the rest is wide
  Norm norm = Norm::kRms;
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  const void* x = nullptr;
  const void* y = nullptr;  ///< null: zeros
  const void* gain = nullptr;
  const void* bias = nullptr;       ///< of kLayer
  void* sum = nullptr;              ///< not used where y is null
  void* normalised = nullptr;       ///< null: not written
  void* normalised_wide = nullptr;  ///< before it is rounded to dtype; null: not written
};

/// Adjoint of ResidualNorm; the statistics of rows are computed again. A Euclidean norm below
/// RmsNorm's ε counts as constant.
struct ResidualNormBackward {
  DType dtype = DType::kFloat32;
  Norm norm = Norm::kRms;
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  const void* sum = nullptr;
  const void* gain = nullptr;
  const void* dsum = nullptr;  ///< of these three at least one; null: zeros
  const void* dnormalised = nullptr;
  const void* dnormalised_wide = nullptr;
  void* dx = nullptr;
  void* dy = nullptr;     ///< dx rounded to dtype; null: not written
  void* dgain = nullptr;  ///< (columns), wide
  void* dbias = nullptr;  ///< of kLayer
};

/// y = x Φ(x), Φ the normal distribution's (Hendrycks & Gimpel 2016, the exact form). All of
/// (elements), contiguous, in `dtype`, not complex.
struct Gelu {
  DType dtype = DType::kFloat32;
  std::int64_t elements = 0;
  const void* x = nullptr;
  void* y = nullptr;
};

struct GeluBackward {
  DType dtype = DType::kFloat32;
  std::int64_t elements = 0;
  const void* x = nullptr;
  const void* dy = nullptr;
  void* dx = nullptr;
};

/// y = g σ(g) x, not rounded between; σ is at least 1e-38 in float32. All of (elements),
/// contiguous, in `dtype`, not complex.
struct SwishGate {
  DType dtype = DType::kFloat32;
  std::int64_t elements = 0;
  const void* g = nullptr;
  const void* x = nullptr;
  void* y = nullptr;
};

struct SwishGateBackward {
  DType dtype = DType::kFloat32;
  std::int64_t elements = 0;
  const void* g = nullptr;
  const void* x = nullptr;
  const void* dy = nullptr;
  void* dg = nullptr;
  void* dx = nullptr;
};

std::size_t scratch_bytes(const ResidualNorm&, int threads);
std::size_t scratch_bytes(const ResidualNormBackward&, int threads);
std::size_t scratch_bytes(const Gelu&, int threads);
std::size_t scratch_bytes(const GeluBackward&, int threads);
std::size_t scratch_bytes(const SwishGate&, int threads);
std::size_t scratch_bytes(const SwishGateBackward&, int threads);
/// Throws std::invalid_argument for a complex dtype and for negative sizes.
void run(const ResidualNorm&, const Executor&, void* scratch);
void run(const ResidualNormBackward&, const Executor&, void* scratch);
void run(const Gelu&, const Executor&, void* scratch);
void run(const GeluBackward&, const Executor&, void* scratch);
void run(const SwishGate&, const Executor&, void* scratch);
void run(const SwishGateBackward&, const Executor&, void* scratch);

}  // namespace gateloop::recurrence
