// The special-function unit of a GPU, and a division made of it.
#pragma once

#include <cmath>

#include "floats.h"

namespace fused_sce {

// A GPU's special-function unit. On a CPU the same functions by the standard library.
struct SpecialFunctions {
  // 2^x, within 2 ULP (which is what the CUDA C++ Programming Guide says of exp2f, made of it); a result below the
  // smallest normal number is 0.
  FUSED_SCE_INLINE float exp2(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return x < -126.0f ? 0.0f : std::exp2(x);
#endif
  }

  // 1 / x for x in [1, 2], within 1 ULP.
  FUSED_SCE_INLINE float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return 1.0f / x;
#endif
  }
};

// e / divisor, rounded once as IEEE 754 wants it, for e in [0, 1] and divisor = 1 + e, rounded.
FUSED_SCE_INLINE double quotient(double e, double divisor) { return e / divisor; }

template <class Unit = SpecialFunctions>
FUSED_SCE_INLINE float quotient_by_steps(float e, float divisor) {
  // P. Markstein's (1990): one step of Newton's for the reciprocal, one for the quotient. What a compiler makes of `/`
  // also asks whether the operands are in range, which costs as much again. Where e is so small that the residual might
  // underflow, the divisor is 1 and the residual 0. tests/cpp/cuda_threads.cpp compares with `/`.
  const float guess = Unit::reciprocal(divisor);
  const float reciprocal = mul_add(guess, mul_add(-divisor, guess, 1.0f), guess);
  const float rounded = e * reciprocal;
  return mul_add(mul_add(-divisor, rounded, e), reciprocal, rounded);
}

FUSED_SCE_INLINE float quotient(float e, float divisor) {
#if defined(__CUDA_ARCH__)
  return quotient_by_steps(e, divisor);
#else
  return e / divisor;
#endif
}

}  // namespace fused_sce
