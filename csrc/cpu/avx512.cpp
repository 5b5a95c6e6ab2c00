// The CPU kernels for x86-64 processors with AVX-512 F, DQ, BW and VL.
#if defined(__x86_64__)
#define FUSED_SCE_ISA avx512
#define FUSED_SCE_HAS_FMA 1
#if defined(__clang__)
#define FUSED_SCE_TARGET "avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,bmi,bmi2"
#else  // GCC would otherwise use 256 of the 512 bits
#define FUSED_SCE_TARGET "avx512f,avx512dq,avx512bw,avx512vl,avx2,fma,bmi,bmi2,prefer-vector-width=512"
#endif
#include "kernels-inl.h"
#endif
