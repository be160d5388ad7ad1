// Operations on rows of float32, one call each.
#include <algorithm>

#include "recurrence/inference.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "recurrence/cpu/inference_rows.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include "recurrence/cpu/gates-inl.h"
#include "recurrence/cpu/rows-inl.h"

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {

void RmsNormOfRow(const float* x, const float* gain, std::int64_t n, float* to) {
  RmsNormRow(x, gain, n, to);
}
void LayerNormOfRow(const float* x, const float* gain, const float* bias, std::int64_t n,
                    float* to) {
  LayerNormRow(x, gain, bias, n, to);
}
void GeluOfRow(float* x, std::int64_t n) { GeluRow(x, n); }
void SwishOfRow(float* x, std::int64_t n) { Swish(x, n); }
void AddToRow(const float* from, float* to, std::int64_t n) { AddRow(from, to, n); }
void MultiplyIntoRow(const float* from, float* to, std::int64_t n) { MultiplyRow(from, to, n); }

void PolarGateRow(const float* z, float* a, std::int64_t n) {
  ForEachVector<float>(n, [&](auto d, std::int64_t c) HWY_ATTR {
    Store(d, MakePolarGate(d, Load<Complex<decltype(d)>>(d, z, c)).a, a, c);
  });
}

void SigmoidRow(const float* z, float* a, float* rest, std::int64_t n) {
  ForEachVector<float>(n, [&](auto d, std::int64_t c) HWY_ATTR {
    const auto gate = MakeSigmoidGate(d, Load<Real<decltype(d)>>(d, z, c));
    Store(d, gate.a, a, c);
    Store(d, gate.rest, rest, c);
  });
}

/// Row i of the state is read and written once; y gathers q_i times its real part.
void RunHeadStep(const HeadStep& p) {
  const int parts = p.complex ? 2 : 1;
  std::fill_n(p.y, p.values, 0.0f);
  for (std::int64_t i = 0; i < p.keys; ++i) {
    const float* const a = p.a + (p.per_key ? i * parts : 0);
    const float im_of_a = p.complex ? a[1] : 0;
    float* const re_row = p.state + i * p.values;
    float* const im_row = re_row + p.keys * p.values;
    ForEachVector<float>(p.values, [&](auto d, std::int64_t c) HWY_ATTR {
      const auto a_re = hn::Set(d, a[0]), a_im = hn::Set(d, im_of_a);
      const auto re = hn::LoadU(d, re_row + c);
      const auto input = hn::Mul(hn::Set(d, p.k[i]), hn::LoadU(d, p.v + c));
      auto next = hn::MulAdd(a_re, re, input);
      if (p.complex) {
        const auto im = hn::LoadU(d, im_row + c);
        next = hn::NegMulAdd(a_im, im, next);
        hn::StoreU(hn::MulAdd(a_re, im, hn::Mul(a_im, re)), d, im_row + c);
      }
      hn::StoreU(next, d, re_row + c);
      hn::StoreU(hn::MulAdd(hn::Set(d, p.q[i]), next, hn::LoadU(d, p.y + c)), d, p.y + c);
    });
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace gateloop::recurrence {
namespace cpu {
HWY_EXPORT(RmsNormOfRow);
HWY_EXPORT(LayerNormOfRow);
HWY_EXPORT(GeluOfRow);
HWY_EXPORT(SwishOfRow);
HWY_EXPORT(AddToRow);
HWY_EXPORT(MultiplyIntoRow);
HWY_EXPORT(PolarGateRow);
HWY_EXPORT(SigmoidRow);
HWY_EXPORT(RunHeadStep);
}  // namespace cpu

using namespace cpu;

void rms_norm_row(const float* x, const float* gain, std::int64_t n, float* to) {
  HWY_DYNAMIC_DISPATCH(RmsNormOfRow)(x, gain, n, to);
}
void layer_norm_row(const float* x, const float* gain, const float* bias, std::int64_t n,
                    float* to) {
  HWY_DYNAMIC_DISPATCH(LayerNormOfRow)(x, gain, bias, n, to);
}
void gelu_row(float* x, std::int64_t n) { HWY_DYNAMIC_DISPATCH(GeluOfRow)(x, n); }
void swish_row(float* x, std::int64_t n) { HWY_DYNAMIC_DISPATCH(SwishOfRow)(x, n); }
void add_row(const float* from, float* to, std::int64_t n) {
  HWY_DYNAMIC_DISPATCH(AddToRow)(from, to, n);
}
void multiply_row(const float* from, float* to, std::int64_t n) {
  HWY_DYNAMIC_DISPATCH(MultiplyIntoRow)(from, to, n);
}
void polar_gate_row(const float* z, float* a, std::int64_t n) {
  HWY_DYNAMIC_DISPATCH(PolarGateRow)(z, a, n);
}
void sigmoid_row(const float* z, float* a, float* rest, std::int64_t n) {
  HWY_DYNAMIC_DISPATCH(SigmoidRow)(z, a, rest, n);
}
void run(const HeadStep& p) { HWY_DYNAMIC_DISPATCH(RunHeadStep)(p); }

}  // namespace gateloop::recurrence
#endif
