#pragma once

/// Weights from one storage format to another.
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "gateloop/runtime.h"
#include "recurrence/inference.h"

namespace gateloop::runtime {

/// A matrix as stored: an element may be wider than what products read ("F64").
struct StoredMatrix {
  std::string_view dtype;
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  const std::byte* data = nullptr;
  const std::byte* scales = nullptr;  ///< (rows) of float32, "I8" only
};

/// n numbers of this dtype, of a floating kind, at any address.
void read_floats(std::string_view dtype, const std::byte* from, std::int64_t n, float* to);

/// A matrix converted; `scales` is empty but for int8.
struct Converted {
  std::vector<std::byte> data;
  std::vector<float> scales;
};
/// To the nearest number of the format, halves to even. Int8 is scale times an integer of at most
/// 127. The scale is a 127th of the row's largest number: an error of at most scale / 2.
Converted convert(const StoredMatrix& from, recurrence::Storage to);

/// The storage of a format where the file has `dtype`.
recurrence::Storage storage_of(Format format, std::string_view dtype);
/// "F32", "BF16", "F16" or "I8".
std::string dtype_of(recurrence::Storage storage);

}  // namespace gateloop::runtime
