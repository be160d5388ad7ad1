#pragma once

/// What reading a model without its gradient needs beside the scans: products with weights in the
/// format that they are stored in, and operations on rows of float32. Weights are (out, in).
///
/// As in gateloop/recurrence.h, the caller provides threads and memory. A result is the same bits
/// for any number of threads.
#include <cstddef>
#include <cstdint>

#include "gateloop/recurrence.h"

namespace gateloop::recurrence {

/// How a matrix is stored. Products accumulate in float32; those of int8 and int16 in int32,
/// exactly within a block of columns. Rows that meet bfloat16 are rounded to it first, as torch's
/// are.
enum class Storage : std::uint8_t { kFloat32, kBFloat16, kFloat16, kInt8 };
inline constexpr int kStorages = 4;

constexpr std::size_t storage_bytes(Storage storage) {
  return storage == Storage::kFloat32 ? 4 : storage == Storage::kInt8 ? 1 : 2;
}

/// (rows, columns), contiguous. Row r of int8 stands for scales[r] times its integers.
struct Matrix {
  Storage storage = Storage::kFloat32;
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  const void* data = nullptr;
  const float* scales = nullptr;  ///< (rows), int8 only
};

// ---- One row times a matrix ---------------------------------------------------------------------

/// Bytes that arrange() writes of a row of so many columns.
std::size_t arranged_bytes(Storage storage, std::int64_t columns);
/// x (columns) as dot products with this storage read it. For bfloat16 it is rounded: a relative
/// error of at most 2^-9. For int8 it is rounded to int16 with one scale for the row: an error of
/// at most 2^-16 of its largest number.
void arrange(Storage storage, const float* x, std::int64_t columns, void* arranged);
/// y[r - first] = matrix[r] · x + bias[r] for r in [first, last); bias may be null.
void multiply_rows(const Matrix& matrix, const void* arranged, std::int64_t first,
                   std::int64_t last, const float* bias, float* y);

// ---- Many rows times a matrix -------------------------------------------------------------------

/// y[m, n] = x[m] · matrix[n] + bias[n]. x: (rows, columns), y: (rows, matrix.rows), both with
/// contiguous rows `x_stride` and `y_stride` numbers apart. Rows of x are rounded as arrange()
/// does; more than four that meet int8 only where the processor multiplies pairs of int16.
struct Product {
  Matrix matrix;
  std::int64_t rows = 0;
  const float* x = nullptr;
  std::int64_t x_stride = 0;
  const float* bias = nullptr;
  float* y = nullptr;
  std::int64_t y_stride = 0;
};
std::size_t scratch_bytes(const Product&, int threads);
void run(const Product&, const Executor&, void* scratch);

// ---- Rows ---------------------------------------------------------------------------------------

/// One row of the matrix as float32.
void widen_row(const Matrix& matrix, std::int64_t row, float* to);
/// x / max(‖x‖, 1e-12) √n gain; `to` may be x.
void rms_norm_row(const float* x, const float* gain, std::int64_t n, float* to);
/// torch's LayerNorm with its ε of 1e-5; `to` may be x.
void layer_norm_row(const float* x, const float* gain, const float* bias, std::int64_t n,
                    float* to);
/// x Φ(x), in place.
void gelu_row(float* x, std::int64_t n);
/// x σ(x), in place.
void swish_row(float* x, std::int64_t n);
/// to += from.
void add_row(const float* from, float* to, std::int64_t n);
/// to *= from.
void multiply_row(const float* from, float* to, std::int64_t n);
/// (re, im) of a = σ(|z|) z/|z| from (re, im) of z, n pairs; `a` may be z.
void polar_gate_row(const float* z, float* a, std::int64_t n);
/// σ(z) and 1 - σ(z); either may be z.
void sigmoid_row(const float* z, float* a, float* rest, std::int64_t n);

/// One step of one head of K keys and V values: S = a S + k^T v, y = q Re(S). q, k: (K), v, y: (V).
/// a: one transition, or if `per_key` K, in (re, im) pairs if `complex`. The state is (1 or 2, K,
/// V), its imaginary part, where it has one, after its real part.
struct HeadStep {
  std::int64_t keys = 0;
  std::int64_t values = 0;
  bool complex = true;
  bool per_key = false;
  const float* a = nullptr;
  const float* q = nullptr;
  const float* k = nullptr;
  const float* v = nullptr;
  float* state = nullptr;
  float* y = nullptr;
};
void run(const HeadStep&);

/// Causal attention of one head over what is stored of the steps so far: query m reads the first
/// `count` + m keys, or the last `window` of these, y_m = Σ_s w_s v_s. w_s: q_m · k_s / √dim_head,
/// or the softmax of these.
struct AttentionHead {
  std::int64_t queries = 1;
  std::int64_t count = 1;
  std::int64_t window = 0;  ///< 0: all
  std::int64_t dim_head = 0;
  bool softmax = true;
  const float* q = nullptr;  ///< (queries, dim_head), rows q_stride apart
  std::int64_t q_stride = 0;
  const float* keys = nullptr;  ///< (count + queries - 1, dim_head)
  const float* values = nullptr;
  float* y = nullptr;  ///< (queries, dim_head), rows y_stride apart
  std::int64_t y_stride = 0;
};
/// Numbers of `scratch`; `queries`, `count` and `window` alone say how many.
std::int64_t scratch_numbers(const AttentionHead&);
void run(const AttentionHead&, float* scratch);

}  // namespace gateloop::recurrence
