// Compiler differences, once. No torch header, no CUDA header.
#pragma once

// Functions are `static`: each file of csrc/cpu compiles its own copy for its instruction set, and the linker must not
// replace one copy by another.
#if defined(__CUDACC__)
#define FUSED_SCE_INLINE static __host__ __device__ __forceinline__
#else
#define FUSED_SCE_INLINE static inline __attribute__((always_inline))
#endif

// For non-static members. Without it nvcc treats a kernel's call of the function as unreachable, and removes the code
// that leads to it.
#if defined(__CUDACC__)
#define FUSED_SCE_HOST_DEVICE __host__ __device__
#else
#define FUSED_SCE_HOST_DEVICE
#endif

// 1 if a*b+c is one instruction (fused multiply-add), as always on a GPU. A file with a target region defines it before
// it includes this header, because not every compiler defines __FMA__ inside such a region.
#if defined(__CUDA_ARCH__)
#define FUSED_SCE_HAS_FMA 1
#elif !defined(FUSED_SCE_HAS_FMA)
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define FUSED_SCE_HAS_FMA 1
#else
#define FUSED_SCE_HAS_FMA 0
#endif
#endif
