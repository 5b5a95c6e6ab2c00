// The focal and the asymmetric loss of one element and its gradient, for CPU and CUDA.
//
//     loss     = alpha m^g c                          g = gamma_pos t + gamma_neg (1 - t)
//     gradient = alpha m^g (c' + g (m' / m) c)        ' is d / dx
//
//     m = t sigmoid(-x) + (1 - t) q                   how far the prediction is off
//     c = p t softplus(-x) - (1 - t) log(1 - q)       the sigmoid cross-entropy if clip = 0
//     q = max(sigmoid(x) - clip, 0)                   a probability up to clip is good enough for a negative
//     alpha = a t + (1 - a) (1 - t), or 1             x: logit, t: target in [0, 1], p: pos_weight
//
// With one gamma and clip = 0 it is the focal loss (T. Lin et al., 2017; soft targets as in torchvision's
// sigmoid_focal_loss), with two gammas and clip the asymmetric loss (E. Ben-Baruch et al., 2020; timm's
// AsymmetricLossMultiLabel). With gammas and clip of 0 it has the bits of loss.h.
//
// Nothing is clamped, and there is no logarithm of a probability that may be rounded to 0 or 1: neither tail is lost. A
// factor of 0 leaves out what it multiplies, as in loss.h. p and alpha are factors of the loss of a target of 0 or 1.
//
// Error bounds in ULP (tests/test_formulas.py enforces them), float and double:
//     t in {0, 1}: loss and gradient 4 + 2 g ULP for every logit. Results below the smallest normal number are within
//                  1 + g subnormal steps.
//     with clip:   negatives 4 + 2 (1 + g) k, where k = sigmoid(x) / q, because q has the error of sigmoid(x); and
//                  (1 + g) / clip subnormal steps more, because sigmoid'(x) is divided by 1 - q.
//     in between:  8 + 4 (1 + g) k + 2 g |log m| of the sum of the sizes of the terms, because g and m are rounded.
//     infinite x:  with the matching target loss and gradient are 0.
//     NaN:         in x or t gives NaN, unless a factor leaves it out.
#pragma once

#include <type_traits>

#include "../options.h"
#include "loss.h"

namespace fused_sce {

// Gammas that are integers up to this one need no logarithm.
constexpr int kLargestSmallPower = 7;

constexpr double kLn2 = 0.693147180559945309;

// base^exponent for an exponent of kBits bits, 2 or 3.
template <class T, int kBits = 3>
FUSED_SCE_INLINE T small_power(T base, typename Constants<T>::Bits exponent) {
  const T square = base * base;
  T power = exponent & 1 ? base : T(1);
  power = exponent & 2 ? power * square : power;
  return kBits == 3 && (exponent & 4) ? power * (square * square) : power;
}

// All ones or 0: chooses by bits. Of conditions GCC makes paths, and computes on each what both share.
template <class T>
using Mask = typename Constants<T>::Bits;

template <class T>
FUSED_SCE_INLINE T choose(Mask<T> mask, T one, T other) {
  using Bits = typename Constants<T>::Bits;
  return bit_cast<T>(Bits((bit_cast<Bits>(one) & mask) | (bit_cast<Bits>(other) & ~mask)));
}

template <class T>
FUSED_SCE_INLINE Mask<T> mask_of_sign(typename Constants<T>::Bits bits) {
  return Mask<T>(typename Constants<T>::SignedBits(bits) >> (8 * sizeof(T) - 1));
}

template <class T>
FUSED_SCE_INLINE Mask<T> is_negative_mask(T x) {
  return mask_of_sign<T>(bit_cast<typename Constants<T>::Bits>(x));
}

// Of a label, which is 0, -0 or 1: the third bit of 1 is set.
template <class T>
FUSED_SCE_INLINE Mask<T> is_positive_mask(T t) {
  return mask_of_sign<T>(bit_cast<typename Constants<T>::Bits>(t) << 2);
}

template <class T>
FUSED_SCE_INLINE T flipped(Mask<T> mask, T value) {
  using Bits = typename Constants<T>::Bits;
  constexpr Bits kSign = Bits(1) << (8 * sizeof(T) - 1);
  return bit_cast<T>(Bits(bit_cast<Bits>(value) ^ (mask & kSign)));
}

// value / 2^kScale as fraction 2^exponent, with the fraction in [1, 2), for a normal value.
template <class T>
struct Split {
  T fraction;
  T exponent;
};

template <class T, int kScale = 0>
FUSED_SCE_INLINE Split<T> split(T value) {
  using C = Constants<T>;
  using Bits = typename C::Bits;
  constexpr Bits kOne = Bits(C::kExponentBias) << C::kMantissaBits;
  constexpr Bits kMantissa = (Bits(1) << C::kMantissaBits) - 1;
  const Bits bits = bit_cast<Bits>(value);
  const typename C::SignedBits exponent = bits >> C::kMantissaBits;
  return {bit_cast<T>((bits & kMantissa) | kOne), T(exponent - (C::kExponentBias + kScale))};
}

// exponent * log(base) in two parts, for base > 0, which may be subnormal.
template <class T>
FUSED_SCE_INLINE TwoPart<T> scaled_logarithm(T base, T exponent) {
  using C = Constants<T>;
  // log(base) = n ln(2), whose upper part is exact, and log1p(fraction - 1). Each sum begins with its larger term, so
  // its error follows from it (T. J. Dekker, 1971).
  const Split<T> parts = split<T, 64>(base * T(0x1p64));
  const TwoPart<T> log1p = log1p_of(TwoPart<T>{parts.fraction - T(1), T(0)});
  const T whole = parts.exponent * C::kLn2Upper;
  const T sum = whole + log1p.upper;
  const T rest = (log1p.upper - (sum - whole)) + mul_add(parts.exponent, C::kLn2Lower, log1p.lower);
  const T upper = sum + rest;
  const T lower = rest - (upper - sum);
  const T product = exponent * upper;
  return {product, mul_add(exponent, lower, -residual_of_product(exponent, upper, product))};
}

// base^exponent from scaled_logarithm(), for base in [0, 1] and exponent >= 0: within 2 + exponent / 2 ULP. 0^0 is 1.
template <class T>
FUSED_SCE_INLINE T power_of(T base, T exponent, TwoPart<T> logarithm) {
  const TwoPart<T> e = exp_of(reduce_argument(logarithm.upper));
  const T power = e.upper + mul_add(e.upper, logarithm.lower, e.lower);
  // For a base of 0 the logarithm is meaningless.
  return exponent == T(0) ? T(1) : base == T(0) || e.upper == T(0) ? T(0) : power;
}

// The options, rounded to the type computed in.
template <class T>
struct Modulation {
  using Bits = typename Constants<T>::Bits;
  T gamma_pos;
  T gamma_neg;
  T clip;
  // Whether both gammas are integers up to kLargestSmallPower, and these.
  bool has_small_powers;
  Bits power_pos;
  Bits power_neg;
  bool has_lower_power;      // whether negatives take gamma_neg - 1 instead, which saves a division
  bool has_one_small_power;  // whether both are the same
  // An easy alpha is the same for all elements, and no factor of 0. Then it multiplies the powers of labels.
  bool has_easy_alpha;
  T alpha_pos;  // 1 if there is none
  T alpha_neg;
};

template <class T>
FUSED_SCE_INLINE Modulation<T> modulation_of(const Options& options, bool has_label_alpha) {
  using Bits = typename Constants<T>::Bits;
  Modulation<T> by = {};
  by.gamma_pos = T(options.gamma_pos);
  by.gamma_neg = T(options.gamma_neg);
  // Less than a rounding. So 1 - q, which is at least the clip, is no subnormal number.
  by.clip = T(options.clip) < Constants<T>::kSmallestNormal ? T(0) : T(options.clip);
  if (options.gamma_pos <= kLargestSmallPower && options.gamma_neg <= kLargestSmallPower) {
    by.power_pos = Bits(options.gamma_pos);
    by.power_neg = Bits(options.gamma_neg);
    by.has_small_powers = double(by.power_pos) == options.gamma_pos && double(by.power_neg) == options.gamma_neg;
  }
  by.has_one_small_power = by.has_small_powers && by.power_pos == by.power_neg;
  by.has_lower_power = by.clip != T(0) && options.gamma_neg >= 1.0;
  by.has_easy_alpha = !has_label_alpha && options.has_alpha && options.alpha > 0.0 && options.alpha < 1.0;
  by.alpha_pos = by.has_easy_alpha ? T(options.alpha) : T(1);
  by.alpha_neg = by.has_easy_alpha ? T(1.0 - options.alpha) : T(1);
  return by;
}

// alpha
template <class T>
FUSED_SCE_INLINE T balance(T alpha, T t) {
  return mul_add(alpha, t, (T(1) - alpha) * (T(1) - t));
}

// alpha and p of a label: a factor of its loss.
template <class T>
FUSED_SCE_INLINE T factor_of_label(T t, T alpha, T pos_weight) {
  return t == T(1) ? product_of_factors(alpha, pos_weight) : T(1) - alpha;
}

// The loss of a label, a target of 0 or 1, comes in three steps, so that a CPU can make loops of them: what there is to
// know before the logarithm, the power, and the rest. Without clip both labels have the same formula in y = x or, for a
// positive, y = -x:
//     loss = m^g c, gradient = m^g (m + g (1 - m) c), m = sigmoid(y), c = softplus(y) = max(y, 0) + log1p(exp(-|y|)).
// With clip that of a negative is, where r = q / (1 - q),
//     loss = q^g c, gradient = q^(g - 1) sigmoid'(x) (r + g c), c = log1p(r).
// Both are m^(g or g - 1) (slope + rate c).
template <class T>
struct Label {
  T base;    // m
  T linear;  // c; with clip c less log1p(argument), which has the sign of the argument
  T argument;
  T slope;
  T rate;
};

template <class T, bool kClip, bool kLower>
FUSED_SCE_INLINE Label<T> label_of(const Modulation<T>& by, T x, T t, TwoPart<T> e) {
  const Mask<T> is_positive = is_positive_mask(t);
  const T y = flipped(is_positive, x);
  const Mask<T> is_negative = is_negative_mask(y);
  const T gamma = choose(is_positive, by.gamma_pos, by.gamma_neg);
  const T linear = choose(is_negative, T(0), y);
  if (!kClip) {
    const Quotient<T> parts = quotient_of(e);
    const T smaller = smaller_sigmoid(e, parts);
    const T larger = T(1) - smaller;
    const T m = choose(is_negative, smaller, larger);
    return {m, sum_of(linear, e, parts), T(0), m, gamma * choose(is_negative, larger, smaller)};
  }
  // sigmoid(-|x|) = e / (1 + e) and 1 - q = w / (1 + e) from one division, the slowest of operations.
  const T sum = T(1) + e.upper;
  const T w = mul_add(by.clip, sum, choose(is_negative, T(1), e.upper));
  const T reciprocal = T(1) / (sum * w);
  const T smaller = smaller_sigmoid(e, quotient_of(e, e.upper * (reciprocal * w)));
  const T larger = T(1) - smaller;
  const T m = choose(is_negative, smaller, larger);
  const T rest = choose(is_negative, larger, smaller);
  const bool is_clipped = m <= by.clip;
  const T q = is_clipped ? T(0) : m - by.clip;
  const T one_minus_q = rest + by.clip;        // if it is not clipped
  const T inverse = (reciprocal * sum) * sum;  // 1 / (1 - q)
  const T ratio = q * inverse;
  const T derivative = is_clipped ? T(0) : larger * smaller;
  // Beyond q = 1/2, where the ratio is above 1, c is -log(1 - q) by exponent and fraction.
  const bool is_large = q > T(0.5);
  const Split<T> parts = split(one_minus_q);
  const T linear_by_parts = is_large ? parts.exponent * -T(kLn2) : T(0);
  const T argument = is_large ? T(1) - parts.fraction : ratio;
  const T slope = derivative * (kLower ? ratio : inverse);
  const T rate = kLower ? derivative : q == T(0) ? T(0) : derivative / q;
  return {
      choose(is_positive, m, q), choose(is_positive, linear, linear_by_parts), choose(is_positive, e.upper, argument),
      choose(is_positive, m, slope), gamma * choose(is_positive, rest, rate)};
}

// The power and alpha.
template <class T, bool kLower, int kBits = 3>
FUSED_SCE_INLINE T small_power_of_label(const Modulation<T>& by, T base, T t) {
  const Mask<T> is_positive = is_positive_mask(t);
  const Mask<T> of_negative = by.power_neg - (kLower ? 1 : 0);
  const T power = small_power<T, kBits>(base, of_negative ^ ((of_negative ^ by.power_pos) & is_positive));
  return power * choose(is_positive, by.alpha_pos, by.alpha_neg);
}

// The same for other powers, in two steps.
template <class T>
FUSED_SCE_INLINE T exponent_of_label(const Modulation<T>& by, T t) {
  return choose(is_positive_mask(t), by.gamma_pos, by.has_lower_power ? by.gamma_neg - T(1) : by.gamma_neg);
}

template <class T>
FUSED_SCE_INLINE TwoPart<T> logarithm_of_label(const Modulation<T>& by, T base, T t) {
  return scaled_logarithm(base, exponent_of_label(by, t));
}

template <class T>
FUSED_SCE_INLINE T power_of_label(const Modulation<T>& by, T base, T t, TwoPart<T> logarithm) {
  return power_of(base, exponent_of_label(by, t), logarithm) * choose(is_positive_mask(t), by.alpha_pos, by.alpha_neg);
}

// Loss and gradient but for alpha and p. kLower: see Modulation::has_lower_power.
template <class T, bool kClip, bool kLower>
FUSED_SCE_INLINE LossAndGradient<T> loss_of_label(const Label<T>& label, T t, T power) {
  T c = label.linear;
  if (kClip) {
    const Mask<T> is_minus = is_negative_mask(label.argument);
    const TwoPart<T> log1p = log1p_of(TwoPart<T>{std::fabs(label.argument), T(0)});
    c += flipped(is_minus, log1p.upper + log1p.lower);
  }
  const Mask<T> is_positive = is_positive_mask(t);
  const T factor = kLower ? power * choose(is_positive, T(1), label.base) : power;
  const T size = power * (label.slope + product(label.rate, c));
  return {factor * c, flipped(is_positive, size)};
}

// What belongs to a target in between, or to any other: m, g, and what multiplies alpha m^g in loss and gradient.
template <class T>
struct SoftTarget {
  T base;
  T gamma;
  T loss;
  T gradient;
};

template <class T, bool kClip>
FUSED_SCE_INLINE SoftTarget<T> soft_target_of(const Modulation<T>& by, T x, T t, T pos_weight, TwoPart<T> e) {
  const Quotient<T> parts = quotient_of(e);
  const T smaller = smaller_sigmoid(e, parts);
  const T larger = T(1) - smaller;
  const T probability = is_negative(x) ? smaller : larger;
  const T rest = is_negative(x) ? larger : smaller;
  const T derivative = larger * smaller;
  const T of_positive = sum_of(is_negative(x) ? -x : T(0), e, parts);
  T of_negative = sum_of(is_negative(x) ? T(0) : x, e, parts);
  T q = probability;
  T slope_of_negative = probability;
  bool is_clipped = false;
  if (kClip) {
    is_clipped = probability <= by.clip;
    q = is_clipped ? T(0) : probability - by.clip;
    const T one_minus_q = is_clipped ? T(1) : rest + by.clip;
    const bool is_large = q > T(0.5);
    const Split<T> parts = split(one_minus_q);
    const TwoPart<T> log1p = log1p_of(TwoPart<T>{is_large ? parts.fraction - T(1) : q / one_minus_q, T(0)});
    const T value = log1p.upper + log1p.lower;
    of_negative = is_large ? mul_add(parts.exponent, -T(kLn2), -value) : value;
    slope_of_negative = is_clipped ? T(0) : derivative / one_minus_q;
  }
  const T positive = product_of_factors(t, pos_weight);
  const T negative = T(1) - t;
  const T c = add_product(product(positive, of_positive), negative, of_negative);
  const T slope = add_product(product(positive, -rest), negative, slope_of_negative);
  const T m = mul_add(t, rest, negative * q);
  const T gamma = mul_add(t, by.gamma_pos - by.gamma_neg, by.gamma_neg);
  // m' / m, of size 1 at most where it is a quotient. Where q is 0, m = t sigmoid(-x), which may be subnormal.
  const T quotient = m == T(0) ? T(0) : (negative - t) * (derivative / m);
  const T rate = gamma * (is_clipped ? (t == T(0) ? T(0) : -probability) : quotient);
  return {m, gamma, c, slope + product_of_factors(rate, c)};
}

// m^g of that. kSmallPower: see Modulation::has_one_small_power.
template <class T, bool kSmallPower>
FUSED_SCE_INLINE T power_of_soft_target(const Modulation<T>& by, T t, T base, T gamma) {
  if (kSmallPower) return small_power(base, t < T(0.5) ? by.power_neg : by.power_pos);
  const TwoPart<T> logarithm = scaled_logarithm(base, gamma);
  const T power = power_of(base, gamma, logarithm);
  // Of a base above 1, which needs a target outside of [0, 1], that is the inverse.
  return logarithm.upper > T(0) ? T(1) / power : power;
}

// Loss and gradient of one element, whatever its target is. `alpha` and `pos_weight` may be 1.
template <class T, bool kClip>
FUSED_SCE_INLINE LossAndGradient<T>
focal_loss_with(const Modulation<T>& by, T x, T t, T pos_weight, bool has_alpha, T alpha) {
  const TwoPart<T> e = exp_of(reduce_argument(x));
  if (t != T(0) && t != T(1)) {
    const SoftTarget<T> soft = soft_target_of<T, kClip>(by, x, t, pos_weight, e);
    T power = by.has_one_small_power ? power_of_soft_target<T, true>(by, t, soft.base, soft.gamma)
                                     : power_of_soft_target<T, false>(by, t, soft.base, soft.gamma);
    if (has_alpha) power = product(balance(alpha, t), power);
    return {product_of_factors(power, soft.loss), product_of_factors(power, soft.gradient)};
  }
  const auto loss_of = [&](auto lower) {
    constexpr bool kLower = kClip && decltype(lower)::value;
    const Label<T> label = label_of<T, kClip, kLower>(by, x, t, e);
    const T power = by.has_small_powers ? small_power_of_label<T, kLower>(by, label.base, t)
                                        : power_of_label(by, label.base, t, logarithm_of_label(by, label.base, t));
    return loss_of_label<T, kClip, kLower>(label, t, power);
  };
  const LossAndGradient<T> result = by.has_lower_power ? loss_of(std::true_type{}) : loss_of(std::false_type{});
  // An easy alpha is in the power.
  const T factor = has_alpha && !by.has_easy_alpha ? factor_of_label(t, alpha, pos_weight)
                   : t == T(1)                     ? pos_weight
                                                   : T(1);
  return {product(factor, result.loss), product(factor, result.gradient)};
}

template <class T>
FUSED_SCE_INLINE LossAndGradient<T>
focal_loss(const Modulation<T>& by, T x, T t, T pos_weight, bool has_alpha, T alpha) {
  return by.clip == T(0) ? focal_loss_with<T, false>(by, x, t, pos_weight, has_alpha, alpha)
                         : focal_loss_with<T, true>(by, x, t, pos_weight, has_alpha, alpha);
}

}  // namespace fused_sce
