// The CPU kernels for any processor of the architecture the compiler targets (SSE2 on x86-64, NEON on AArch64).
#define FUSED_SCE_ISA baseline
#include "kernels-inl.h"
