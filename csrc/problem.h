// What the op layer hands to a kernel: plain data, the same for CPU and CUDA.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtypes.h"
#include "formulas/exp_log1p.h"
#include "options.h"

namespace fused_sce {

// Dimensions after neighbours were merged; the op layer copies operands that would need more.
constexpr int kMaxDims = 6;

// One input, already broadcast to the shape of the logits. A single value is not: it is where `data` points.
struct Operand {
  const void* data = nullptr;  // null: absent
  DType dtype = DType::Float32;
  bool contiguous = false;         // element i of the problem is data[i]; meaningless for a single value
  int64_t strides[kMaxDims] = {};  // in elements, 0 where it is broadcast

  FUSED_SCE_MEMBER explicit operator bool() const { return data != nullptr; }
};

// How the targets of a problem are given. All but dense ones belong to rows of `columns` elements in row-major order.
enum class TargetFormat : int8_t {
  Dense,       // one for each element
  ClassIndex,  // an integer for each row, the column of its only positive
  Packed,  // a bit for each element: eight in a byte, the first in the lowest bit, and each row from a byte of its own
  IndexList,  // `list_length` integers for each row, the columns of its positives, or -1
  Csr         // the columns and the targets of some elements, row by row; those of the others are 0
};

// One output. Its element i is element i of the problem.
struct Result {
  void* data = nullptr;  // null: not wanted
  DType dtype = DType::Float32;

  FUSED_SCE_MEMBER explicit operator bool() const { return data != nullptr; }
};

// A loss over `numel` elements in row-major order of `sizes`. The dimensions are the logits' in any order: the op layer
// takes that of their memory. Which results are set says what to compute:
//   loss:     the loss of each element (reduction "none");
//   gradient: d loss / d logits of each element, times `upstream` and `factor` where present, over divisor_of(). It may
//             lie in the memory of the logits (element for element), and nowhere else in that of an operand.
// Sums come from `sum()` and `rows()`, which write them elsewhere.
struct Problem {
  int64_t numel = 0;
  int ndim = 1;  // at least 1
  int64_t sizes[kMaxDims] = {};

  Operand logits;
  Operand target;
  Operand weight;      // of the type computed in
  Operand pos_weight;  // of the type computed in
  Operand mask;        // bool
  Operand alpha;       // of the type computed in; instead of options.alpha
  Operand prior;       // of the type computed in; instead of options.smoothing_prior
  Operand upstream;    // of the type computed in, or of that of the logits
  Operand factor;      // grad_output where it is one value, instead of `upstream`; where the kernel runs
  Options options;
  const int64_t* count = nullptr;  // where the kernel runs: divides as well, at least 1; null: absent

  TargetFormat format = TargetFormat::Dense;
  int64_t columns = 0;                     // of the logits
  int64_t list_length = 0;                 // IndexList
  int64_t values = 0;                      // Csr: how many there are
  const int64_t* value_columns = nullptr;  // Csr: of each value, ascending in a row
  const int64_t* row_begins = nullptr;     // Csr: the first value of each row, and the end
  // ClassIndex: rows with this index do not count. Their targets are NaN, which is options.ignore_value then.
  int64_t ignored_index = 0;
  bool has_ignored_index = false;

  bool in_double = false;  // computed in double instead of float
  bool is_made = false;    // `gradient` is that for a factor of 1 already; then there is no `upstream`
  Result loss;
  Result gradient;

  // Whether some elements may not count. Those have a loss and a gradient of 0, whatever else belongs to them.
  FUSED_SCE_MEMBER bool leaves_out() const { return options.has_ignore_value || mask; }

  // Whether a target may be wrong: an integer that is no label, a soft one outside of [0, 1], or an index.
  FUSED_SCE_MEMBER bool may_be_wrong() const {
    return is_integer(target.dtype) || options.check_target || format != TargetFormat::Dense;
  }

  FUSED_SCE_MEMBER bool has_alpha() const { return options.has_alpha || alpha; }

  // Whether the formula is that of focal.h instead of loss.h.
  FUSED_SCE_MEMBER bool is_focal() const {
    return options.gamma_pos != 0.0 || options.gamma_neg != 0.0 || options.clip != 0.0 || has_alpha();
  }
};

// What divides the gradient and the sums, where `count` can be read.
FUSED_SCE_INLINE double divisor_of(const Problem& problem) {
  if (!problem.count) return problem.options.divisor;
  const int64_t count = *problem.count;
  return problem.options.divisor * double(count < 1 ? 1 : count);
}

// factor / divisor in two parts: scaled(g, ...) is g * factor / divisor within 1 ULP, for two instructions and no
// division, as long as factor / divisor is a normal number. Then both parts have the same sign and neither is 0, so
// that an infinite g stays infinite. Of a smaller quotient the upper part may be 0, but only a factor of 0 makes both
// 0.
template <class T>
FUSED_SCE_INLINE TwoPart<T> quotient_in_parts(double factor, double divisor) {
  using Bits = typename Constants<T>::Bits;
  const double quotient = factor / divisor;
  T upper = T(quotient);
  if (factor == 0.0 || !(upper - upper == T(0))) return {upper, upper};  // 0, infinite or NaN
  // What the upper part leaves is (factor - upper d) / d. Once per problem, so a software fma is good enough.
  double rest = std::fma(-double(upper), divisor, factor) / divisor;
  if (upper != T(0) && rest != 0.0 && (rest < 0.0) != (upper < T(0))) {  // rounded away from 0: take its neighbour
    upper = bit_cast<T>(Bits(bit_cast<Bits>(upper) - 1));
    rest = std::fma(-double(upper), divisor, factor) / divisor;
  }
  T lower = T(rest);
  if (lower == T(0)) lower = upper * T(0x1p-60);  // too little to change a rounding
  if (lower == T(0)) lower = std::copysign(bit_cast<T>(Bits(1)), T(quotient));
  return {upper, lower};
}

// Whether it comes from a factor of 0, which leaves out what it multiplies.
template <class T>
FUSED_SCE_INLINE bool is_zero_scale(TwoPart<T> scale) {
  return scale.lower == T(0);
}

FUSED_SCE_INLINE double factor_of(const Problem& problem) {
  const Operand& factor = problem.factor;
  if (!factor) return 1.0;
  return visit_floating(
      factor.dtype, [&](auto tag) { return load_as<double>(*static_cast<const decltype(tag)*>(factor.data)); });
}

// Whether nothing is left to do: the gradient is made, and its factor is 1.
FUSED_SCE_INLINE bool is_done(const Problem& problem) { return problem.is_made && factor_of(problem) == 1.0; }

// What multiplies the gradient of each element, where `factor` and `count` can be read.
template <class T>
FUSED_SCE_INLINE TwoPart<T> gradient_scale(const Problem& problem) {
  return quotient_in_parts<T>(factor_of(problem), divisor_of(problem));
}

// The storage position of element `index` of a strided operand.
FUSED_SCE_INLINE int64_t offset_of(const Problem& problem, const Operand& operand, int64_t index) {
  int64_t offset = 0;
  for (int dim = problem.ndim - 1; dim > 0; --dim) {
    const int64_t size = problem.sizes[dim];
    const int64_t outer = index / size;
    offset += (index - outer * size) * operand.strides[dim];
    index = outer;
  }
  return offset + index * operand.strides[0];
}

}  // namespace fused_sce
