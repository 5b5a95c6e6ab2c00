// exp(-|x|) and log1p(e), each as a sum of two parts, for float and double, on CPU and CUDA.
//
// The code is branch-free, so that compilers vectorise the loops of csrc/cpu. Polynomials are evaluated in pairs (G.
// Estrin, 1960): about as many operations as Horner's scheme, in a dependency chain of half the length. log1p_of_gap()
// is by Horner's scheme.
#pragma once

#include <cmath>
#include <cstdint>

#include "floats.h"

namespace fused_sce {

// The constants for one type. The polynomials are minimax fits; tools/fit_polynomials.py prints them.
template <class T>
struct Constants;

template <>
struct Constants<float> {
  using Bits = uint32_t;
  using SignedBits = int32_t;
  static constexpr int kMantissaBits = 23;
  static constexpr int kExponentBias = 127;
  static constexpr float kSmallestNormal = 0x1p-126f;
  // Beyond it the result is 0: exp(-104) < 2^-150 = exp(-103.97), half of the smallest subnormal.
  static constexpr float kLargest = 104.0f;
  static constexpr float kLog2E = 1.44269504f;
  // ln 2 in two parts. The upper part has 9 significant bits, so its product with n (8 bits) is exact even without
  // fused multiply-add.
  static constexpr float kLn2Upper = 0.693359375f;
  static constexpr float kLn2Lower = -2.12194440e-4f;
  // n reaches -150, where 2^n is no normal number. So 2^n = 2^(n + 64) kUnscale: the first factor is normal, and a
  // subnormal product of mantissa, kUnscale and first factor is rounded only in the last multiplication.
  static constexpr float kUnscale = 0x1p-64f;
  // The addition of 1.5 * 2^23, whose last bit has the value 1, rounds to an integer n and leaves it in the low bits.
  // 127 + 64 is the biased exponent of 2^64: with it in the sum, one shift of the bits makes 2^(n + 64).
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

  // P(gap) of add_log1p() in loss.h, largest error relative to log1p(e) 2^-30.8
  FUSED_SCE_INLINE float log1p_of_gap(float gap) {
    float p = mul_add(0.0001307221391f, gap, -0.0007686082972f);
    p = mul_add(p, gap, 0.003565525636f);
    p = mul_add(p, gap, -0.01666605845f);
    return mul_add(p, gap, 0.08333331347f);
  }
};

template <>
struct Constants<double> {
  using Bits = uint64_t;
  using SignedBits = int64_t;
  static constexpr int kMantissaBits = 52;
  static constexpr int kExponentBias = 1023;
  static constexpr double kSmallestNormal = 0x1p-1022;
  // exp(-746) < 2^-1075 = exp(-745.13), half of the smallest subnormal.
  static constexpr double kLargest = 746.0;
  static constexpr double kLog2E = 1.4426950408889634;
  // The upper part has 42 significant bits, so its product with n (11 bits) is exact.
  static constexpr double kLn2Upper = 0.69314718055989033;
  static constexpr double kLn2Lower = 5.4979230187083712e-14;
  static constexpr double kUnscale = 0x1p-512;                                // n reaches -1076
  static constexpr double kRoundMagic = 6755399441055744.0 + 1023.0 + 512.0;  // 1.5 * 2^52, otherwise as above

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

  // P(gap) of add_log1p() in loss.h, largest error relative to log1p(e) 2^-61.7
  FUSED_SCE_INLINE double log1p_of_gap(double gap) {
    double p = mul_add(1.54188826560931783e-8, gap, -1.11166384495660792e-7);
    p = mul_add(p, gap, 5.2874495019344265e-7);
    p = mul_add(p, gap, -2.27953738232140689e-6);
    p = mul_add(p, gap, 9.71073683742999601e-6);
    p = mul_add(p, gap, -0.0000416246756591870127);
    p = mul_add(p, gap, 0.00018037513062683962);
    p = mul_add(p, gap, -0.000793650789383478091);
    p = mul_add(p, gap, 0.00357142857121536513);
    p = mul_add(p, gap, -0.0166666666666613443);
    return mul_add(p, gap, 0.0833333333333332871);
  }
};

// exp(-|x|) = exp(remainder) 2^n with |remainder| <= ln(2) / 2 and scale = 2^n / kUnscale.
template <class T>
struct ReducedArgument {
  T remainder;
  T scale;
};

// A CPU loop passes `largest` as a variable: GCC 12 computes the smaller of two variables in one instruction, that of a
// variable and a constant in two or three.
template <class T>
FUSED_SCE_INLINE ReducedArgument<T> reduce_argument(T x, T largest = Constants<T>::kLargest) {
  using C = Constants<T>;
  const T size = std::fabs(x);
  const T a = largest < size ? largest : size;  // NaN stays NaN
  const T shifted = mul_add(a, -C::kLog2E, C::kRoundMagic);
  const T n = shifted - C::kRoundMagic;  // -a / ln 2, rounded to an integer
  const T remainder = mul_add(n, -C::kLn2Lower, mul_add(n, -C::kLn2Upper, -a));
  return {remainder, bit_cast<T>(bit_cast<typename C::Bits>(shifted) << C::kMantissaBits)};
}

// exp(-|x|). The upper part alone is within 1.05 ULP, the sum of both within 0.58 ULP (0.9 ULP where the lower part is
// subnormal). A subnormal result is rounded once, never flushed. NaN gives NaN.
template <class T>
FUSED_SCE_INLINE TwoPart<T> exp_of(ReducedArgument<T> reduced) {
  using C = Constants<T>;
  const T r = reduced.remainder;
  const T r2 = r * r;
  const T p = mul_add(r2, C::exp_tail(r, r2), r);
  const T mantissa = mul_add(p, C::kUnscale, C::kUnscale);
  const T lost = mul_add(p, C::kUnscale, C::kUnscale - mantissa);
  return {mantissa * reduced.scale, lost * reduced.scale};
}

// c - a b: exactly for a b within a few ULP of c, as for a rounded product, and for quotient_of() with an error far
// below the last bit of a. Without fused multiply-add the product is formed from halves of a and b (T. J. Dekker,
// 1971).
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

// log1p(e) for e = e.upper + e.lower in [0, 1]. The sum of both parts is within 0.75 ULP.
template <class T>
FUSED_SCE_INLINE TwoPart<T> log1p_of(TwoPart<T> e) {
  // (e - e^2 / 2) + e^3 tail. `upper` is the first term rounded. The second part is its rounding error, the effect of
  // e.lower (times the derivative 1 / (1 + e), for which 1 - e / 2 is accurate enough), and the cubic rest.
  const T minus_half = T(-0.5) * e.upper;
  const T upper = mul_add(minus_half, e.upper, e.upper);
  const T lost = mul_add(minus_half, e.upper, e.upper - upper);
  const T small = mul_add(e.lower, T(1) + minus_half, lost);
  const T e2 = e.upper * e.upper;
  return {upper, mul_add(e2 * e.upper, Constants<T>::log1p_tail(e.upper, e2), small)};
}

}  // namespace fused_sce
