// What one thread does to multiply values in place. No CUDA header.
#pragma once

#include <cstdint>
#include <type_traits>

#include "launch.h"
#include "memory.h"

namespace fused_sce::cuda {

// values[i] *= factor for a thread's range. For a factor of 1, the usual one, no value is read or written.
template <class Stored>
FUSED_SCE_INLINE void scale_values(Stored* values, const Operand& factor, ThreadRange range) {
  using T = std::conditional_t<std::is_same<Stored, double>::value, double, float>;
  constexpr int kGroup = 16 / sizeof(Stored);
  const T by = load_element<T>(factor, 0);
  if (by == T(1)) return;
  const bool is_aligned = is_aligned_for_group(values + range.begin, kGroup);
  for (int64_t i = range.first(kGroup); i < range.end; i += range.stride(kGroup)) {
    const int count = range.end - i < kGroup ? int(range.end - i) : kGroup;
    const bool wide = is_aligned && count == kGroup;
    T group[kGroup];
    unpack(load_pack<Stored, kGroup>(values, i, count, wide), group);
    FUSED_SCE_UNROLL
    for (int k = 0; k < kGroup; ++k) group[k] *= by;
    store_pack(values, i, count, wide, group);
  }
}

}  // namespace fused_sce::cuda
