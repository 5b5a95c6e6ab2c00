// Element types as the kernels see them: a tag for the interface, storage structs for the 16-bit types, conversions.
#pragma once

#include <cstdint>

#include "formulas/floats.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fused_sce {

enum class DType : int8_t { Float32, Float64, BFloat16, Float16, Bool, UInt8, Int8, Int16, Int32, Int64 };

// Storage only; arithmetic is done in float.
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

// Branch-free, so that loops over it become vector code; subnormals and NaN kept.
FUSED_SCE_INLINE float to_float(Float16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = uint32_t(value.bits & 0x7fffu) << 13;
  // The exponent sits right for a bias of 127 after a multiplication by 2^112, exact for subnormals too.
  const uint32_t finite = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;
  return bit_cast<float>(sign | (magnitude >= 0x0f800000u ? special : finite));
#endif
}

// The nearest value, ties to even; what is too large becomes inf, NaN stays NaN (quiet).
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

FUSED_SCE_INLINE Float16 to_float16(float value) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal results: subtract the bias difference (112) and round to 10 mantissa bits by integer addition.
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Results below 2^-14: adding 0.5 puts the wanted bits at the bottom of the sum, rounded by the addition itself.
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  uint32_t result = magnitude < (113u << 23) ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? special : result;  // 65520 and above round to inf
  return {uint16_t(sign | result)};
#endif
}

// One element of any type to the type computed in (float or double), and back.
template <class T, class From>
FUSED_SCE_INLINE T load_as(From value) {
  return T(value);
}
template <class T>
FUSED_SCE_INLINE T load_as(BFloat16 value) {
  return T(to_float(value));
}
template <class T>
FUSED_SCE_INLINE T load_as(Float16 value) {
  return T(to_float(value));
}
template <class T>
FUSED_SCE_INLINE T load_as(Bool value) {
  return value.byte ? T(1) : T(0);
}

// A double goes to 16 bits through float: two roundings, which differ from one in about one of 2^13 values by one step.
template <class To>
struct StoreAs;
template <>
struct StoreAs<float> {
  FUSED_SCE_INLINE float from(double value) { return float(value); }
  FUSED_SCE_INLINE float from(float value) { return value; }
};
template <>
struct StoreAs<double> {
  FUSED_SCE_INLINE double from(double value) { return value; }
  FUSED_SCE_INLINE double from(float value) { return double(value); }
};
template <>
struct StoreAs<BFloat16> {
  FUSED_SCE_INLINE BFloat16 from(double value) { return to_bfloat16(float(value)); }
  FUSED_SCE_INLINE BFloat16 from(float value) { return to_bfloat16(value); }
};
template <>
struct StoreAs<Float16> {
  FUSED_SCE_INLINE Float16 from(double value) { return to_float16(float(value)); }
  FUSED_SCE_INLINE Float16 from(float value) { return to_float16(value); }
};

// Calls `action` with a value of the storage type that `dtype` names.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable  // action may be the host's; a kernel's is checked where it is written
#endif
template <class Action>
FUSED_SCE_INLINE void visit(DType dtype, Action&& action) {
  switch (dtype) {
    case DType::Float32: action(float{}); break;
    case DType::Float64: action(double{}); break;
    case DType::BFloat16: action(BFloat16{}); break;
    case DType::Float16: action(Float16{}); break;
    case DType::Bool: action(Bool{}); break;
    case DType::UInt8: action(uint8_t{}); break;
    case DType::Int8: action(int8_t{}); break;
    case DType::Int16: action(int16_t{}); break;
    case DType::Int32: action(int32_t{}); break;
    case DType::Int64: action(int64_t{}); break;
  }
}

// The same for the types a result may have.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class Action>
FUSED_SCE_INLINE void visit_floating(DType dtype, Action&& action) {
  switch (dtype) {
    case DType::Float64: action(double{}); break;
    case DType::BFloat16: action(BFloat16{}); break;
    case DType::Float16: action(Float16{}); break;
    default: action(float{}); break;
  }
}

}  // namespace fused_sce
