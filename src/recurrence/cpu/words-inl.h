// What instructions multiply: words of one number or of two.
#include "recurrence/cpu/product_words.h"
#include "recurrence/cpu/vectors-inl.h"
#include "recurrence/inference.h"

#if defined(GATELOOP_RECURRENCE_CPU_WORDS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef GATELOOP_RECURRENCE_CPU_WORDS_INL_H_
#undef GATELOOP_RECURRENCE_CPU_WORDS_INL_H_
#else
#define GATELOOP_RECURRENCE_CPU_WORDS_INL_H_
#endif

HWY_BEFORE_NAMESPACE();
namespace gateloop::recurrence::cpu {
namespace HWY_NAMESPACE {

/// The words that products with this storage are made of here: pairs double the products of an
/// instruction where the processor has it. Without, weights are widened to float32.
inline Word WordOf(Storage storage) {
#if HWY_ARCH_X86 && HWY_TARGET == HWY_AVX3
  static const bool has_bfloat16 = __builtin_cpu_supports("avx512bf16") != 0;
  static const bool has_int16 = __builtin_cpu_supports("avx512vnni") != 0;
  if (storage == Storage::kBFloat16 && has_bfloat16) return Word::kTwoBFloat16;
  if (storage == Storage::kInt8 && has_int16) return Word::kTwoInt16;
#endif
  (void)storage;
  return Word::kFloat32;
}

/// sum += weight x, word by word. Highway 1.0.3 has no such instructions, and an intrinsic in a
/// function with a target of its own would not be inlined.
template <Word kWord, class V>
HWY_INLINE void AddProduct(V weight, V x, V& sum) {
  if constexpr (kWord == Word::kFloat32) {
    sum = hn::MulAdd(weight, x, sum);
  } else {
#if HWY_ARCH_X86 && HWY_TARGET == HWY_AVX3
    if constexpr (kWord == Word::kTwoBFloat16) {
      asm("vdpbf16ps %2, %1, %0" : "+v"(sum.raw) : "v"(x.raw), "v"(weight.raw));
    } else {
      asm("vpdpwssd %2, %1, %0" : "+v"(sum.raw) : "v"(x.raw), "v"(weight.raw));
    }
#endif
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace gateloop::recurrence::cpu
HWY_AFTER_NAMESPACE();

#endif  // GATELOOP_RECURRENCE_CPU_WORDS_INL_H_
