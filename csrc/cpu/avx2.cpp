// The CPU kernels for x86-64 processors with AVX2 and fused multiply-add (from 2013 on).
#if defined(__x86_64__)
#define FUSED_SCE_ISA avx2
#define FUSED_SCE_HAS_FMA 1
#define FUSED_SCE_TARGET "avx2,fma,bmi,bmi2"
#include "kernels-inl.h"
#endif
