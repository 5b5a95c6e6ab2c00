// Floating-point operations with the same result on every compiler and processor.
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

// The unevaluated sum of a rounded value and its rounding error.
template <class T>
struct TwoPart {
  T upper;
  T lower;
};

}  // namespace fused_sce
