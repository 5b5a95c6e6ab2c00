// Element types of the kernels: a tag for the interface, storage structs, conversions.
#pragma once

#include <cstdint>
#include <type_traits>

#include "formulas/floats.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fused_sce {

enum class DType : int8_t { Float32, Float64, BFloat16, Float16, Bool, UInt8, Int8, Int16, Int32, Int64 };

FUSED_SCE_INLINE constexpr bool is_integer(DType dtype) { return dtype > DType::Bool; }

// Storage only: arithmetic is in float.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
struct Bool {
  uint8_t byte;
};

FUSED_SCE_INLINE float to_float(BFloat16 value) { return bit_cast<float>(uint32_t(value.bits) << 16); }

// Exact, for subnormals and NaN too. Branch-free, so that compilers vectorise loops over it.
FUSED_SCE_INLINE float to_float(Float16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(value.bits & 0x7fffu) << 13;
  // The multiplication by 2^112 = 2^(127 - 15) changes the exponent's bias. It is exact, and normalises subnormals.
  const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;
  return bit_cast<float>(sign | (magnitude >= 0x0f800000u ? special : finite));
#endif
}

// The nearest value, ties to even. Too large a value gives inf, NaN gives a quiet NaN.
FUSED_SCE_INLINE BFloat16 to_bfloat16(float value) {
#if defined(__CUDA_ARCH__)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  return {uint16_t(value != value ? quiet_nan : rounded)};
#endif
}

// As to_bfloat16.
FUSED_SCE_INLINE Float16 to_float16(float value) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal results: subtract 112 from the exponent, then round to 10 mantissa bits by an integer addition.
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Results below 2^-14: the addition of 0.5 rounds, and leaves the result in the low bits of the sum.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  uint32_t result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? special : result;  // 65520 and above round to inf
  return {uint16_t(sign | result)};
#endif
}

// Converts one element of any type to the type computed in (float or double).
template <class T, class From>
FUSED_SCE_INLINE T load_as(From value) {
  if constexpr (std::is_same_v<From, BFloat16> || std::is_same_v<From, Float16>) {
    return T(to_float(value));
  } else if constexpr (std::is_same_v<From, Bool>) {
    return value.byte ? T(1) : T(0);
  } else {
    return T(value);
  }
}

// Converts a result to the type it is stored in. A double becomes 16 bits through float: it is rounded twice, which for
// about one of 2^13 values gives the neighbour of the nearest value.
template <class To, class T>
FUSED_SCE_INLINE To store_as(T value) {
  if constexpr (std::is_same_v<To, BFloat16>) {
    return to_bfloat16(float(value));
  } else if constexpr (std::is_same_v<To, Float16>) {
    return to_float16(float(value));
  } else {
    return To(value);
  }
}

// Calls `action` with a value of the storage type that `dtype` names, and returns what it returns.
FUSED_SCE_CALLS_BACK
template <class Action>
FUSED_SCE_INLINE auto visit(DType dtype, Action&& action) {
  switch (dtype) {
    case DType::Float32: return action(float{});
    case DType::Float64: return action(double{});
    case DType::BFloat16: return action(BFloat16{});
    case DType::Float16: return action(Float16{});
    case DType::Bool: return action(Bool{});
    case DType::UInt8: return action(uint8_t{});
    case DType::Int8: return action(int8_t{});
    case DType::Int16: return action(int16_t{});
    case DType::Int32: return action(int32_t{});
    default: return action(int64_t{});
  }
}

// As visit, for the types of results.
FUSED_SCE_CALLS_BACK
template <class Action>
FUSED_SCE_INLINE auto visit_floating(DType dtype, Action&& action) {
  switch (dtype) {
    case DType::Float64: return action(double{});
    case DType::BFloat16: return action(BFloat16{});
    case DType::Float16: return action(Float16{});
    default: return action(float{});
  }
}

}  // namespace fused_sce
