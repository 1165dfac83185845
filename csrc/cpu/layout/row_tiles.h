// Moves rows of logits between memory (any dtype, any strides) and tiles of the kernel's arithmetic
// type.
//
// A tile is a stretch of one row, short enough to stay in the first-level cache. Where the row
// already is what the arithmetic wants (its dtype, class stride 1) the tile is the row itself, and
// nothing is copied.

#pragma once

#include "cpu/vec/half.h"
#include "cpu/layout/rows.h"
#include "cpu/vec/vec.h"

namespace afm::cpu::AFM_CAPABILITY {
namespace {

template <DType dtype>
struct Element;
template <>
struct Element<DType::kFloat32> {
  using Stored = float;
  static AFM_MEMBER float load(const float* p) { return *p; }
  static AFM_MEMBER void store(float* p, float x) { *p = x; }
};
template <>
struct Element<DType::kFloat64> {
  using Stored = double;
  static AFM_MEMBER double load(const double* p) { return *p; }
  static AFM_MEMBER void store(double* p, double x) { *p = x; }
};
template <>
struct Element<DType::kFloat16> {
  using Stored = uint16_t;
  static AFM_MEMBER float load(const uint16_t* p) { return from_float16(*p); }
  static AFM_MEMBER void store(uint16_t* p, float x) { *p = to_float16(x); }
};
template <>
struct Element<DType::kBFloat16> {
  using Stored = uint16_t;
  static AFM_MEMBER float load(const uint16_t* p) { return from_bfloat16(*p); }
  static AFM_MEMBER void store(uint16_t* p, float x) { *p = to_bfloat16(x); }
};

// The compiler vectorises these where the stride is 1; float16 has its own instructions.
template <DType dtype, class T>
static __attribute__((noinline)) void gather(const void* data, int64_t stride, int64_t n, T* tile) {
  using E = Element<dtype>;
  const auto* from = static_cast<const typename E::Stored*>(data);
  int64_t i = 0;
  if (stride == 1) {
#if AFM_CAPABILITY_AVX512
    if constexpr (dtype == DType::kFloat16 && sizeof(T) == 4)
      for (; i + 16 <= n; i += 16)
        _mm512_storeu_ps(
            tile + i, _mm512_maskz_cvtph_ps(
                          0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i))));
#elif AFM_CAPABILITY_AVX2
    if constexpr (dtype == DType::kFloat16 && sizeof(T) == 4)
      for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(
            tile + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
    for (; i < n; ++i) tile[i] = static_cast<T>(E::load(from + i));
  } else {
    for (; i < n; ++i) tile[i] = static_cast<T>(E::load(from + i * stride));
  }
}

template <DType dtype, class T>
static __attribute__((noinline)) void scatter(const T* tile, int64_t n, void* data,
                                              int64_t stride) {
  using E = Element<dtype>;
  auto* to = static_cast<typename E::Stored*>(data);
  int64_t i = 0;
  if (stride == 1) {
#if AFM_CAPABILITY_AVX512
    if constexpr (dtype == DType::kFloat16 && sizeof(T) == 4)
      for (; i + 16 <= n; i += 16)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i),
                            _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(tile + i),
                                                  _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif AFM_CAPABILITY_AVX2
    if constexpr (dtype == DType::kFloat16 && sizeof(T) == 4)
      for (; i + 8 <= n; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(tile + i),
                                         _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
    for (; i < n; ++i) E::store(to + i, tile[i]);
  } else {
    for (; i < n; ++i) E::store(to + i * stride, tile[i]);
  }
}

constexpr int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

template <class T>
constexpr DType kNative = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;

// One row of a tensor; null where the tensor is absent.
struct RowPointer {
  char* data;
  DType dtype;
  int64_t stride;

  AFM_MEMBER char* at(int64_t j) const { return data + j * stride * element_size(dtype); }

  AFM_MEMBER RowPointer at_class(int64_t j) const { return {at(j), dtype, stride}; }

  template <class T>
  AFM_MEMBER bool is_native() const {
    return dtype == kNative<T> && stride == 1;
  }

  // Classes [j, j + n) as T: in place, or copied to `buffer`.
  template <class T>
  AFM_MEMBER const T* read(int64_t j, int64_t n, T* buffer) const {
    if (is_native<T>()) return reinterpret_cast<const T*>(data) + j;
    switch (dtype) {
      case DType::kFloat32:
        gather<DType::kFloat32>(at(j), stride, n, buffer);
        break;
      case DType::kFloat64:
        gather<DType::kFloat64>(at(j), stride, n, buffer);
        break;
      case DType::kFloat16:
        gather<DType::kFloat16>(at(j), stride, n, buffer);
        break;
      case DType::kBFloat16:
        gather<DType::kBFloat16>(at(j), stride, n, buffer);
        break;
    }
    return buffer;
  }

  // Where classes from j on are to be written: in place, or to `buffer`, for write() to pass on.
  template <class T>
  AFM_MEMBER T* writable(int64_t j, T* buffer) const {
    return is_native<T>() ? reinterpret_cast<T*>(data) + j : buffer;
  }

  template <class T>
  AFM_MEMBER void write(int64_t j, int64_t n, const T* buffer) const {
    if (is_native<T>()) return;
    switch (dtype) {
      case DType::kFloat32:
        scatter<DType::kFloat32>(buffer, n, at(j), stride);
        break;
      case DType::kFloat64:
        scatter<DType::kFloat64>(buffer, n, at(j), stride);
        break;
      case DType::kFloat16:
        scatter<DType::kFloat16>(buffer, n, at(j), stride);
        break;
      case DType::kBFloat16:
        scatter<DType::kBFloat16>(buffer, n, at(j), stride);
        break;
    }
  }

  // One class.
  template <class T>
  AFM_MEMBER void put(int64_t j, T value) const {
    T buffer;
    const RowPointer one = at_class(j);
    *one.template writable<T>(0, &buffer) = value;
    one.template write<T>(0, 1, &buffer);
  }
};

// Walks over the rows of a call, from any row on, and knows where each tensor has the present one.
struct RowCursor {
  const RowShape& shape;
  int64_t index[RowsOf::kMaxDims];

  RowCursor(const RowShape& row_shape, int64_t row) : shape(row_shape) {
    for (int d = shape.dims - 1; d >= 0; --d) {
      index[d] = row % shape.sizes[d];
      row /= shape.sizes[d];
    }
  }

  AFM_MEMBER RowPointer row_of(const RowsOf& tensor) const {
    if (tensor.data == nullptr) return {nullptr, tensor.dtype, 1};
    int64_t offset = 0;
    for (int d = 0; d < shape.dims; ++d) offset += index[d] * tensor.row_strides[d];
    return {static_cast<char*>(tensor.data) + offset * element_size(tensor.dtype), tensor.dtype,
            tensor.class_stride};
  }

  // Rows from the present one on that differ in the innermost dimension alone.
  AFM_MEMBER int64_t run() const { return shape.sizes[shape.dims - 1] - index[shape.dims - 1]; }

  // Over `count` rows; `adjacent`: run() is no less.
  AFM_MEMBER void skip(int64_t count, bool adjacent) {
    if (adjacent) index[shape.dims - 1] += count - 1, count = 1;
    for (int64_t i = 0; i < count; ++i) next();
  }

  AFM_MEMBER void next() {
    for (int d = shape.dims - 1; d >= 0; --d) {
      if (++index[d] < shape.sizes[d] || d == 0) return;
      index[d] = 0;
    }
  }
};

// Note [Strided classes]
// ~~~~~~~~~~~~~~~~~~~~~~
// Where the classes of a row lie apart but rows lie side by side, as in contiguous (N, C, H, W)
// logits, a row touches a cache line for each class, and lines a power of two apart fight for the
// same places of every cache. So kBlockRows rows are transposed at a time: whole lines are read,
// and written, once.

// A tensor of a call, and where its worker looks for the row it is to work on; of an input also for
// the row after it, which is null at the end of a block.
struct RowSlot {
  const RowsOf& tensor;
  RowPointer& row;
  RowPointer* next;
  bool is_output;
};

// One tensor's part in a block of rows: a transposed copy, where the tensor is strided so.
template <class T>
struct RowBlock {
  T* rows = nullptr;  // kBlockRows * classes; null: the rows are taken where they lie
  RowPointer first;   // row 0 of the block, in the tensor

  static bool is_needed(const RowsOf& tensor, const RowShape& shape) {
    return tensor.data != nullptr && tensor.class_stride != 1 &&
           tensor.row_strides[shape.dims - 1] == 1;
  }

  void load(int64_t classes, int64_t count) const {
    T line[kBlockRows];
    for (int64_t j = 0; j < classes; ++j) {
      const RowPointer across = {first.at(j), first.dtype, 1};
      const T* values = across.template read<T>(0, count, line);
      for (int64_t r = 0; r < count; ++r) rows[r * classes + j] = values[r];
    }
  }

  RowPointer row(int64_t r, int64_t classes, int64_t row_stride) const {
    if (first.data == nullptr) return first;
    if (rows == nullptr)
      return {first.data + r * row_stride * element_size(first.dtype), first.dtype, first.stride};
    return {reinterpret_cast<char*>(rows + r * classes), kNative<T>, 1};
  }

  void store(int64_t classes, int64_t count) const {
    T line[kBlockRows];
    for (int64_t j = 0; j < classes; ++j) {
      const RowPointer across = {first.at(j), first.dtype, 1};
      T* values = across.template writable<T>(0, line);
      for (int64_t r = 0; r < count; ++r) values[r] = rows[r * classes + j];
      across.template write<T>(0, count, values);
    }
  }
};

// Calls run(i) for rows [begin, end), with every slot's row in place. `scratch`:
// block_scratch(...).
template <class T, int kSlots, class F>
AFM_INLINE void for_rows(const RowShape& shape, int64_t classes, const RowSlot (&slots)[kSlots],
                         T* scratch, int64_t begin, int64_t end, const F& run) {
  const int last = shape.dims - 1;
  RowBlock<T> blocks[kSlots];
  bool blocked = false;
  for (int k = 0; k < kSlots; ++k) {
    if (block_scratch(classes, 1) == 0 || !RowBlock<T>::is_needed(slots[k].tensor, shape)) continue;
    blocks[k].rows = scratch + k * kBlockRows * classes;
    blocked = true;
  }
  RowCursor cursor(shape, begin);
  for (int64_t i = begin; i < end;) {
    int64_t count = cursor.run();
    count = !blocked || count < kBlockRows ? count : kBlockRows;
    count = count < end - i ? count : end - i;
    for (int k = 0; k < kSlots; ++k) {
      blocks[k].first = cursor.row_of(slots[k].tensor);
      if (blocks[k].rows != nullptr && !slots[k].is_output) blocks[k].load(classes, count);
    }
    const auto row = [&](int k, int64_t r) AFM_LAMBDA_INLINE {
      return blocks[k].row(r, classes, slots[k].tensor.row_strides[last]);
    };
    for (int64_t r = 0; r < count; ++r, ++i) {
      for (int k = 0; k < kSlots; ++k) {
        slots[k].row = row(k, r);
        if (slots[k].next != nullptr)
          *slots[k].next = r + 1 < count ? row(k, r + 1) : RowPointer{nullptr, DType::kFloat32, 1};
      }
      run(i);
    }
    cursor.skip(count, true);
    for (int k = 0; k < kSlots; ++k)
      if (blocks[k].rows != nullptr && slots[k].is_output) blocks[k].store(classes, count);
  }
}

// Makes non-temporal stores visible to other threads.
AFM_INLINE void end_of_streams() {
#if AFM_CAPABILITY_AVX2 || AFM_CAPABILITY_AVX512
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace afm::cpu::AFM_CAPABILITY
