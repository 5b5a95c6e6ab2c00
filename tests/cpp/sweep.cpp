// Sweeps the bit patterns of a floating-point type through the CPU kernels and compares loss and gradient with float64.
//
//     sweep STEP        every STEP-th of the 2^32 float32 patterns and every bfloat16 and float16, for t = 0 and t = 1
//
// No torch: only the kernels, those of every instruction set that this processor has, on two threads. Prints the worst
// errors. Fails past the bounds below, where a result is 0 and the exact one is not (or the other way round), for NaN
// that does not come from NaN, and where a gradient written over its logits is another one.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "../../csrc/cpu/kernels.h"

namespace {

using namespace fused_sce;

constexpr int kBatch = 4096;
constexpr int kThreads = 2;

// The bits of a stored value and back, and what there is to know of its type.
struct Float32Format {
  using Stored = float;
  static constexpr DType kType = DType::Float32;
  static constexpr const char* kName = "float32";
  static constexpr int kBits = 32;
  static constexpr int kMantissa = 24;
  static constexpr int kSmallestStep = -149;  // exponent of the smallest subnormal
  static constexpr double kBound = 2.0;       // ULP
  static Stored decode(uint32_t bits) { return bit_cast<float>(bits); }
  static float value(Stored stored) { return stored; }
  static double rounded(double exact) { return float(exact); }
};

// 16-bit results are float32 results rounded once: half a unit, and what an error of 2 float32 ULP may add to it.
struct BFloat16Format {
  using Stored = BFloat16;
  static constexpr DType kType = DType::BFloat16;
  static constexpr const char* kName = "bfloat16";
  static constexpr int kBits = 16;
  static constexpr int kMantissa = 8;
  static constexpr int kSmallestStep = -133;
  static constexpr double kBound = 0.5 + 2.0 / 65536;
  static Stored decode(uint32_t bits) { return {uint16_t(bits)}; }
  static float value(Stored stored) { return to_float(stored); }
  static double rounded(double exact) { return to_float(to_bfloat16(float(exact))); }
};

struct Float16Format {
  using Stored = Float16;
  static constexpr DType kType = DType::Float16;
  static constexpr const char* kName = "float16";
  static constexpr int kBits = 16;
  static constexpr int kMantissa = 11;
  static constexpr int kSmallestStep = -24;
  static constexpr double kBound = 0.5 + 2.0 / 8192;
  static Stored decode(uint32_t bits) { return {uint16_t(bits)}; }
  static float value(Stored stored) { return to_float(stored); }
  static double rounded(double exact) { return to_float(to_float16(float(exact))); }
};

// |got - exact| in units in the last place of `exact`; below the normal range in subnormal steps.
template <class Format>
double ulps(double got, double exact) {
  constexpr double kNever = std::numeric_limits<double>::infinity();
  if (std::isnan(exact)) return std::isnan(got) ? 0.0 : kNever;
  if (std::isinf(exact)) return got == exact ? 0.0 : kNever;
  if (!std::isfinite(got)) return kNever;
  int exponent = 0;
  std::frexp(exact, &exponent);
  const int step = exponent - Format::kMantissa;
  return std::fabs(got - exact) / std::ldexp(1.0, step > Format::kSmallestStep ? step : Format::kSmallestStep);
}

struct Worst {
  double ulp = 0.0;
  float logit = 0.0f;

  void keep(double error, float at) {
    if (error > ulp) *this = {error, at};
  }
};

// The worst of one instruction set; [0] and [1] are t = 0 and t = 1.
struct Report {
  Worst loss[2];
  Worst gradient[2];
  long lost = 0;
  bool same_in_place = true;

  void add(const Report& other) {
    for (int t = 0; t < 2; ++t) {
      loss[t].keep(other.loss[t].ulp, other.loss[t].logit);
      gradient[t].keep(other.gradient[t].ulp, other.gradient[t].logit);
    }
    lost += other.lost;
    same_in_place = same_in_place && other.same_in_place;
  }
};

// Exact loss and gradient for t = 0 and t = 1, in float64: its error is 2^-29 of a float32 ULP.
struct Exact {
  double loss[2];
  double gradient[2];

  explicit Exact(double x) {
    const double e = std::exp(-std::fabs(x));
    const double log1p_e = std::log1p(e);
    const double larger = 1.0 / (1.0 + e);
    const double smaller = e / (1.0 + e);
    loss[0] = (x < 0 ? 0.0 : x) + log1p_e;  // in this order NaN stays NaN
    loss[1] = (x > 0 ? 0.0 : -x) + log1p_e;
    gradient[0] = x < 0 ? smaller : larger;
    gradient[1] = x < 0 ? -larger : -smaller;
  }
};

// Every kThreads-th batch of patterns from batch `thread` on; a report for each instruction set.
template <class Format>
void sweep_part(uint64_t step, int thread, std::vector<Report>& reports) {
  using Stored = typename Format::Stored;
  constexpr uint64_t kPatterns = uint64_t(1) << Format::kBits;
  const std::vector<const cpu::Kernels*>& kernels = cpu::runnable_kernels();
  std::vector<Stored> logits(kBatch), target(kBatch), loss(kBatch), gradient(kBatch), in_place(kBatch);
  std::vector<Exact> exact;
  const Stored targets[2] = {store_as<Stored>(0.0f), store_as<Stored>(1.0f)};

  for (uint64_t base = thread * kBatch * step; base < kPatterns; base += kThreads * kBatch * step) {
    int count = 0;
    exact.clear();
    for (uint64_t bits = base; count < kBatch && bits < kPatterns; bits += step) {
      logits[count] = Format::decode(uint32_t(bits));
      exact.emplace_back(Format::value(logits[count++]));
    }
    for (int t = 0; t < 2; ++t) {
      for (Stored& value : target) value = targets[t];
      Problem problem;
      problem.numel = problem.sizes[0] = count;
      problem.logits = {logits.data(), Format::kType, true, {}};
      problem.target = {target.data(), Format::kType, true, {}};
      problem.loss = {loss.data(), Format::kType};
      problem.gradient = {gradient.data(), Format::kType};
      for (size_t k = 0; k < kernels.size(); ++k) {
        kernels[k]->chunks(problem, 0, cpu::num_chunks(count), nullptr);
        Report& report = reports[k];

        in_place = logits;
        Problem overwriting = problem;
        overwriting.logits.data = overwriting.gradient.data = in_place.data();
        kernels[k]->chunks(overwriting, 0, cpu::num_chunks(count), nullptr);
        const bool same = std::memcmp(in_place.data(), gradient.data(), count * sizeof(Stored)) == 0;
        report.same_in_place = report.same_in_place && same;

        for (int i = 0; i < count; ++i) {
          const float logit = Format::value(logits[i]);
          const double got_loss = Format::value(loss[i]);
          const double got_gradient = Format::value(gradient[i]);
          report.loss[t].keep(ulps<Format>(got_loss, exact[i].loss[t]), logit);
          report.gradient[t].keep(ulps<Format>(got_gradient, exact[i].gradient[t]), logit);
          report.lost += (Format::rounded(exact[i].loss[t]) == 0) != (got_loss == 0);
          report.lost += (Format::rounded(exact[i].gradient[t]) == 0) != (got_gradient == 0);
        }
      }
    }
  }
}

// True if the bounds hold.
template <class Format>
bool sweep(uint64_t step) {
  const std::vector<const cpu::Kernels*>& kernels = cpu::runnable_kernels();
  std::vector<std::vector<Report>> reports(kThreads, std::vector<Report>(kernels.size()));
  std::vector<std::thread> threads;
  for (int thread = 0; thread < kThreads; ++thread) {
    threads.emplace_back([&, thread] { sweep_part<Format>(step, thread, reports[thread]); });
  }
  for (std::thread& thread : threads) thread.join();

  const unsigned long long printed_step = step;
  std::printf("%s, every %llu. pattern, bound %.5f ULP\n", Format::kName, printed_step, Format::kBound);
  bool all_hold = true;
  for (size_t k = 0; k < kernels.size(); ++k) {
    Report report;
    for (const std::vector<Report>& of_thread : reports) report.add(of_thread[k]);
    bool holds = report.lost == 0 && report.same_in_place;
    for (int t = 0; t < 2; ++t) {
      const Worst& loss = report.loss[t];
      const Worst& gradient = report.gradient[t];
      std::printf(
          "  %-8s t=%d: loss %.4f ULP at %.9g, gradient %.4f ULP at %.9g\n", kernels[k]->isa, t, loss.ulp, loss.logit,
          gradient.ulp, gradient.logit);
      holds = holds && loss.ulp <= Format::kBound && gradient.ulp <= Format::kBound;
    }
    const char* in_place = report.same_in_place ? "" : "another gradient in place, ";
    std::printf("  %-8s %s%ld lost: %s\n", kernels[k]->isa, in_place, report.lost, holds ? "holds" : "BROKEN");
    all_hold = all_hold && holds;
  }
  std::fflush(stdout);
  return all_hold;
}

}  // namespace

int main(int argc, char** argv) {
  const uint64_t step = argc == 2 ? std::strtoull(argv[1], nullptr, 10) : 0;
  if (step == 0) {
    std::fprintf(stderr, "usage: sweep STEP\n");
    return 2;
  }
  bool holds = sweep<BFloat16Format>(1);
  holds = sweep<Float16Format>(1) && holds;
  holds = sweep<Float32Format>(step) && holds;
  return holds ? 0 : 1;
}
