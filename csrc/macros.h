// Compiler differences, once. No torch header, no CUDA header.
#pragma once

// Functions are `static`: each file of csrc/cpu compiles its own copy for its instruction set, and the linker must not
// replace one copy by another. Members cannot be `static`, so on the CPU they are inlined always: there is no copy.
//
// Without __host__ __device__ nvcc treats a kernel's call of a function as unreachable, and removes the code that leads
// to it. FUSED_SCE_CALLS_BACK stands before a function that calls its argument, which may be a function of the host.
//
// A loop over a group must be unrolled completely: an array that is indexed at run time would lie in memory.
#if defined(__CUDACC__)
#define FUSED_SCE_INLINE static __host__ __device__ __forceinline__
#define FUSED_SCE_MEMBER __host__ __device__ __forceinline__
#define FUSED_SCE_CALLS_BACK _Pragma("nv_exec_check_disable")
#define FUSED_SCE_UNROLL _Pragma("unroll")
#define FUSED_SCE_NO_UNROLL _Pragma("unroll 1")
#else
#define FUSED_SCE_INLINE static inline __attribute__((always_inline))
#define FUSED_SCE_MEMBER inline __attribute__((always_inline))
#define FUSED_SCE_CALLS_BACK
#define FUSED_SCE_UNROLL
#define FUSED_SCE_NO_UNROLL
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
