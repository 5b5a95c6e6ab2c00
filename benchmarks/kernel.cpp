// Times the CPU kernels without torch, operands in the cache.
//
//     kernel                       every instruction set, job and type: ns per element, the best of many rounds
//     kernel ISA JOB TYPES ROUNDS  one of them; with few rounds, under callgrind:
//
//     valgrind --tool=callgrind --toggle-collect='*::chunks(*' build/kernel avx2 gradient float32 10
//
// counts instructions; divided by the elements that the program prints it says how many each takes.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "../csrc/cpu/kernels.h"

namespace {

using namespace fused_sce;

constexpr int64_t kElements = 16384;  // float32 logits, target and gradient: 192 KiB
constexpr int kRounds = 2000;

// Storage for kElements of any type, aligned as torch's.
struct Array {
  Array(DType type, float (*value)(int64_t)) : type(type), data(std::aligned_alloc(64, kElements * 8)) {
    visit(type, [&](auto tag) {
      using Stored = decltype(tag);
      for (int64_t i = 0; i < kElements; ++i) static_cast<Stored*>(data)[i] = stored(value(i), tag);
    });
  }
  Array(const Array&) = delete;
  ~Array() { std::free(data); }

  Operand operand() const { return {data, type, true, {}}; }

  DType type;
  void* data;

 private:
  static BFloat16 stored(float value, BFloat16) { return to_bfloat16(value); }
  static Float16 stored(float value, Float16) { return to_float16(value); }
  static Bool stored(float value, Bool) { return {value != 0.0f}; }
  template <class Stored>
  static Stored stored(float value, Stored) {
    return Stored(value);
  }
};

float logit(int64_t) {
  static std::mt19937 generator(0);
  static std::normal_distribution<float> normal(0.0f, 3.0f);
  return normal(generator);
}

float label(int64_t i) { return float(i % 3 == 0); }

struct Types {
  const char* name;
  DType logits;
  DType target;
};

constexpr Types kTypes[] = {
    {"float32", DType::Float32, DType::Float32},     {"float32+bool", DType::Float32, DType::Bool},
    {"float32+uint8", DType::Float32, DType::UInt8}, {"bfloat16", DType::BFloat16, DType::BFloat16},
    {"float64", DType::Float64, DType::Float64},
};

// Best time of a round, in ns per element.
double best(const cpu::Kernels& kernels, bool gradient, const Types& types, int rounds) {
  const Array logits(types.logits, logit);
  const Array target(types.target, label);
  const Array result(types.logits, label);
  std::vector<double> partial_sums(cpu::num_chunks(kElements));
  Problem problem;
  problem.numel = problem.sizes[0] = kElements;
  problem.options.divisor = double(kElements);
  problem.logits = logits.operand();
  problem.target = target.operand();
  problem.in_double = types.logits == DType::Float64;
  if (gradient) problem.gradient = {result.data, result.type};

  double least = 1e300;
  for (int round = 0; round < rounds; ++round) {
    const auto start = std::chrono::steady_clock::now();
    kernels.chunks(problem, 0, cpu::num_chunks(kElements), partial_sums.data());
    const std::chrono::duration<double, std::nano> taken = std::chrono::steady_clock::now() - start;
    if (taken.count() < least) least = taken.count();
  }
  return least / kElements;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 1 && argc != 5) {
    std::fprintf(stderr, "usage: kernel [ISA loss|gradient TYPES ROUNDS]\n");
    return 2;
  }
  const int rounds = argc == 5 ? std::atoi(argv[4]) : kRounds;
  int found = 0;
  for (const cpu::Kernels* kernels : cpu::runnable_kernels()) {
    for (const Types& types : kTypes) {
      for (const bool gradient : {false, true}) {
        const std::string job = gradient ? "gradient" : "loss";
        if (argc == 5 &&
            (argv[1] != std::string(kernels->isa) || argv[2] != job || argv[3] != std::string(types.name))) {
          continue;
        }
        const double ns = best(*kernels, gradient, types, rounds);
        std::printf(
            "%-9s %-14s %-14s %8.3f ns per element, %lld elements\n", kernels->isa, types.name,
            gradient ? "loss+gradient" : "loss", ns, static_cast<long long>(kElements) * rounds);
        ++found;
      }
    }
  }
  if (found == 0)
    std::fprintf(stderr, "nothing here of that name; instruction sets: %s\n", cpu::available_isas().c_str());
  return found > 0 ? 0 : 2;
}
