// The CUDA kernels without a GPU: runs the loops of csrc/cuda for every thread of a grid on the CPU. Results of single
// elements are compared with the CPU kernels bit for bit. Sums over 16-bit logits and their gradients, which have a
// formula of their own on a GPU, are compared with exact values. tests/test_sweep.py compiles and runs it; exit
// status 0 is success, 77 that this processor lacks the CPU kernels that FUSED_SCE_ISA names.
//
// Arrays end where their allocation ends, so that with -fsanitize=address a read or write past an operand is an error,
// and with -fsanitize=undefined so is a wide load from an address that is not aligned for it.
#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cuda/choose.h"

using namespace fused_sce;
using cuda::kThreads;
using cuda::Output;
using cuda::ThreadRange;

namespace {

constexpr DType kAllTypes[] = {DType::Float32, DType::Float64, DType::BFloat16, DType::Float16, DType::Bool,
                               DType::UInt8,   DType::Int8,    DType::Int16,    DType::Int32,   DType::Int64};
constexpr DType kFloatTypes[] = {DType::Float32, DType::Float64, DType::BFloat16, DType::Float16};

// What a test asks of a problem. Losses and gradients of elements are one output (Output::Elements), decided by the
// results that are set.
enum class Wanted { Loss, Gradient, Sum, SumAndGradient };
constexpr Wanted kAllWanted[] = {Wanted::Loss, Wanted::Gradient, Wanted::Sum, Wanted::SumAndGradient};

bool wants_sum(Wanted wanted) { return wanted == Wanted::Sum || wanted == Wanted::SumAndGradient; }

const char* name_of(DType dtype) {
  static const char* const names[] = {"float32", "float64", "bfloat16", "float16", "bool",
                                      "uint8",   "int8",    "int16",    "int32",   "int64"};
  return names[int(dtype)];
}
const char* name_of(Wanted wanted) {
  static const char* const names[] = {"loss", "gradient", "sum", "sum and gradient"};
  return names[int(wanted)];
}

int failures = 0;
int64_t checks = 0;

__attribute__((format(printf, 2, 3))) void expect(bool good, const char* format, ...) {
  ++checks;
  if (good || ++failures > 20) return;
  va_list arguments;
  va_start(arguments, format);
  std::printf("FAILED: ");
  std::vprintf(format, arguments);
  std::printf("\n");
  va_end(arguments);
}

size_t size_of(DType dtype) {
  size_t size = 0;
  visit(dtype, [&](auto tag) { size = sizeof(tag); });
  return size;
}

template <class To>
To stored(double value) {
  return To(value);
}
template <>
BFloat16 stored(double value) {
  return to_bfloat16(float(value));
}
template <>
Float16 stored(double value) {
  return to_float16(float(value));
}
template <>
Bool stored(double value) {
  return {uint8_t(value != 0.0)};
}

// `length` elements of a type that begin `shift` elements behind an aligned address and end with the allocation.
class Array {
 public:
  Array(DType dtype, int64_t length, int64_t shift = 0)
      : dtype_(dtype),
        length_(length),
        bytes_((length + shift) * size_of(dtype)),
        data_(static_cast<char*>(std::malloc(bytes_ ? bytes_ : 1))),
        start_(data_ + shift * size_of(dtype)) {
    poison();
  }
  Array(const Array&) = delete;
  ~Array() { std::free(data_); }

  // A NaN of each type that no computation gives.
  void poison() { std::memset(data_, 0xfb, bytes_); }

  void set(int64_t i, double value) {
    visit(dtype_, [&](auto tag) { static_cast<decltype(tag)*>(data())[i] = stored<decltype(tag)>(value); });
  }
  double get(int64_t i) const {
    double value = 0.0;
    visit(dtype_, [&](auto tag) { value = load_as<double>(static_cast<const decltype(tag)*>(data())[i]); });
    return value;
  }
  bool is_poison(int64_t i) const {
    const unsigned char* bytes = static_cast<unsigned char*>(data()) + i * size_of(dtype_);
    for (size_t k = 0; k < size_of(dtype_); ++k) {
      if (bytes[k] != 0xfb) return false;
    }
    return true;
  }
  void copy(const Array& other, int64_t i) {
    const size_t size = size_of(dtype_);
    std::memcpy(static_cast<char*>(data()) + i * size, static_cast<char*>(other.data()) + i * size, size);
  }
  // Equal bits, or both NaN: which NaN is not specified.
  bool same(const Array& other, int64_t i) const {
    const size_t size = size_of(dtype_);
    if (!std::memcmp(static_cast<char*>(data()) + i * size, static_cast<char*>(other.data()) + i * size, size)) {
      return true;
    }
    return std::isnan(get(i)) && std::isnan(other.get(i));
  }

  void* data() const { return start_; }
  DType dtype() const { return dtype_; }
  int64_t length() const { return length_; }
  Result result() { return {start_, dtype_}; }
  Operand contiguous() const {
    Operand operand;
    operand.data = start_;
    operand.dtype = dtype_;
    operand.contiguous = true;
    return operand;
  }
  Operand strided(std::initializer_list<int64_t> strides) const {
    Operand operand = contiguous();
    operand.contiguous = false;
    int dim = 0;
    for (int64_t stride : strides) operand.strides[dim++] = stride;
    return operand;
  }

 private:
  DType dtype_;
  int64_t length_;
  size_t bytes_;
  char* data_;
  char* start_;
};

std::mt19937_64 random_bits(20240607);

double random_between(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(random_bits);
}

// Mostly ordinary logits, every eighth one extreme. NaN and infinities only if asked for: they would make every sum
// NaN.
void fill_logits(Array& array, bool finite = false) {
  static const double extremes[] = {0.0, -0.0, 17.5, -17.5, 88.7, -88.7, 103.9, -103.97, 1e-40, 2e4, -2e4, 65504.0};
  static const double special[] = {INFINITY, -INFINITY, NAN, 3e38, -3e38};
  for (int64_t i = 0; i < array.length(); ++i) {
    double value = random_between(-20.0, 20.0);
    if (random_bits() % 8 == 0) value = extremes[random_bits() % 12];
    if (!finite && random_bits() % 64 == 0) value = special[random_bits() % 5];
    array.set(i, value);
  }
}

void fill_target(Array& array) {
  for (int64_t i = 0; i < array.length(); ++i) {
    array.set(i, random_bits() % 3 ? double(random_bits() % 2) : random_between(0.0, 1.0));
  }
}

void fill_weight(Array& array) {
  for (int64_t i = 0; i < array.length(); ++i) array.set(i, random_between(0.0, 5.0));
}

// The type that a problem is computed in, which is that of its weights.
DType computing_type(DType logits, DType target) {
  return logits == DType::Float64 || target == DType::Float64 ? DType::Float64 : DType::Float32;
}

bool is_16bit(DType dtype) { return dtype == DType::BFloat16 || dtype == DType::Float16; }

// As the op layer leaves a problem: contiguous operands have strides, too.
Problem with_strides(Problem problem) {
  for (Operand* operand :
       {&problem.logits, &problem.target, &problem.weight, &problem.pos_weight, &problem.mask, &problem.alpha,
        &problem.upstream}) {
    if (!operand->contiguous) continue;
    int64_t stride = 1;
    for (int dim = problem.ndim - 1; dim >= 0; --dim) {
      operand->strides[dim] = stride;
      stride *= problem.sizes[dim];
    }
  }
  return problem;
}

// What thread `range.thread` of a launch does.
template <Output kOutput>
double run_output(const Problem& given, ThreadRange range) {
  const Problem problem = with_strides(given);
  double sum = 0.0;
  cuda::choose_loop<kOutput>(problem, range.threads, [&](auto loop) {
    using Loop = decltype(loop);
    sum = Loop::run(problem, gradient_scale<typename Loop::T>(problem), range);
  });
  return sum;
}

double run_thread(const Problem& problem, Wanted wanted, ThreadRange range) {
  switch (wanted) {
    case Wanted::Sum: return run_output<Output::Sum>(problem, range);
    case Wanted::SumAndGradient: return run_output<Output::SumAndGradient>(problem, range);
    default: return run_output<Output::Elements>(problem, range);
  }
}

// The same for a row; as in rows.cu problem.loss is not that of the elements.
double run_row(Problem problem, ThreadRange range) {
  problem.loss = {};
  problem = with_strides(problem);
  double sum = 0.0;
  cuda::choose_row_loop(problem, [&](auto loop) {
    using Loop = decltype(loop);
    sum = Loop::run(problem, {}, range);
  });
  return sum;
}

// The sums of all threads of a grid of `blocks` (0: those of the launch), run one after the other.
std::vector<double> run_grid(const Problem& problem, Wanted wanted, int blocks) {
  const int64_t launched = int64_t(blocks ? blocks : cuda::num_blocks(problem)) * kThreads;
  const int64_t threads = cuda::num_threads(problem, launched);
  std::vector<double> sums(launched);
  for (int64_t thread = 0; thread < launched; ++thread) {
    sums[thread] = run_thread(problem, wanted, cuda::range_of(problem.numel, thread, threads));
  }
  return sums;
}

double total_of(const std::vector<double>& sums) {
  cpu::PairwiseSum total;
  for (const double sum : sums) total.add(sum);
  return total.total();
}

// The CPU kernels' results of a problem; returns the sum of the losses.
double run_reference(const Problem& problem) {
  std::vector<double> partial_sums(cpu::num_chunks(problem.numel));
  cpu::kernels().chunks(problem, 0, int64_t(partial_sums.size()), partial_sums.data());
  return total_of(partial_sums);
}

bool close(double a, double b, double relative) {
  return a == b || (std::isnan(a) && std::isnan(b)) || std::fabs(a - b) <= relative * std::fabs(b);
}

void expect_same(const Array& got, const Array& want, const std::string& what) {
  int64_t wrong = 0;
  int64_t first = -1;
  for (int64_t i = 0; i < want.length(); ++i) {
    if (got.same(want, i)) continue;
    if (!wrong++) first = i;
  }
  expect(
      wrong == 0, "%s: %lld of %lld differ, first at %lld: got %.17g, want %.17g%s", what.c_str(), (long long)wrong,
      (long long)want.length(), (long long)first, first < 0 ? 0.0 : got.get(first), first < 0 ? 0.0 : want.get(first),
      first >= 0 && got.is_poison(first) ? " (never written)" : "");
}

// Loss and gradient of element i of a problem in double, and the size of the terms that the gradient is made of.
struct ExactElement {
  double loss;
  double gradient;
  double terms;
};

double value_at(const Problem& problem, const Operand& operand, int64_t i) {
  if (!operand) return 1.0;
  const int64_t offset = operand.contiguous ? i : offset_of(problem, operand, i);
  double value = 0.0;
  visit(operand.dtype, [&](auto tag) {
    value = load_as<double>(static_cast<const decltype(tag)*>(operand.data)[offset]);
  });
  return value;
}

// The target that the formula gets, rounded as the kernels round it.
double exact_target(const Problem& problem, int64_t i) {
  const double target = value_at(problem, problem.target, i);
  return problem.in_double ? cuda::changed_target(problem, target, 0.0)
                           : double(cuda::changed_target(problem, float(target), 0.0f));
}

bool counts_at(const Problem& problem, int64_t i) {
  if (problem.mask && value_at(problem, problem.mask, i) == 0.0) return false;
  const double target = value_at(problem, problem.target, i);
  return !(problem.in_double ? is_ignored(problem.options, target) : is_ignored(problem.options, float(target)));
}

ExactElement exact_element(const Problem& problem, int64_t i) {
  if (!counts_at(problem, i)) return {};
  const double x = value_at(problem, problem.logits, i);
  const double t = exact_target(problem, i);
  const double weight = value_at(problem, problem.weight, i);
  const double upstream = value_at(problem, problem.upstream, i) * factor_of(problem) / divisor_of(problem);
  const LossAndGradient<double> exact =
      sigmoid_cross_entropy<double, true>(x, t, value_at(problem, problem.pos_weight, i));
  const double total = std::fabs(1.0 - t) + std::fabs(value_at(problem, problem.pos_weight, i) * t);
  return {exact.loss * weight, exact.gradient * weight * upstream, total * std::fabs(weight * upstream)};
}

// |got - want| in units of the last place of `want` in a 16-bit type; below its normal numbers in subnormal steps.
double ulps_16bit(DType dtype, double got, double want) {
  if (got == want || (std::isnan(got) && std::isnan(want))) return 0.0;
  const bool is_bfloat = dtype == DType::BFloat16;
  const double largest = is_bfloat ? 0x1.fep127 : 65504.0;
  if (std::isinf(got) && std::fabs(want) > largest) return 0.0;
  if (!std::isfinite(got) || !std::isfinite(want)) return INFINITY;
  const int exponent = want == 0.0 ? -1000 : std::ilogb(want);
  const int smallest = is_bfloat ? -126 : -14;
  return std::fabs(got - want) / std::ldexp(1.0, std::max(exponent, smallest) - (is_bfloat ? 7 : 10));
}

// Gradients of 16-bit logits, for targets 0 and 1 within 0.51 ULP of the exact ones; in between both terms may cancel,
// and the bound is 2^-20 of their size beside it.
void expect_near_16bit(const Problem& problem, const Array& got, const std::string& what) {
  int64_t wrong = 0;
  for (int64_t i = 0; i < got.length(); ++i) {
    const ExactElement exact = exact_element(problem, i);
    const double t = exact_target(problem, i);
    const double slack = t == 0.0 || t == 1.0 || exact.terms == 0.0 ? 0.0 : exact.terms * 0x1p-20;
    const double nearest = std::fabs(got.get(i) - exact.gradient) <= slack ? got.get(i) : exact.gradient;
    const double error = ulps_16bit(got.dtype(), got.get(i), nearest);
    const double with_slack = ulps_16bit(got.dtype(), got.get(i), nearest + (got.get(i) > nearest ? slack : -slack));
    if (std::min(error, with_slack) <= 0.51) continue;
    if (!wrong++) {
      expect(
          false, "%s: element %lld is %.9g, want %.9g (%.3f ULP)%s", what.c_str(), (long long)i, got.get(i),
          exact.gradient, error, got.is_poison(i) ? " (never written)" : "");
    }
  }
  expect(wrong == 0, "%s: %lld of %lld too far off", what.c_str(), (long long)wrong, (long long)got.length());
}

// A sum of losses by the formula for 16-bit logits, and how far off it may be: what gpu16.h says of each element, and
// the float additions of a group of eight.
struct Bounded {
  double value = 0.0;
  double bound = 0.0;
};

Bounded exact_sum(const Problem& problem, int64_t begin, int64_t end) {
  Bounded sum;
  for (int64_t i = begin; i < end; ++i) {
    if (!counts_at(problem, i)) continue;
    const double loss = exact_element(problem, i).loss;
    sum.value += std::fabs(loss) > 0x1.fffffep127 ? INFINITY : loss;  // as a float, which is what is added up
    const double x = std::fabs(value_at(problem, problem.logits, i));
    sum.bound += std::fabs(loss) * (0x1p-20 + std::fmin(x, 104.0) * 0x1p-23 + 8 * 0x1p-24) + 0x1p-149;
  }
  return sum;
}

void expect_near(double sum, const Bounded& exact, const std::string& what) {
  const bool same = sum == exact.value || (std::isnan(sum) && std::isnan(exact.value));
  expect(
      same || std::fabs(sum - exact.value) <= exact.bound, "%s: sum %.17g, want %.17g within %g", what.c_str(), sum,
      exact.value, exact.bound);
}

// Makes what is wanted with every thread of a grid (of the launch's size unless `blocks` is given) and compares with
// the CPU, or with exact values where the GPU has its own formula. `problem` has no results yet; a loss is of type
// `loss_type`, a gradient of the logits', `shift` elements behind an aligned address.
void check(Problem problem, Wanted wanted, DType loss_type, int64_t shift, const std::string& what, int blocks = 0) {
  const int64_t numel = problem.numel;
  const DType result = wanted == Wanted::Loss ? loss_type : problem.logits.dtype;
  const std::string title = what + ", " + name_of(wanted) + " as " + name_of(result);
  const bool has_own_formula =
      is_16bit(problem.logits.dtype) && !problem.in_double && wanted != Wanted::Loss && !problem.is_focal();
  const bool writes = wanted != Wanted::Sum;
  Array got(result, numel, shift);

  (wanted == Wanted::Loss ? problem.loss : problem.gradient) = writes ? got.result() : Result{};
  const double sum = total_of(run_grid(problem, wanted, blocks));

  if (has_own_formula) {
    if (writes) expect_near_16bit(problem, got, title);
    const Bounded exact = exact_sum(problem, 0, numel);
    if (wants_sum(wanted)) expect_near(sum, exact, title);
    return;
  }
  Array want(result, numel);
  (wanted == Wanted::Loss ? problem.loss : problem.gradient) = writes ? want.result() : Result{};
  const double want_sum = run_reference(problem);
  if (writes) expect_same(got, want, title);
  if (wants_sum(wanted)) {
    expect(close(sum, want_sum, 1e-14), "%s: sum %.17g, want %.17g", title.c_str(), sum, want_sum);
  }
}

std::string describe(const char* what, const Problem& problem) {
  return std::string(what) + ", " + name_of(problem.logits.dtype) + " logits, " + name_of(problem.target.dtype) +
         " target, " + std::to_string(problem.numel) + " elements";
}

Problem problem_of(int64_t numel, const Operand& logits, const Operand& target) {
  Problem problem;
  problem.numel = numel;
  problem.sizes[0] = numel;
  problem.logits = logits;
  problem.target = target;
  problem.in_double = logits.dtype == DType::Float64 || target.dtype == DType::Float64;
  problem.options.divisor = double(numel ? numel : 1) * 3.0;
  if (numel % 3 == 1) problem.options.label_smoothing = 0.125;  // some of all problems, soft targets and loops
  return problem;
}

void test_launch() {
  expect(cuda::num_blocks(0, kThreads) == 1, "no work must still launch a block, to write the sum");
  for (int group : {2, 4, 8}) {
    int before = 0;
    for (int64_t numel = 1; numel <= (int64_t(1) << 40); numel = numel * 3 / 2 + 1) {
      const int64_t groups = cuda::divide_up(numel, group);
      const int blocks = cuda::num_blocks(groups, kThreads);
      expect((groups - 1) * group < numel && numel <= groups * group, "groups of %lld elements", (long long)numel);
      expect(1 <= blocks && blocks <= cuda::kMaxBlocks, "%d blocks", blocks);
      expect(blocks >= before, "a longer problem gets fewer blocks: %lld", (long long)numel);
      expect(blocks == cuda::kMaxBlocks || int64_t(blocks) * kThreads >= groups, "groups without thread");
      expect(int64_t(blocks - 1) * kThreads < groups, "a block without work at %lld elements", (long long)numel);
      before = blocks;

      Problem problem;
      problem.numel = numel;
      problem.logits.dtype = group == 2 ? DType::Float64 : group == 4 ? DType::Float32 : DType::Float16;
      expect(cuda::num_blocks(problem) == blocks, "blocks must follow from length and logits type alone");
      const int64_t words = cuda::workspace_words(problem);
      expect(words == (blocks > 1 ? 1 + blocks : 0), "%lld words for %d blocks", (long long)words, blocks);
      expect(words <= cuda::kMaxWorkspaceWords, "workspace of %lld words", (long long)words);

      const int team = cuda::threads_per_row(numel, group);
      expect(team == kThreads || (team <= 32 && (team & (team - 1)) == 0), "%d threads for a row", team);
      expect(kThreads % team == 0, "%d threads for a row", team);
    }
  }
  for (int group : {2, 4, 8}) {
    for (int64_t columns : {1, 2, 3, 7, 8, 80, 1000, 1003, 9605, 1 << 20, (1 << 20) + 1}) {
      for (int64_t numel = columns; numel <= (int64_t(1) << 40); numel = numel * 5 / 2 + columns) {
        const int64_t groups = cuda::divide_up(numel, group);
        const int64_t launched = int64_t(cuda::num_blocks(groups, kThreads)) * kThreads;
        const int64_t threads = cuda::threads_with_fixed_columns(launched, numel, group, columns);
        expect(0 <= threads && threads <= launched, "%lld of %lld threads", (long long)threads, (long long)launched);
        expect(
            groups <= launched || threads * group % columns == 0, "columns change: %lld threads, %lld columns",
            (long long)threads, (long long)columns);
        expect(
            threads > launched / 2 || columns > launched, "%lld of %lld threads for %lld columns", (long long)threads,
            (long long)launched, (long long)columns);
        expect(
            cuda::threads_with_fixed_columns(threads, numel, group, columns) == threads, "%lld threads are not kept",
            (long long)threads);
      }
    }
  }
  const ThreadRange nothing = cuda::range_of(100, 7, 7);
  expect(nothing.begin == nothing.end, "a thread beyond those that share has nothing");
  expect(cuda::threads_per_row(0, 4) == 1, "an empty row has a thread, which writes its sum");
  expect(cuda::threads_per_row(5, 4) == 2, "five float32 columns are two groups");
  for (DType dtype : kFloatTypes) {
    expect(cuda::group_size(dtype) * size_of(dtype) == 16, "a group of %s is one 16-byte load", name_of(dtype));
  }
}

// Every type of logits and target, odd lengths, unaligned starts of every operand and result.
void test_contiguous() {
  const int64_t lengths[] = {0, 1, 2, 3, 4, 7, 8, 9, 15, 17, 63, 64, 257, 1021};
  int turn = 0;
  for (DType logits_type : kFloatTypes) {
    for (DType target_type : kAllTypes) {
      for (int64_t numel : lengths) {
        for (int64_t shift : {0, 1}) {
          ++turn;
          Array logits(logits_type, numel, shift);
          Array target(target_type, numel, turn % 4);
          const DType computing = computing_type(logits_type, target_type);
          Array upstream(turn / 2 % 2 ? computing : logits_type, numel, turn % 3);
          Array single(turn / 2 % 2 ? logits_type : computing, 1);
          fill_logits(logits, shift == 0);
          fill_target(target);
          fill_weight(upstream);
          fill_weight(single);
          Problem problem = problem_of(numel, logits.contiguous(), target.contiguous());
          const bool in_float = computing == DType::Float32;
          expect(cuda::is_contiguous(problem) == in_float, "%s: wrong way", describe("contiguous", problem).c_str());
          for (Wanted wanted : kAllWanted) {
            check(problem, wanted, kFloatTypes[turn % 4], (turn / 2) % 2, describe("contiguous", problem));
          }
          problem.upstream = upstream.contiguous();
          expect(cuda::is_contiguous(problem) == in_float, "%s: wrong way", describe("upstream", problem).c_str());
          check(problem, Wanted::Gradient, logits_type, 0, describe("contiguous, upstream", problem));
          problem.factor = single.contiguous();
          check(problem, Wanted::Gradient, logits_type, 0, describe("contiguous, upstream and factor", problem));
          problem.upstream = {};
          check(problem, Wanted::Gradient, logits_type, 0, describe("contiguous, factor", problem));
        }
      }
    }
  }
}

// Lengths of several blocks, and grids too small for the length, so that threads take several groups.
void test_grids() {
  for (DType dtype : kFloatTypes) {
    for (int64_t numel : {20011, 100003}) {
      Array logits(dtype, numel);
      Array target(DType::UInt8, numel);
      fill_logits(logits, true);
      fill_target(target);
      const Problem problem = problem_of(numel, logits.contiguous(), target.contiguous());
      for (int blocks : {0, 1, 3}) {
        check(problem, Wanted::SumAndGradient, dtype, 0, describe("grid", problem), blocks);
        check(problem, Wanted::Loss, DType::Float32, 0, describe("grid", problem), blocks);
      }
    }
  }
}

// Each element is written by one thread, once, whatever the alignment.
void test_written_once() {
  for (DType dtype : kFloatTypes) {
    for (bool strided : {false, true}) {
      for (int64_t shift : {0, 1}) {
        const int64_t numel = 1543;
        Array logits(dtype, 2 * numel, shift);
        Array target(DType::Bool, numel);
        fill_logits(logits, true);
        fill_target(target);
        Problem problem = problem_of(numel, strided ? logits.strided({2}) : logits.contiguous(), target.contiguous());
        for (Wanted wanted : {Wanted::Loss, Wanted::Gradient}) {
          Array result(dtype, numel, shift);
          problem.loss = problem.gradient = {};
          (wanted == Wanted::Loss ? problem.loss : problem.gradient) = result.result();
          std::vector<int> writes(numel);
          const int64_t threads = kThreads * int64_t(2);
          for (int64_t thread = 0; thread < threads; ++thread) {
            result.poison();
            run_thread(problem, wanted, {0, numel, thread, threads});
            for (int64_t i = 0; i < numel; ++i) writes[i] += !result.is_poison(i);
          }
          for (int64_t i = 0; i < numel; ++i) {
            expect(
                writes[i] == 1, "%s, %s: element %lld written %d times", describe("once", problem).c_str(),
                name_of(wanted), (long long)i, writes[i]);
          }
        }
      }
    }
  }
}

// Weights broadcast along rows or columns or neither; logits and target transposed or with gaps.
void test_strided() {
  int turn = 0;
  for (DType logits_type : kFloatTypes) {
    for (DType target_type : kAllTypes) {
      for (int64_t rows : {1, 3, 37}) {
        for (int64_t columns : {1, 2, 5, 8, 29}) {
          ++turn;
          const int64_t numel = rows * columns;
          const DType computing = computing_type(logits_type, target_type);
          Array logits(logits_type, numel, turn % 2);
          Array target(target_type, 2 * numel);
          Array weight(computing, columns);
          Array row_weight(computing, rows);
          Array pos_weight(computing, numel, turn % 3);
          Array upstream(turn / 2 % 2 ? computing : logits_type, rows);
          fill_logits(logits, turn % 2);
          fill_target(target);
          for (Array* each : {&weight, &row_weight, &pos_weight, &upstream}) fill_weight(*each);

          Problem problem = problem_of(numel, logits.contiguous(), target.strided({2 * columns, 2}));
          problem.ndim = 2;
          problem.sizes[0] = rows;
          problem.sizes[1] = columns;
          if (turn % 2) problem.logits = logits.strided({1, rows});
          if (turn % 3) problem.weight = turn % 3 == 1 ? weight.strided({0, 1}) : row_weight.strided({1, 0});
          if (turn % 5 < 3) problem.pos_weight = turn % 5 ? pos_weight.contiguous() : pos_weight.strided({0, 1});
          expect(!cuda::is_contiguous(problem), "%s: wrong way", describe("strided", problem).c_str());
          for (Wanted wanted : kAllWanted) {
            check(problem, wanted, kFloatTypes[turn % 4], turn % 2, describe("strided", problem));
          }
          problem.upstream = upstream.strided({1, 0});
          check(problem, Wanted::Gradient, logits_type, 0, describe("strided, upstream by row", problem));
        }
      }
    }
  }
}

// Contiguous logits and target, but an upstream gradient for each row: what the gradient of a sum over rows asks for.
void test_upstream_by_row() {
  for (DType dtype : kFloatTypes) {
    Array logits(dtype, 12 * 11);
    Array target(DType::UInt8, 12 * 11);
    Array upstream(computing_type(dtype, DType::UInt8), 12);
    fill_logits(logits);
    fill_target(target);
    fill_weight(upstream);
    Problem problem = problem_of(12 * 11, logits.contiguous(), target.contiguous());
    problem.ndim = 2;
    problem.sizes[0] = 12;
    problem.sizes[1] = 11;
    problem.upstream = upstream.strided({1, 0});
    expect(!cuda::is_contiguous(problem), "%s: wrong way", describe("upstream by row", problem).c_str());
    check(problem, Wanted::Gradient, dtype, 0, describe("upstream by row", problem));
  }
}

// One weight or pos_weight for each column, kept in registers: all jobs and types, one value for all, columns that
// repeat after any number of groups, threads with several groups, unaligned starts.
void test_weights_in_registers() {
  int turn = 0;
  for (DType logits_type : kFloatTypes) {
    for (DType target_type : kAllTypes) {
      for (int64_t columns : {1, 3, 4, 5, 8, 20, 24, 77, 80, 1000}) {
        for (int64_t rows : {1, 2, 41}) {
          ++turn;
          if (target_type == DType::Float64 && logits_type != DType::Float64) continue;  // in double: StridedLoop
          const int64_t numel = rows * columns;
          Array logits(logits_type, numel, turn % 2);
          Array target(target_type, numel, turn % 3 == 0);
          Array weight(computing_type(logits_type, target_type), columns);
          Array pos_weight(computing_type(logits_type, target_type), columns, turn % 3);
          fill_logits(logits, turn % 2);
          fill_target(target);
          fill_weight(weight);
          fill_weight(pos_weight);
          Problem problem = problem_of(numel, logits.contiguous(), target.contiguous());
          problem.ndim = 2;
          problem.sizes[0] = rows;
          problem.sizes[1] = columns;
          if (turn % 3 != 1) problem.weight = weight.strided({0, turn % 7 == 0 ? 0 : 1});
          if (turn % 3 != 2) problem.pos_weight = pos_weight.strided({0, turn % 5 == 0 ? 0 : 1});
          for (int blocks : {0, 1}) {
            const int64_t launched = int64_t(blocks ? blocks : cuda::num_blocks(problem)) * kThreads;
            const int64_t threads = cuda::num_threads(problem, launched);
            expect(
                cuda::threads_with_fixed_weights(problem, threads) == threads || columns == 1000, "%s",
                describe("weights", problem).c_str());
            for (Wanted wanted : kAllWanted) {
              check(problem, wanted, kFloatTypes[turn % 4], turn / 2 % 2, describe("weights", problem), blocks);
            }
          }
        }
      }
    }
  }
}

// What does not count has a loss and a gradient of 0, whatever its values are, and no label is asked of it.
void test_what_counts() {
  int turn = 0;
  for (DType logits_type : kFloatTypes) {
    for (DType target_type : kAllTypes) {
      for (int64_t columns : {1, 5, 8, 80, 1003}) {
        for (int64_t rows : {1, 3, 41}) {
          ++turn;
          const int64_t numel = rows * columns;
          const bool by_value = turn % 3 != 0, by_mask = turn % 3 != 1;
          const bool is_soft = target_type <= DType::Float16;
          Array logits(logits_type, numel, turn % 2);
          Array target(target_type, numel, turn % 4 == 0);
          Array mask(DType::Bool, numel, turn % 5);
          const DType computing = computing_type(logits_type, target_type);
          Array weight(computing, columns);
          Array upstream(computing, numel);
          fill_logits(logits, true);
          fill_target(target);
          fill_weight(weight);
          fill_weight(upstream);
          for (int64_t i = 0; i < numel; ++i) mask.set(i, random_bits() % 3 != 0);
          Problem problem = problem_of(numel, logits.contiguous(), target.contiguous());
          problem.ndim = 2;
          problem.sizes[0] = rows;
          problem.sizes[1] = columns;
          if (by_mask) problem.mask = turn % 2 ? mask.contiguous() : mask.strided({0, 1});
          if (by_value) {
            const double value = is_soft ? (turn % 2 ? NAN : -1.0) : target_type == DType::Bool ? 1.0 : 7.0;
            problem.options.has_ignore_value = true;
            problem.options.ignore_value = value;
            for (int64_t i = 0; i < numel; ++i) {
              if (random_bits() % 3 == 0) target.set(i, value);
            }
          }
          int64_t counted = 0;
          for (int64_t i = 0; i < numel; ++i) {
            const bool counts = counts_at(problem, i);
            counted += counts;
            if (counts) continue;
            logits.set(i, i % 2 ? NAN : INFINITY);
            upstream.set(i, i % 3 ? NAN : INFINITY);
            if (!by_value && target_type != DType::Bool) target.set(i, 9.0);
          }
          if (turn % 2) problem.weight = weight.strided({0, 1});
          for (Wanted wanted : kAllWanted) {
            check(problem, wanted, kFloatTypes[turn % 4], turn / 2 % 2, describe("what counts", problem), turn % 2);
          }
          const int64_t on_cpu = cpu::kernels().count(problem, 0, cpu::num_chunks(numel));
          expect(on_cpu == counted, "%s: on the CPU %lld", describe("what counts", problem).c_str(), (long long)on_cpu);
          problem.upstream = upstream.contiguous();
          check(problem, Wanted::Gradient, logits_type, 0, describe("what counts, upstream", problem));
        }
      }
    }
  }
}

// A bool is true if its byte is not 0, whatever else it is.
// The formulas of focal.h: every path of them, and every operand.
void test_focal() {
  struct Focus {
    double gamma_pos, gamma_neg, clip, alpha;  // alpha < 0: none
  };
  const Focus focuses[] = {{2, 2, 0, 0.25},  {1, 4, 0.05, -1},    {0, 0, 0, 0.3}, {7, 0, 0.1, -1},  {0.5, 2.5, 0, 1},
                           {0, 0.5, 0.2, 0}, {1.5, 3.5, 0.6, -1}, {9, 9, 0, -1},  {0, 1, 0.05, 0.1}};
  int64_t turn = 0;
  for (DType logits_type : kFloatTypes) {
    for (DType target_type : {DType::Float32, logits_type, DType::Bool, DType::UInt8, DType::Int64}) {
      for (const Focus& focus : focuses) {
        ++turn;
        const int64_t columns = 7;
        const int64_t numel = columns * (40 + turn % 3 * 300);
        const DType computing = computing_type(logits_type, target_type);
        Array logits(logits_type, numel, turn % 2);
        Array target(target_type, numel, turn % 3);
        Array weight(computing, columns);
        Array pos_weight(computing, columns);
        Array alpha(computing, columns);
        Array mask(DType::Bool, numel);
        Array upstream(computing, numel);
        fill_logits(logits, turn % 4 == 0);
        fill_target(target);
        fill_weight(weight);
        fill_weight(pos_weight);
        for (int64_t i = 0; i < columns; ++i) alpha.set(i, i == 2 ? 0.0 : random_between(0.0, 1.0));
        for (int64_t i = 0; i < numel; ++i) mask.set(i, double(random_bits() % 4 != 0));
        fill_weight(upstream);
        Problem problem = problem_of(numel, logits.contiguous(), target.contiguous());
        problem.options.gamma_pos = focus.gamma_pos;
        problem.options.gamma_neg = focus.gamma_neg;
        problem.options.clip = focus.clip;
        problem.options.has_alpha = focus.alpha >= 0.0;
        problem.options.alpha = focus.alpha;
        for (Wanted wanted : kAllWanted) {
          check(problem, wanted, kFloatTypes[turn % 4], turn / 2 % 2, describe("focal", problem), turn % 2);
        }
        problem.upstream = upstream.contiguous();
        check(problem, Wanted::Gradient, logits_type, 0, describe("focal, upstream", problem));
        problem.upstream = {};
        problem.ndim = 2;
        problem.sizes[0] = numel / columns;
        problem.sizes[1] = columns;
        if (turn % 2) problem.weight = weight.strided({0, 1});
        if (turn % 3) problem.pos_weight = pos_weight.strided({0, 1});
        if (turn % 5) problem.alpha = alpha.strided({0, 1});
        if (turn % 4) problem.mask = mask.contiguous();
        for (Wanted wanted : kAllWanted) {
          check(problem, wanted, kFloatTypes[turn % 4], 0, describe("focal with factors", problem));
        }
      }
    }
  }
}

// Targets that are given row by row, prior and threshold: every path, against the CPU kernels.
void test_formats() {
  int64_t turn = 0;
  for (DType logits_type : kFloatTypes) {
    for (TargetFormat format :
         {TargetFormat::Dense, TargetFormat::ClassIndex, TargetFormat::Packed, TargetFormat::IndexList,
          TargetFormat::Csr}) {
      for (int64_t columns : {1, 7, 8, 80, 1003}) {
        for (int option = 0; option < 5; ++option) {
          ++turn;
          const int64_t rows = 1 + turn % 19;
          const int64_t numel = rows * columns;
          const DType computing = computing_type(logits_type, logits_type);
          Array logits(logits_type, numel, turn % 2);
          Array prior(computing, columns);
          fill_logits(logits, turn % 3 == 0);
          fill_weight(prior);
          std::vector<int64_t> indices, begins = {0};
          std::vector<uint8_t> bytes;
          std::vector<float> values;
          const int64_t list_length = std::min<int64_t>(columns, 4) + 1;
          for (int64_t row = 0; row < rows; ++row) {
            const size_t before = indices.size();
            if (format == TargetFormat::ClassIndex) indices.push_back(int64_t(random_bits() % columns));
            if (format == TargetFormat::Packed) {
              for (int64_t column = 0; column < columns; column += 8) {
                const int64_t left = std::min<int64_t>(columns - column, 8);
                bytes.push_back(uint8_t(random_bits() & ((1u << left) - 1)));
              }
            }
            if (format == TargetFormat::IndexList || format == TargetFormat::Csr) {
              for (int64_t column = int64_t(random_bits() % 3); column < columns; column += 1 + columns / 4) {
                indices.push_back(column);
                values.push_back(float(random_between(0.0, 1.0)));
              }
            }
            if (format == TargetFormat::IndexList) {
              indices.resize(before + list_length, -1);
              std::swap(indices[before], indices[before + list_length - 1]);
            }
            begins.push_back(int64_t(values.size()));
          }
          Array target(DType::Float32, numel);
          fill_target(target);
          Problem problem = problem_of(numel, logits.contiguous(), target.contiguous());
          problem.ndim = 2;
          problem.sizes[0] = rows;
          problem.sizes[1] = columns;
          problem.format = format;
          problem.columns = columns;
          problem.list_length = list_length;
          problem.values = int64_t(values.size());
          problem.value_columns = indices.data();
          problem.row_begins = begins.data();
          if (format == TargetFormat::ClassIndex && option == 1) {
            problem.has_ignored_index = problem.options.has_ignore_value = true;
            problem.ignored_index = indices[0];
            problem.options.ignore_value = NAN;
          }
          if (format != TargetFormat::Dense) {
            problem.in_double = logits_type == DType::Float64;
            problem.target = {};
            problem.target.dtype = format == TargetFormat::Csr ? DType::Float32 : DType::Bool;
            problem.target.data = format == TargetFormat::Csr      ? static_cast<const void*>(values.data())
                                  : format == TargetFormat::Packed ? static_cast<const void*>(bytes.data())
                                                                   : static_cast<const void*>(indices.data());
          }
          problem.options.label_smoothing = option == 2 || option == 3 ? 0.25 : 0.0;
          problem.options.has_threshold = option >= 3;
          problem.options.target_threshold = 0.25;
          problem.options.check_target = option == 4;
          if (option == 2) problem.prior = prior.strided({0, 1});
          if (option == 0) problem.options.gamma_neg = 2.0;
          // Losses of 16-bit logits and their gradients have another formula on a GPU, so these are compared elsewhere.
          for (Wanted wanted : kAllWanted) {
            if (wanted != Wanted::Loss && is_16bit(logits_type) && !problem.is_focal()) continue;
            check(problem, wanted, kFloatTypes[turn % 4], 0, describe("format", problem));
          }
        }
      }
    }
  }
}

// A wrong index or target ends the thread that sees it, and none reads where it must not.
void test_wrong_targets() {
  const int64_t columns = 10;
  const int64_t rows = 4;
  Array logits(DType::Float32, rows * columns);
  Array losses(DType::Float32, rows * columns);
  Array soft(DType::Float32, rows * columns);
  fill_logits(logits, true);
  const auto fails = [&](const Problem& problem) {
    try {
      run_grid(problem, Wanted::Loss, 1);
    } catch (const std::domain_error&) {
      return true;
    }
    return false;
  };
  const auto problem_with = [&](TargetFormat format, const void* target) {
    Problem problem = problem_of(rows * columns, logits.contiguous(), soft.contiguous());
    problem.options.label_smoothing = 0.0;
    problem.format = format;
    problem.columns = columns;
    problem.target.data = target;
    problem.target.dtype = format == TargetFormat::Csr ? DType::Float32 : DType::Bool;
    problem.loss = losses.result();
    return problem;
  };
  for (int64_t index : {-1, 0, 9, 10}) {
    const int64_t indices[] = {1, index, 3, 4};
    const bool is_wrong = index < 0 || index > 9;
    expect(fails(problem_with(TargetFormat::ClassIndex, indices)) == is_wrong, "class index %d", int(index));
  }
  for (int64_t index : {-2, -1, 0, 9, 10}) {
    const int64_t indices[] = {1, 2, index, 4, 5, -1, 6, -1};
    Problem problem = problem_with(TargetFormat::IndexList, indices);
    problem.list_length = 2;
    expect(fails(problem) == (index < -1 || index > 9), "index %d in a list", int(index));
  }
  const int64_t twice[] = {1, 2, 3, 3, 5, -1, 6, -1};
  Problem list = problem_with(TargetFormat::IndexList, twice);
  list.list_length = 2;
  expect(fails(list), "an index twice in its row");
  for (unsigned bits : {0u, 3u, 4u, 128u}) {
    const uint8_t bytes[] = {1, 0, 255, 1, 7, uint8_t(bits), 0, 0};
    expect(fails(problem_with(TargetFormat::Packed, bytes)) == (bits > 3), "bits %u behind the last label", bits);
  }
  const float values[] = {1, 1, 1, 1};
  const struct {
    int64_t begins[5];
    int64_t columns[4];
    bool is_wrong;
  } matrices[] = {{{0, 1, 2, 3, 4}, {0, 1, 2, 3}, false}, {{0, 2, 4, 4, 4}, {1, 5, 0, 9}, false},
                  {{0, 2, 4, 4, 4}, {5, 1, 0, 9}, true},  {{0, 2, 4, 4, 4}, {1, 1, 0, 9}, true},
                  {{0, 2, 4, 4, 4}, {1, 10, 0, 9}, true}, {{0, 2, 4, 4, 4}, {-1, 1, 0, 9}, true},
                  {{0, 3, 2, 4, 4}, {0, 1, 2, 3}, true},  {{0, 1, 2, 3, 3}, {0, 1, 2, 3}, true},
                  {{1, 1, 2, 3, 4}, {0, 1, 2, 3}, true},  {{0, 1, 2, 3, 900}, {0, 1, 2, 3}, true},
                  {{0, -5, 2, 3, 4}, {0, 1, 2, 3}, true}};
  for (const auto& matrix : matrices) {
    Problem problem = problem_with(TargetFormat::Csr, values);
    problem.values = 4;
    problem.value_columns = matrix.columns;
    problem.row_begins = matrix.begins;
    const auto run = [&] { return cpu::kernels().chunks(problem, 0, 1, nullptr); };
    expect(fails(problem) == matrix.is_wrong, "a sparse target with columns %d, ...", int(matrix.columns[0]));
    expect(run() != matrix.is_wrong, "the same on the CPU");
  }
  for (int64_t value : {0, 1, 2, -1}) {
    const int64_t integers[] = {1, value, 0, 1};
    const int64_t diagonal[] = {0, 1, 2, 3};
    const int64_t begins[] = {0, 1, 2, 3, 4};
    Problem problem = problem_with(TargetFormat::Csr, integers);
    problem.target.dtype = DType::Int64;
    problem.values = 4;
    problem.value_columns = diagonal;
    problem.row_begins = begins;
    expect(fails(problem) == (value < 0 || value > 1), "a sparse integer target of %d", int(value));
    problem.options.has_ignore_value = true;
    problem.options.ignore_value = double(value);
    expect(!fails(problem), "a sparse integer target of %d that does not count", int(value));
    expect(cpu::kernels().chunks(problem, 0, 1, nullptr), "the same on the CPU");
  }
  for (double value : {0.0, 1.0, 0.5, -1e-9, 1.001, double(NAN)}) {
    fill_target(soft);
    soft.set(13, value);
    for (DType logits_type : {DType::Float32, DType::Float64}) {
      Array other(logits_type, rows * columns);
      fill_logits(other, true);
      Problem problem = problem_of(rows * columns, other.contiguous(), soft.contiguous());
      problem.loss = losses.result();
      expect(!fails(problem), "a soft target of %g without check_target", value);
      problem.options.check_target = true;
      expect(fails(problem) == !(value >= 0.0 && value <= 1.0), "check_target of %g", value);
    }
  }
}

void test_any_byte_is_true() {
  for (DType dtype : kFloatTypes) {
    const int64_t numel = 1021;
    Array logits(dtype, numel);
    Array target(DType::Bool, numel);
    fill_logits(logits);
    for (int64_t i = 0; i < numel; ++i) static_cast<uint8_t*>(target.data())[i] = uint8_t(random_bits() % 4 ? i : 0);
    const Problem problem = problem_of(numel, logits.contiguous(), target.contiguous());
    for (Wanted wanted : kAllWanted) check(problem, wanted, dtype, 0, describe("bytes as bool", problem));
  }
}

// As many dimensions as there may be, in any order of strides.
void test_dimensions() {
  const int64_t sizes[kMaxDims] = {2, 3, 2, 5, 3, 4};
  for (int shuffle = 0; shuffle < 20; ++shuffle) {
    int order[kMaxDims] = {0, 1, 2, 3, 4, 5};
    for (int i = kMaxDims - 1; i > 0; --i) std::swap(order[i], order[random_bits() % (i + 1)]);
    Array logits(DType::Float32, 720);
    Array target(DType::Int64, 720);
    fill_logits(logits);
    fill_target(target);
    Problem problem = problem_of(720, logits.strided({}), target.contiguous());
    problem.ndim = kMaxDims;
    int64_t stride = 1;
    for (int dim : order) {
      problem.logits.strides[dim] = stride;
      stride *= sizes[dim];
    }
    for (int dim = 0; dim < kMaxDims; ++dim) problem.sizes[dim] = sizes[dim];
    for (Wanted wanted : kAllWanted) check(problem, wanted, DType::Float32, 0, describe("six dimensions", problem));
  }
}

// Logits that are infinite and right, which cost nothing, and groups whose losses are too large for a sum in float.
void make_infinite(Array& logits, Array& target) {
  const double large = logits.dtype() == DType::BFloat16 ? 3e38 : 60000.0;
  for (int64_t i = 0; i < logits.length(); ++i) {
    if (random_bits() % 16 == 0) {
      target.set(i, double(random_bits() % 2));
      logits.set(i, target.get(i) == 1.0 ? INFINITY : -INFINITY);
    } else if (i / 64 % 8 == 3) {
      logits.set(i, large);
    }
  }
}

// The sum of a thread has the same bits for every layout of the same values.
void test_sum_order() {
  for (DType dtype : kFloatTypes) {
    for (bool has_infinite : {false, true}) {
      const int64_t rows = 211;
      const int64_t columns = 37;
      const int64_t numel = rows * columns;
      Array plain(dtype, numel);
      Array shifted(dtype, numel, 1);
      Array transposed(dtype, numel);
      Array target(DType::UInt8, numel);
      Array wide_target(dtype == DType::Float64 ? DType::Float64 : DType::Float32, numel, 1);
      Array long_target(DType::Int64, numel);
      fill_logits(plain, true);
      fill_target(target);
      if (has_infinite) make_infinite(plain, target);
      for (int64_t i = 0; i < numel; ++i) {
        shifted.set(i, plain.get(i));
        transposed.set(i % columns * rows + i / columns, plain.get(i));
        wide_target.set(i, target.get(i));
        long_target.set(i, target.get(i));
      }
      Problem problem = problem_of(numel, plain.contiguous(), target.contiguous());
      problem.ndim = 2;
      problem.sizes[0] = rows;
      problem.sizes[1] = columns;
      Array gradient(dtype, numel);
      const int blocks = 3;
      for (Wanted wanted : {Wanted::Sum, Wanted::SumAndGradient}) {
        const char* const name = name_of(dtype);
        if (wanted == Wanted::SumAndGradient) problem.gradient = gradient.result();
        problem.logits = plain.contiguous();
        problem.target = target.contiguous();
        const std::vector<double> want = run_grid(problem, wanted, blocks);
        expect(!std::isnan(total_of(want)), "%s: no logit is NaN, but the sum", name);
        problem.logits = shifted.contiguous();
        expect(run_grid(problem, wanted, blocks) == want, "%s: an unaligned start changes a sum", name);
        for (const Array* other : {&wide_target, &long_target}) {
          problem.target = other->contiguous();
          expect(run_grid(problem, wanted, blocks) == want, "%s: the target's type changes a sum", name);
        }
        problem.logits = transposed.strided({1, rows});
        expect(run_grid(problem, wanted, blocks) == want, "%s: strides change a sum", name);
      }
    }
  }
}

// A count in memory divides as a divisor does, and 0 as if it were 1.
void test_count() {
  for (DType dtype : kFloatTypes) {
    for (bool strided : {false, true}) {
      const int64_t numel = 1543;
      Array logits(dtype, 2 * numel);
      Array target(DType::UInt8, numel);
      Array got(dtype, numel);
      Array want(dtype, numel);
      fill_logits(logits, true);
      fill_target(target);
      Problem problem = problem_of(numel, strided ? logits.strided({2}) : logits.contiguous(), target.contiguous());
      expect(divisor_of(problem) == problem.options.divisor, "no count: the divisor alone");
      for (int64_t count : {int64_t(0), int64_t(1), int64_t(7), int64_t(1) << 40}) {
        for (Wanted wanted : {Wanted::Gradient, Wanted::SumAndGradient}) {
          Problem counted = problem;
          counted.count = &count;
          counted.gradient = got.result();
          Problem divided = problem;
          divided.options.divisor *= double(count ? count : 1);
          divided.gradient = want.result();
          expect(divisor_of(counted) == divided.options.divisor, "divisor with a count of %lld", (long long)count);
          const std::vector<double> sums = run_grid(counted, wanted, 1);
          expect(run_grid(divided, wanted, 1) == sums, "a count changes the sum of a thread");
          expect_same(got, want, describe("count", problem) + ", " + name_of(wanted));
        }
      }
    }
  }
}

// The gradient in the memory of the logits, for threads of one and of several groups: the same bits as elsewhere, also
// where sums are not finite and losses must be computed again.
void test_in_place() {
  int turn = 0;
  for (DType logits_type : kFloatTypes) {
    for (DType target_type : kAllTypes) {
      for (bool is_weighted : {false, true}) {
        for (int extreme = 0; extreme < 3; ++extreme) {
          ++turn;
          const int64_t columns = 40;
          const int64_t rows = 241;
          const int64_t numel = rows * columns;
          const DType computing = computing_type(logits_type, target_type);
          Array logits(logits_type, numel, turn % 2);
          Array target(target_type, numel, turn % 3);
          Array weight(computing, columns);
          Array loss(computing, numel);
          Array loss_in_place(computing, numel);
          Array gradient(logits_type, numel, turn % 2);
          Array in_place(logits_type, numel, turn % 2);
          fill_logits(logits, extreme < 2);  // the last time with NaN
          fill_target(target);
          fill_weight(weight);
          if (extreme == 1) make_infinite(logits, target);
          Problem problem = problem_of(numel, logits.contiguous(), target.contiguous());
          problem.ndim = 2;
          problem.sizes[0] = rows;
          problem.sizes[1] = columns;
          if (is_weighted) problem.weight = problem.pos_weight = weight.strided({0, 1});
          if (turn % 4 == 3) problem.target = target.strided({columns, 1});  // runs StridedLoop
          for (int blocks : {0, 1}) {
            for (Wanted wanted : {Wanted::Gradient, Wanted::SumAndGradient}) {
              const std::string what = describe("in place", problem) + ", " + name_of(wanted);
              problem.loss = problem.gradient = {};
              problem.logits = logits.contiguous();
              problem.gradient = gradient.result();
              if (wanted == Wanted::Gradient) problem.loss = loss.result();
              const std::vector<double> want = run_grid(problem, wanted, blocks);

              for (int64_t i = 0; i < numel; ++i) in_place.copy(logits, i);
              problem.logits = in_place.contiguous();
              problem.gradient = in_place.result();
              if (wanted == Wanted::Gradient) problem.loss = loss_in_place.result();
              const std::vector<double> got = run_grid(problem, wanted, blocks);

              expect_same(in_place, gradient, what);
              if (wanted == Wanted::Gradient) expect_same(loss_in_place, loss, what + ", loss");
              for (size_t thread = 0; wants_sum(wanted) && thread < want.size(); ++thread) {
                const bool same = got[thread] == want[thread] || (std::isnan(got[thread]) && std::isnan(want[thread]));
                expect(
                    same, "%s: sum of thread %d is %.17g, want %.17g", what.c_str(), int(thread), got[thread],
                    want[thread]);
              }
            }
          }
        }
      }
    }
  }
}

void test_rows() {
  int turn = 0;
  for (DType dtype : kFloatTypes) {
    for (int64_t columns : {0, 1, 2, 3, 5, 8, 20, 31, 33, 80, 255, 256, 1000, 1031, 9605}) {
      ++turn;
      const int64_t count = columns > 1000 ? 3 : 17;
      const int64_t numel = count * columns;
      Array logits(dtype, numel, turn % 2);
      Array target(DType::UInt8, numel);
      Array weight(computing_type(dtype, DType::UInt8), columns);
      Array want(DType::Float64, count);
      fill_logits(logits, true);
      fill_target(target);
      fill_weight(weight);
      Problem problem = problem_of(numel, logits.contiguous(), target.contiguous());
      if (turn % 3 == 0) {
        problem.ndim = 2;
        problem.sizes[0] = count;
        problem.sizes[1] = columns;
        problem.weight = weight.strided({0, 1});
      }
      problem.options.divisor = double(columns ? columns : 1);
      problem.loss = want.result();
      cpu::kernels().rows(problem, columns, 0, count);

      const int team = cuda::threads_per_row(columns, cuda::group_size(dtype));
      for (int64_t row = 0; row < count; ++row) {
        double sum = 0.0;
        for (int thread = 0; thread < team; ++thread) {
          sum += run_row(problem, {row * columns, (row + 1) * columns, thread, team});
        }
        const std::string what =
            describe("rows", problem) + ", row " + std::to_string(row) + " of " + std::to_string(columns) + " columns";
        if (is_16bit(dtype)) {
          expect_near(sum, exact_sum(problem, row * columns, (row + 1) * columns), what);
        } else {
          expect(
              close(sum / problem.options.divisor, want.get(row), 1e-13), "%s: %.17g, want %.17g", what.c_str(),
              sum / problem.options.divisor, want.get(row));
        }
      }
    }
  }
}

void test_scale() {
  int turn = 0;
  for (DType dtype : kFloatTypes) {
    for (DType factor_type : kFloatTypes) {
      for (int64_t numel : {1, 2, 7, 8, 9, 1000, 2051}) {
        ++turn;
        Array values(dtype, numel, turn % 2);
        Array want(dtype, numel);
        Array factor(factor_type, 1);
        factor.set(0, turn % 5 ? random_between(-3.0, 3.0) : NAN);
        fill_logits(values);
        for (int64_t i = 0; i < numel; ++i) {
          const double value = values.get(i), by = factor.get(0);
          const bool in_double = dtype == DType::Float64;
          want.set(i, in_double ? product_of_factors(by, value) : double(product_of_factors(float(by), float(value))));
        }
        visit_floating(dtype, [&](auto tag) {
          auto* data = static_cast<decltype(tag)*>(values.data());
          for (int64_t thread = 0; thread < kThreads; ++thread) {
            cuda::scale_values(data, factor.contiguous(), ThreadRange{0, numel, thread, kThreads});
          }
          expect_same(values, want, std::string("scale ") + name_of(dtype) + " by " + name_of(factor_type));
          factor.set(0, 1.0);
          decltype(data) nowhere = nullptr;  // by 1: never looked at
          cuda::scale_values(nowhere, factor.contiguous(), ThreadRange{0, numel, 0, kThreads});
        });
      }
    }
  }
}

// Indices beyond 32 bits. First the ends of 2^40 - 1 elements in three rows, of which each is one logit over and over;
// then problems whose arrays would end where small ones really lie.
void test_large() {
  const int64_t numel = (int64_t(1) << 40) - 1;
  const int64_t groups = cuda::divide_up(numel, 4);
  Array row_logits(DType::Float32, 3);
  Array row_target(DType::Bool, 1);
  row_target.set(0, 1.0);
  for (int row = 0; row < 3; ++row) row_logits.set(row, double(row));
  Problem problem = problem_of(numel, row_logits.strided({1, 0}), row_target.strided({0, 0}));
  problem.ndim = 2;
  problem.sizes[0] = 3;
  problem.sizes[1] = numel / 3;
  expect(problem.sizes[1] * 3 == numel, "three rows");
  const double first = run_thread(problem, Wanted::Sum, {0, numel, 0, groups});
  const double last = run_thread(problem, Wanted::Sum, {0, numel, groups - 1, groups});
  expect(close(first, 4.0 * std::log1p(std::exp(0.0)), 1e-6), "the first group of 2^40 - 1: %.17g", first);
  expect(close(last, 3.0 * std::log1p(std::exp(-2.0)), 1e-6), "the last group of 2^40 - 1: %.17g", last);

  const int64_t count = 101;
  Array logits(DType::Float32, count);
  Array losses(DType::Float32, count);
  Array want(DType::Float32, count);
  Array targets(DType::UInt8, count);
  fill_logits(logits);
  fill_target(targets);
  Problem reference = problem_of(count, logits.contiguous(), targets.contiguous());
  reference.loss = want.result();
  run_reference(reference);
  const int64_t begin = int64_t(1) << 40;
  const auto moved = [&](const Array& array) {
    return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(array.data()) - begin * size_of(array.dtype()));
  };
  problem = problem_of(begin + count, logits.contiguous(), targets.contiguous());
  problem.logits.data = moved(logits);
  problem.target.data = moved(targets);
  problem.loss = {moved(losses), DType::Float32};
  for (int64_t thread = 0; thread < 64; ++thread) {
    run_thread(problem, Wanted::Loss, {begin, begin + count, thread, 64});
  }
  expect_same(losses, want, "elements behind 2^40");

  problem = problem_of(numel, logits.contiguous(), targets.contiguous());
  problem.loss = losses.result();
  losses.poison();
  run_thread(problem, Wanted::Loss, {0, numel, 0, groups});
  for (int64_t i = 0; i < count; ++i) {
    expect(i < 4 ? losses.same(want, i) : losses.is_poison(i), "element %lld of 2^40 - 1", (long long)i);
  }
}

}  // namespace

int main() {
  try {
    cpu::kernels();
  } catch (const std::invalid_argument& error) {
    std::printf("%s\n", error.what());
    return 77;
  }
  std::printf("compared with the %s kernels\n", cpu::kernels().isa);
  const struct {
    const char* name;
    void (*run)();
  } tests[] = {
      {"launch", test_launch},
      {"contiguous", test_contiguous},
      {"grids", test_grids},
      {"written once", test_written_once},
      {"strided", test_strided},
      {"weights", test_weights_in_registers},
      {"bool", test_any_byte_is_true},
      {"upstream by row", test_upstream_by_row},
      {"dimensions", test_dimensions},
      {"sum order", test_sum_order},
      {"count", test_count},
      {"what counts", test_what_counts},
      {"focal", test_focal},
      {"formats", test_formats},
      {"wrong targets", test_wrong_targets},
      {"in place", test_in_place},
      {"rows", test_rows},
      {"scale", test_scale},
      {"large", test_large}};
  for (const auto& test : tests) {
    const int failures_before = failures;
    const int64_t checks_before = checks;
    test.run();
    std::printf(
        "%-15s %8lld checks, %d failed\n", test.name, (long long)(checks - checks_before), failures - failures_before);
  }
  return failures > 0;
}
