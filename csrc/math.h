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
//     float:  t in {0, 1}: loss and gradient 2 ULP for every logit (the worst of all 2^32 are 1.24 and 1.01); results
//             below the smallest normal float within one subnormal step. t in between: 4 ULP of the sum of the two
//             non-negative terms.
//     double: the same bounds.
//     inf:    with the matching target loss and gradient are 0. NaN in x or t gives NaN.
//
// Everything is branch-free, so that compilers turn the loops of csrc/cpu into vector code, and every a*b+c that may be
// one instruction is written as mul_add: results do not depend on what a compiler chooses to contract, and a CPU with
// fused multiply-add and a GPU compute the same bits.
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

// Constants of exp(-a) and log1p(e) for one type. The polynomials are minimax fits, printed by fit_polynomials.py;
// their coefficients stand highest power first, as Horner's scheme reads them.
template <class T>
struct Constants;

template <>
struct Constants<float> {
  using Bits = uint32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr float kMax = 3.40282347e+38f;
  // exp(-104) is below half of the smallest subnormal, 2^-150 = exp(-103.97): from here on the result is 0.
  static constexpr float kLargest = 104.0f;
  static constexpr float kLog2E = 1.44269504f;
  // ln 2 in two parts; the upper has 9 significant bits, so its product with n (8 bits) is exact without fused
  // multiply-add too.
  static constexpr float kLn2Upper = 0.693359375f;
  static constexpr float kLn2Lower = -2.12194440e-4f;
  // 2^n for the n of exp(-a), which reaches -150, is 2^(n + 64) 2^-64: the first is a normal number, and the product
  // with the second rounds once where it is subnormal.
  static constexpr float kUnscale = 0x1p-64f;
  // Adding it rounds to an integer (the last bit of 1.5 * 2^23 is 1) and leaves that, plus the biased exponent of 2^64,
  // in the low bits: one shift makes 2^(n + 64) of it.
  static constexpr float kRoundMagic = 12582912.0f + 127.0f + 64.0f;

  // (exp(r) - 1 - r) / r^2, largest error relative to exp(r) 2^-28.3
  FUSED_SCE_INLINE float exp_tail(float r) {
    float q = 0.001381459865f;
    q = mul_add(q, r, 0.00836871688f);
    q = mul_add(q, r, 0.04166838805f);
    q = mul_add(q, r, 0.1666652063f);
    return mul_add(q, r, 0.4999999345f);
  }

  // (log1p(e) - e + e^2 / 2) / e^3, largest error relative to log1p(e) 2^-29.5
  FUSED_SCE_INLINE float log1p_tail(float e) {
    float q = 0.002278800821f;
    q = mul_add(q, e, -0.01469078753f);
    q = mul_add(q, e, 0.04430993274f);
    q = mul_add(q, e, -0.08592571318f);
    q = mul_add(q, e, 0.1267977804f);
    q = mul_add(q, e, -0.1622840017f);
    q = mul_add(q, e, 0.1992633641f);
    q = mul_add(q, e, -0.2499331236f);
    return mul_add(q, e, 0.3333309293f);
  }
};

template <>
struct Constants<double> {
  using Bits = uint64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr double kMax = 1.7976931348623157e+308;
  // exp(-746) is below half of the smallest subnormal, 2^-1075 = exp(-745.13).
  static constexpr double kLargest = 746.0;
  static constexpr double kLog2E = 1.4426950408889634;
  // The upper part has 42 significant bits: its product with n (11 bits) is exact.
  static constexpr double kLn2Upper = 0.69314718055989033;
  static constexpr double kLn2Lower = 5.4979230187083712e-14;
  static constexpr double kUnscale = 0x1p-512;                                // n reaches -1076
  static constexpr double kRoundMagic = 6755399441055744.0 + 1023.0 + 512.0;  // 1.5 * 2^52, and as above

  // (exp(r) - 1 - r) / r^2, largest error relative to exp(r) 2^-57.9
  FUSED_SCE_INLINE double exp_tail(double r) {
    double q = 2.50000616262395106e-8;
    q = mul_add(q, r, 2.76302483849967405e-7);
    q = mul_add(q, r, 2.75575863737815006e-6);
    q = mul_add(q, r, 0.000024801493098888392);
    q = mul_add(q, r, 0.000198412695065787302);
    q = mul_add(q, r, 0.00138888889436301331);
    q = mul_add(q, r, 0.00833333333349446166);
    q = mul_add(q, r, 0.0416666666665301585);
    q = mul_add(q, r, 0.166666666666664125);
    return mul_add(q, r, 0.500000000000001063);
  }

  // (log1p(e) - e + e^2 / 2) / e^3, largest error relative to log1p(e) 2^-57.8
  FUSED_SCE_INLINE double log1p_tail(double e) {
    double q = -0.0000174416108192306661;
    q = mul_add(q, e, 0.0002084719054057716);
    q = mul_add(q, e, -0.00118457854794970334);
    q = mul_add(q, e, 0.00427791593566156318);
    q = mul_add(q, e, -0.0111011240423354897);
    q = mul_add(q, e, 0.0222645940498438777);
    q = mul_add(q, e, -0.0364162275769105703);
    q = mul_add(q, e, 0.0508840734608170323);
    q = mul_add(q, e, -0.0634639989692719758);
    q = mul_add(q, e, 0.0736154661495918156);
    q = mul_add(q, e, -0.0822168298676059922);
    q = mul_add(q, e, 0.0906067764294466865);
    q = mul_add(q, e, -0.0999353581275547603);
    q = mul_add(q, e, 0.111100409527109534);
    q = mul_add(q, e, -0.124998663516023178);
    q = mul_add(q, e, 0.142857021354556968);
    q = mul_add(q, e, -0.166666659027266018);
    q = mul_add(q, e, 0.199999999693124153);
    q = mul_add(q, e, -0.249999999993146704);
    return mul_add(q, e, 0.333333333333271531);
  }
};

// An unevaluated sum: `upper` is the rounded value, `lower` what the rounding lost.
template <class T>
struct TwoPart {
  T upper;
  T lower;
};

// exp(-a) for a >= 0, in two parts: upper alone is within 1 ULP, both together within 0.81 (every 17th float up to 87).
// NaN gives NaN. Subnormal results are rounded once, never flushed.
template <class T>
FUSED_SCE_INLINE TwoPart<T> exp_of_negative(T a) {
  using C = Constants<T>;
  using Bits = typename C::Bits;
  a = a > C::kLargest ? C::kLargest : a;  // in this order NaN stays NaN
  const T shifted = mul_add(a, -C::kLog2E, C::kRoundMagic);
  const T n = shifted - C::kRoundMagic;  // -a / ln 2, rounded to an integer
  T r = mul_add(n, -C::kLn2Upper, -a);
  r = mul_add(n, -C::kLn2Lower, r);  // |r| <= ln(2) / 2

  const T p = mul_add(r * r, C::exp_tail(r), r);
  const T mantissa = T(1) + p;
  const T lost = p - (mantissa - T(1));

  const T scale = bit_cast<T>(bit_cast<Bits>(shifted) << C::kMantissaBits);
  return {mantissa * scale * C::kUnscale, lost * scale * C::kUnscale};
}

// 1 - a b, exactly, for b = 1 / a rounded. The fused form has no rounding; without it the product is formed from halves
// of a and b (T. J. Dekker, 1971).
template <class T>
FUSED_SCE_INLINE T reciprocal_residual(T a, T b) {
#if FUSED_SCE_HAS_FMA
  return mul_add(-a, b, T(1));
#else
  constexpr T kSplit = T((int64_t(1) << ((Constants<T>::kMantissaBits + 2) / 2)) + 1);
  const T a_upper = a * kSplit - (a * kSplit - a);
  const T b_upper = b * kSplit - (b * kSplit - b);
  const T a_lower = a - a_upper;
  const T b_lower = b - b_upper;
  return (((T(1) - a_upper * b_upper) - a_upper * b_lower) - a_lower * b_upper) - a_lower * b_lower;
#endif
}

// What the loss and its gradient at one logit are made of.
template <class T>
struct Tails {
  TwoPart<T> log1p_e;  // log1p(exp(-|x|)); the sum of both parts, not rounded
  T sigmoid;           // sigmoid(x)
  T opposite;          // sigmoid(-x)
};

template <class T>
FUSED_SCE_INLINE Tails<T> tails(T x) {
  const TwoPart<T> e = exp_of_negative<T>(std::fabs(x));

  // log1p(e) = (e - e^2 / 2) + e^3 tail: the first part rounded, what that lost, and what e.lower adds (times the
  // derivative 1 / (1 + e), for which 1 - e / 2 is good enough) together with the cubic rest.
  const T minus_half = T(-0.5) * e.upper;
  const T upper = mul_add(minus_half, e.upper, e.upper);
  const T lost_by_upper = mul_add(minus_half, e.upper, e.upper - upper);
  const T small = mul_add(e.lower, T(1) + minus_half, lost_by_upper);
  const T lower = mul_add(e.upper * e.upper * e.upper, Constants<T>::log1p_tail(e.upper), small);

  // 1 / (1 + e) as quotient + correction: what rounding 1 + e lost and what the division left. The smaller sigmoid,
  // e / (1 + e), needs it twice over: its ULP may be half as large.
  const T denominator = T(1) + e.upper;
  const T lost = e.upper - (denominator - T(1)) + e.lower;
  const T quotient = T(1) / denominator;
  const T residual = mul_add(-lost, quotient, reciprocal_residual(denominator, quotient));
  const T correction = quotient * residual;
  const T larger = quotient + correction;
  const T smaller = mul_add(e.upper, quotient, mul_add(e.lower, quotient, e.upper * correction));
  return {{upper, lower}, x < T(0) ? smaller : larger, x < T(0) ? larger : smaller};
}

template <class T>
struct LossAndGradient {
  T loss;
  T gradient;
};

// The loss of one element and its derivative by the logit. kPosWeight = false is p = 1, without its multiplications.
template <class T, bool kPosWeight>
FUSED_SCE_INLINE LossAndGradient<T> sigmoid_cross_entropy(T x, T t, T pos_weight) {
  const Tails<T> tail = tails<T>(x);
  const T negative = T(1) - t;
  const T positive = kPosWeight ? pos_weight * t : t;

  // max(x, 0) and max(-x, 0) are never both non-zero: one product serves both terms. Where its factor is 0 the product
  // is 0 even if x is infinite: a sure and right logit costs nothing.
  const T slope = x > T(0) ? negative : positive;
  const T linear = slope == T(0) ? T(0) : slope * std::fabs(x);
  T loss;
  if (kPosWeight) {
    loss = mul_add(negative + positive, tail.log1p_e.upper + tail.log1p_e.lower, linear);
  } else {
    // Both sums at once with one rounding that counts: the larger part plus the smaller, and what that addition lost.
    const T larger = linear > tail.log1p_e.upper ? linear : tail.log1p_e.upper;
    const T smaller = linear > tail.log1p_e.upper ? tail.log1p_e.upper : linear;
    const T sum = larger + smaller;
    const T lost = smaller - (sum - larger);
    loss = sum + (lost + tail.log1p_e.lower);
    loss = std::fabs(linear) <= Constants<T>::kMax ? loss : linear;  // inf - inf above
  }

  const T gradient = mul_add(negative, tail.sigmoid, -(positive * tail.opposite));
  return {loss, gradient};
}

}  // namespace fused_sce
