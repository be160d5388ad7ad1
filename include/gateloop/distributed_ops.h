#pragma once

/// The recurrences of gateloop/ops.h over one sequence that lies in blocks on the processes of a
/// c10d group: rank 0 holds the first steps, the next rank those that follow, and so on. Blocks may
/// differ in length and may be empty. Each process passes its block and gets its block of the
/// outputs. In Python these are the functions of gateloop_cpp.distributed.
///
/// All processes of the group call a function together and in the same order. Options are the same
/// on all, and so are shapes but for T. If one runs the backward pass, all do.
#include <ATen/ATen.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

namespace gateloop::time_sharded {

// Arguments of all functions, where they differ from those in gateloop/ops.h:
//
// group:         name of the process group, as c10d::register_process_group() was given it, which
//                does not own the group (Python: group.group_name).
// initial_state: before the first step of the whole sequence. The process that reads that step uses
//                it: rank 0, or with reverse the last rank. The others may leave it out. Its
//                gradient arrives there, and zeros on the other processes.
// cu_seqlens:    (N + 1), of the whole packed sequence, the same on every process.
// mask:          (B, T) of this process's block.
//
// The final state is that of the whole sequence, the same on every process. As for
// torch.distributed's collectives, the loss is the sum of what the processes call backward on: a
// final state that each of them uses receives the sum of their gradients.
//
// A block sends a state and the product of its transitions. On the way back it sends the gradient
// of a state and one more product. All are in the dtype of states, and their size does not depend
// on T. Where the products of a block's first and last steps underflow to zero, these steps alone
// are read twice. Gates below one make such products. Else the block is read three times, and twice
// on the way back.
//
// Differentiable once. Throws c10::Error naming the operator and the argument.

/// See gateloop::linear_recurrence. Returns (h (B, T, D), final_state (B or N, D)).
std::tuple<at::Tensor, at::Tensor> linear_recurrence(
    const at::Tensor& a, const at::Tensor& x, const std::string& group,
    const std::optional<at::Tensor>& initial_state = std::nullopt, bool reverse = false,
    const std::optional<at::Tensor>& cu_seqlens = std::nullopt,
    const std::optional<at::Tensor>& mask = std::nullopt);

/// See gateloop::gate_loop; in the form that it takes by default.
/// Returns (y (B, T, D) or (B, T, H, V), final_state (B or N, D) or (B or N, H, K, V)).
std::tuple<at::Tensor, at::Tensor> gate_loop(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& a,
    const std::string& group, const std::optional<at::Tensor>& initial_state = std::nullopt,
    bool reverse = false, const std::optional<at::Tensor>& cu_seqlens = std::nullopt,
    const std::optional<at::Tensor>& mask = std::nullopt, c10::string_view feature_map = "none");

/// See gateloop::polar_gate_loop. Returns (y (B, T, D), final_state (B or N, D) complex).
std::tuple<at::Tensor, at::Tensor> polar_gate_loop(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& z,
    const std::string& group, const std::optional<at::Tensor>& initial_state = std::nullopt,
    bool reverse = false, const std::optional<at::Tensor>& cu_seqlens = std::nullopt,
    const std::optional<at::Tensor>& mask = std::nullopt);

/// See gateloop::simple_gate_loop. Returns (y (B, T, D), final_state (B or N, D)).
std::tuple<at::Tensor, at::Tensor> simple_gate_loop(
    const at::Tensor& q, const at::Tensor& kv, const at::Tensor& z, const std::string& group,
    const std::optional<at::Tensor>& initial_state = std::nullopt, bool reverse = false,
    bool normalize_input = false, const std::optional<at::Tensor>& cu_seqlens = std::nullopt,
    const std::optional<at::Tensor>& mask = std::nullopt);

/// What attention over a window reads of the blocks before this one.
///
/// last: (B, min(time, steps), ...), the last steps of this block of `time` steps.
/// Returns (the last min(steps, begin) steps before this block (B, ..., ...), begin: the number of
/// steps before this block). Differentiable once.
std::tuple<at::Tensor, std::int64_t> steps_before(const at::Tensor& last, std::int64_t time,
                                                  std::int64_t steps, const std::string& group);

}  // namespace gateloop::time_sharded
