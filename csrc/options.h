// The options of the loss that the kernels see: each is named once in the schema and once in the struct, in the same
// order.
#pragma once

#include <cstdint>

namespace fused_sce {

//   divisor   divides the loss. An integer made of sizes, because it stays symbolic under torch.compile; a float would
//             recompile for each batch size.
#define FUSED_SCE_OPTIONS "SymInt divisor=1"

struct Options {
  double divisor = 1.0;

  // Takes the options from the values of a call.
  template <class Values>
  static Options next(Values& values) {
    return {double(values.template next<int64_t>())};
  }
};

}  // namespace fused_sce
