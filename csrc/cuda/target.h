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

// Whether the targets that a thread has seen are good: integers that are labels, 0 or 1, indices of labels, and with
// check_target soft targets in [0, 1]. Asked once, at the end: an assertion in the loop would be a call, around which
// registers are spilled.
struct LabelCheck {
  uint32_t other_bits = 0;

  template <class Stored>
  FUSED_SCE_MEMBER void see(Stored target) {
    if constexpr (std::is_integral<Stored>::value) other_bits |= (target & ~Stored(1)) != 0;
  }
  FUSED_SCE_MEMBER void expect(bool good) { other_bits |= !good; }
  FUSED_SCE_MEMBER void see_bytes(uint32_t word) { other_bits |= word & 0xfefefefeu; }

  // Stops the program if one is not: on a GPU as a failed assertion does.
  FUSED_SCE_MEMBER void expect_labels() const {
#if defined(__CUDA_ARCH__)
    assert(other_bits == 0 && "a target of fused_sce is no label, no index of one, or not in [0, 1]");
#else
    if (other_bits != 0) throw std::domain_error("a target is wrong");
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
    for (int k = 0; k < kGroup; ++k) targets[k] = smoothed_target(problem.options, group.values[k]);
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

// A single target of any type, layout and format, and whether its element counts.
template <class T>
struct SingleTarget {
  T value;
  bool counts;
};

// The target of element `index` of a problem that gives them row by row. Each thread looks for its own: a positive is
// found by the formula as a label, where a correction afterwards would lose the tail.
template <class T>
FUSED_SCE_INLINE T find_target(const Problem& problem, int64_t index, LabelCheck& labels) {
  const int64_t row = index / problem.columns;
  const int64_t column = index - row * problem.columns;
  if (problem.format == TargetFormat::Packed) {
    const int64_t row_bytes = (problem.columns + 7) / 8;
    const uint32_t byte = static_cast<const uint8_t*>(problem.target.data)[row * row_bytes + column / 8];
    labels.expect(column + 1 < problem.columns || byte >> column % 8 <= 1);  // nothing behind the last label
    return T(byte >> column % 8 & 1u);
  }
  if (problem.format == TargetFormat::ClassIndex) {
    const int64_t label = static_cast<const int64_t*>(problem.target.data)[row];
    if (problem.has_ignored_index && label == problem.ignored_index) return T(NAN);
    labels.expect(0 <= label && label < problem.columns);
    return label == column ? T(1) : T(0);
  }
  if (problem.format == TargetFormat::IndexList) {
    const int64_t* const list = static_cast<const int64_t*>(problem.target.data) + row * problem.list_length;
    int found = 0;
    for (int64_t k = 0; k < problem.list_length; ++k) {
      labels.expect(-1 <= list[k] && list[k] < problem.columns);
      found += list[k] == column;
    }
    labels.expect(found <= 1);
    return T(found > 0);
  }
  const int64_t begin = problem.row_begins[row];
  int64_t end = problem.row_begins[row + 1];
  const int64_t rows = problem.numel / problem.columns;
  const bool is_whole = (row > 0 || begin == 0) && (row + 1 < rows || end == problem.values);
  if (begin < 0 || end < begin || end > problem.values || !is_whole) {
    labels.expect(false);
    return T(0);
  }
  const int64_t* const columns = problem.value_columns;
  if (column == 0) {  // one thread checks the row: its columns are those of the logits and ascend
    for (int64_t k = begin; k < end; ++k) {
      labels.expect(columns[k] < problem.columns && (k == begin ? columns[k] >= 0 : columns[k - 1] < columns[k]));
    }
  }
  int64_t first = begin;
  while (first < end) {
    const int64_t middle = first + (end - first) / 2;
    if (columns[middle] < column) {
      first = middle + 1;
    } else {
      end = middle;
    }
  }
  if (first >= problem.row_begins[row + 1] || columns[first] != column) return T(0);
  return visit(problem.target.dtype, [&](auto tag) {
    return load_as<T>(static_cast<const decltype(tag)*>(problem.target.data)[first]);
  });
}

// A dense target.
template <class T>
FUSED_SCE_INLINE SingleTarget<T>
load_dense_target(const Problem& problem, int64_t offset, int64_t mask_offset, LabelCheck& labels) {
  bool counts = is_masked_in(problem, mask_offset);
  const T value = visit(problem.target.dtype, [&](auto tag) {
    const auto stored = static_cast<const decltype(tag)*>(problem.target.data)[offset];
    const T loaded = load_as<T>(stored);
    counts = counts && !is_ignored(problem.options, loaded);
    if (counts) labels.see(stored);
    return loaded;
  });
  return {value, counts};
}

// The target of element `index`; `offset` and `mask_offset` are those of a dense one and of the mask.
template <class T>
FUSED_SCE_INLINE SingleTarget<T>
load_target(const Problem& problem, int64_t index, int64_t offset, int64_t mask_offset, LabelCheck& labels) {
  SingleTarget<T> target;
  if (problem.format == TargetFormat::Dense) {
    target = load_dense_target<T>(problem, offset, mask_offset, labels);
  } else {
    target.value = find_target<T>(problem, index, labels);
    target.counts = is_masked_in(problem, mask_offset) && !is_ignored(problem.options, target.value);
    const bool is_label = target.value == T(0) || target.value == T(1);
    if (is_integer(problem.target.dtype)) labels.expect(!target.counts || is_label);
  }
  const bool is_fraction = target.value >= T(0) && target.value <= T(1);
  if (problem.options.check_target) labels.expect(!target.counts || is_fraction);
  return target;
}

}  // namespace fused_sce::cuda
