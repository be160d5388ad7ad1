#include "nn/packing.h"

#include "distributed/group.h"
#include "ops/checks.h"
#include "ops/offsets.h"

namespace gateloop::nn {
namespace {

using torch::Tensor;

constexpr std::int64_t kIgnored = -100;

Places places_of_packed(const Tensor& cu_seqlens, const Tensor& x, std::int64_t begin) {
  const auto cuts = cu_seqlens.to(torch::kLong);
  const auto steps = at::arange(begin, begin + x.size(1), cuts.options());
  const auto sequence = at::searchsorted(cuts, steps, /*out_int32=*/false, /*right=*/true) - 1;
  const auto position = steps - cuts.index_select(0, sequence);
  return {sequence.unsqueeze(0).to(x.device()), position.unsqueeze(0).to(x.device())};
}

Places places_of_padded(const Tensor& mask) {
  const auto steps = at::arange(mask.size(1), mask.options().dtype(torch::kLong));
  return {at::where(mask, at::zeros_like(steps), -1 - steps), (mask.cumsum(1) - 1).clamp_min(0)};
}

}  // namespace

void check_packing(const char* module, const char* name, const Tensor& x, const Packing& packing) {
  ops::check_cu_seqlens(module, name, x, packing.cu_seqlens);
  ops::check_mask(module, name, x, packing.mask, packing.cu_seqlens);
  // Of the whole, whose length the recurrences gather.
  if (packing.time_group.empty() && ops::is_given(packing.cu_seqlens) &&
      packing.cu_seqlens->is_cpu()) {
    ops::sequence_offsets(module, packing.cu_seqlens, x.size(1));
  }
}

Extent Extent::of(const char* module, const Tensor& x, const Packing& packing) {
  if (packing.time_group.empty()) return {.before = 0, .all = x.size(1)};
  const auto group = distributed::find_group(module, packing.time_group);
  const Tensor time = at::full({}, x.size(1), x.options().dtype(torch::kLong));
  Extent extent;
  int rank = 0;
  for (const auto& block : distributed::Gathering(*group, {time}).wait()) {
    const auto steps = block[0].item().toLong();
    if (rank++ < group->getRank()) extent.before += steps;
    extent.all += steps;
  }
  return extent;
}

std::optional<Places> Places::of(const Packing& packing, const Tensor& x, std::int64_t begin) {
  if (packing.cu_seqlens) return places_of_packed(*packing.cu_seqlens, x, begin);
  if (packing.mask) return places_of_padded(*packing.mask);
  return std::nullopt;
}

Tensor Places::visible(std::int64_t window) const {
  const auto same = sequence.unsqueeze(2).eq(sequence.unsqueeze(1));
  const auto near = (position.unsqueeze(2) - position.unsqueeze(1)).lt(window);
  const auto time = sequence.size(1);
  return same.logical_and(near).logical_and(at::ones({time, time}, same.options()).tril());
}

Tensor next_tokens(const Tensor& ids, const Packing& packing, std::int64_t begin) {
  const auto time = ids.size(1);
  if (packing.mask) {
    const auto padding = packing.mask->logical_not();
    const auto real = at::arange(time, ids.options()).expand_as(ids).masked_fill(padding, time);
    const auto following = std::get<0>(real.flip(1).cummin(1)).flip(1).narrow(1, 1, time - 1);
    const auto tokens = ids.gather(1, following.clamp_max(time - 1));
    return tokens.masked_fill(padding.narrow(1, 0, time - 1).logical_or(following.eq(time)),
                              kIgnored);
  }
  auto tokens = ids.narrow(1, 1, time - 1);
  if (!packing.cu_seqlens) return tokens;
  const auto sequence = places_of_packed(*packing.cu_seqlens, ids, begin).sequence;
  const auto ends = sequence.narrow(1, 1, time - 1).ne(sequence.narrow(1, 0, time - 1));
  return tokens.masked_fill(ends, kIgnored);
}

TokensOver next_tokens_over_group(const Tensor& ids, const Packing& packing) {
  const auto time = ids.size(1);
  const auto real = packing.mask ? *packing.mask : at::ones_like(ids, at::kBool);
  // Of each row the first token that is no padding, if there is one.
  auto first = ids.new_full({ids.size(0)}, kIgnored);
  if (time > 0) {
    first = ids.gather(1, real.to(at::kInt).argmax(1, /*keepdim=*/true)).squeeze(1);
    first = first.masked_fill(real.any(1).logical_not(), kIgnored);
  }
  const auto group = distributed::find_group("Transformer", packing.time_group);
  const auto blocks =
      distributed::Gathering(*group, {first, at::full({}, time, ids.options())}).wait();
  const auto rank = static_cast<std::size_t>(group->getRank());
  std::int64_t begin = 0;
  for (std::size_t i = 0; i < rank; ++i) begin += blocks[i][1].item().toLong();
  auto following = at::full_like(first, kIgnored);
  for (std::size_t i = blocks.size() - 1; i > rank; --i) {
    following = at::where(blocks[i][0].ge(0), blocks[i][0], following);
  }
  following = following.unsqueeze(1);
  const auto missing = following.lt(0);

  Packing longer{.cu_seqlens = packing.cu_seqlens};
  if (packing.mask) longer.mask = at::cat({*packing.mask, missing.logical_not()}, 1);
  auto next = next_tokens(at::cat({ids, following.clamp_min(0)}, 1), longer, begin).clone();
  if (time > 0) next.narrow(1, time - 1, 1).masked_fill_(missing, kIgnored);
  auto count = at::zeros({}, ids.options());
  for (const auto& block : distributed::Gathering(*group, {next.ne(kIgnored).sum()}).wait()) {
    count += block[0];
  }
  return {next, count};
}

Tensor pairs_of_blocks(const Tensor& sequence, std::int64_t past, std::int64_t blocks,
                       std::int64_t window) {
  const auto missing = blocks * window + past - sequence.size(0);
  const auto whole =
      at::constant_pad_nd(sequence, {window - past, missing}, -1).view({blocks + 1, window});
  const auto queries = whole.narrow(0, 1, blocks);
  const auto keys = at::cat({whole.narrow(0, 0, blocks), queries}, 1);
  return queries.unsqueeze(2).eq(keys.unsqueeze(1));
}

}  // namespace gateloop::nn
