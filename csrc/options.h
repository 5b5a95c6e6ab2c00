// The options of the loss that the kernels see: each is named once in the schema and once in the struct, in the same
// order.
#pragma once

#include <cstdint>
#include <optional>

#include "formulas/floats.h"

namespace fused_sce {

//   divisor           divides the loss. An integer, because those stay symbolic under torch.compile: a float would
//                     recompile for each batch size.
//   label_smoothing   (s)
//   smoothing_prior   (p) A target t becomes (1 - s) t + s p.
//   ignore_value      a target equal to it (NaN: that is NaN) does not count: see Problem::leaves_out().
//   gamma_pos, gamma_neg, clip
//                     of the focal and the asymmetric loss: formulas/focal.h.
//   alpha             (a) A loss is multiplied by a t + (1 - a) (1 - t).
//   target_threshold  a target becomes 1 if it is larger, else 0; after the smoothing.
//   check_target      a target outside of [0, 1] is an error.
#define FUSED_SCE_OPTIONS                                                                              \
  "SymInt divisor=1, float label_smoothing=0.0, float smoothing_prior=0.5, float? ignore_value=None, " \
  "float gamma_pos=0.0, float gamma_neg=0.0, float clip=0.0, float? alpha=None, "                      \
  "float? target_threshold=None, bool check_target=False"

struct Options {
  double divisor = 1.0;
  double label_smoothing = 0.0;
  double smoothing_prior = 0.5;
  bool has_ignore_value = false;
  double ignore_value = 0.0;  // as the target's type holds it
  double gamma_pos = 0.0;
  double gamma_neg = 0.0;
  double clip = 0.0;
  bool has_alpha = false;
  double alpha = 0.0;
  bool has_threshold = false;
  double target_threshold = 0.0;
  bool check_target = false;

  // Takes the options from the values of a call.
  template <class Values>
  static Options next(Values& values) {
    const int64_t divisor = values.template next<int64_t>();
    const double label_smoothing = values.template next<double>();
    const double smoothing_prior = values.template next<double>();
    const std::optional<double> ignore_value = values.template next<std::optional<double>>();
    const double gamma_pos = values.template next<double>();
    const double gamma_neg = values.template next<double>();
    const double clip = values.template next<double>();
    const std::optional<double> alpha = values.template next<std::optional<double>>();
    const std::optional<double> target_threshold = values.template next<std::optional<double>>();
    const bool check_target = values.template next<bool>();
    return {
        double(divisor),
        label_smoothing,
        smoothing_prior,
        bool(ignore_value),
        ignore_value.value_or(0.0),
        gamma_pos,
        gamma_neg,
        clip,
        bool(alpha),
        alpha.value_or(0.0),
        bool(target_threshold),
        target_threshold.value_or(0.0),
        check_target};
  }

  // Whether a target is not taken as it is.
  FUSED_SCE_MEMBER bool changes_target() const { return label_smoothing != 0.0 || has_threshold; }
};

// A target after the smoothing, rounded to the type computed in.
template <class T>
FUSED_SCE_INLINE T smoothed_target(const Options& options, T target) {
  return add_product(T(options.label_smoothing * options.smoothing_prior), T(1.0 - options.label_smoothing), target);
}

// The same with a prior of its own.
template <class T>
FUSED_SCE_INLINE T smoothed_target(const Options& options, T target, T prior) {
  return add_product(T(options.label_smoothing) * prior, T(1.0 - options.label_smoothing), target);
}

// A target after the threshold. NaN stays NaN.
template <class T>
FUSED_SCE_INLINE T binary_target(const Options& options, T target) {
  const T label = target > T(options.target_threshold) ? T(1) : T(0);
  return target == target ? label : target;
}

// Whether a target equals the ignore_value.
template <class T>
FUSED_SCE_INLINE bool is_ignored(const Options& options, T target) {
  const T value = T(options.ignore_value);
  return options.has_ignore_value && (target == value || (target != target && value != value));
}

}  // namespace fused_sce
