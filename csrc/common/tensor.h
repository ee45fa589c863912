// Tensors of the stable ABI: data pointers, views, and the checks that every op makes of its inputs, outputs and
// indices.

#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

namespace pact_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename T>
T* data_ptr(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// nullptr for a missing tensor.
template <typename T>
T* data_ptr(const std::optional<Tensor>& t) {
  return t.has_value() ? data_ptr<T>(*t) : nullptr;
}

// A matrix [rows, width] for each head, with contiguous rows.
template <typename T>
struct HeadView {
  T* data;
  int64_t head_stride, row_stride;

  T* at(int64_t head, int64_t row) const { return data + head * head_stride + row * row_stride; }
};

// Of t [1, heads, rows, width].
template <typename T>
HeadView<T> head_view(const Tensor& t) {
  return {data_ptr<T>(t), t.stride(1), t.stride(2)};
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "fp32";
    case ScalarType::BFloat16: return "bf16";
    case ScalarType::Long: return "int64";
    case ScalarType::Char: return "int8";
    default: return "another dtype";
  }
}

inline bool is_matrix(const Tensor& t, ScalarType type, int64_t rows, int64_t columns) {
  return t.scalar_type() == type && t.dim() == 2 && t.size(0) == rows && t.size(1) == columns;
}

// [rows, columns] with contiguous rows; the leading dimension may exceed `columns`.
inline void check_rows(const Tensor& t, ScalarType type, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(is_matrix(t, type, rows, columns) && (columns <= 1 || t.stride(1) == 1), "pact_fast: ", name,
                  " must be ", dtype_name(type), " [", rows, ", ", columns, "] with contiguous rows");
}

// [rows, columns], contiguous.
inline void check_matrix(const Tensor& t, ScalarType type, int64_t rows, int64_t columns, const char* name) {
  STD_TORCH_CHECK(is_matrix(t, type, rows, columns) && t.is_contiguous(), "pact_fast: ", name, " must be contiguous ",
                  dtype_name(type), " [", rows, ", ", columns, "]");
}

// [1, heads, rows, head_dim] with contiguous rows.
inline void check_heads(const Tensor& t, ScalarType type, int64_t heads, int64_t rows, int64_t head_dim,
                        const char* name) {
  STD_TORCH_CHECK(t.dim() == 4 && t.scalar_type() == type && t.size(0) == 1 && t.size(1) == heads &&
                      t.size(2) == rows && t.size(3) == head_dim && t.stride(3) == 1,
                  "pact_fast: ", name, " must be ", dtype_name(type), " [1, ", heads, ", ", rows, ", ", head_dim,
                  "] with contiguous rows");
}

// [n], contiguous; a missing tensor passes.
inline void check_vector(const std::optional<Tensor>& t, ScalarType type, int64_t n, const char* name) {
  STD_TORCH_CHECK(
      !t.has_value() || (t->dim() == 1 && t->size(0) == n && t->scalar_type() == type && t->is_contiguous()),
      "pact_fast: ", name, " must be contiguous ", dtype_name(type), " [", n, "]");
}

// An index vector int64 [n] with all entries in [low, high): the kernels read and write at these places.
inline void check_index(const Tensor& t, int64_t n, int64_t low, int64_t high, const char* name) {
  check_vector(t, ScalarType::Long, n, name);
  const int64_t* index = data_ptr<int64_t>(t);
  bool inside = true;
  for (int64_t i = 0; i < n; ++i) inside &= low <= index[i] && index[i] < high;
  if (inside) return;
  int64_t i = 0;
  while (low <= index[i] && index[i] < high) ++i;
  STD_TORCH_CHECK(false, "pact_fast: ", name, "[", i, "] = ", index[i], " is outside [", low, ", ", high, ")");
}

}  // namespace pact_fast
