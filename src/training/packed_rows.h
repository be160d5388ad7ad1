#pragma once

/// Rows of a text in which a state starts anew, as one packed sequence.
#include <torch/torch.h>

#include <cstdint>
#include <optional>

#include "gateloop/nn/transformer.h"

namespace gateloop::training {

/// The byte at which a state starts anew; none: only at the start of a row.
using Separator = std::optional<std::uint8_t>;

struct PackedRows {
  torch::Tensor ids;  ///< (1, B T)
  nn::Packing packing;
};

/// ids (B, T) -> the same in one row, of which a sequence begins at each row and each separator.
PackedRows pack_rows(const torch::Tensor& ids, std::uint8_t separator);

/// ids (B, T + 1) int64 -> -ln p of the bytes 1..T of each row. Each is predicted from those before
/// it since the last start of a state: the row's or a separator. A separator itself is predicted
/// from the document before it. Reduced as by cross_entropy, the softmax in at least float32.
torch::Tensor next_byte_loss(nn::Transformer& model, const torch::Tensor& ids, Separator separator,
                             at::Reduction::Reduction reduction);

}  // namespace gateloop::training
