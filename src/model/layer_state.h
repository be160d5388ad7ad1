#pragma once

#include <cstdint>

#include "gateloop/model.h"

namespace gateloop::model {

/// Numbers of a layer's state for one sequence.
struct LayerStateSizes {
  std::int64_t simple = 0;      ///< of the simple gate loop in front
  std::int64_t recurrence = 0;  ///< real numbers
  std::int64_t heads = 0;       ///< of attention; 0 without
  std::int64_t dim_head = 0;
  std::int64_t window = 0;  ///< the most steps kept; 0: all
};
LayerStateSizes layer_state_sizes(const ModelSpec& spec, const LayerSpec& layer);

}  // namespace gateloop::model
