// Times the CPU kernels against the same loop on SLEEF's vector functions within 1 ULP, and against the addition of two
// arrays into a third, operands in the cache and in memory. Without torch.
//
//     sleef SECONDS    for each instruction set and size, 5 by default
//
// The loop is the shortest that computes loss, gradient and float64 sum: it does not care for NaN, infinities and the
// last bit. The candidates take turns over slices of the arrays. A figure is the mean over the slices of the best time
// of each, so that it counts little what else the machine does.
#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "../csrc/cpu/kernels.h"

// sleef.h declares only what the compiler's own target can run.
extern "C" {
__m256 Sleef_expf8_u10avx2(__m256);
__m256 Sleef_log1pf8_u10avx2(__m256);
__m512 Sleef_expf16_u10avx512f(__m512);
__m512 Sleef_log1pf16_u10avx512f(__m512);
}

namespace {

using namespace fused_sce;

// One slice is 768 KiB of logits, target and gradient where there are many, and all there is in the cache.
constexpr int64_t kSlice = 16 * cpu::kChunk;

struct Slice {
  const float* logits;
  const float* target;
  float* gradient;
  int64_t count;  // a multiple of 16
};

// The sum of the losses, and the gradient times `scale`. Half: half as many floats.
template <class Floats, class Half, class Doubles>
FUSED_SCE_INLINE double loss_and_gradient(const Slice& slice, Floats (*exp)(Floats), Floats (*log1p)(Floats)) {
  constexpr int kWidth = sizeof(Floats) / sizeof(float);
  const float scale = 1.0f / float(slice.count);
  Doubles sums[2] = {};
  for (int64_t i = 0; i < slice.count; i += kWidth) {
    const Floats x = *reinterpret_cast<const Floats*>(slice.logits + i);
    const Floats t = *reinterpret_cast<const Floats*>(slice.target + i);
    const Floats size = x < 0 ? -x : x;
    const Floats e = exp(-size);
    const Floats slope = x < 0 ? t : 1 - t;
    const Floats gradient = slope - e / (1 + e);
    *reinterpret_cast<Floats*>(slice.gradient + i) = (x < 0 ? -gradient : gradient) * scale;
    const Floats loss = slope * size + log1p(e);
    const Half* const halves = reinterpret_cast<const Half*>(&loss);
    sums[0] += __builtin_convertvector(halves[0], Doubles);
    sums[1] += __builtin_convertvector(halves[1], Doubles);
  }
  double sum = 0.0;
  for (int k = 0; k < kWidth / 2; ++k) sum += sums[0][k] + sums[1][k];
  return sum;
}

__attribute__((target("avx2,fma"))) double sleef_avx2(const Slice& slice) {
  return loss_and_gradient<__m256, __m128, __m256d>(slice, Sleef_expf8_u10avx2, Sleef_log1pf8_u10avx2);
}

__attribute__((target("avx512f,avx512dq,avx2,fma"))) double sleef_avx512(const Slice& slice) {
  return loss_and_gradient<__m512, __m256, __m512d>(slice, Sleef_expf16_u10avx512f, Sleef_log1pf16_u10avx512f);
}

__attribute__((target("avx2"))) double add(const Slice& slice) {
  for (int64_t i = 0; i < slice.count; ++i) slice.gradient[i] = slice.logits[i] + slice.target[i];
  return 0.0;
}

double kernel(const cpu::Kernels& kernels, const Slice& slice) {
  double sums[kSlice / cpu::kChunk];
  Problem problem;
  problem.numel = problem.sizes[0] = slice.count;
  problem.options.divisor = double(slice.count);
  problem.logits = {slice.logits, DType::Float32, true, {}};
  problem.target = {slice.target, DType::Float32, true, {}};
  problem.gradient = {slice.gradient, DType::Float32};
  kernels.chunks(problem, 0, cpu::num_chunks(slice.count), sums);
  return sums[0];
}

struct Candidate {
  std::string name;
  std::function<double(const Slice&)> run;
};

// Prints ns per element of each candidate, and what the others take in units of the first.
void compare(const char* title, const std::vector<Candidate>& candidates, int64_t count, double seconds) {
  using Clock = std::chrono::steady_clock;
  std::vector<float> logits(count + 16), target(count + 16), gradient(count + 16);
  const auto aligned = [](std::vector<float>& array) {
    return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(array.data()) + 63) / 64 * 64);
  };
  for (int64_t i = 0; i < count; ++i) {
    aligned(logits)[i] = float(i * 7919 % 20011) * 1e-3f - 10.0f;
    aligned(target)[i] = float(i % 3 == 0);
  }
  const int64_t slices = (count + kSlice - 1) / kSlice;
  std::vector<std::vector<double>> best(candidates.size(), std::vector<double>(slices, 1e300));
  volatile double sink = 0.0;
  const auto end = Clock::now() + std::chrono::duration<double>(seconds);
  int64_t rounds = 0;
  for (; Clock::now() < end || rounds < 5; ++rounds) {
    for (size_t k = 0; k < candidates.size(); ++k) {
      for (int64_t n = 0; n < slices; ++n) {
        const int64_t begin = n * kSlice;
        const Slice slice = {
            aligned(logits) + begin, aligned(target) + begin, aligned(gradient) + begin,
            std::min(kSlice, count - begin)};
        const auto start = Clock::now();
        sink = sink + candidates[k].run(slice);
        const std::chrono::duration<double, std::nano> taken = Clock::now() - start;
        best[k][n] = std::min(best[k][n], taken.count());
      }
    }
  }
  std::printf("%s, %lld rounds\n", title, static_cast<long long>(rounds));
  double first = 0.0;
  for (size_t k = 0; k < candidates.size(); ++k) {
    double total = 0.0;
    for (const double taken : best[k]) total += taken / double(count);
    if (k == 0) first = total;
    std::printf("  %-10s%7.3f ns per element%8.2f\n", candidates[k].name.c_str(), total, total / first);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 5.0;
  for (const cpu::Kernels* kernels : cpu::runnable_kernels()) {
    const std::string isa = kernels->isa;
    if (isa == "baseline") continue;
    const std::vector<Candidate> candidates = {
        {isa, [kernels](const Slice& slice) { return kernel(*kernels, slice); }},
        {"SLEEF", isa == "avx512" ? sleef_avx512 : sleef_avx2},
        {"addition", add}};
    compare((isa + ", 192 KiB").c_str(), candidates, 16384, seconds);
    compare((isa + ", 118 MB").c_str(), candidates, 1024 * 9605 / 16 * 16, seconds);
  }
}
