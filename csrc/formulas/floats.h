// Floating-point operations: those with the same result on every compiler and processor, and the special-function unit
// of a GPU with a division that uses it.
//
// Every a*b+c that may be one instruction is written as mul_add, and compilers must not contract others
// (-ffp-contract=off). So a CPU with fused multiply-add and a GPU compute the same bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../macros.h"

namespace fused_sce {

// a b + c, rounded once where FUSED_SCE_HAS_FMA is 1, else twice.
template <class T>
FUSED_SCE_INLINE T mul_add(T a, T b, T c) {
#if FUSED_SCE_HAS_FMA
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

// The value with the same bits, as std::bit_cast in C++20.
template <class To, class From>
FUSED_SCE_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// factor * value, and 0 where the factor is 0, whatever the value: a weight of 0 leaves out infinities and NaN.
template <class T>
FUSED_SCE_INLINE T product(T factor, T value) {
  return factor == T(0) ? T(0) : factor * value;
}

// The product of two factors, 0 if either is 0.
template <class T>
FUSED_SCE_INLINE T product_of_factors(T a, T b) {
  return b == T(0) ? T(0) : product(a, b);
}

// sum + factor * value; a factor of 0 as in product().
template <class T>
FUSED_SCE_INLINE T add_product(T sum, T factor, T value) {
  return factor == T(0) ? sum : mul_add(factor, value, sum);
}

// The unevaluated sum of a rounded value and its rounding error.
template <class T>
struct TwoPart {
  T upper;
  T lower;
};

// value (scale.upper + scale.lower)
template <class T>
FUSED_SCE_INLINE T scaled(T value, TwoPart<T> scale) {
  return mul_add(value, scale.lower, value * scale.upper);
}

// value * factor * scale, a factor of 0 as in product(). The factor is scaled first: the value alone, or scaled, may be
// too small for a normal number where the product of all three is one.
template <class T>
FUSED_SCE_INLINE T scaled_product(T factor, TwoPart<T> scale, T value) {
  return product(factor == T(0) ? T(0) : scaled(factor, scale), value);
}

// A GPU's special-function unit; on a CPU the same functions from the standard library.
struct SpecialFunctions {
  // 2^x within 2 ULP, the bound of the CUDA C++ Programming Guide for exp2f, which uses this instruction. A result
  // below the smallest normal number is 0.
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

// e / divisor for e in [0, 1] and divisor = 1 + e, rounded. The nearest float or double, as IEEE 754 defines division.
FUSED_SCE_INLINE double quotient(double e, double divisor) { return e / divisor; }

// The same by P. Markstein's method (1990): one Newton step for the reciprocal, one for the quotient. `/` would also
// check the range of the operands, which doubles the cost. Where e is so small that the residual could underflow, the
// divisor is 1 and the residual is 0. tests/test_formulas.py compares with `/`.
template <class Unit = SpecialFunctions>
FUSED_SCE_INLINE float quotient_by_steps(float e, float divisor) {
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
