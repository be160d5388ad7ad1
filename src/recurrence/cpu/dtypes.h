#pragma once

/// Sizes of the storage types, and the checks of arguments.
#include <algorithm>
#include <cstddef>
#include <functional>
#include <stdexcept>
#include <string>

#include "gateloop/recurrence.h"
#include "recurrence/cpu/schedule.h"

namespace gateloop::recurrence::cpu {

inline const char* name(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kFloat64:
      return "float64";
    case DType::kComplex64:
      return "complex64";
    case DType::kComplex128:
      return "complex128";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat16:
      return "float16";
  }
  return "no dtype";
}

/// Of a value that is none of DType's, or of one that the caller does not take.
[[noreturn]] inline void throw_dtype(DType dtype) {
  throw std::invalid_argument(std::string("gateloop: no kernel for dtype ") + name(dtype));
}

constexpr bool is_complex(DType dtype) {
  return dtype == DType::kComplex64 || dtype == DType::kComplex128;
}

/// Bytes of one real number as stored.
constexpr std::size_t storage_bytes(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
    case DType::kFloat32:
    case DType::kComplex64:
      return 4;
    case DType::kFloat64:
    case DType::kComplex128:
      return 8;
  }
  throw_dtype(dtype);
}

/// Bytes of one real number in the state, which is float32 or float64.
constexpr std::size_t accumulation_bytes(DType dtype) {
  return std::max(storage_bytes(dtype), sizeof(float));
}

inline void check(const char* op, const Shape& shape, DType dtype, bool complex_allowed) {
  if (dtype > DType::kFloat16 || (is_complex(dtype) && !complex_allowed)) {
    throw std::invalid_argument(
        std::string(op) + ": dtype must be float32, float64, bfloat16" +
        (complex_allowed ? ", float16, complex64 or complex128, got " : " or float16, got ") +
        name(dtype));
  }
  if (shape.batch < 0 || shape.time < 0 || shape.channels < 0) {
    throw std::invalid_argument(std::string(op) + ": shape must be non-negative, got (" +
                                std::to_string(shape.batch) + ", " + std::to_string(shape.time) +
                                ", " + std::to_string(shape.channels) + ")");
  }
}

/// `offsets`, if given, cut the time of one batch entry into sequences.
inline void check(const char* op, const Shape& shape, Offsets offsets) {
  if (offsets.empty()) return;
  const auto refuse = [op](const std::string& what) {
    throw std::invalid_argument(std::string(op) + ": " + what);
  };
  if (shape.batch != 1) {
    refuse("shape.batch must be 1 beside offsets, got " + std::to_string(shape.batch));
  }
  if (offsets.front() != 0) {
    refuse("offsets must begin with 0, got " + std::to_string(offsets.front()));
  }
  if (offsets.back() != shape.time) {
    refuse("offsets must end with the time " + std::to_string(shape.time) + ", got " +
           std::to_string(offsets.back()));
  }
  if (const auto at = std::adjacent_find(offsets.begin(), offsets.end(), std::greater<>());
      at != offsets.end()) {
    refuse("offsets must not decrease, got " + std::to_string(at[1]) + " after " +
           std::to_string(at[0]));
  }
}

/// What the scheduler reads of any operation, checked; `carry_parts` reals make one channel of
/// its carry: the state, or in a backward operation its gradient.
template <class Params>
Problem sized_problem(const char* op, const Params& p, bool complex_allowed,
                      std::size_t carry_parts) {
  check(op, p.shape, p.dtype, complex_allowed);
  check(op, p.shape, p.offsets);
  Problem problem;
  problem.shape = p.shape;
  problem.downwards = p.reverse;
  problem.storage_bytes = storage_bytes(p.dtype);
  problem.carry_bytes = carry_parts * accumulation_bytes(p.dtype);
  if constexpr (requires { p.final_state; }) {
    problem.carry_in = p.initial_state;
    problem.carry_out = p.final_state;
  } else {
    problem.adjoint = true;
    problem.carry_in = p.dfinal_state;
    problem.carry_out = p.dinitial_state;
  }
  return problem;
}

}  // namespace gateloop::recurrence::cpu
