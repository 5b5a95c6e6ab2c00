// The CPU kernels for x86-64 processors with AVX2 and fused multiply-add (from 2013 on).
#if defined(__x86_64__)
#include <cmath>
#include <cstdint>
#include <cstring>

#define FUSED_SCE_HAS_FMA 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,bmi,bmi2")
#endif

#include "kernels.h"
#define FUSED_SCE_ISA avx2
#include "kernels-inl.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
