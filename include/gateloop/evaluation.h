#pragma once

/// Bits per byte of a text: under a model in training, in windows, and under a saved one by several
/// processes. In one, runtime::evaluate reads a saved model faster than its modules would.
#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <span>

#include "gateloop/distributed.h"
#include "gateloop/nn/transformer.h"
#include "gateloop/runtime.h"

namespace gateloop::training {

using runtime::Score;

struct EvaluationOptions {
  /// Window of evaluate_windows: bytes predicted from one zero state.
  std::int64_t length = 256;
  /// evaluate_windows: only this many whole windows, evenly spaced, the same at every call; 0, or
  /// more than there are: all.
  std::int64_t windows = 0;
  /// Byte that begins a document: the state starts anew before each, in a window too.
  std::optional<std::uint8_t> separator = std::nullopt;
  /// Bytes in one forward pass, B x T; bounds the memory: windows are batched up to it. At 8192 the
  /// widest activation of the enwik8 preset (8192 x 2048 float32) holds 64 MB.
  std::int64_t bytes_per_pass = 8192;
  /// kBFloat16 and kHalf: the passes run under autocast, as in training, with the
  /// weights as they are; kFloat32: without autocast, whatever the caller has set.
  torch::ScalarType dtype = torch::kFloat32;
  /// Called after each pass with the bytes that this process has predicted so far and in all.
  std::function<void(std::int64_t done, std::int64_t total)> progress;
};

/// Whole windows in a text: `length` bytes read, each predicting the next.
std::int64_t window_count(std::span<const std::uint8_t> text, std::int64_t length);

/// Window i starts from zero state, reads text[i L .. i L + L - 1] and predicts the byte after
/// each, where L is `length`; the last window may be shorter. The model is in eval mode meanwhile
/// and no gradient is recorded.
/// Throws std::invalid_argument for a text shorter than two bytes, a byte outside the model's
/// vocabulary, or options below one.
///
/// Every process of `communicator` calls it with the same text; each computes a part of the
/// windows, and all have the score of the whole.
Score evaluate_windows(nn::Transformer model, std::span<const std::uint8_t> text,
                       const EvaluationOptions& options = {},
                       const distributed::Communicator& communicator = {});

/// What runtime::evaluate(reader, text, options) returns, up to rounding, from all processes of
/// `communicator`. Each calls it with the same model, text and options, and has the result.
///
/// A process reads whole windows, or documents, one part of them of as many bytes as the others'.
/// Without windows, all processes together read a stretch longer than `bytes_at_once` bytes a
/// process. This is so where the model has no full attention. They read it in blocks of so many
/// bytes: each process a part of a block, and the state goes on from block to block. That takes
/// modules of the reader's model, which `modules` returns; it is called for such a text alone.
///
/// Processes tell each other how far they are, every 2 s or each quarter of the communicator's
/// time-out: none waits for another longer than that takes for a pass. `progress` is called so
/// often, and after each block. It gets the bytes that all have read and those of the text. Throws
/// as runtime::evaluate(), and as the communicator where a process ends.
Score evaluate_over_processes(runtime::Reader& reader,
                              const std::function<nn::Transformer()>& modules,
                              std::span<const std::uint8_t> text,
                              const runtime::EvaluateOptions& options,
                              const distributed::Communicator& communicator);

}  // namespace gateloop::training
