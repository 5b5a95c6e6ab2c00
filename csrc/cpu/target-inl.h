// The targets of a block: gathered from any type, stride and format, checked, changed, and which of them count. Part of
// kernels-inl.h.

// Converts `count` elements, `stride` apart, to the computing type.
template <class T, class From>
void copy_run(const From* from, int64_t stride, int64_t count, T* to) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = load_as<T>(from[i]);
  } else if (stride == 0) {
    const T value = load_as<T>(from[0]);
    for (int64_t i = 0; i < count; ++i) to[i] = value;
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = load_as<T>(from[i * stride]);
  }
}

// Whether all of `count` stored targets, `stride` apart, are labels: 0 or 1. Those of floating types may be soft.
template <class Stored>
bool are_labels(const Stored* stored, int64_t stride, int64_t count) {
  if constexpr (std::is_integral_v<Stored>) {
    Stored other_bits = 0;
    if (stride == 1) {
      for (int64_t i = 0; i < count; ++i) other_bits |= stored[i];
    } else {
      for (int64_t i = 0; i < count; ++i) other_bits |= stored[i * stride];
    }
    return (other_bits & ~Stored(1)) == 0;
  }
  return true;
}

template <class T>
constexpr DType kDTypeOf = std::is_same_v<T, double> ? DType::Float64 : DType::Float32;

// Elements [begin, begin + count) of an operand as an array of T: the operand itself if it is one, else `buffer`.
// Unless `only_labels` is null, it becomes false where an element is no label (are_labels).
template <class T>
const T* gather(
    const Problem& problem,
    const Operand& operand,
    int64_t begin,
    int64_t count,
    T* buffer,
    bool* only_labels = nullptr) {
  if (operand.contiguous && operand.dtype == kDTypeOf<T>) return static_cast<const T*>(operand.data) + begin;
  visit(operand.dtype, [&](auto tag) {
    using From = decltype(tag);
    const From* data = static_cast<const From*>(operand.data);
    const auto take = [&](const From* from, int64_t stride, int64_t run, T* to) {
      copy_run(from, stride, run, to);
      if (only_labels && !are_labels(from, stride, run)) *only_labels = false;
    };
    if (operand.contiguous) {
      take(data + begin, 1, count, buffer);
      return;
    }
    const int64_t columns = problem.sizes[problem.ndim - 1];
    const int64_t stride = operand.strides[problem.ndim - 1];
    int64_t column = begin % columns;
    for (int64_t done = 0; done < count;) {
      const int64_t left = columns - column;
      const int64_t run = count - done < left ? count - done : left;
      take(data + offset_of(problem, operand, begin + done), stride, run, buffer + done);
      done += run;
      column = 0;
    }
  });
  return buffer;
}

// Calls `fill(row, first, length, to)` for the part of each row that is among elements [begin, begin + count): columns
// [first, first + length) of the row, whose targets go to `to`. Returns whether all calls returned true.
template <class T, class Fill>
bool fill_rows(const Problem& problem, int64_t begin, int64_t count, T* buffer, const Fill& fill) {
  bool all_good = true;
  int64_t row = begin / problem.columns;
  int64_t first = begin % problem.columns;
  for (int64_t done = 0; done < count; ++row, first = 0) {
    const int64_t left = problem.columns - first;
    const int64_t length = count - done < left ? count - done : left;
    all_good &= fill(row, first, length, buffer + done);
    done += length;
  }
  return all_good;
}

template <class T>
void fill(T* to, int64_t length, T value) {
  for (int64_t i = 0; i < length; ++i) to[i] = value;
}

template <class T>
bool fill_class_index(const Problem& problem, int64_t row, int64_t first, int64_t length, T* to) {
  const int64_t index = static_cast<const int64_t*>(problem.target.data)[row];
  if (problem.has_ignored_index && index == problem.ignored_index) {
    fill(to, length, T(NAN));
    return true;
  }
  fill(to, length, T(0));
  if (first <= index && index < first + length) to[index - first] = T(1);
  return 0 <= index && index < problem.columns;
}

template <class T>
bool fill_packed(const Problem& problem, int64_t row, int64_t first, int64_t length, T* to) {
  const int64_t row_bytes = (problem.columns + 7) / 8;
  const uint8_t* const bytes = static_cast<const uint8_t*>(problem.target.data) + row * row_bytes;
  // Eight labels of a byte at once: a copy of it in each byte of a word, of which bit k is kept in byte k, and moved to
  // the lowest bit.
  uint8_t labels[kBlock + 16];
  const int64_t first_byte = first / 8;
  const int64_t end_byte = (first + length + 7) / 8;
  for (int64_t n = first_byte; n < end_byte; ++n) {
    const uint64_t bits = bytes[n] * uint64_t(0x0101010101010101) & uint64_t(0x8040201008040201);
    const uint64_t word = (bits + uint64_t(0x7f7f7f7f7f7f7f7f)) >> 7 & uint64_t(0x0101010101010101);
    std::memcpy(labels + 8 * (n - first_byte), &word, 8);  // the first label in the first byte: little-endian
  }
  const uint8_t* const from = labels + first % 8;
  for (int64_t i = 0; i < length; ++i) to[i] = T(from[i]);
  // The bits behind the last column are 0.
  return problem.columns % 8 == 0 || bytes[row_bytes - 1] >> problem.columns % 8 == 0;
}

template <class T>
bool fill_index_list(const Problem& problem, int64_t row, int64_t first, int64_t length, T* to) {
  const int64_t* const list = static_cast<const int64_t*>(problem.target.data) + row * problem.list_length;
  fill(to, length, T(0));
  bool is_good = true;
  if (first == 0) {  // once for each row
    int64_t wrong = 0;
    for (int64_t k = 0; k < problem.list_length; ++k) wrong |= list[k] < -1 || list[k] >= problem.columns ? 1 : 0;
    is_good = wrong == 0;
  }
  // Indices elsewhere in the row are written aside: a branch would be guessed wrong.
  T aside = T(0);
  bool is_again = false;
  for (int64_t k = 0; k < problem.list_length; ++k) {
    const uint64_t place = uint64_t(list[k]) - uint64_t(first);
    T* const target = place < uint64_t(length) ? to + place : &aside;
    is_again |= *target != T(0);
    *target = T(1);
    aside = T(0);
  }
  return is_good && !is_again;
}

// The first of the ascending numbers [begin, end) that is not below `value`.
inline const int64_t* first_not_below(const int64_t* begin, const int64_t* end, int64_t value) {
  while (begin < end) {
    const int64_t* const middle = begin + (end - begin) / 2;
    *middle < value ? begin = middle + 1 : end = middle;
  }
  return begin;
}

template <class T>
bool fill_csr(const Problem& problem, int64_t row, int64_t first, int64_t length, T* to) {
  fill(to, length, T(0));
  const int64_t begin = problem.row_begins[row];
  const int64_t end = problem.row_begins[row + 1];
  const int64_t rows = problem.numel / problem.columns;
  const bool is_whole = (row > 0 || begin == 0) && (row + 1 < rows || end == problem.values);
  if (begin < 0 || end < begin || end > problem.values || !is_whole) return false;
  const int64_t* const columns = problem.value_columns;
  if (first == 0) {  // each row is checked once: its columns are those of the logits and ascend
    for (int64_t k = begin; k < end; ++k) {
      const int64_t least = k == begin ? 0 : columns[k - 1] + 1;
      if (columns[k] < least || columns[k] >= problem.columns) return false;
    }
  }
  const int64_t* from = first_not_below(columns + begin, columns + end, first);
  visit(problem.target.dtype, [&](auto tag) {
    const auto* const values = static_cast<const decltype(tag)*>(problem.target.data);
    for (; from < columns + end && *from < first + length; ++from) {
      if (*from >= first) to[*from - first] = load_as<T>(values[from - columns]);  // unless they do not ascend
    }
  });
  return true;
}

// Targets [begin, begin + count) of a problem as an array of T, which may be `buffer`. `all_good` becomes false where
// an index is wrong, or with `checks_labels` where a dense integer is no label.
template <class T>
const T*
gather_target(const Problem& problem, int64_t begin, int64_t count, T* buffer, bool* all_good, bool checks_labels) {
  if (problem.format == TargetFormat::Dense) {
    return gather(problem, problem.target, begin, count, buffer, checks_labels ? all_good : nullptr);
  }
  const auto fill_by = [&](auto fill_row) {
    return fill_rows(problem, begin, count, buffer, [&](int64_t row, int64_t first, int64_t length, T* to) {
      return fill_row(problem, row, first, length, to);
    });
  };
  bool are_good = true;
  switch (problem.format) {
    case TargetFormat::ClassIndex: are_good = fill_by(fill_class_index<T>); break;
    case TargetFormat::Packed: are_good = fill_by(fill_packed<T>); break;
    case TargetFormat::IndexList: are_good = fill_by(fill_index_list<T>); break;
    default: are_good = fill_by(fill_csr<T>);
  }
  if (!are_good) *all_good = false;
  return buffer;
}

// Whether those of the targets that count are what check_target asks for, or labels if they are integers. `counts` is
// that of find_counted(); null: all count.
template <class T>
bool are_valid(const Problem& problem, int64_t count, const T* target, const typename Constants<T>::Bits* counts) {
  using Bits = typename Constants<T>::Bits;
  Bits wrong = 0;  // not a bool, see has_nan()
  if (is_integer(problem.target.dtype)) {
    for (int64_t i = 0; i < count; ++i) {
      wrong |= target[i] == T(0) || target[i] == T(1) ? 0 : counts ? counts[i] : Bits(1);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      wrong |= target[i] >= T(0) && target[i] <= T(1) ? 0 : counts ? counts[i] : Bits(1);
    }
  }
  return wrong == 0;
}

// The targets as the formula gets them, in `buffer` where an option changes them. It may hold them already. `prior` may
// be null.
template <class T>
const T* change_target(const Options& options, int64_t count, const T* target, const T* prior, T* buffer) {
  if (options.label_smoothing != 0.0) {
    if (prior) {
      for (int64_t i = 0; i < count; ++i) buffer[i] = smoothed_target(options, target[i], prior[i]);
    } else {
      for (int64_t i = 0; i < count; ++i) buffer[i] = smoothed_target(options, target[i]);
    }
    target = buffer;
  }
  if (options.has_threshold) {
    for (int64_t i = 0; i < count; ++i) buffer[i] = binary_target(options, target[i]);
    target = buffer;
  }
  return target;
}

// Calls `action(i, counts)` for each of the elements [begin, begin + count), whose targets are in `target`. `counts`
// says whether the element counts; it is is_ignored() and the mask, with all that is the same for every element outside
// the loop. `buffer` is for the mask.
template <class T, class Action>
FUSED_SCE_INLINE void for_each_that_counts(
    const Problem& problem,
    int64_t begin,
    int64_t count,
    const T* target,
    T* buffer,
    const Action& action) {
  const T ignored = problem.options.has_ignore_value ? T(problem.options.ignore_value) : T(0);
  const bool takes_nan = ignored != ignored;
  const auto loop = [&](auto is_kept) {
    for (int64_t i = 0; i < count; ++i) action(i, is_kept(i));
  };
  const auto by_value = [&](auto is_kept) {
    if (!problem.options.has_ignore_value) {
      loop(is_kept);
    } else if (takes_nan) {
      loop([=](int64_t i) { return is_kept(i) & (target[i] == target[i]); });
    } else {
      loop([=](int64_t i) { return is_kept(i) & !(target[i] == ignored); });
    }
  };
  if (!problem.mask) return by_value([](int64_t) { return true; });
  const T* const mask = gather(problem, problem.mask, begin, count, buffer);
  by_value([=](int64_t i) { return mask[i] != T(0); });
}

// Finds which of the elements count; `buffer` is for the mask.
template <class T>
void find_counted(
    const Problem& problem,
    int64_t begin,
    int64_t count,
    const T* target,
    T* buffer,
    typename Constants<T>::Bits* found) {
  using Bits = typename Constants<T>::Bits;
  for_each_that_counts(
      problem, begin, count, target, buffer, [&](int64_t i, bool counts) { found[i] = counts ? ~Bits(0) : Bits(0); });
}
