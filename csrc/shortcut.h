// The short way from Python to the ops, for the call that training makes all day.
#pragma once

#include <pybind11/pybind11.h>

namespace fused_sce {

// Adds the function `usual_loss` to the module.
void add_shortcut(pybind11::module_& m);

}  // namespace fused_sce
