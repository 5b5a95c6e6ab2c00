// Sweeps float32 bit patterns through the CPU kernels and compares loss and gradient with float64.
//
//     sweep STEP        every STEP-th of the 2^32 patterns, for t = 0 and t = 1, on two threads
//
// No torch: this is the kernels and the math header alone. Prints the worst errors and fails past 2 ULP, or if any
// result is 0 where the exact one is not (or the other way round), or NaN anywhere but for NaN. Choose the kernels with
// FUSED_SCE_ISA.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

#include "../../csrc/cpu/kernels.h"

namespace {

constexpr double kBound = 2.0;
constexpr int kBatch = 4096;
constexpr int kThreads = 2;

struct Worst {
  double ulp = 0.0;
  float logit = 0.0f;
};

// |got - exact| in units in the last place of `exact`; below the normal range in subnormal steps.
double ulps(float got, double exact) {
  if (std::isnan(exact)) return std::isnan(got) ? 0.0 : HUGE_VAL;
  if (std::isinf(exact)) return got == exact ? 0.0 : HUGE_VAL;
  if (!std::isfinite(got)) return HUGE_VAL;
  int exponent = 0;
  std::frexp(exact, &exponent);
  return std::fabs(got - exact) / std::ldexp(1.0, exponent - 24 > -149 ? exponent - 24 : -149);
}

struct Report {
  Worst loss[2];
  Worst gradient[2];
  long lost = 0;
};

void keep(Worst& worst, double error, float logit) {
  if (error > worst.ulp) worst = {error, logit};
}

void sweep(uint64_t step, int thread, Report& report) {
  using namespace fused_sce;
  std::vector<float> logits(kBatch), target(kBatch), loss(kBatch), gradient(kBatch);
  for (uint64_t base = thread * kBatch * step; base < (uint64_t(1) << 32); base += kThreads * kBatch * step) {
    int count = 0;
    for (uint64_t bits = base; count < kBatch && bits < (uint64_t(1) << 32); bits += step) {
      logits[count++] = bit_cast<float>(uint32_t(bits));
    }
    for (int t = 0; t < 2; ++t) {
      for (float& value : target) value = float(t);
      Problem problem;
      problem.numel = problem.sizes[0] = count;
      problem.logits = {logits.data(), DType::Float32, true, {}};
      problem.target = {target.data(), DType::Float32, true, {}};
      problem.loss = {loss.data(), DType::Float32};
      problem.gradient = {gradient.data(), DType::Float32};
      cpu::kernels().chunks(problem, 0, cpu::num_chunks(count), nullptr);
      for (int i = 0; i < count; ++i) {
        const double x = logits[i];
        const double e = std::exp(-std::fabs(x));
        const double wrong = t ? -x : x;
        const double exact_loss = (wrong < 0 ? 0.0 : wrong) + std::log1p(e);
        const double exact_gradient = (wrong < 0 ? e : 1.0) / (1.0 + e) * (t ? -1 : 1);
        keep(report.loss[t], ulps(loss[i], exact_loss), logits[i]);
        keep(report.gradient[t], ulps(gradient[i], exact_gradient), logits[i]);
        report.lost += (float(exact_loss) == 0) != (loss[i] == 0);
        report.lost += (float(exact_gradient) == 0) != (gradient[i] == 0);
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t step = argc == 2 ? std::strtoull(argv[1], nullptr, 10) : 0;
  if (step == 0) {
    std::fprintf(stderr, "usage: sweep STEP\n");
    return 2;
  }
  Report reports[kThreads];
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&, thread] { sweep(step, thread, reports[thread]); });
  }
  for (std::thread& thread : threads) thread.join();

  bool holds = true;
  long lost = 0;
  for (const Report& report : reports) lost += report.lost;
  std::printf("%s, every %llu. float32:\n", fused_sce::cpu::kernels().isa, static_cast<unsigned long long>(step));
  for (int t = 0; t < 2; ++t) {
    Worst loss, gradient;
    for (const Report& report : reports) {
      keep(loss, report.loss[t].ulp, report.loss[t].logit);
      keep(gradient, report.gradient[t].ulp, report.gradient[t].logit);
    }
    std::printf(
        "t=%d: loss %.3f ULP at %.9g, gradient %.3f ULP at %.9g\n", t, loss.ulp, loss.logit, gradient.ulp,
        gradient.logit);
    holds = holds && loss.ulp <= kBound && gradient.ulp <= kBound;
  }
  std::printf("lost: %ld\n", lost);
  return holds && lost == 0 ? 0 : 1;
}
