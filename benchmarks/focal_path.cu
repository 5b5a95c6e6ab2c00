// What one label of a focal or asymmetric loss executes on a GPU: the loops of csrc/cuda have branches for every
// option, of which a label takes one path. Here the options are constants and the targets labels, so the loops have
// that path alone.
//
//     nvcc -O3 -std=c++17 --fmad=false -arch=sm_90 -cubin benchmarks/focal_path.cu -o focal_path.cubin
//     cuobjdump -sass focal_path.cubin      # instructions between a loop's first load and its branch back
#include "../csrc/formulas/focal.h"

using namespace fused_sce;

template <int kGammaPos, int kGammaNeg, int kClipPercent>
__global__ void focal_label(const float* x, const float* t, float* gradient, double* sums, long count) {
  Options options;
  options.gamma_pos = kGammaPos / 10.0;
  options.gamma_neg = kGammaNeg / 10.0;
  options.clip = kClipPercent / 100.0;
  const Modulation<float> by = modulation_of<float>(options, false);
  constexpr bool kClip = kClipPercent > 0;
  constexpr bool kLower = kClip && kGammaNeg >= 10;
  double sum = 0.0;
#pragma unroll 1
  for (long i = blockIdx.x * 256l + threadIdx.x; i < count; i += gridDim.x * 256l) {
    const float target = t[i] != 0.0f ? 1.0f : 0.0f;
    const Label<float> label = label_of<float, kClip, kLower>(by, x[i], target, exp_of(reduce_argument(x[i])));
    const float power = by.has_small_powers
                            ? small_power_of_label<float, kLower>(by, label.base, target)
                            : power_of_label(by, label.base, target, logarithm_of_label(by, label.base, target));
    const LossAndGradient<float> result = loss_of_label<float, kClip, kLower>(label, target, power);
    gradient[i] = result.gradient;
    sum += result.loss;
  }
  sums[blockIdx.x * 256l + threadIdx.x] = sum;
}

template __global__ void focal_label<20, 20, 0>(const float*, const float*, float*, double*, long);
template __global__ void focal_label<25, 25, 0>(const float*, const float*, float*, double*, long);
template __global__ void focal_label<10, 40, 5>(const float*, const float*, float*, double*, long);
template __global__ void focal_label<10, 25, 5>(const float*, const float*, float*, double*, long);
