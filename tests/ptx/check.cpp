// The CUDA kernels as nvcc compiles them, without a GPU: their PTX, launched by their own host code, runs in the
// interpreter of machine.h. Every result must have the CPU kernels' bits, except where a GPU has a formula of its own
// (gpu16.h), and be near long double, except with focal.h. A wrong target must end in an assertion.
//     check KERNELS.ptx FIRST COUNT [uncovered]
// runs the random cases FIRST to FIRST + COUNT - 1, and prints which part of the instructions was executed; `uncovered`
// lists the lines that were not. Exit status 0 is success, 1 that a kernel is wrong, 77 that this processor lacks the
// CPU kernels with fused multiply-add.
#include <algorithm>
#include <cinttypes>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cuda/kernels.h"
#include "../../csrc/cuda/strided.h"
#include "runtime.h"

namespace fused_sce::cpu {

#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kKernels;
}
static const Kernels& kReference = avx2::kKernels;
#else
namespace baseline {
extern const Kernels kKernels;
}
static const Kernels& kReference = baseline::kKernels;
#endif

}  // namespace fused_sce::cpu

using namespace fused_sce;
using ptx::Access;
using ptx::fail;

namespace {

constexpr DType kAllTypes[] = {DType::Float32, DType::Float64, DType::BFloat16, DType::Float16, DType::Bool,
                               DType::UInt8,   DType::Int8,    DType::Int16,    DType::Int32,   DType::Int64};
constexpr DType kFloatTypes[] = {DType::Float32, DType::Float64, DType::BFloat16, DType::Float16};

const char* name_of(DType dtype) {
  static const char* const names[] = {"float32", "float64", "bfloat16", "float16", "bool",
                                      "uint8",   "int8",    "int16",    "int32",   "int64"};
  return names[int(dtype)];
}

bool is_16bit(DType dtype) { return dtype == DType::BFloat16 || dtype == DType::Float16; }
bool is_floating(DType dtype) { return dtype <= DType::Float16; }

size_t size_of(DType dtype) {
  return visit(dtype, [](auto tag) { return sizeof(tag); });
}

std::mt19937_64 random_bits;  // of the case
int64_t compared = 0;         // values

int64_t below(int64_t bound) { return int64_t(random_bits() % uint64_t(bound)); }
bool one_in(int64_t count) { return below(count) == 0; }
double between(double low, double high) { return std::uniform_real_distribution<double>(low, high)(random_bits); }

template <class T, size_t kCount>
T any_of(const T (&list)[kCount]) {
  return list[below(kCount)];
}

// `length` elements that begin `shift` elements behind an aligned address.
class Array {
 public:
  Array(const char* name, DType dtype, int64_t length, int64_t shift = 0)
      : name_(name),
        dtype_(dtype),
        length_(length),
        bytes_(size_t(length) * size_of(dtype)),
        memory_(
            static_cast<char*>(std::aligned_alloc(256, (bytes_ + size_t(shift) * size_of(dtype) + 511) / 256 * 256))),
        start_(memory_ + size_t(shift) * size_of(dtype)) {
    std::memset(start_, kUnwritten, bytes_);
  }
  Array(const Array&) = delete;
  ~Array() { std::free(memory_); }

  void set(int64_t i, double value) {
    visit(dtype_, [&](auto tag) {
      using Stored = decltype(tag);
      if constexpr (std::is_same_v<Stored, Bool>) {
        // Any byte but 0 is true.
        data<Stored>()[i].byte = value == 0.0 ? 0 : uint8_t(one_in(4) ? 1 + below(255) : 1);
      } else {
        data<Stored>()[i] = store_as<Stored>(value);
      }
    });
  }
  double get(int64_t i) const {
    return visit(dtype_, [&](auto tag) { return load_as<double>(data<decltype(tag)>()[i]); });
  }
  void copy(const Array& other) { std::memcpy(start_, other.start_, bytes_); }
  // Equal bits, or both NaN: which NaN is not specified.
  bool same(const Array& other, int64_t i) const {
    const size_t size = size_of(dtype_);
    if (!std::memcmp(start_ + size_t(i) * size, other.start_ + size_t(i) * size, size)) return true;
    return std::isnan(get(i)) && std::isnan(other.get(i));
  }
  bool is_unwritten() const {
    return std::all_of(start_, start_ + bytes_, [](char byte) { return byte == kUnwritten; });
  }

  std::string bits() const { return {start_, bytes_}; }
  DType dtype() const { return dtype_; }
  int64_t length() const { return length_; }
  Result result() { return {start_, dtype_}; }
  Operand operand() const {
    Operand operand;
    operand.data = start_;
    operand.dtype = dtype_;
    return operand;
  }
  template <class T>
  T* data() const {
    return reinterpret_cast<T*>(start_);
  }

  // Lets the kernel read it, or write it.
  void enter_as_operand() const { enter(Access::Read, bytes_); }
  void enter_as_result() const { enter(Access::Once, 0); }
  void enter_as_both() const { enter(Access::Once, bytes_); }

 private:
  static constexpr char kUnwritten = char(0xfb);

  void enter(Access access, size_t initialised) const {
    ptx::Runtime::get().machine.add(name_, start_, bytes_, access, initialised);
  }

  const char* name_;
  DType dtype_;
  int64_t length_;
  size_t bytes_;
  char* memory_;
  char* start_;
};

enum class Output { Loss, Gradient, LossAndGradient, Sum, SumAndGradient, Rows };
constexpr Output kOutputs[] = {
    Output::Loss,           Output::Gradient,       Output::LossAndGradient, Output::Sum,  Output::Sum,
    Output::SumAndGradient, Output::SumAndGradient, Output::SumAndGradient,  Output::Rows, Output::Rows};
const char* name_of(Output output) {
  static const char* const names[] = {"loss", "gradient", "loss and gradient", "sum", "sum and gradient", "rows"};
  return names[int(output)];
}

// What a problem may have.
enum class Features {
  Plain,       // contiguous logits and targets
  Contiguous,  // and options that the loops for these know
  All
};

// Where the elements of an operand lie.
enum class Layout { Contiguous, Transposed, Gaps, Column, Row, Single };

// Loss and gradient of an element in long double; the sizes of their terms, which errors are relative to; and how often
// a subnormal step of exp(-|x|) is in them.
struct Exact {
  long double loss = 0;
  long double loss_terms = 0;
  long double gradient = 0;
  long double gradient_terms = 0;
  long double steps = 0;
};

long double times(long double factor, long double value) { return factor == 0 ? 0 : factor * value; }

// Half a step of `dtype` at `value`, and a little more.
long double rounding(DType dtype, long double value) {
  const int bits = dtype == DType::Float64 ? 53 : dtype == DType::Float32 ? 24 : dtype == DType::BFloat16 ? 8 : 11;
  const int smallest = dtype == DType::Float64 ? -1022 : dtype == DType::Float16 ? -14 : -126;
  const bool is_normal = value != 0 && std::isfinite(value);
  const int exponent = is_normal ? std::max(smallest, std::ilogb(value)) : smallest;
  return std::ldexp(1.02L, exponent - bits);
}

long double largest(DType dtype) {
  switch (dtype) {
    case DType::Float64: return 0x1.fffffffffffffp1023L;
    case DType::Float16: return 65504.0L;
    case DType::BFloat16: return 0x1.fep127L;
    default: return 0x1.fffffep127L;
  }
}

// Whether a value of type `dtype` is within `error` of another, but for its rounding.
bool agrees(double got, long double want, long double error, DType dtype) {
  if (std::isnan(want) || std::isnan(got)) return std::isnan(want) && std::isnan(got);
  if (std::isinf(got)) {
    return std::fabs(want) + error > largest(dtype) * 0.999L && std::signbit(got) == std::signbit(want);
  }
  return std::isfinite(want) && std::fabs(got - want) <= error + rounding(dtype, want);
}

// The order in which the interpreter runs a launch.
struct Schedule {
  const char* name;
  ptx::Options options;
};

Schedule any_schedule() {
  using ptx::Options;
  static const Schedule schedules[] = {
      {"forward", {Options::Forward, 1, 0, 1, false, false}},
      {"reverse, weak", {Options::Reverse, 1, 0, 1, true, false}},
      {"random, 4 blocks in turns of 60, weak", {Options::Random, 4, 60, 1, true, false}},
      {"8 blocks to barriers, weak", {Options::Forward, 8, 0, 1, true, false}},
      {"reverse, 3 blocks in turns of 9, weak", {Options::Reverse, 3, 9, 1, true, false}},
      {"random, 5 blocks in turns of 300, weak, inexact", {Options::Random, 5, 300, 1, true, true}}};
  Schedule schedule = any_of(schedules);
  schedule.options.seed = random_bits();
  return schedule;
}

// A problem drawn at random, with its memory.
class Case {
 public:
  Case() {
    draw_sizes();
    draw_types();
    draw_options();
    draw_logits();
    problem_.format == TargetFormat::Dense ? draw_dense_target() : draw_row_target();
    draw_factors();
    if (is_wrong_) is_wrong_ = spoil_target();
    draw_divisor();
    has_own_formula_ = is_16bit(problem_.logits.dtype) && !problem_.in_double && !problem_.is_focal();
    flatten();
  }

  std::string description() const {
    static const char* const formats[] = {"dense", "class_index", "packed", "index_list", "csr"};
    std::string text = std::string(name_of(output_)) + " as " + name_of(result_type_) + " of " + std::to_string(rows_) +
                       " x " + std::to_string(columns_) + " " + name_of(problem_.logits.dtype) + " logits, " +
                       name_of(problem_.target.dtype) + " " + formats[int(problem_.format)] + " target";
    for (const auto& [name, is_there] :
         {std::pair("weight", bool(problem_.weight)),
          {"pos_weight", bool(problem_.pos_weight)},
          {"mask", bool(problem_.mask)},
          {"ignore_value", problem_.options.has_ignore_value},
          {"smoothing", problem_.options.label_smoothing != 0.0},
          {"prior", bool(problem_.prior)},
          {"threshold", problem_.options.has_threshold},
          {"focal", problem_.is_focal()},
          {"upstream", bool(problem_.upstream)},
          {"factor", bool(problem_.factor)},
          {"count", problem_.count != nullptr},
          {"in place", in_place_},
          {"is made", problem_.is_made},
          {"special logits", has_special_},
          {"wrong target", is_wrong_}}) {
      if (is_there) text += std::string(", ") + name;
    }
    return text;
  }

  // Runs the problem in several orders and compares.
  void run() {
    compute_reference();
    const int runs = is_wrong_ ? 1 : 2;
    for (int n = 0; n < runs; ++n) run_in_order(any_schedule());
  }

 private:
  bool wants_loss() const { return output_ == Output::Loss || output_ == Output::LossAndGradient; }
  bool wants_sum() const { return output_ == Output::Sum || output_ == Output::SumAndGradient; }
  bool wants_gradient() const {
    return output_ == Output::Gradient || output_ == Output::LossAndGradient || output_ == Output::SumAndGradient;
  }
  DType computing_type() const { return problem_.in_double ? DType::Float64 : DType::Float32; }

  Array& add(const char* name, DType dtype, int64_t length) {
    operands_.push_back(std::make_unique<Array>(name, dtype, length, are_aligned_ ? 0 : below(16)));
    return *operands_.back();
  }

  // An operand in a layout. `value` is called for each of its elements that is read.
  template <class Value>
  Array& add(const char* name, DType dtype, Layout layout, Operand& operand, Value&& value) {
    int64_t strides[2] = {columns_, 1};
    int64_t length = numel_;
    switch (layout) {
      case Layout::Contiguous: break;
      case Layout::Transposed: strides[0] = 1, strides[1] = rows_; break;
      case Layout::Gaps: strides[0] = 2 * columns_, strides[1] = 2, length = 2 * numel_; break;
      case Layout::Column: strides[0] = 0, length = columns_; break;
      case Layout::Row: strides[0] = 1, strides[1] = 0, length = rows_; break;
      case Layout::Single: strides[0] = strides[1] = 0, length = 1; break;
    }
    Array& array = add(name, dtype, length);
    for (int64_t i = 0; i < length; ++i) array.set(i, value());
    operand = array.operand();
    operand.contiguous = layout == Layout::Contiguous;
    std::copy(strides, strides + 2, operand.strides);
    return array;
  }

  // Lengths around the ends of groups, of blocks, and of what all threads of a small grid take at once or twice.
  void draw_sizes() {
    output_ = any_of(kOutputs);
    are_aligned_ = one_in(2);
    static const int64_t blocks[] = {256, 512, 1024, 2048, 3072, 4096, 6144, 8192};
    int64_t size = 1 + below(40);
    if (one_in(4)) size = 1 + below(6000);
    if (one_in(4)) size = any_of(blocks) * (1 + below(2)) + below(19) - 9;
    if (one_in(300) && cuda::kMaxBlocks > 1000) size = 260 * 512 + below(19);  // with double more blocks than threads
    static const int64_t widths[] = {1, 2, 3, 4, 5, 8, 16, 19, 20, 64, 80, 100, 512, 513, 1000, 1024, 1030, 4097};
    columns_ = one_in(3) && output_ != Output::Rows ? size : any_of(widths);
    rows_ = std::max<int64_t>(1, size / columns_);
    if (one_in(60)) (output_ == Output::Rows ? columns_ : rows_) = 0;
    numel_ = rows_ * columns_;
    problem_.numel = numel_;
    problem_.columns = columns_;
  }

  void draw_types() {
    logits_type_ = any_of(kFloatTypes);
    target_type_ = any_of(kAllTypes);
    features_ = any_of({Features::Plain, Features::Contiguous, Features::All});
    // The types of targets that have kernels of their own.
    if (features_ == Features::Plain && !one_in(3))
      target_type_ = any_of({DType::Float32, logits_type_, DType::UInt8, DType::Bool});
    result_type_ = one_in(2) ? logits_type_ : any_of(kFloatTypes);
    static const TargetFormat formats[] = {
        TargetFormat::ClassIndex, TargetFormat::Packed, TargetFormat::IndexList, TargetFormat::Csr};
    if (features_ == Features::All && one_in(2)) problem_.format = any_of(formats);
    if (problem_.format != TargetFormat::Dense && problem_.format != TargetFormat::Csr) target_type_ = DType::Bool;
    problem_.in_double = logits_type_ == DType::Float64 || target_type_ == DType::Float64;
    is_wrong_ = one_in(12) && numel_ > 0;
  }

  void draw_options() {
    Options& options = problem_.options;
    if (features_ == Features::Plain) return;
    const bool has_all = features_ == Features::All;
    if (has_all && one_in(2)) {
      struct Focus {
        double gamma_pos, gamma_neg, clip, alpha;  // alpha < 0: none
      };
      static const Focus focuses[] = {{2, 2, 0, 0.25},  {1, 4, 0.05, -1},    {0, 0, 0, 0.3}, {7, 0, 0.1, -1},
                                      {0.5, 2.5, 0, 1}, {0, 0.5, 0.2, 0},    {9, 9, 0, -1},  {1.5, 3.5, 0.6, -1},
                                      {2, 2, 0, -1},    {0, 1, 0.05, 0.125}, {3, 3, 0.1, -1}};
      const Focus focus = any_of(focuses);
      options.gamma_pos = focus.gamma_pos;
      options.gamma_neg = focus.gamma_neg;
      options.clip = focus.clip;
      options.has_alpha = focus.alpha >= 0.0;
      options.alpha = options.has_alpha ? focus.alpha : 0.0;
    }
    if (one_in(3)) options.label_smoothing = 0.125;
    if (has_all && one_in(6)) {
      options.has_threshold = true;
      options.target_threshold = 0.25;
    }
    options.check_target = has_all && is_floating(target_type_) && one_in(6);
    // A wrong target that does not count is none.
    const bool can_ignore = problem_.format != TargetFormat::Packed && problem_.format != TargetFormat::IndexList;
    if (is_wrong_ || !can_ignore || !one_in(2)) return;
    options.has_ignore_value = true;
    if (problem_.format == TargetFormat::ClassIndex) {
      options.ignore_value = NAN;
      problem_.has_ignored_index = true;
      problem_.ignored_index = one_in(2) ? -100 : below(std::max<int64_t>(columns_, 1));
    } else {
      const bool is_unsigned = target_type_ == DType::UInt8;
      options.ignore_value = is_floating(target_type_)     ? (one_in(2) ? NAN : -1.0)
                             : target_type_ == DType::Bool ? 1.0
                                                           : (is_unsigned || one_in(2) ? 7.0 : -1.0);
    }
  }

  // Mostly ordinary logits, some extreme, and in some cases infinities and NaN.
  void draw_logits() {
    static const double extremes[] = {0.0, -0.0, 17.5, -17.5, 88.7, -88.7, 103.9, -103.97, 1e-40, 2e4, -2e4, 6e4};
    static const double specials[] = {INFINITY, -INFINITY, NAN, 3e38, -3e38};
    has_special_ = one_in(4);
    const bool has_extreme = !one_in(4);
    const Layout layout =
        features_ != Features::All || one_in(2) ? Layout::Contiguous : any_of({Layout::Transposed, Layout::Gaps});
    const auto value = [&] {
      if (has_special_ && one_in(40)) return any_of(specials);
      return has_extreme && one_in(8) ? any_of(extremes) : between(-20.0, 20.0);
    };
    logits_ = &add("logits", logits_type_, layout, problem_.logits, value);
    in_place_ = wants_gradient() && layout == Layout::Contiguous && one_in(2);
  }

  void draw_dense_target() {
    const Options& options = problem_.options;
    const bool is_hard = one_in(2) || !is_floating(target_type_);
    is_beyond_ = is_floating(target_type_) && !options.check_target && one_in(8);
    const Layout layout = features_ != Features::All || one_in(2)
                              ? Layout::Contiguous
                              : any_of({Layout::Transposed, Layout::Gaps, Layout::Column});
    const auto value = [&] {
      if (options.has_ignore_value && one_in(4)) return options.ignore_value;
      if (is_beyond_) return double(below(7) - 3);
      return is_hard || one_in(3) ? double(below(2)) : between(0.0, 1.0);
    };
    target_ = &add("target", target_type_, layout, problem_.target, value);
  }

  // Targets that are given row by row; dense_ has them one by one.
  void draw_row_target() {
    const TargetFormat format = problem_.format;
    const bool is_csr = format == TargetFormat::Csr;
    const int64_t list_length = std::min<int64_t>(columns_, 4) + 1;
    std::vector<int64_t> indices, begins = {0};
    std::vector<double> values;
    std::vector<uint8_t> bytes;
    dense_.assign(size_t(numel_), 0.0);
    for (int64_t row = 0; row < rows_; ++row) {
      const auto label = [&](int64_t column) -> double& { return dense_[size_t(row * columns_ + column)]; };
      if (format == TargetFormat::ClassIndex) {
        indices.push_back(columns_ == 0 ? 0 : below(columns_));
        if (problem_.has_ignored_index && one_in(3)) indices.back() = problem_.ignored_index;
        const bool is_ignored = problem_.has_ignored_index && indices.back() == problem_.ignored_index;
        for (int64_t column = 0; is_ignored && column < columns_; ++column) label(column) = NAN;
        if (!is_ignored && columns_ > 0) label(indices.back()) = 1.0;
      } else if (format == TargetFormat::Packed) {
        for (int64_t column = 0; column < columns_; ++column) {
          if (column % 8 == 0) bytes.push_back(0);
          label(column) = double(below(2));
          bytes.back() |= uint8_t(label(column) == 0.0 ? 0 : 1 << column % 8);
        }
      } else {
        const size_t before = indices.size();
        for (int64_t column = below(3); column < columns_; column += 1 + columns_ / 4) {
          indices.push_back(column);
          values.push_back(is_floating(target_type_) && is_csr ? between(0.0, 1.0) : is_csr ? double(below(2)) : 1.0);
          if (is_csr && problem_.options.has_ignore_value && one_in(4)) values.back() = problem_.options.ignore_value;
        }
        if (!is_csr) {
          for (size_t n = before; n < indices.size(); ++n) label(indices[n]) = 1.0;
          indices.resize(before + size_t(list_length), -1);
          std::shuffle(indices.begin() + int64_t(before), indices.end(), random_bits);
        }
        begins.push_back(int64_t(values.size()));
      }
    }
    const auto numbers = [&](const char* name, const std::vector<int64_t>& from) -> Array& {
      Array& array = add(name, DType::Int64, int64_t(from.size()));
      std::copy(from.begin(), from.end(), array.data<int64_t>());
      return array;
    };
    problem_.list_length = list_length;
    if (is_csr) {
      value_columns_ = &numbers("value_columns", indices);
      row_begins_ = &numbers("row_begins", begins);
      target_ = &add("target", target_type_, int64_t(values.size()));
      for (size_t n = 0; n < values.size(); ++n) target_->set(int64_t(n), values[n]);
      for (int64_t row = 0; row < rows_; ++row) {  // as they are stored
        for (int64_t n = begins[size_t(row)]; n < begins[size_t(row) + 1]; ++n) {
          dense_[size_t(row * columns_ + indices[size_t(n)])] = target_->get(n);
        }
      }
      problem_.values = target_->length();
      problem_.value_columns = value_columns_->data<int64_t>();
      problem_.row_begins = row_begins_->data<int64_t>();
    } else if (format == TargetFormat::Packed) {
      target_ = &add("target", DType::UInt8, int64_t(bytes.size()));
      std::copy(bytes.begin(), bytes.end(), target_->data<uint8_t>());
    } else {
      target_ = &numbers("target", indices);
    }
    problem_.target = target_->operand();
    problem_.target.dtype = target_type_;
  }

  void draw_factors() {
    const DType computing = computing_type();
    // Not 0 beside targets below 0: the zeros that this makes may have another sign on the CPU.
    const auto weight = [&] { return one_in(16) && !is_beyond_ ? 0.0 : between(0.0, 5.0); };
    static const Layout layouts[] = {Layout::Column, Layout::Column, Layout::Column,
                                     Layout::Single, Layout::Row,    Layout::Contiguous};
    const bool may_weigh = output_ != Output::Rows || features_ == Features::All;  // whose loops have no weights
    if (may_weigh && one_in(4)) add("weight", computing, any_of(layouts), problem_.weight, weight);
    if (may_weigh && one_in(4)) add("pos_weight", computing, any_of(layouts), problem_.pos_weight, weight);
    if (features_ != Features::Plain) {
      const auto fraction = [] { return one_in(16) ? 0.0 : between(0.0, 1.0); };
      if (!is_wrong_ && one_in(3)) {
        const Layout layout = features_ == Features::Contiguous
                                  ? Layout::Contiguous
                                  : any_of({Layout::Contiguous, Layout::Column, Layout::Row});
        add("mask", DType::Bool, layout, problem_.mask, [] { return double(!one_in(4)); });
      }
      if (problem_.is_focal() && one_in(3)) add("alpha", computing, Layout::Column, problem_.alpha, fraction);
      if (features_ == Features::All && problem_.options.label_smoothing != 0.0 && one_in(2)) {
        add("prior", computing, Layout::Column, problem_.prior, fraction);
      }
    }
    if (output_ != Output::Gradient && output_ != Output::LossAndGradient) return;
    const DType type = one_in(2) ? computing : logits_type_;
    if (one_in(3)) {
      add("upstream", type, any_of({Layout::Contiguous, Layout::Contiguous, Layout::Row}), problem_.upstream, weight);
    }
    if (one_in(3)) {
      add("factor", type, Layout::Single, problem_.factor, [&] { return one_in(3) ? 1.0 : weight(); });
    }
    problem_.is_made = output_ == Output::Gradient && !in_place_ && !problem_.upstream && !is_wrong_ && one_in(6);
  }

  void draw_divisor() {
    if (output_ == Output::Loss) return;
    problem_.options.divisor = double(one_in(3) ? 1 : std::max<int64_t>(numel_, 1) * (1 + below(3)));
    if (!one_in(5)) return;
    Array& count = add("count", DType::Int64, 1);
    count.set(0, double(below(1000)));
    problem_.count = count.data<int64_t>();
  }

  // Makes a target wrong; false: these cannot be.
  bool spoil_target() {
    const int64_t row = below(rows_);
    int64_t* const indices = target_->data<int64_t>();
    switch (problem_.format) {
      case TargetFormat::Dense: {
        if (target_->dtype() == DType::Bool) return false;
        const bool is_soft = is_floating(target_type_);
        if (is_soft) problem_.options.check_target = true;
        const Operand& target = problem_.target;
        const int64_t at = row * target.strides[0] + below(columns_) * target.strides[1];
        target_->set(at, !is_soft ? 2.0 : one_in(2) ? 1.5 : NAN);
        return true;
      }
      case TargetFormat::ClassIndex: indices[row] = one_in(2) ? -1 : columns_; return true;
      case TargetFormat::IndexList:
        indices[row * problem_.list_length + below(problem_.list_length)] = one_in(2) ? -2 : columns_;
        return true;
      case TargetFormat::Packed:
        if (columns_ % 8 == 0) return false;
        target_->data<uint8_t>()[(row + 1) * ((columns_ + 7) / 8) - 1] |= 0x80;
        return true;
      case TargetFormat::Csr:
        if (problem_.values > 0 && one_in(2)) {
          value_columns_->set(below(problem_.values), one_in(2) ? -1 : double(columns_));
        } else {
          row_begins_->set(row, one_in(2) ? -1 : double(problem_.values + 900));
        }
        return true;
    }
    return false;
  }

  // Two dimensions become one where each operand allows it, as the op layer has it, and some three.
  void flatten() {
    Operand* const operands[] = {&problem_.logits, &problem_.target, &problem_.weight, &problem_.pos_weight,
                                 &problem_.mask,   &problem_.alpha,  &problem_.prior,  &problem_.upstream};
    problem_.ndim = 2;
    problem_.sizes[0] = rows_;
    problem_.sizes[1] = columns_;
    const auto joins = [&](const Operand* each) { return each->strides[0] == each->strides[1] * columns_; };
    if (std::all_of(std::begin(operands), std::end(operands), joins)) {
      problem_.ndim = 1;
      problem_.sizes[0] = numel_;
      for (Operand* each : operands) each->strides[0] = each->strides[1];
    } else if (rows_ % 2 == 0 && one_in(4)) {
      problem_.ndim = 3;
      problem_.sizes[0] = 2;
      problem_.sizes[1] = rows_ / 2;
      problem_.sizes[2] = columns_;
      for (Operand* each : operands) {
        each->strides[2] = each->strides[1];
        each->strides[1] = each->strides[0];
        each->strides[0] *= rows_ / 2;
      }
    }
  }

  double value_at(const Operand& operand, int64_t i) const {
    if (!operand) return 1.0;
    const int64_t offset = operand.contiguous ? i : offset_of(problem_, operand, i);
    return visit(operand.dtype, [&](auto tag) {
      return load_as<double>(static_cast<const decltype(tag)*>(operand.data)[offset]);
    });
  }

  double target_at(int64_t i) const { return dense_.empty() ? value_at(problem_.target, i) : dense_[size_t(i)]; }

  bool counts_at(int64_t i) const {
    if (problem_.mask && value_at(problem_.mask, i) == 0.0) return false;
    const double target = target_at(i);
    return !(problem_.in_double ? is_ignored(problem_.options, target) : is_ignored(problem_.options, float(target)));
  }

  // loss.h's formula.
  Exact exact_at(int64_t i) const {
    Exact exact;
    if (!counts_at(i)) return exact;
    const double target = target_at(i), prior = problem_.prior ? value_at(problem_.prior, i) : 0.0;
    // The target that the formula gets, rounded as the kernels round it.
    const long double t = problem_.in_double ? cuda::changed_target(problem_, target, prior)
                                             : double(cuda::changed_target(problem_, float(target), float(prior)));
    const long double x = value_at(problem_.logits, i);
    const long double e = std::exp(-std::fabs(x)), log1p_e = std::log1p(e);
    const long double negative = 1 - t, positive = times(value_at(problem_.pos_weight, i), t);
    const auto softplus = [&](bool of_minus) { return ((x > 0) != of_minus ? std::fabs(x) : 0) + log1p_e; };
    const auto sigmoid = [&](bool of_minus) { return ((x > 0) != of_minus ? 1 : e) / (1 + e); };
    const long double weight = value_at(problem_.weight, i);
    const long double factor = times(weight, times(value_at(problem_.upstream, i), factor_of(problem_)));
    const long double scale = factor / divisor_of(problem_);
    const long double a = times(negative, softplus(false)), b = times(positive, softplus(true));
    const long double c = times(negative, sigmoid(false)), d = times(positive, sigmoid(true));
    exact.loss = times(weight, a + b);
    exact.loss_terms = times(weight, std::fabs(a) + std::fabs(b));
    exact.gradient = times(scale, c - d);
    exact.gradient_terms = times(std::fabs(scale), std::fabs(c) + std::fabs(d));
    exact.steps = (1 + std::fabs(negative) + std::fabs(positive)) * std::max({1.0L, weight, std::fabs(scale)});
    return exact;
  }

  // What the CPU kernels make of it, and what long double does.
  void compute_reference() {
    cpu_loss_ = std::make_unique<Array>("loss", wants_loss() ? result_type_ : computing_type(), numel_);
    cpu_gradient_ = std::make_unique<Array>("gradient", logits_type_, numel_);
    Problem problem = problem_;
    problem.is_made = false;
    problem.loss = cpu_loss_->result();
    problem.gradient = cpu_gradient_->result();
    const bool is_right = cpu::kReference.chunks(problem, 0, cpu::num_chunks(numel_), nullptr);
    if (is_right == is_wrong_) fail("the CPU kernels say that the target is %s", is_right ? "right" : "wrong");
    for (int64_t i = 0; !is_wrong_ && !problem_.is_focal() && i < numel_; ++i) exact_.push_back(exact_at(i));
  }

  void run_in_order(const Schedule& schedule) {
    ptx::Runtime& runtime = ptx::Runtime::get();
    const int64_t shift = are_aligned_ ? 0 : below(16);
    Array loss("loss", result_type_, output_ == Output::Rows ? rows_ : numel_, shift);
    Array gradient("gradient", logits_type_, numel_, shift);
    Array total("total", result_type_, 1, shift);
    Problem problem = problem_;
    runtime.machine.clear();
    runtime.machine.options = schedule.options;
    for (const auto& operand : operands_) {
      if (!in_place_ || operand.get() != logits_) operand->enter_as_operand();
    }
    if (wants_loss() || output_ == Output::Rows) {
      problem.loss = loss.result();
      loss.enter_as_result();
    }
    if (wants_gradient()) problem.gradient = gradient.result();
    if (wants_gradient() && in_place_) {
      gradient.copy(*logits_);
      problem.logits.data = problem.gradient.data;
      gradient.enter_as_both();
    } else if (wants_gradient()) {
      gradient.enter_as_result();
    }
    if (wants_sum()) total.enter_as_result();

    // One workspace for all cases: each sum must leave it ready for the next.
    static std::vector<double> workspace(size_t(cuda::kMaxWorkspaceWords), 0.0);
    const size_t words = size_t(cuda::workspace_words(problem));
    if (words > 0) {
      runtime.machine.add("workspace", workspace.data(), 8 * words, Access::BetweenBlocks, 8);
    }
    const std::string what = std::string(" (") + schedule.name + ")";
    cudaError_t status = cudaSuccess;
    if (wants_sum()) {
      status = cuda::sum(problem, total.result(), words ? workspace.data() : nullptr, nullptr);
    } else if (output_ == Output::Rows) {
      status = cuda::rows(problem, columns_, rows_, nullptr);
    } else {
      status = cuda::elements(problem, nullptr);
    }
    if (is_wrong_) {
      if (status == cudaSuccess) fail("the wrong target was not seen%s", what.c_str());
      if (runtime.error.rfind("assertion", 0) != 0) fail("%s%s", runtime.error.c_str(), what.c_str());
      workspace[0] = 0.0;
      cudaGetLastError();
      return;
    }
    if (status != cudaSuccess) fail("%s%s", runtime.error.c_str(), what.c_str());
    if (words > 0 && workspace[0] != 0.0) fail("the counter of the workspace is not 0 again%s", what.c_str());

    if (wants_loss()) compare_losses(loss, what);
    if (wants_gradient()) compare_gradient(gradient, what);
    if (wants_sum()) compare_sum(total.get(0), 0, numel_, what);
    for (int64_t row = 0; output_ == Output::Rows && row < rows_; ++row) {
      compare_sum(loss.get(row), row * columns_, (row + 1) * columns_, what);
    }
    if (has_own_formula_ && schedule.options.inexact) return;
    const std::string bits = (wants_loss() || output_ == Output::Rows ? loss.bits() : "") +
                             (wants_gradient() ? gradient.bits() : "") + (wants_sum() ? total.bits() : "");
    if (!first_bits_.empty() && first_bits_ != bits) fail("the results depend on the order%s", what.c_str());
    first_bits_ = bits;
  }

  [[noreturn]] void fail_at(int64_t i, const char* name, double got, long double want, const std::string& what) const {
    fail(
        "%s %" PRId64 " of logit %.9g, target %.9g is %.17g, want %.17Lg%s", name, i, value_at(problem_.logits, i),
        target_at(i), got, want, what.c_str());
  }

  void compare_losses(const Array& loss, const std::string& what) const {
    const long double unit = problem_.in_double ? 0x1p-53L : 0x1p-24L,
                      step = problem_.in_double ? 0x1p-1074L : 0x1p-149L;
    for (int64_t i = 0; i < numel_; ++i) {
      const double got = loss.get(i);
      ++compared;
      if (!loss.same(*cpu_loss_, i)) fail_at(i, "loss", got, cpu_loss_->get(i), what);
      // A product of two factors may be too large where the one of all three is not.
      if (exact_.empty() || !std::isfinite(got)) continue;
      const Exact& exact = exact_[size_t(i)];
      const long double error = 8 * unit * exact.loss_terms + 2 * step * exact.steps;
      if (!agrees(got, exact.loss, error, result_type_)) fail_at(i, "loss", got, exact.loss, what);
    }
  }

  void compare_gradient(const Array& gradient, const std::string& what) const {
    if (is_done(problem_)) {
      if (!gradient.is_unwritten()) fail("the gradient was made, and is written%s", what.c_str());
      return;
    }
    const long double unit = problem_.in_double ? 0x1p-53L : 0x1p-24L,
                      step = problem_.in_double ? 0x1p-1074L : 0x1p-149L;
    for (int64_t i = 0; i < numel_; ++i) {
      const double got = gradient.get(i);
      ++compared;
      if (!has_own_formula_ && !gradient.same(*cpu_gradient_, i))
        fail_at(i, "gradient", got, cpu_gradient_->get(i), what);
      if (exact_.empty()) continue;
      const Exact& exact = exact_[size_t(i)];
      const long double x = std::min(104.0, std::fabs(value_at(problem_.logits, i)));
      const long double relative = has_own_formula_ ? 0x1p-19L + x * 0x1p-23L : 10 * unit;
      const long double error = relative * exact.gradient_terms + 4 * step * exact.steps;
      if (!agrees(got, exact.gradient, error, logits_type_)) fail_at(i, "gradient", got, exact.gradient, what);
    }
  }

  // The sum of elements [begin, end). Its own formula errs by what gpu16.h says and by float additions of a group.
  void compare_sum(double got, int64_t begin, int64_t end, const std::string& what) const {
    long double want = 0, error = 0;
    for (int64_t i = begin; i < end; ++i) {
      const double loss = cpu_loss_->get(i);
      if (has_own_formula_ && std::isfinite(loss)) {
        const Exact& exact = exact_[size_t(i)];
        const long double x = std::min(104.0, std::fabs(value_at(problem_.logits, i)));
        want += exact.loss;
        error += exact.loss_terms * (0x1p-20L + x * 0x1p-23L + 10 * 0x1p-24L) + 2 * 0x1p-149L * exact.steps;
      } else {
        want += loss;
        error += std::isfinite(loss) ? std::fabs(loss) * 1e-13L : 0.0L;
      }
    }
    ++compared;
    want /= divisor_of(problem_);
    error = error / divisor_of(problem_) + std::fabs(want) * 1e-13L;
    if (std::isinf(want)) error = 0;
    const bool same = double(want) == got;
    if (!same && !agrees(got, want, error, result_type_)) {
      fail("the sum from %" PRId64 " on is %.17g, want %.17Lg within %Lg%s", begin, got, want, error, what.c_str());
    }
  }

  Output output_;
  int64_t rows_ = 0;
  int64_t columns_ = 0;
  int64_t numel_ = 0;
  DType logits_type_;
  DType target_type_;
  DType result_type_;
  Features features_ = Features::All;
  bool are_aligned_ = false;
  bool has_special_ = false;
  bool is_beyond_ = false;  // targets are not in [0, 1]
  bool in_place_ = false;   // the gradient in the memory of the logits
  bool is_wrong_ = false;   // a target
  bool has_own_formula_ = false;
  Problem problem_;
  std::vector<std::unique_ptr<Array>> operands_;
  Array* logits_ = nullptr;
  Array* target_ = nullptr;
  Array* value_columns_ = nullptr;
  Array* row_begins_ = nullptr;
  std::vector<double> dense_;  // the targets of a format that is not
  std::unique_ptr<Array> cpu_loss_;
  std::unique_ptr<Array> cpu_gradient_;
  std::vector<Exact> exact_;  // none with focal.h, which has the CPU's bits everywhere
  std::string first_bits_;
};

void check_scale() {
  ptx::Runtime& runtime = ptx::Runtime::get();
  const DType dtype = any_of(kFloatTypes), factor_type = any_of(kFloatTypes);
  const int64_t numel = one_in(4) ? below(10) : below(9000);
  const int64_t shift = one_in(2) ? 0 : below(16);
  Array values("values", dtype, numel, shift), want("values", dtype, numel), factor("factor", factor_type, 1, below(2));
  factor.set(0, one_in(5) ? 1.0 : one_in(5) ? NAN : one_in(5) ? 0.0 : between(-3.0, 3.0));
  const double by = factor.get(0);
  for (int64_t i = 0; i < numel; ++i) {
    values.set(i, one_in(50) ? INFINITY : between(-2.0, 2.0));
    const double value = values.get(i);
    const bool in_double = dtype == DType::Float64;
    want.set(i, in_double ? product_of_factors(by, value) : double(product_of_factors(float(by), float(value))));
  }
  const Schedule schedule = any_schedule();
  runtime.machine.clear();
  runtime.machine.options = schedule.options;
  // By 1 no value is looked at.
  by == 1.0 ? values.enter_as_result() : values.enter_as_both();
  factor.enter_as_operand();
  if (cuda::scale(values.result(), numel, factor.operand(), nullptr) != cudaSuccess) fail("%s", runtime.error.c_str());
  for (int64_t i = 0; i < numel; ++i) {
    ++compared;
    if (values.same(want, i)) continue;
    fail(
        "%s by %s %g: %" PRId64 " is %.17g, want %.17g", name_of(dtype), name_of(factor_type), by, i, values.get(i),
        want.get(i));
  }
}

// Runs a case; false: something is wrong.
bool run_case(uint64_t number) {
  random_bits.seed(number);
  std::string description = "scale";
  try {
    if (one_in(40)) {
      check_scale();
    } else {
      Case drawn;
      description = drawn.description();
      drawn.run();
    }
    return true;
  } catch (const ptx::Error& error) {
    std::printf("FAILED: case %" PRIu64 ", %s: %s\n", number, description.c_str(), error.what());
    return false;
  }
}

// Which part of the instructions was executed, for each kind of kernel.
void print_coverage(bool lists_lines) {
  const ptx::Runtime& runtime = ptx::Runtime::get();
  for (const char* kind : {"elements_kernel", "rows_kernel", "scale_kernel", "sum_kernel"}) {
    int kernels = 0, launched = 0;
    int64_t instructions = 0, executed = 0;
    for (const auto& [name, function] : runtime.program->functions()) {
      if (name.find(kind) == std::string::npos) continue;
      ++kernels;
      launched += runtime.launches.count(name) > 0;
      for (size_t n = 0; n < function.code.size(); ++n) {
        ++instructions;
        executed += function.covered[n];
        if (lists_lines && !function.covered[n]) std::printf("line %d is not executed\n", function.code[n].line);
      }
    }
    std::printf(
        "%-16s %2d of %2d kernels, %5.1f %% of %" PRId64 " instructions\n", kind, launched, kernels,
        100.0 * double(executed) / double(std::max<int64_t>(instructions, 1)), instructions);
  }
}

}  // namespace

int main(int count, char** arguments) {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 77;
#endif
  if (count < 4) {
    std::fprintf(stderr, "usage: check KERNELS.ptx FIRST COUNT [uncovered]\n");
    return 2;
  }
  const uint64_t first = std::strtoull(arguments[2], nullptr, 10);
  const uint64_t cases = std::strtoull(arguments[3], nullptr, 10);
  ptx::Runtime& runtime = ptx::Runtime::get();
  try {
    runtime.program = std::make_unique<ptx::Program>(arguments[1]);
  } catch (const ptx::Error& error) {
    std::printf("FAILED: %s: %s\n", arguments[1], error.what());
    return 1;
  }
  for (uint64_t number = first; number < first + cases; ++number) {
    if (!run_case(number)) return 1;
  }
  print_coverage(count > 4);
  std::printf(
      "%" PRIu64 " cases, %" PRId64 " values compared, %.3g instructions executed\n", cases, compared,
      double(runtime.machine.instructions));
  return 0;
}
