// What the op layer hands to a kernel: plain data, the same for CPU and CUDA.
#pragma once

#include <cmath>
#include <cstdint>

#include "dtypes.h"
#include "formulas/floats.h"
#include "options.h"

namespace fused_sce {

// Dimensions after neighbours were merged; the op layer copies operands that would need more.
constexpr int kMaxDims = 6;

// One input, already broadcast to the shape of the logits.
struct Operand {
  const void* data = nullptr;  // null: absent
  DType dtype = DType::Float32;
  bool contiguous = false;         // element i of the problem is data[i]
  int64_t strides[kMaxDims] = {};  // in elements, 0 where it is broadcast

  FUSED_SCE_MEMBER explicit operator bool() const { return data != nullptr; }
};

// One output, contiguous.
struct Result {
  void* data = nullptr;  // null: not wanted
  DType dtype = DType::Float32;

  FUSED_SCE_MEMBER explicit operator bool() const { return data != nullptr; }
};

// A loss over `numel` elements in row-major order of `sizes`. Which results are set says what to compute:
//   loss:     the loss of each element (reduction "none");
//   gradient: d loss / d logits of each element, divided by the divisor and `count`, times `upstream` where present. It
//             may lie in the memory of the logits (element for element), and nowhere else in that of an operand.
// Sums come from `sum()` and `rows()`, which write them elsewhere.
struct Problem {
  int64_t numel = 0;
  int ndim = 1;  // at least 1
  int64_t sizes[kMaxDims] = {};

  Operand logits;
  Operand target;
  Operand weight;      // of the type computed in
  Operand pos_weight;  // of the type computed in
  Operand upstream;    // of the type computed in, or of that of the logits
  Options options;
  const int64_t* count = nullptr;  // where the kernel runs: divides as well, at least 1; null: absent

  bool in_double = false;  // computed in double instead of float
  Result loss;
  Result gradient;
};

// 1 / divisor in two parts: g * upper + g * lower is g / divisor within 1 ULP, for two instructions and no division.
template <class T>
FUSED_SCE_INLINE TwoPart<T> reciprocal(double divisor) {
  const T upper = T(1.0 / divisor);
  // (1 - upper d) / d is what the upper part leaves of 1 / d. Once per problem, so a software fma is good enough.
  const T lower = T(std::fma(-double(upper), divisor, 1.0) / divisor);
  return {upper, lower};
}

// What divides the gradient and the sums, where `count` can be read.
FUSED_SCE_INLINE double divisor_of(const Problem& problem) {
  if (!problem.count) return problem.options.divisor;
  const int64_t count = *problem.count;
  return problem.options.divisor * double(count < 1 ? 1 : count);
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
