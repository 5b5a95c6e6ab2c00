// All CUDA kernels as one program: their headers are parsed once.
#include "../../csrc/cuda/elements.cu"
#include "../../csrc/cuda/rows.cu"
#include "../../csrc/cuda/sum.cu"
