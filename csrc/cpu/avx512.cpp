// The CPU kernels for x86-64 processors with AVX-512 F, DQ, BW and VL.
#if defined(__x86_64__)
#include <cmath>
#include <cstdint>
#include <cstring>

#define FUSED_SCE_HAS_FMA 1
// prefer-vector-width: GCC would otherwise use 256 of the 512 bits.
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,f16c,bmi,bmi2,prefer-vector-width=512")
#endif

#include "kernels.h"
#define FUSED_SCE_ISA avx512
#include "kernels-inl.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
