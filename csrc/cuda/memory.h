// Elements in memory: packs of neighbours, wide loads and stores, single elements of a type known at run time.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../dtypes.h"
#include "../problem.h"

namespace fused_sce::cuda {

// A group of neighbours as it lies in memory, aligned for wide loads (of 16 bytes; a larger group takes several). Words
// instead of elements, because a compiler that sees elements takes a register for each.
template <class Stored, int kGroup>
struct __attribute__((aligned(sizeof(Stored) * kGroup < 16 ? sizeof(Stored) * kGroup : 16), may_alias)) Pack {
  static constexpr int kBytes = int(sizeof(Stored)) * kGroup;
  using Word = std::conditional_t<kBytes % 4 == 0, uint32_t, uint16_t>;  // the smallest group has two bytes
  Word words[kBytes / sizeof(Word)];
};

// Whether a group at `address` can be loaded wide. Then so can the groups after it: a group is a whole number of wide
// loads.
template <class Stored>
FUSED_SCE_INLINE bool is_aligned_for_group(const Stored* address, int group) {
  const int bytes = int(sizeof(Stored)) * group;
  return reinterpret_cast<uintptr_t>(address) % (bytes < 16 ? bytes : 16) == 0;
}

// Element k of a pack. `k` is a constant after unrolling.
template <class Stored, int kGroup>
FUSED_SCE_INLINE Stored element_of(const Pack<Stored, kGroup>& pack, int k) {
  using Word = typename Pack<Stored, kGroup>::Word;
  if constexpr (sizeof(Stored) == 8) {
    return bit_cast<Stored>(uint64_t(pack.words[2 * k]) | uint64_t(pack.words[2 * k + 1]) << 32);
  } else if constexpr (sizeof(Stored) == sizeof(uint32_t)) {
    return bit_cast<Stored>(pack.words[k]);
  } else {
    using Bits = std::conditional_t<sizeof(Stored) == 2, uint16_t, uint8_t>;
    constexpr int kPerWord = sizeof(Word) / sizeof(Stored);
    return bit_cast<Stored>(Bits(pack.words[k / kPerWord] >> (k % kPerWord * 8 * int(sizeof(Stored)))));
  }
}

template <class T, class Stored, int kGroup>
FUSED_SCE_INLINE void unpack(const Pack<Stored, kGroup>& pack, T (&values)[kGroup]) {
  FUSED_SCE_UNROLL
  for (int k = 0; k < kGroup; ++k) values[k] = load_as<T>(element_of(pack, k));
}

// The group at element `i` of an array. `wide`: all of it, from an aligned address. Otherwise the first `count`
// elements one by one, and 0 for the others.
template <class Stored, int kGroup>
FUSED_SCE_INLINE Pack<Stored, kGroup> load_pack(const void* data, int64_t i, int count, bool wide) {
  const Stored* const from = static_cast<const Stored*>(data) + i;
  if (wide) return *reinterpret_cast<const Pack<Stored, kGroup>*>(from);
  Stored stored[kGroup];
  FUSED_SCE_UNROLL
  for (int k = 0; k < kGroup; ++k) stored[k] = k < count ? from[k] : Stored{};
  Pack<Stored, kGroup> pack;
  memcpy(&pack, stored, sizeof(pack));
  return pack;
}

// The same for stores: all of the group, or its first `count` elements.
template <class T, int kGroup, class Stored>
FUSED_SCE_INLINE void store_pack(Stored* data, int64_t i, int count, bool wide, const T (&values)[kGroup]) {
  Stored* const to = data + i;
  Stored stored[kGroup];
  FUSED_SCE_UNROLL
  for (int k = 0; k < kGroup; ++k) stored[k] = store_as<Stored>(values[k]);
  if (wide) {
    Pack<Stored, kGroup> pack;
    memcpy(&pack, stored, sizeof(pack));
    *reinterpret_cast<Pack<Stored, kGroup>*>(to) = pack;
    return;
  }
  FUSED_SCE_UNROLL
  for (int k = 0; k < kGroup; ++k) {
    if (k < count) to[k] = stored[k];
  }
}

// A group of an operand, or of a result, of a floating type known at run time.
template <class T, int kGroup>
FUSED_SCE_INLINE void load_group(const Operand& operand, int64_t i, int count, T (&values)[kGroup]) {
  visit_floating(operand.dtype, [&](auto tag) {
    using Stored = decltype(tag);
    const Stored* const data = static_cast<const Stored*>(operand.data) + i;
    unpack(load_pack<Stored, kGroup>(data, 0, count, count == kGroup && is_aligned_for_group(data, kGroup)), values);
  });
}

template <class T, int kGroup>
FUSED_SCE_INLINE void store_group(const Result& result, int64_t i, int count, const T (&values)[kGroup]) {
  visit_floating(result.dtype, [&](auto tag) {
    using Stored = decltype(tag);
    Stored* const data = static_cast<Stored*>(result.data) + i;
    store_pack(data, 0, count, count == kGroup && is_aligned_for_group(data, kGroup), values);
  });
}

// A single element of a floating type known at run time.
template <class T>
FUSED_SCE_INLINE T load_element(const Operand& operand, int64_t offset) {
  return visit_floating(
      operand.dtype, [&](auto tag) { return load_as<T>(static_cast<const decltype(tag)*>(operand.data)[offset]); });
}

// A single weight, which has the type computed in; 1 where there is none.
template <class T>
FUSED_SCE_INLINE T load_weight(const Operand& weight, int64_t offset) {
  return weight ? static_cast<const T*>(weight.data)[offset] : T(1);
}

template <class T>
FUSED_SCE_INLINE void store_element(const Result& result, int64_t offset, T value) {
  visit_floating(result.dtype, [&](auto tag) {
    using Stored = decltype(tag);
    static_cast<Stored*>(result.data)[offset] = store_as<Stored>(value);
  });
}

}  // namespace fused_sce::cuda
