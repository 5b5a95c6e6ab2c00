// The target: the only place where it is loaded and converted, for contiguous and strided problems alike.
#pragma once

#undef NDEBUG  // the assertion checks data, not the program
#include <cassert>
#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "memory.h"

namespace fused_sce::cuda {

// A target of one byte: uint8 or bool.
struct ByteTarget {
  uint8_t byte;
};

// A target whose type is known at run time.
struct AnyTarget {};

// Whether the integer targets that a thread has seen are labels, 0 or 1. Asked once, at the end: an assertion in the
// loop would be a call, around which registers are spilled.
struct LabelCheck {
  uint32_t other_bits = 0;

  template <class Stored>
  FUSED_SCE_MEMBER void see(Stored target) {
    if constexpr (std::is_integral<Stored>::value) other_bits |= (target & ~Stored(1)) != 0;
  }
  FUSED_SCE_MEMBER void see_bytes(uint32_t word) { other_bits |= word & 0xfefefefeu; }

  // Stops the program if one is not: on a GPU as a failed assertion does.
  FUSED_SCE_MEMBER void expect_labels() const {
#if defined(__CUDA_ARCH__)
    assert(other_bits == 0 && "an integer target of fused_sce must be 0 or 1");
#else
    if (other_bits != 0) throw std::domain_error("an integer target must be 0 or 1");
#endif
  }
};

// Calls `action` with a value of the target's type, if there are loops for it beside AnyTarget; returns whether. Those
// take every target as it is: to change it there would cost each of them 1 instruction per element.
template <class Logits, class Action>
bool choose_target(const Problem& problem, Action&& action) {
  if (problem.options.changes_target() || problem.leaves_out()) return false;
  const DType target = problem.target.dtype;
  if (target == DType::Bool || target == DType::UInt8) {
    action(ByteTarget{});
  } else if (target == DType::Float32) {
    action(float{});
  } else if (target == problem.logits.dtype) {
    action(Logits{});
  } else {
    return false;
  }
  return true;
}

// The targets of a group as they were loaded: bits that convert() makes numbers of, so that a thread has loads in
// flight without waiting for the first.
template <class T, class Target, int kGroup>
struct TargetGroup {
  Pack<Target, kGroup> pack;
};
// Converted when it is loaded.
template <class T, int kGroup>
struct TargetGroup<T, AnyTarget, kGroup> {
  T values[kGroup];
  uint32_t others;  // bit k is set where element k does not count
};

// Whether the mask lets an element count.
FUSED_SCE_INLINE bool is_masked_in(const Problem& problem, int64_t offset) {
  return !problem.mask || static_cast<const Bool*>(problem.mask.data)[offset].byte != 0;
}

// Whether load_target() can load all whole groups from element `begin` on wide.
template <class Target>
FUSED_SCE_INLINE bool is_target_aligned(const Problem& problem, int64_t begin, int group) {
  if constexpr (std::is_same<Target, AnyTarget>::value) {
    return visit(problem.target.dtype, [&](auto tag) {
      return is_aligned_for_group(static_cast<const decltype(tag)*>(problem.target.data) + begin, group);
    });
  } else {
    return is_aligned_for_group(static_cast<const Target*>(problem.target.data) + begin, group);
  }
}

// The targets of the group at element `i` of a contiguous target; `count` and `wide` as in load_pack().
template <class T, class Target, int kGroup>
FUSED_SCE_INLINE TargetGroup<T, Target, kGroup>
load_target(const Problem& problem, int64_t i, int count, bool wide, LabelCheck& labels) {
  TargetGroup<T, Target, kGroup> group;
  if constexpr (std::is_same<Target, AnyTarget>::value) {
    visit(problem.target.dtype, [&](auto tag) {
      using Stored = decltype(tag);
      const Pack<Stored, kGroup> pack = load_pack<Stored, kGroup>(problem.target.data, i, count, wide);
      unpack(pack, group.values);
      group.others = 0;
      if (problem.leaves_out()) {
        FUSED_SCE_UNROLL
        for (int k = 0; k < kGroup; ++k) {
          const bool counts =
              k < count && is_masked_in(problem, i + k) && !is_ignored(problem.options, group.values[k]);
          group.others |= uint32_t(!counts) << k;
        }
      }
      FUSED_SCE_UNROLL
      for (int k = 0; k < kGroup; ++k) labels.see(group.others >> k & 1 ? Stored{} : element_of(pack, k));
    });
  } else {
    group.pack = load_pack<Target, kGroup>(problem.target.data, i, count, wide);
  }
  return group;
}

// 1 for every byte that is not 0, four at a time. torch makes only bools of 0 and 1, but a view of other bytes as bool
// may have any.
template <int kGroup>
FUSED_SCE_INLINE void make_bool(Pack<ByteTarget, kGroup>& pack) {
  FUSED_SCE_UNROLL
  for (int n = 0; n < kGroup / 4; ++n) {
    const uint32_t word = pack.words[n];
    pack.words[n] = (((word & 0x7f7f7f7fu) + 0x7f7f7f7fu) | word) >> 7 & 0x01010101u;
  }
}

// Without the conversion instruction, which runs at an eighth of the speed of an addition: 2^23 with the byte in its
// last bits, less 2^23.
template <class T, int kGroup>
FUSED_SCE_INLINE void unpack(const Pack<ByteTarget, kGroup>& pack, T (&values)[kGroup]) {
  FUSED_SCE_UNROLL
  for (int k = 0; k < kGroup; ++k) {
#if defined(__CUDA_ARCH__)
    const uint32_t bits = __byte_perm(pack.words[k / 4], 0x4b000000u, 0x7440u | (k % 4));
#else
    const uint32_t bits = 0x4b000000u | element_of(pack, k).byte;
#endif
    values[k] = T(bit_cast<float>(bits) - 0x1p23f);
  }
}

template <class T, class Target, int kGroup>
FUSED_SCE_INLINE void
convert(const Problem& problem, TargetGroup<T, Target, kGroup> group, LabelCheck& labels, T (&targets)[kGroup]) {
  if constexpr (std::is_same<Target, AnyTarget>::value) {
    FUSED_SCE_UNROLL
    for (int k = 0; k < kGroup; ++k) targets[k] = changed_target(problem.options, group.values[k]);
  } else {
    if constexpr (std::is_same<Target, ByteTarget>::value) {
      if (problem.target.dtype == DType::Bool) {
        make_bool(group.pack);
      } else {
        FUSED_SCE_UNROLL
        for (int n = 0; n < kGroup / 4; ++n) labels.see_bytes(group.pack.words[n]);
      }
    }
    unpack(group.pack, targets);
  }
}

// A single target of any type and layout, and whether its element counts.
template <class T>
struct SingleTarget {
  T value;
  bool counts;
};

template <class T>
FUSED_SCE_INLINE SingleTarget<T>
load_target(const Problem& problem, int64_t offset, int64_t mask_offset, LabelCheck& labels) {
  bool counts = is_masked_in(problem, mask_offset);
  const T value = visit(problem.target.dtype, [&](auto tag) {
    const auto stored = static_cast<const decltype(tag)*>(problem.target.data)[offset];
    const T loaded = load_as<T>(stored);
    counts = counts && !is_ignored(problem.options, loaded);
    if (counts) labels.see(stored);
    return loaded;
  });
  return {changed_target(problem.options, value), counts};
}

}  // namespace fused_sce::cuda
