// Compiler differences, once. No torch header, no CUDA header.
#pragma once

// Functions are `static`: every instruction-set file of csrc/cpu compiles its own copy, and the linker must not merge a
// copy made for AVX-512 with one made for a machine that lacks it.
#if defined(__CUDACC__)
#define FUSED_SCE_INLINE static __host__ __device__ __forceinline__
#else
#define FUSED_SCE_INLINE static inline __attribute__((always_inline))
#endif

// For non-static members: nvcc takes a kernel's call of a host function for unreachable code and drops what leads
// there.
#if defined(__CUDACC__)
#define FUSED_SCE_HOST_DEVICE __host__ __device__
#else
#define FUSED_SCE_HOST_DEVICE
#endif

// Whether a*b+c is one instruction. CUDA always has it; on a CPU the including file says so, because compilers disagree
// on defining __FMA__ inside a target region. Without it std::fma would be a call of the software version.
#if defined(__CUDA_ARCH__)
#define FUSED_SCE_HAS_FMA 1
#elif !defined(FUSED_SCE_HAS_FMA)
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define FUSED_SCE_HAS_FMA 1
#else
#define FUSED_SCE_HAS_FMA 0
#endif
#endif
