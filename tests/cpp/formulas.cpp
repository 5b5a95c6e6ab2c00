// The formulas of csrc/formulas on numpy arrays, for tests/test_formulas.py.
//
// Compiled twice: FUSED_SCE_HAS_FMA=1 makes the module formulas_fma, 0 makes formulas_without_fma. They need different
// names because pybind11 keeps one module per name. All arrays of a call have the same length.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <cstdint>
#include <optional>

#include "../../csrc/dtypes.h"
#include "../../csrc/formulas/focal.h"
#include "../../csrc/formulas/gpu16.h"
#include "../../csrc/formulas/loss.h"

namespace {

namespace py = pybind11;
using namespace fused_sce;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

// A special-function unit with the given relative errors.
struct ErringUnit {
  static float exp2(float x) {
    const double result = std::exp2(double(x)) * (1.0 + exp2_error);
    return result < 0x1p-126 ? 0.0f : float(result);
  }
  static float reciprocal(float x) { return float((1.0 + reciprocal_error) / double(x)); }
  static inline double exp2_error = 0.0;
  static inline double reciprocal_error = 0.0;
};

template <class T, class Function>
Array<T> map(py::ssize_t size, Function function) {
  Array<T> result(size);
  T* data = result.mutable_data();
  for (py::ssize_t i = 0; i < size; ++i) data[i] = function(i);
  return result;
}

// The same for a function that returns two values, as a struct of two.
template <class T, class Function>
py::tuple map_to_pairs(py::ssize_t size, Function function) {
  Array<T> first(size);
  Array<T> second(size);
  T* first_data = first.mutable_data();
  T* second_data = second.mutable_data();
  for (py::ssize_t i = 0; i < size; ++i) {
    const auto [one, two] = function(i);
    first_data[i] = one;
    second_data[i] = two;
  }
  return py::make_tuple(first, second);
}

template <class T>
py::tuple exp_parts(const Array<T>& x) {
  return map_to_pairs<T>(x.size(), [&](auto i) { return exp_of(reduce_argument(x.data()[i])); });
}

template <class T>
py::tuple log1p_parts(const Array<T>& upper, const Array<T>& lower) {
  return map_to_pairs<T>(upper.size(), [&](auto i) { return log1p_of(TwoPart<T>{upper.data()[i], lower.data()[i]}); });
}

template <class T>
py::tuple loss_and_gradient(const Array<T>& x, const Array<T>& t, const std::optional<Array<T>>& pos_weight) {
  const T* logits = x.data();
  const T* target = t.data();
  if (!pos_weight) {
    return map_to_pairs<T>(
        x.size(), [=](auto i) { return sigmoid_cross_entropy<T, false>(logits[i], target[i], T(1)); });
  }
  const T* factor = pos_weight->data();
  return map_to_pairs<T>(
      x.size(), [=](auto i) { return sigmoid_cross_entropy<T, true>(logits[i], target[i], factor[i]); });
}

template <class T>
Array<T> power(const Array<T>& base, const Array<T>& exponent) {
  return map<T>(base.size(), [&](auto i) {
    const T b = base.data()[i];
    const T e = exponent.data()[i];
    return power_of(b, e, scaled_logarithm(b, e));
  });
}

template <class T>
py::tuple focal(
    const Array<T>& x,
    const Array<T>& t,
    double gamma_pos,
    double gamma_neg,
    double clip,
    std::optional<double> alpha,
    const std::optional<Array<T>>& pos_weight) {
  Options options;
  options.gamma_pos = gamma_pos;
  options.gamma_neg = gamma_neg;
  options.clip = clip;
  options.has_alpha = bool(alpha);
  options.alpha = alpha.value_or(0.0);
  const Modulation<T> modulation = modulation_of<T>(options, false);
  const T* factor = pos_weight ? pos_weight->data() : nullptr;
  return map_to_pairs<T>(x.size(), [&](auto i) {
    return focal_loss<T>(
        modulation, x.data()[i], t.data()[i], factor ? factor[i] : T(1), options.has_alpha, T(options.alpha));
  });
}

py::tuple loss_and_gradient_16bit(
    const Array<float>& x,
    const Array<float>& t,
    const std::optional<Array<float>>& pos_weight,
    const Array<double>& exp2_error,
    const Array<double>& reciprocal_error) {
  const float* factor = pos_weight ? pos_weight->data() : nullptr;
  return map_to_pairs<float>(x.size(), [&](auto i) {
    ErringUnit::exp2_error = exp2_error.data()[i];
    ErringUnit::reciprocal_error = reciprocal_error.data()[i];
    return factor ? sigmoid_cross_entropy_16bit<true, ErringUnit>(x.data()[i], t.data()[i], factor[i])
                  : sigmoid_cross_entropy_16bit<false, ErringUnit>(x.data()[i], t.data()[i], 1.0f);
  });
}

// e / (1 + e)
Array<float> quotients(const Array<float>& e, const Array<double>& reciprocal_error) {
  return map<float>(e.size(), [&](auto i) {
    ErringUnit::reciprocal_error = reciprocal_error.data()[i];
    return quotient_by_steps<ErringUnit>(e.data()[i], 1.0f + e.data()[i]);
  });
}

// noconvert: an array of another type is an error, or a call of the other overload, never a copy.
template <class T>
void define_for_type(py::module_& module) {
  module.def("exp_parts", exp_parts<T>, py::arg("x").noconvert());
  module.def("log1p_parts", log1p_parts<T>, py::arg("upper").noconvert(), py::arg("lower").noconvert());
  module.def(
      "loss_and_gradient", loss_and_gradient<T>, py::arg("x").noconvert(), py::arg("t").noconvert(),
      py::arg("pos_weight").noconvert() = py::none());
  module.def(
      "focal", focal<T>, py::arg("x").noconvert(), py::arg("t").noconvert(), py::arg("gamma_pos"), py::arg("gamma_neg"),
      py::arg("clip") = 0.0, py::arg("alpha") = py::none(), py::arg("pos_weight").noconvert() = py::none());
  module.def("power", power<T>, py::arg("base").noconvert(), py::arg("exponent").noconvert());
}

}  // namespace

#if FUSED_SCE_HAS_FMA
#define MODULE_NAME formulas_fma
#else
#define MODULE_NAME formulas_without_fma
#endif

PYBIND11_MODULE(MODULE_NAME, module) {
  define_for_type<float>(module);
  define_for_type<double>(module);
  module.def(
      "loss_and_gradient_16bit", loss_and_gradient_16bit, py::arg("x").noconvert(), py::arg("t").noconvert(),
      py::arg("pos_weight").noconvert(), py::arg("exp2_error").noconvert(), py::arg("reciprocal_error").noconvert());
  module.def("quotient_by_steps", quotients, py::arg("e").noconvert(), py::arg("reciprocal_error").noconvert());
  module.def(
      "to_bfloat16",
      [](const Array<float>& x) {
        return map<uint16_t>(x.size(), [&](auto i) { return to_bfloat16(x.data()[i]).bits; });
      },
      py::arg("x").noconvert());
  module.def(
      "to_float16",
      [](const Array<float>& x) {
        return map<uint16_t>(x.size(), [&](auto i) { return to_float16(x.data()[i]).bits; });
      },
      py::arg("x").noconvert());
  module.def(
      "from_bfloat16",
      [](const Array<uint16_t>& bits) {
        return map<float>(bits.size(), [&](auto i) { return to_float(BFloat16{bits.data()[i]}); });
      },
      py::arg("bits").noconvert());
  module.def(
      "from_float16",
      [](const Array<uint16_t>& bits) {
        return map<float>(bits.size(), [&](auto i) { return to_float(Float16{bits.data()[i]}); });
      },
      py::arg("bits").noconvert());
}
