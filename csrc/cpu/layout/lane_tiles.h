// Moves short rows of logits between memory and lanes: class j of Vec<T>::width rows is one vector.
//
// Note [Rows across lanes]
// ~~~~~~~~~~~~~~~~~~~~~~~~
// A row of ten or nineteen classes leaves most of a vector idle, and what is done once a row (seven
// reductions across a vector, two logarithms, three divisions) costs more than what is done once a
// class. With a row in each lane nothing is reduced across a vector, every lane works, and a
// logarithm serves all rows at once. What it takes is a transposed tile, in the first-level cache:
//
//   * rows of adjacent classes: matrices of 4 x 4 lanes are transposed in registers. Two shuffles a
//     vector; 16-bit classes travel in pairs, so that they take one.
//   * rows side by side, as pixels of contiguous (N, C, H, W) logits: a class is a vector already.
//   * anything else, element by element.
//
// The last block of a call may have fewer rows than lanes: the idle lanes repeat a row, and are not
// stored.

#pragma once

#include "cpu/layout/row_tiles.h"

namespace afm::cpu::AFM_CAPABILITY {
namespace {

template <DType dtype>
AFM_INLINE Vec<float> load_class(const char* p) {
  if constexpr (dtype == DType::kBFloat16)
    return load_bfloat16(reinterpret_cast<const BFloat16*>(p));
  else if constexpr (dtype == DType::kFloat16)
    return load_float16(reinterpret_cast<const Float16*>(p));
  else
    return Vec<float>::load(reinterpret_cast<const float*>(p));
}

template <DType dtype>
AFM_INLINE void store_class(Vec<float> x, char* p) {
  if constexpr (dtype == DType::kBFloat16)
    store_bfloat16(x, reinterpret_cast<BFloat16*>(p));
  else if constexpr (dtype == DType::kFloat16)
    store_float16(x, reinterpret_cast<Float16*>(p));
  else
    x.store(reinterpret_cast<float*>(p));
}

// Classes in 16 bytes of a row.
template <DType dtype>
constexpr int64_t kGroup = dtype == DType::kFloat32 ? 4 : 8;

// Calls f(first class) for groups that cover the row; the last one may overlap its neighbour.
template <DType dtype, class F>
AFM_INLINE void for_groups(int64_t classes, const F& f) {
  const int64_t last = classes - kGroup<dtype>;
  for (int64_t j = 0; j < last; j += kGroup<dtype>) f(j);
  f(last);
}

template <DType dtype>
static __attribute__((noinline)) void rows_to_lanes(const char* const* rows, int64_t classes,
                                                    float* tile) {
  constexpr int kLanes = Vec<float>::width;
  for_groups<dtype>(classes, [&](int64_t j) AFM_LAMBDA_INLINE {
    Vec<float> x[4];
    for (int i = 0; i < 4; ++i) x[i] = load_parts(rows + i, j * element_size(dtype));
    transpose_parts(x);
    float* to = tile + j * kLanes;
    for (int i = 0; i < 4; ++i) {
      if constexpr (dtype == DType::kFloat32) {
        x[i].store(to + i * kLanes);
      } else {
        Vec<float> first, second;
        if constexpr (dtype == DType::kBFloat16)
          unpack_bfloat16(x[i], first, second);
        else
          unpack_float16(x[i], first, second);
        first.store(to + 2 * i * kLanes), second.store(to + (2 * i + 1) * kLanes);
      }
    }
  });
}

template <DType dtype>
static __attribute__((noinline)) void lanes_to_rows(const float* tile, int64_t classes,
                                                    char* const* rows) {
  constexpr int kLanes = Vec<float>::width;
  for_groups<dtype>(classes, [&](int64_t j) AFM_LAMBDA_INLINE {
    const float* from = tile + j * kLanes;
    Vec<float> x[4];
    for (int i = 0; i < 4; ++i) {
      if constexpr (dtype == DType::kFloat32) {
        x[i] = Vec<float>::load(from + i * kLanes);
      } else {
        const Vec<float> first = Vec<float>::load(from + 2 * i * kLanes),
                         second = Vec<float>::load(from + (2 * i + 1) * kLanes);
        x[i] =
            dtype == DType::kBFloat16 ? pack_bfloat16(first, second) : pack_float16(first, second);
      }
    }
    transpose_parts(x);
    for (int i = 0; i < 4; ++i) store_parts(x[i], rows + i, j * element_size(dtype));
  });
}

// How many blocks of Vec::width rows are moved at a time: where rows are side by side, a class is
// then several lines of memory in a row. All tiles together stay within a first-level cache.
constexpr int kMostLaneBlocks = 4;
constexpr int lane_blocks(int64_t classes) {
  return classes <= 24 ? kMostLaneBlocks : classes <= 64 ? 2 : 1;
}

// One tensor's part in a few blocks of rows.
template <class T>
struct LaneRows {
  static constexpr int kLanes = Vec<T>::width, kMostRows = kMostLaneBlocks * kLanes;
  const RowsOf& tensor;
  const int64_t classes;
  const bool stream;      // whether what is stored is not worth keeping in the caches
  char* rows[kMostRows];  // where each row begins
  int count = 0;
  bool side_by_side = false, dense = false;

  LaneRows(const RowsOf& rows_of, int64_t num_classes, bool streamed = false)
      : tensor(rows_of), classes(num_classes), stream(streamed) {}

  // The present row of `cursor` and its successors, `n` in all; `adjacent`: they differ in the
  // innermost dimension alone.
  void locate(const RowCursor& cursor, int n, bool adjacent) {
    count = n, side_by_side = dense = false;
    if (tensor.data == nullptr) return;
    if (adjacent) {
      const int64_t stride = tensor.row_strides[cursor.shape.dims - 1];
      char* first = cursor.row_of(tensor).data;
      for (int r = 0; r < n; ++r) rows[r] = first + r * stride * element_size(tensor.dtype);
      side_by_side = stride == 1 && tensor.class_stride != 1;
      dense = stride == classes && tensor.class_stride == 1;
    } else {
      RowCursor at = cursor;
      for (int r = 0; r < n; ++r, at.next()) rows[r] = at.row_of(tensor).data;
    }
  }

  // All rows to `tile`, block by block. `line`: room for a row.
  void load(T* tile, T* line) {
    if (tensor.data == nullptr) return;
    if constexpr (sizeof(T) == 4) {
      if (tensor.dtype == DType::kFloat32) return load_as<DType::kFloat32>(tile, line);
      if (tensor.dtype == DType::kFloat16) return load_as<DType::kFloat16>(tile, line);
      if (tensor.dtype == DType::kBFloat16) return load_as<DType::kBFloat16>(tile, line);
    }
    for (int r = 0; r < count; r += kLanes) load_one_by_one(r, tile, line);
  }

  // All rows from `tile`. `stage`: room for as many rows, aligned to a cache line.
  void store(const T* tile, T* stage) {
    if (tensor.data == nullptr) return;
    if constexpr (sizeof(T) == 4) {
      if (tensor.dtype == DType::kFloat32) return store_as<DType::kFloat32>(tile, stage);
      if (tensor.dtype == DType::kFloat16) return store_as<DType::kFloat16>(tile, stage);
      if (tensor.dtype == DType::kBFloat16) return store_as<DType::kBFloat16>(tile, stage);
    }
    for (int r = 0; r < count; r += kLanes) store_one_by_one(r, tile, stage);
  }

 private:
  int whole_blocks() const { return count / kLanes * kLanes; }

  void load_one_by_one(int begin, T* tile, T* line) const {
    tile += begin * classes;
    for (int r = 0; r < kLanes; ++r) {
      char* data = rows[begin + r < count ? begin + r : begin];
      const T* from = RowPointer{data, tensor.dtype, tensor.class_stride}.read(0, classes, line);
      for (int64_t j = 0; j < classes; ++j) tile[j * kLanes + r] = from[j];
    }
  }

  void store_one_by_one(int begin, const T* tile, T* line) const {
    tile += begin * classes;
    for (int r = begin; r < count && r < begin + kLanes; ++r) {
      const RowPointer row = {rows[r], tensor.dtype, tensor.class_stride};
      T* to = row.writable(0, line);
      for (int64_t j = 0; j < classes; ++j) to[j] = tile[j * kLanes + r - begin];
      row.write(0, classes, to);
    }
  }

  template <DType dtype>
  void load_as(float* tile, float* line) {
    const int whole = whole_blocks();
    if (side_by_side) {
      const int64_t step = tensor.class_stride * element_size(dtype);
      for (int64_t j = 0; j < classes; ++j)
        for (int r = 0; r < whole; r += kLanes)
          load_class<dtype>(rows[r] + j * step).store(tile + r * classes + j * kLanes);
      if (whole < count) load_one_by_one(whole, tile, line);
    } else if (tensor.class_stride == 1 && classes >= kGroup<dtype>) {
      for (int r = count; r % kLanes != 0; ++r) rows[r] = rows[0];
      for (int r = 0; r < count; r += kLanes)
        rows_to_lanes<dtype>(rows + r, classes, tile + r * classes);
    } else {
      for (int r = 0; r < count; r += kLanes) load_one_by_one(r, tile, line);
    }
  }

  template <DType dtype>
  void store_as(const float* tile, float* stage) {
    const int whole = whole_blocks();
    if (side_by_side) {
      const int64_t step = tensor.class_stride * element_size(dtype);
      for (int64_t j = 0; j < classes; ++j)
        for (int r = 0; r < whole; r += kLanes)
          store_class<dtype>(Vec<float>::load(tile + r * classes + j * kLanes), rows[r] + j * step);
      if (whole < count) store_one_by_one(whole, tile, stage);
    } else if (tensor.class_stride == 1 && classes >= kGroup<dtype>) {
      const int64_t bytes = classes * element_size(dtype);
      const bool staged = stream && dense && whole == count && can_stream(rows[0], count * bytes);
      char *const first = rows[0], *const staging = reinterpret_cast<char*>(stage);
      for (int r = 0; r < count && staged; ++r) rows[r] = staging + r * bytes;
      for (int r = count; r % kLanes != 0; ++r) rows[r] = staging;
      for (int r = 0; r < count; r += kLanes)
        lanes_to_rows<dtype>(tile + r * classes, classes, rows + r);
      if (staged) stream_lines(first, staging, count * bytes);
    } else {
      for (int r = 0; r < count; r += kLanes) store_one_by_one(r, tile, stage);
    }
  }
};

// A tensor of a call, and the tile its rows pass through: room for lane_blocks(classes) blocks.
template <class T>
struct LaneSlot {
  LaneRows<T> rows;
  T* tile;
  bool is_output;
};

// Calls run(i, count, offset) for rows [begin, end), a block of up to Vec<T>::width rows at a time:
// rows [i, i + count) lie in the tiles from element `offset` on. `stage`: room for a tile, aligned
// to a cache line.
template <class T, int kSlots, class F>
AFM_INLINE void for_lane_blocks(const RowShape& shape, int64_t classes,
                                LaneSlot<T> (&slots)[kSlots], T* stage, int64_t begin, int64_t end,
                                const F& run) {
  constexpr int kLanes = Vec<T>::width;
  const int64_t most = lane_blocks(classes) * kLanes;
  RowCursor cursor(shape, begin);
  for (int64_t i = begin; i < end;) {
    int64_t count = most - i % most;  // visits begin at the same rows in every thread
    count = count < end - i ? count : end - i;
    const bool adjacent = cursor.run() >= count;
    for (LaneSlot<T>& slot : slots) slot.rows.locate(cursor, static_cast<int>(count), adjacent);
    cursor.skip(count, adjacent);
    for (LaneSlot<T>& slot : slots)
      if (!slot.is_output) slot.rows.load(slot.tile, stage);
    for (int64_t r = 0; r < count; r += kLanes)
      run(i + r, static_cast<int>(count - r < kLanes ? count - r : kLanes), r * classes);
    for (LaneSlot<T>& slot : slots)
      if (slot.is_output) slot.rows.store(slot.tile, stage);
    i += count;
  }
  end_of_streams();
}

// Row r of a block of tiles; absent where it is not wanted.
template <class T>
AFM_INLINE RowPointer lane_of(const T* tile, int r, bool is_wanted = true) {
  char* data = reinterpret_cast<char*>(const_cast<T*>(tile) + r);
  return {is_wanted ? data : nullptr, kNative<T>, Vec<T>::width};
}

}  // namespace
}  // namespace afm::cpu::AFM_CAPABILITY
