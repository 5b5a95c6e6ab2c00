// The sigmoid cross-entropy of one element and its gradient: every formula of the project, once, for CPU and CUDA.
//
//     loss(x, t) = (1 - t) softplus(x) + p t softplus(-x)          x: logit, t: target, p: pos_weight
//     gradient   = (1 - t) sigmoid(x)  - p t sigmoid(-x)           d loss / d x
//
// with softplus(x) = max(x, 0) + log1p(e), sigmoid(|x|) = 1 / (1 + e), sigmoid(-|x|) = e / (1 + e), e = exp(-|x|). All
// of them come from the one exponential of a number that is never positive, so nothing overflows, and neither tail is
// the difference of two nearly equal numbers: `sigmoid(x) - t` loses every gradient beyond |x| = 17 in float, this
// loses none.
//
// Error bounds (ULP of the result; tests/test_numerics.py and tests/cpp/sweep.cpp enforce them):
//     float:  t in {0, 1}: loss and gradient 2 ULP for every logit (the worst of all 2^32 are 1.29 and 1.02, and 1.41
//             for the loss without fused multiply-add); results below the smallest normal float within one subnormal
//             step. t in between: 4 ULP of the sum of the two non-negative terms.
//     double: the same bounds.
//     inf:    with the matching target loss and gradient are 0. NaN in x or t gives NaN.
//
// Everything is branch-free, so that compilers turn the loops of csrc/cpu into vector code, and every a*b+c that may be
// one instruction is written as mul_add: results do not depend on what a compiler chooses to contract, and a CPU with
// fused multiply-add and a GPU compute the same bits. Polynomials are evaluated by pairs (G. Estrin, 1960): as many
// operations as Horner's scheme, in half as long a chain.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "macros.h"

namespace fused_sce {

FUSED_SCE_INLINE float mul_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#elif FUSED_SCE_HAS_FMA
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

FUSED_SCE_INLINE double mul_add(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#elif FUSED_SCE_HAS_FMA
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

template <class To, class From>
FUSED_SCE_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// Constants of exp(-|x|) and log1p(e) for one type. The polynomials are minimax fits, printed by fit_polynomials.py.
template <class T>
struct Constants;

template <>
struct Constants<float> {
  using Bits = uint32_t;
  using SignedBits = int32_t;
  static constexpr int kMantissaBits = 23;
  // exp(-104) is below half of the smallest subnormal, 2^-150 = exp(-103.97): from here on the result is 0.
  static constexpr float kLargest = 104.0f;
  static constexpr float kLog2E = 1.44269504f;
  // ln 2 in two parts; the upper has 9 significant bits, so its product with n (8 bits) is exact without fused
  // multiply-add too.
  static constexpr float kLn2Upper = 0.693359375f;
  static constexpr float kLn2Lower = -2.12194440e-4f;
  // 2^n for the n of exp(-|x|), which reaches -150, is 2^(n + 64) 2^-64: the first is a normal number, and a product
  // of both with the mantissa rounds once where it is subnormal.
  static constexpr float kUnscale = 0x1p-64f;
  // Adding it rounds to an integer (the last bit of 1.5 * 2^23 is 1) and leaves that, plus the biased exponent of 2^64,
  // in the low bits: one shift makes 2^(n + 64) of it.
  static constexpr float kRoundMagic = 12582912.0f + 127.0f + 64.0f;

  // (exp(r) - 1 - r) / r^2, largest error relative to exp(r) 2^-28.3
  FUSED_SCE_INLINE float exp_tail(float r, float r2) {
    const float q0 = mul_add(0.1666652063f, r, 0.4999999345f);
    const float q2 = mul_add(0.00836871688f, r, 0.04166838805f);
    return mul_add(mul_add(0.001381459865f, r2, q2), r2, q0);
  }

  // (log1p(e) - e + e^2 / 2) / e^3, largest error relative to log1p(e) 2^-29.5
  FUSED_SCE_INLINE float log1p_tail(float e, float e2) {
    const float q0 = mul_add(-0.2499331236f, e, 0.3333309293f);
    const float q2 = mul_add(-0.1622840017f, e, 0.1992633641f);
    const float q4 = mul_add(-0.08592571318f, e, 0.1267977804f);
    const float q6 = mul_add(-0.01469078753f, e, 0.04430993274f);
    float q = mul_add(0.002278800821f, e2, q6);
    q = mul_add(q, e2, q4);
    q = mul_add(q, e2, q2);
    return mul_add(q, e2, q0);
  }
};

template <>
struct Constants<double> {
  using Bits = uint64_t;
  using SignedBits = int64_t;
  static constexpr int kMantissaBits = 52;
  // exp(-746) is below half of the smallest subnormal, 2^-1075 = exp(-745.13).
  static constexpr double kLargest = 746.0;
  static constexpr double kLog2E = 1.4426950408889634;
  // The upper part has 42 significant bits: its product with n (11 bits) is exact.
  static constexpr double kLn2Upper = 0.69314718055989033;
  static constexpr double kLn2Lower = 5.4979230187083712e-14;
  static constexpr double kUnscale = 0x1p-512;                                // n reaches -1076
  static constexpr double kRoundMagic = 6755399441055744.0 + 1023.0 + 512.0;  // 1.5 * 2^52, and as above

  // (exp(r) - 1 - r) / r^2, largest error relative to exp(r) 2^-57.9
  FUSED_SCE_INLINE double exp_tail(double r, double r2) {
    const double q0 = mul_add(0.166666666666664125, r, 0.500000000000001063);
    const double q2 = mul_add(0.00833333333349446166, r, 0.0416666666665301585);
    const double q4 = mul_add(0.000198412695065787302, r, 0.00138888889436301331);
    const double q6 = mul_add(2.75575863737815006e-6, r, 0.000024801493098888392);
    double q = mul_add(2.50000616262395106e-8, r, 2.76302483849967405e-7);
    q = mul_add(q, r2, q6);
    q = mul_add(q, r2, q4);
    q = mul_add(q, r2, q2);
    return mul_add(q, r2, q0);
  }

  // (log1p(e) - e + e^2 / 2) / e^3, largest error relative to log1p(e) 2^-57.8
  FUSED_SCE_INLINE double log1p_tail(double e, double e2) {
    const double q0 = mul_add(-0.249999999993146704, e, 0.333333333333271531);
    const double q2 = mul_add(-0.166666659027266018, e, 0.199999999693124153);
    const double q4 = mul_add(-0.124998663516023178, e, 0.142857021354556968);
    const double q6 = mul_add(-0.0999353581275547603, e, 0.111100409527109534);
    const double q8 = mul_add(-0.0822168298676059922, e, 0.0906067764294466865);
    const double q10 = mul_add(-0.0634639989692719758, e, 0.0736154661495918156);
    const double q12 = mul_add(-0.0364162275769105703, e, 0.0508840734608170323);
    const double q14 = mul_add(-0.0111011240423354897, e, 0.0222645940498438777);
    const double q16 = mul_add(-0.00118457854794970334, e, 0.00427791593566156318);
    double q = mul_add(-0.0000174416108192306661, e, 0.0002084719054057716);
    q = mul_add(q, e2, q16);
    q = mul_add(q, e2, q14);
    q = mul_add(q, e2, q12);
    q = mul_add(q, e2, q10);
    q = mul_add(q, e2, q8);
    q = mul_add(q, e2, q6);
    q = mul_add(q, e2, q4);
    q = mul_add(q, e2, q2);
    return mul_add(q, e2, q0);
  }
};

// An unevaluated sum: `upper` is the rounded value, `lower` what the rounding lost.
template <class T>
struct TwoPart {
  T upper;
  T lower;
};

// exp(-|x|) in the making: exp(remainder) 2^n, with |remainder| <= ln(2) / 2 and scale = 2^n / kUnscale; where the
// result is 0, scale is.
template <class T>
struct Reduced {
  T remainder;
  T scale;
};

template <class T>
FUSED_SCE_INLINE Reduced<T> reduce(T x) {
  using C = Constants<T>;
  using Bits = typename C::Bits;
  const T a = -std::fabs(x);
  const T shifted = mul_add(a, C::kLog2E, C::kRoundMagic);
  const T n = shifted - C::kRoundMagic;  // a / ln 2, rounded to an integer
  const T remainder = mul_add(n, -C::kLn2Lower, mul_add(n, -C::kLn2Upper, a));
  const T scale = bit_cast<T>(bit_cast<Bits>(shifted) << C::kMantissaBits);
  const bool is_zero = a < -C::kLargest;  // then neither is a number to reckon with; asked in this way NaN stays NaN
  return {is_zero ? T(0) : remainder, is_zero ? T(0) : scale};
}

// exp(-|x|) in two parts: upper alone is within 1 ULP, both together within 0.81 (every 17th float up to 87). NaN gives
// NaN. Subnormal results are rounded once, never flushed.
template <class T>
FUSED_SCE_INLINE TwoPart<T> exp_of(Reduced<T> reduced) {
  using C = Constants<T>;
  const T r = reduced.remainder;
  const T r2 = r * r;
  const T p = mul_add(r2, C::exp_tail(r, r2), r);
  const T mantissa = mul_add(p, C::kUnscale, C::kUnscale);
  const T lost = mul_add(p, C::kUnscale, C::kUnscale - mantissa);
  return {mantissa * reduced.scale, lost * reduced.scale};
}

// c - a b, exactly, for a b within a few ULP of c. The fused form has no rounding; without it the product is formed
// from halves of a and b (T. J. Dekker, 1971).
template <class T>
FUSED_SCE_INLINE T residual_of_product(T a, T b, T c) {
#if FUSED_SCE_HAS_FMA
  return mul_add(-a, b, c);
#else
  constexpr T kSplit = T((int64_t(1) << ((Constants<T>::kMantissaBits + 2) / 2)) + 1);
  const T a_upper = a * kSplit - (a * kSplit - a);
  const T b_upper = b * kSplit - (b * kSplit - b);
  const T a_lower = a - a_upper;
  const T b_lower = b - b_upper;
  return (((c - a_upper * b_upper) - a_upper * b_lower) - a_lower * b_upper) - a_lower * b_lower;
#endif
}

// log1p(e); the sum of both parts, not rounded.
template <class T>
FUSED_SCE_INLINE TwoPart<T> log1p_of(TwoPart<T> e) {
  // (e - e^2 / 2) + e^3 tail: the first part rounded, what that lost, and what e.lower adds (times the derivative
  // 1 / (1 + e), for which 1 - e / 2 is good enough) together with the cubic rest.
  const T minus_half = T(-0.5) * e.upper;
  const T upper = mul_add(minus_half, e.upper, e.upper);
  const T lost = mul_add(minus_half, e.upper, e.upper - upper);
  const T small = mul_add(e.lower, T(1) + minus_half, lost);
  const T e2 = e.upper * e.upper;
  return {upper, mul_add(e2 * e.upper, Constants<T>::log1p_tail(e.upper, e2), small)};
}

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

// sigmoid(-|x|) = e / (1 + e).
template <class T>
FUSED_SCE_INLINE T smaller_sigmoid(TwoPart<T> e) {
  // The quotient of the upper parts, then one step of correction by what it leaves of e = q + q e, over 1 + e: that is
  // times sigmoid(|x|), which is 1 less the quotient. e.upper - q is exact, because q is at least half of e.upper (P.
  // H. Sterbenz, 1974), so that the rounding of 1 + e does not matter.
  const T ratio = quotient(e.upper, T(1) + e.upper);
  const T larger = T(1) - ratio;
  const T residual = residual_of_product(ratio, e.upper, e.upper - ratio);
  return mul_add(mul_add(e.lower, larger, residual), larger, ratio);
}

template <class T>
struct LossAndGradient {
  T loss;
  T gradient;
};

// The loss of one element and its derivative by the logit, from e = exp(-|x|). kPosWeight = false is p = 1,
// without its multiplications.
//
// Both are made of the slope, the gradient's limit where x is large and wrong, which is 1 - t or p t: for x >= 0
//     loss     = (1 - t) x + (1 - t + p t) log1p(e)
//     gradient = (1 - t) - (1 - t + p t) sigmoid(-|x|)
// and for x <= 0 the same with p t and |x|, the gradient negated. For a target of 0 or 1 one of both terms is 0; in
// between they cancel only where that is no more than an ULP of (1 - t) sigmoid(x) + p t sigmoid(-x), because
// sigmoid(-|x|) is at most a half.
template <class T, bool kPosWeight>
FUSED_SCE_INLINE LossAndGradient<T> sigmoid_cross_entropy(T x, T t, T pos_weight, TwoPart<T> e) {
  using Bits = typename Constants<T>::Bits;
  using SignedBits = typename Constants<T>::SignedBits;
  const TwoPart<T> log1p_e = log1p_of(e);
  const T negative = T(1) - t;
  const T positive = kPosWeight ? pos_weight * t : t;
  // By the sign bit, as at the end: for a zero of either sign both must go the same way.
  const T slope = bit_cast<SignedBits>(x) < 0 ? positive : negative;
  // 0 for a slope of 0 even if x is infinite: a sure and right logit costs nothing.
  const T linear = slope == T(0) ? T(0) : slope * std::fabs(x);

  T loss;
  if (kPosWeight) {
    loss = mul_add(negative + positive, log1p_e.upper + log1p_e.lower, linear);
  } else {
    // Both sums at once with one rounding that counts: the larger part plus the smaller, and what that addition lost.
    // What it added is at most log1p(1), or not a number if linear is infinite.
    const T larger = linear > log1p_e.upper ? linear : log1p_e.upper;
    const T smaller = linear > log1p_e.upper ? log1p_e.upper : linear;
    const T sum = larger + smaller;
    const T added = sum - larger;
    const T lost = added < T(1) ? smaller - added : T(0);
    loss = sum + (lost + log1p_e.lower);
  }

  const T size = kPosWeight ? mul_add(-(negative + positive), smaller_sigmoid(e), slope) : slope - smaller_sigmoid(e);
  constexpr Bits kSign = Bits(1) << (8 * sizeof(T) - 1);
  return {loss, bit_cast<T>(bit_cast<Bits>(size) ^ (bit_cast<Bits>(x) & kSign))};
}

template <class T, bool kPosWeight>
FUSED_SCE_INLINE LossAndGradient<T> sigmoid_cross_entropy(T x, T t, T pos_weight) {
  return sigmoid_cross_entropy<T, kPosWeight>(x, t, pos_weight, exp_of(reduce(x)));
}

// The same function for logits of 16 bits on a GPU, where memory would otherwise wait for arithmetic: a third of the
// operations. The loss is within 2^-20 + |x| 2^-23 of the exact one, relatively (subnormal: within one step), which
// counts where many are added up to a float; gradients rounded to 16 bits are within 0.51 ULP. Both for t in {0, 1},
// every logit, and a `Unit` that errs as far as it may (tests/cpp/cuda_threads.cpp); t in between: as above, by the sum
// of the two terms. The loss is NaN where a logit is infinite and its label matches: the caller must notice.
//
// With u = [x >= 0] - t (times p where that is negative), which is the slope of above with the sign of the gradient:
//     loss     = u x + (1 - t + p t) log1p(e)
//     gradient = u   - (1 - t + p t) copysign(sigmoid(-|x|), x)
template <bool kPosWeight, class Unit = SpecialFunctions>
FUSED_SCE_INLINE LossAndGradient<float> sigmoid_cross_entropy_16bit(float x, float t, float pos_weight) {
  // exp(-|x|) as the square of its root, which is a normal number where the square is not.
  const float root = Unit::exp2(std::fabs(x) * -0.72134752f);  // log2(e) / 2
  const float e = root * root;
  // By the sign bit: zeros of either sign must go the same way here and in the gradient.
  const bool is_negative = bit_cast<int32_t>(x) < 0;
  float slope = (is_negative ? 0.0f : 1.0f) - t;
  float total = 1.0f;
  if (kPosWeight) {
    const float positive = pos_weight * t;
    slope = is_negative ? -positive : slope;
    total = (1.0f - t) + positive;
  }

  // log1p(e) / e on [0, 1], largest relative error 2^-24.8
  float log1p_by_e = mul_add(0.005365422461f, e, -0.03006830066f);
  log1p_by_e = mul_add(log1p_by_e, e, 0.07920882851f);
  log1p_by_e = mul_add(log1p_by_e, e, -0.1375418752f);
  log1p_by_e = mul_add(log1p_by_e, e, 0.1915384829f);
  log1p_by_e = mul_add(log1p_by_e, e, -0.2485721707f);
  log1p_by_e = mul_add(log1p_by_e, e, 0.3332132995f);
  log1p_by_e = mul_add(log1p_by_e, e, -0.4999964833f);
  log1p_by_e = mul_add(log1p_by_e, e, 1.0f);

  const float weighted = kPosWeight ? total * e : e;
  const float signed_e = bit_cast<float>(bit_cast<uint32_t>(weighted) ^ (bit_cast<uint32_t>(x) & 0x80000000u));
  return {mul_add(weighted, log1p_by_e, slope * x), mul_add(-signed_e, Unit::reciprocal(1.0f + e), slope)};
}

}  // namespace fused_sce
