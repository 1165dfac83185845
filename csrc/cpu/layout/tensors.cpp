#include "cpu/layout/tensors.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <new>

#include "common/shim_check.h"

namespace afm::cpu {

namespace {

int32_t code_of(torch::headeronly::ScalarType type) {
  using torch::headeronly::ScalarType;
  static const int32_t kFloat = aoti_torch_dtype_float32(), kDouble = aoti_torch_dtype_float64();
  static const int32_t kHalf = aoti_torch_dtype_float16(), kBFloat16 = aoti_torch_dtype_bfloat16();
  switch (type) {
    case ScalarType::Double:
      return kDouble;
    case ScalarType::Half:
      return kHalf;
    case ScalarType::BFloat16:
      return kBFloat16;
    default:
      return kFloat;
  }
}

Tensor empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype) {
  static const int32_t kCpu = aoti_torch_device_type_cpu();
  AtenTensorHandle handle;
  AFM_SHIM_CHECK(aoti_torch_empty_strided(dims, sizes, strides, dtype, kCpu, 0, &handle));
  return Tensor(handle);
}

// A thread's scratch memory outlives the call, since fresh pages cost more than the work on a small
// batch.
struct KeptScratch {
  void* data = nullptr;
  int64_t bytes = 0;
  bool in_use = false;
  ~KeptScratch() { std::free(data); }
};
thread_local KeptScratch kept;

constexpr int64_t kMostKept = 8 << 20;
constexpr int64_t kAlignment = 64;

void* allocate(int64_t bytes) {
  void* data = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  if (data == nullptr) throw std::bad_alloc();
  return data;
}

}  // namespace

DType dtype_of(const Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      STD_TORCH_CHECK(false, "a tensor must be float16, bfloat16, float32 or float64");
  }
}

Layout::Layout(const Tensor& tensor) {
  dims = static_cast<int>(tensor.dim());
  numel = tensor.numel();
  int64_t* data;
  AFM_SHIM_CHECK(aoti_torch_get_sizes(tensor.get(), &data));
  sizes = data;
  AFM_SHIM_CHECK(aoti_torch_get_strides(tensor.get(), &data));
  strides = data;
}

bool Layout::is_dense() const {
  int order[RowsOf::kMaxDims];
  int count = 0;
  for (int d = 0; d < dims; ++d)
    if (sizes[d] != 1) order[count++] = d;
  std::sort(order, order + count, [this](int a, int b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  for (int i = 0; i < count; ++i) {
    if (strides[order[i]] != expected) return false;
    expected *= sizes[order[i]];
  }
  return true;
}

bool is_like(const Tensor& tensor, const Tensor& other) {
  const Layout a(tensor), b(other);
  return dtype_of(tensor) == dtype_of(other) && a.dims == b.dims &&
         std::equal(a.sizes, a.sizes + a.dims, b.sizes);
}

bool is_expanded(const Tensor& tensor) {
  const Layout layout(tensor);
  for (int d = 0; d < layout.dims; ++d)
    if (layout.strides[d] == 0 && layout.sizes[d] > 1) return true;
  return false;
}

namespace {

struct AddressRange {
  uintptr_t begin, end;

  explicit AddressRange(const Tensor& tensor)
      : begin(reinterpret_cast<uintptr_t>(tensor.data_ptr())), end(begin) {
    const Layout layout(tensor);
    if (layout.numel == 0) return;
    int64_t last = 0;
    for (int d = 0; d < layout.dims; ++d) last += (layout.sizes[d] - 1) * layout.strides[d];
    end += static_cast<uintptr_t>((last + 1) * tensor.element_size());
  }
};

}  // namespace

bool overlap(const Tensor& a, const Tensor& b) {
  const AddressRange x(a), y(b);
  return x.begin < y.end && y.begin < x.end;
}

bool are_one_view(const Tensor& a, const Tensor& b) {
  const Layout x(a), y(b);
  return a.data_ptr() == b.data_ptr() && dtype_of(a) == dtype_of(b) &&
         std::equal(x.strides, x.strides + x.dims, y.strides);
}

void RowsBuilder::add(const Tensor& tensor, const int64_t* strides, RowsOf& target) {
  target.data = tensor.data_ptr();
  target.dtype = dtype_of(tensor);
  const int row_dims = layout_.dims - 1;
  target.class_stride = layout_.sizes[row_dims] == 1 ? 1 : strides[row_dims];
  for (int d = 0; d < row_dims; ++d) target.row_strides[d] = strides[d];
  targets_[count_++] = &target;
}

void RowsBuilder::finish(RowShape& shape) {
  int dims = 0;  // of what is merged so far
  for (int d = 0; d < layout_.dims - 1; ++d) {
    const int64_t size = layout_.sizes[d];
    if (size == 1) continue;
    bool merges = dims > 0;
    for (int i = 0; merges && i < count_; ++i)
      merges = targets_[i]->row_strides[dims - 1] == targets_[i]->row_strides[d] * size;
    if (!merges) shape.sizes[dims++] = 1;
    shape.sizes[dims - 1] *= size;
    for (int i = 0; i < count_; ++i)
      targets_[i]->row_strides[dims - 1] = targets_[i]->row_strides[d];
  }
  if (dims == 0) {
    shape.sizes[dims++] = 1;
    for (int i = 0; i < count_; ++i) targets_[i]->row_strides[0] = 0;
  }
  shape.dims = dims;
}

Tensor empty_like(const Tensor& tensor, const Layout& layout) {
  if (!layout.is_dense()) return torch::stable::empty_like(tensor);
  return empty_strided(layout.dims, layout.sizes, layout.strides, code_of(tensor.scalar_type()));
}

Tensor empty(int64_t dims, const int64_t* sizes, bool is_double) {
  int64_t strides[RowsOf::kMaxDims];
  int64_t stride = 1;
  for (int64_t d = dims - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= std::max<int64_t>(sizes[d], 1);
  }
  using torch::headeronly::ScalarType;
  return empty_strided(dims, sizes, strides,
                       code_of(is_double ? ScalarType::Double : ScalarType::Float));
}

Tensor empty_channels_last(const int64_t (&sizes)[4]) {
  const int64_t strides[4] = {sizes[1] * sizes[2] * sizes[3], 1, sizes[1] * sizes[3], sizes[1]};
  return empty_strided(4, sizes, strides, code_of(torch::headeronly::ScalarType::Float));
}

Tensor nothing_like(const Tensor& tensor) {
  const int64_t size = 0, stride = 1;
  return empty_strided(1, &size, &stride, code_of(tensor.scalar_type()));
}

Scratch::Scratch(int64_t bytes) : owned_(kept.in_use || bytes > kMostKept) {
  if (owned_) {
    data_ = allocate(bytes);
    return;
  }
  if (kept.bytes < bytes) {
    std::free(kept.data);
    kept.data = nullptr, kept.bytes = 0;
    kept.data = allocate(bytes);
    kept.bytes = bytes;
  }
  kept.in_use = true;
  data_ = kept.data;
}

Scratch::~Scratch() {
  if (owned_)
    std::free(data_);
  else
    kept.in_use = false;
}

}  // namespace afm::cpu
