// The losses of formulas/focal.h over the arrays of a block: part of kernels-inl.h.

// Whether some targets are 0 or 1, and whether others are not.
struct KindsOfTarget {
  bool has_labels;
  bool has_others;
};

template <class T>
KindsOfTarget kinds_of_target(int64_t count, const T* target) {
  typename Constants<T>::Bits labels = 0;  // not a bool, see has_nan()
  typename Constants<T>::Bits others = 0;
  for (int64_t i = 0; i < count; ++i) {
    const bool is_label = target[i] == T(0) || target[i] == T(1);
    labels |= is_label ? 1 : 0;
    others |= is_label ? 0 : 1;
  }
  return {labels != 0, others != 0};
}

// The parts of the focal losses of a block (focal.h: Label), and their powers.
template <class T>
struct Labels {
  alignas(64) T base[kBlock];
  alignas(64) T linear[kBlock];
  alignas(64) T argument[kBlock];
  alignas(64) T slope[kBlock];
  alignas(64) T rate[kBlock];
  alignas(64) T power[kBlock];
};

// labels.power = labels.base^gamma times alpha.
template <class T>
void find_powers(int64_t count, const Modulation<T>& modulation, const T* __restrict__ target, Labels<T>& labels) {
  const Modulation<T> by = modulation;
  const T* __restrict__ base = labels.base;
  T* __restrict__ power = labels.power;
  alignas(64) T rest[kBlock];
  for (int64_t i = 0; i < count; ++i) {
    const TwoPart<T> logarithm = logarithm_of_label(by, base[i], target[i]);
    power[i] = logarithm.upper;
    rest[i] = logarithm.lower;
  }
  for (int64_t i = 0; i < count; ++i) {
    power[i] = power_of_label(by, base[i], target[i], TwoPart<T>{power[i], rest[i]});
  }
}

// The losses and gradients of targets that are 0 or 1, but for factors. kBits: of the small powers, 0 if there are
// none.
template <class T, bool kClip, bool kLower, int kBits>
void compute_labels(
    const Work<T>& work,
    const T* __restrict__ target,
    const T* __restrict__ upper,
    const T* __restrict__ lower,
    TwoPart<T> scale,
    T* __restrict__ loss,
    T* __restrict__ gradient) {
  const Modulation<T> by = *work.modulation;
  const T* __restrict__ logits = work.logits;
  if constexpr (!kClip && kBits > 0) {
    with_prefetch(work, [&](int64_t begin, int64_t count) {
      for (int64_t i = begin; i < begin + count; ++i) {
        const Label<T> label = label_of<T, kClip, kLower>(by, logits[i], target[i], {upper[i], lower[i]});
        const T power = small_power_of_label<T, kLower, kBits>(by, label.base, target[i]);
        const LossAndGradient<T> result = loss_of_label<T, kClip, kLower>(label, target[i], power);
        loss[i] = result.loss;
        gradient[i] = scaled(result.gradient, scale);
      }
    });
    return;
  }
  Labels<T> labels;
  with_prefetch(work, [&](int64_t begin, int64_t count) {
    for (int64_t i = begin; i < begin + count; ++i) {
      const Label<T> label = label_of<T, kClip, kLower>(by, logits[i], target[i], {upper[i], lower[i]});
      labels.base[i] = label.base;
      labels.linear[i] = label.linear;
      labels.slope[i] = label.slope;
      labels.rate[i] = label.rate;
      if (kClip) labels.argument[i] = label.argument;
    }
  });
  if (kBits == 0) find_powers(work.count, by, target, labels);
  for (int64_t i = 0; i < work.count; ++i) {
    const Label<T> label = {
        labels.base[i], labels.linear[i], kClip ? labels.argument[i] : T(0), labels.slope[i], labels.rate[i]};
    const T factor = kBits > 0 ? small_power_of_label<T, kLower, kBits>(by, label.base, target[i]) : labels.power[i];
    const LossAndGradient<T> result = loss_of_label<T, kClip, kLower>(label, target[i], factor);
    loss[i] = result.loss;
    gradient[i] = scaled(result.gradient, scale);
  }
}

template <class T, bool kClip, bool kLower>
auto choose_by_bits(const Modulation<T>& by) {
  if (!by.has_small_powers) return compute_labels<T, kClip, kLower, 0>;
  const bool are_two = by.power_pos < 4 && by.power_neg < (kLower ? 5 : 4);
  return are_two ? compute_labels<T, kClip, kLower, 2> : compute_labels<T, kClip, kLower, 3>;
}

// The losses and gradients of labels times factors: alpha and pos_weight, either of which may be null. The scale comes
// last: a gradient may be too small for a normal number before the factor, and not after it.
template <class T>
void multiply_labels(
    int64_t count,
    const T* __restrict__ target,
    const T* __restrict__ alpha,
    const T* __restrict__ pos_weight,
    TwoPart<T> scale,
    T* __restrict__ loss,
    T* __restrict__ gradient) {
  const auto multiply = [&](auto factor_of) {
    for (int64_t i = 0; i < count; ++i) {
      const T factor = factor_of(i);
      loss[i] = product(factor, loss[i]);
      gradient[i] = scaled(product(factor, gradient[i]), scale);
    }
  };
  if (alpha && pos_weight) {
    multiply([&](int64_t i) { return factor_of_label(target[i], alpha[i], pos_weight[i]); });
  } else if (alpha) {
    multiply([&](int64_t i) { return factor_of_label(target[i], alpha[i], T(1)); });
  } else {
    multiply([&](int64_t i) { return target[i] == T(1) ? pos_weight[i] : T(1); });
  }
}

// The losses and gradients of targets that are neither 0 nor 1.
template <class T, bool kClip>
void compute_soft_targets(
    const Work<T>& work,
    const T* __restrict__ target,
    const T* __restrict__ alpha,
    const T* __restrict__ upper,
    const T* __restrict__ lower,
    T* __restrict__ loss,
    T* __restrict__ gradient) {
  const Modulation<T> by = *work.modulation;
  const TwoPart<T> scale = work.scale;
  const T* __restrict__ logits = work.logits;
  alignas(64) T factor[kBlock];
  alignas(64) T pos_weight[kBlock];
  for (int64_t i = 0; i < work.count; ++i) factor[i] = alpha ? balance(alpha[i], target[i]) : T(1);
  for (int64_t i = 0; i < work.count; ++i) pos_weight[i] = work.pos_weight ? work.pos_weight[i] : T(1);
  alignas(64) T base[kBlock];
  alignas(64) T gamma[kBlock];
  alignas(64) T loss_part[kBlock];
  alignas(64) T gradient_part[kBlock];
  for (int64_t i = 0; i < work.count; ++i) {
    const SoftTarget<T> soft =
        soft_target_of<T, kClip>(by, logits[i], target[i], pos_weight[i], TwoPart<T>{upper[i], lower[i]});
    base[i] = soft.base;
    gamma[i] = soft.gamma;
    loss_part[i] = soft.loss;
    gradient_part[i] = soft.gradient;
  }
  if (by.has_one_small_power) {
    for (int64_t i = 0; i < work.count; ++i) base[i] = power_of_soft_target<T, true>(by, target[i], base[i], gamma[i]);
  } else {
    for (int64_t i = 0; i < work.count; ++i) base[i] = power_of_soft_target<T, false>(by, target[i], base[i], gamma[i]);
  }
  for (int64_t i = 0; i < work.count; ++i) {
    const T power = product(factor[i], base[i]);
    const bool is_label = target[i] == T(0) || target[i] == T(1);
    loss[i] = is_label ? loss[i] : product_of_factors(power, loss_part[i]);
    gradient[i] = is_label ? gradient[i] : scaled(product_of_factors(power, gradient_part[i]), scale);
  }
}

// The formulas of focal.h over arrays: short loops, as those of compute() and for the same reason.
template <class T>
void compute_focal(const Work<T>& work) {
  alignas(64) T upper[kBlock];
  alignas(64) T lower[kBlock];
  alignas(64) T buffer[kBlock];
  alignas(64) T unwanted[kBlock];
  const Modulation<T>& by = *work.modulation;
  exponentials(work, upper, lower);
  const T* target = work.target;
  if (work.counts) {  // what does not count has a target of 0: it may be NaN, or no label
    for (int64_t i = 0; i < work.count; ++i) buffer[i] = masked(work.target[i], work.counts[i]);
    target = buffer;
  }
  T* const loss = work.loss ? work.loss : unwanted;
  T* const gradient = work.gradient ? work.gradient : unwanted;
  const KindsOfTarget kinds = kinds_of_target(work.count, target);
  if (kinds.has_labels) {
    const auto compute = by.has_lower_power ? choose_by_bits<T, true, true>(by)
                         : by.clip != T(0)  ? choose_by_bits<T, true, false>(by)
                                            : choose_by_bits<T, false, false>(by);
    const T* const alpha = by.has_easy_alpha ? nullptr : work.alpha;
    const bool has_factors = alpha || work.pos_weight;
    compute(work, target, upper, lower, has_factors ? quotient_in_parts<T>(1.0, 1.0) : work.scale, loss, gradient);
    if (has_factors) multiply_labels(work.count, target, alpha, work.pos_weight, work.scale, loss, gradient);
  }
  if (kinds.has_others) {
    const auto compute = by.clip == T(0) ? compute_soft_targets<T, false> : compute_soft_targets<T, true>;
    compute(work, target, work.alpha, upper, lower, loss, gradient);
  }
  if (work.counts) {
    zero_others(work.count, work.counts, loss);
    zero_others(work.count, work.counts, gradient);
  }
}
