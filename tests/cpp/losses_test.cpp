// The losses' kernels without PyTorch, for AddressSanitizer and UBSan: every buffer is an
// allocation of its exact size, starts off the alignment that vectors would like, and has gaps
// between its rows that must keep their sentinels. Values are compared with plain double-precision
// formulas. tests/afm_kernels/test_sanitizers.py builds and runs this.
//
//   losses_test portable|avx2|avx512

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/dkl/dkl.h"
#include "cpu/softmax_kl/softmax_kl.h"

using namespace afm;
using namespace afm::cpu;

namespace {

// Rows in a block of exactly as many bytes as they need, `misalign` elements off the allocator's
// alignment. Class stride 0: rows lie side by side, as pixels of (N, C, H, W).
struct Rows {
  DType dtype;
  int64_t rows, classes, row_stride, class_stride;
  std::vector<char> bytes;
  int64_t misalign;

  Rows(DType dtype, int64_t rows, int64_t classes, int64_t row_gap, int64_t class_stride,
       int64_t misalign)
      : dtype(dtype),
        rows(rows),
        classes(classes),
        row_stride(class_stride == 0 ? 1 : classes * class_stride + row_gap),
        class_stride(class_stride == 0 ? rows + row_gap : class_stride),
        bytes(static_cast<size_t>(
                  (misalign + (rows - 1) * row_stride + (classes - 1) * this->class_stride + 1) *
                  bytes_of(dtype)),
              kSentinel),
        misalign(misalign) {
    bytes.shrink_to_fit();
  }

  char* at(int64_t i, int64_t j) {
    return bytes.data() + (misalign + i * row_stride + j * class_stride) * bytes_of(dtype);
  }
  double get(int64_t i, int64_t j) { return decode(at(i, j), dtype); }
  void set(int64_t i, int64_t j, double x) { encode(x, at(i, j), dtype); }

  void view(RowsOf& target) {
    target.data = at(0, 0), target.dtype = dtype, target.class_stride = class_stride;
    target.row_strides[0] = row_stride;
  }

  // Every byte that is no class of any row still holds its sentinel.
  bool gaps_are_whole() {
    std::vector<char> used(bytes.size(), 0);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < classes; ++j)
        for (int64_t b = 0; b < bytes_of(dtype); ++b)
          used[static_cast<size_t>(at(i, j) - bytes.data() + b)] = 1;
    for (size_t k = 0; k < bytes.size(); ++k)
      if (!used[k] && bytes[k] != kSentinel) return false;
    return true;
  }
};

struct Truth {
  double value = 0;
  std::vector<double> by_student, by_teacher;
  // How large the numbers are whose differences these are: their rounding stays, however small a
  // difference comes out. Gradients of a saturated row, or of a student next to its teacher, and
  // the cross-entropy of a row that one class dominates, are such.
  double gradient_terms = 0, value_terms = 0;
};

std::vector<double> softmax(const std::vector<double>& z, double t) {
  double top = -INFINITY, sum = 0;
  for (double x : z) top = std::fmax(top, x);
  std::vector<double> p(z.size());
  for (size_t j = 0; j < z.size(); ++j) sum += p[j] = std::exp((z[j] - top) / t);
  for (double& x : p) x /= sum;
  return p;
}

// Finite logits of moderate size only: plain formulas do.
Truth truth_of(const std::vector<double>& s, const std::vector<double>& t,
               const SoftmaxKlParams& params, int64_t label) {
  const size_t n = s.size();
  const std::vector<double> q = softmax(s, params.temperature), p = softmax(t, params.temperature);
  Truth out;
  out.by_student.assign(n, 0), out.by_teacher.assign(n, 0);
  const auto add_kl = [&](const std::vector<double>& a, const std::vector<double>& b,
                          std::vector<double>& by_a,
                          std::vector<double>& by_b) {  // KL(a || b)
    double kl = 0;
    for (size_t j = 0; j < n; ++j) kl += a[j] * std::log(a[j] / b[j]);
    for (size_t j = 0; j < n; ++j) {
      by_b[j] += (b[j] - a[j]) / params.temperature;
      by_a[j] += a[j] * (std::log(a[j] / b[j]) - kl) / params.temperature;
    }
    out.value += kl;
  };
  if (params.divergence == Divergence::kJs) {
    const double beta = params.beta, gamma = 1 - beta;
    double kl_p = 0, kl_q = 0;
    for (size_t j = 0; j < n; ++j) {
      const double m = beta * p[j] + gamma * q[j];
      kl_p += p[j] * std::log(p[j] / m), kl_q += q[j] * std::log(q[j] / m);
    }
    for (size_t j = 0; j < n; ++j) {
      const double m = beta * p[j] + gamma * q[j];
      out.by_student[j] = gamma * q[j] * (std::log(q[j] / m) - kl_q) / params.temperature;
      out.by_teacher[j] = beta * p[j] * (std::log(p[j] / m) - kl_p) / params.temperature;
    }
    out.value = beta * kl_p + gamma * kl_q;
  } else {
    add_kl(p, q, out.by_teacher, out.by_student);
    if (params.divergence == Divergence::kJeffreys) add_kl(q, p, out.by_student, out.by_teacher);
  }
  for (size_t j = 0; j < n; ++j)
    out.gradient_terms =
        std::fmax(out.gradient_terms, (p[j] + q[j]) * std::fabs(std::log(q[j] / p[j])));
  out.gradient_terms *= params.divergence_weight / params.temperature;
  out.value *= params.divergence_weight;
  for (size_t j = 0; j < n; ++j)
    out.by_student[j] *= params.divergence_weight, out.by_teacher[j] *= params.divergence_weight;
  if (label >= 0) {
    const std::vector<double> q1 = softmax(s, 1);
    const double smooth = params.cross_entropy.label_smoothing, w = params.cross_entropy.weight;
    out.gradient_terms += w;  // softmax less target
    for (size_t j = 0; j < n; ++j) {
      out.value_terms = std::fmax(out.value_terms, w * std::fabs(s[j]));
      const double target =
          (j == static_cast<size_t>(label) ? 1 - smooth : 0) + smooth / static_cast<double>(n);
      out.value -= w * target * std::log(q1[j]);
      out.by_student[j] += w * (q1[j] - target);
    }
  }
  return out;
}

template <class Params>
using Kernel = void (*)(const Params&, int64_t, int64_t, void*);

struct Kernels {
  Kernel<SoftmaxKlParams> kl_float, kl_double;
  Kernel<DklParams> dkl_float, dkl_double;
};

struct Case {
  DType student, teacher;
  int64_t rows, classes, row_gap, class_stride, misalign;
  double distance, temperature;
};

std::string describe(const Case& c, const char* what, int64_t i) {
  char text[200];
  std::snprintf(text, sizeof(text),
                "%s: row %ld, dtypes %d %d, %ld x %ld, gap %ld, stride %ld, distance %g, T %g",
                what, static_cast<long>(i), static_cast<int>(c.student),
                static_cast<int>(c.teacher), static_cast<long>(c.rows),
                static_cast<long>(c.classes), static_cast<long>(c.row_gap),
                static_cast<long>(c.class_stride), c.distance, c.temperature);
  return text;
}

double tolerance(DType dtype) {
  return dtype == DType::kBFloat16  ? 1e-2
         : dtype == DType::kFloat16 ? 2e-3
         : dtype == DType::kFloat32 ? 1e-5
                                    : 1e-11;
}

struct Inputs {
  Rows student, teacher;
  bool is_double;
  std::vector<double> s(int64_t i) { return row(student, i); }
  std::vector<double> t(int64_t i) { return row(teacher, i); }
  static std::vector<double> row(Rows& rows, int64_t i) {
    std::vector<double> out;
    for (int64_t j = 0; j < rows.classes; ++j) out.push_back(rows.get(i, j));
    return out;
  }
};

Inputs make_inputs(const Case& c, Random& random) {
  Inputs in{Rows(c.student, c.rows, c.classes, c.row_gap, c.class_stride, c.misalign),
            Rows(c.teacher, c.rows, c.classes, c.row_gap, c.class_stride, c.misalign),
            c.student == DType::kFloat64 || c.teacher == DType::kFloat64};
  for (int64_t i = 0; i < c.rows; ++i)
    for (int64_t j = 0; j < c.classes; ++j) {
      const double t = 3 * random.normal();
      in.teacher.set(i, j, t), in.student.set(i, j, t + c.distance * random.normal());
    }
  return in;
}

double unit_of(bool is_double) { return is_double ? 0x1p-53 : 0x1p-24; }

// `terms`: as Truth::gradient_terms.
void compare(const Case& c, const char* what, Rows& grad, int64_t i,
             const std::vector<double>& truth, double terms) {
  const bool is_double = c.student == DType::kFloat64 || c.teacher == DType::kFloat64;
  double error = 0, norm = 0;
  for (int64_t j = 0; j < c.classes; ++j) {
    const double difference = grad.get(i, j) - truth[static_cast<size_t>(j)];
    error += difference * difference,
        norm += truth[static_cast<size_t>(j)] * truth[static_cast<size_t>(j)];
  }
  // Four roundings of what was subtracted; and a float16 below 2^-14 is good to half of 2^-24.
  const double subnormal =
      grad.dtype == DType::kFloat16 ? 0x1p-25 * std::sqrt(static_cast<double>(c.classes)) : 0;
  const double allowed =
      tolerance(grad.dtype) * std::sqrt(norm) + 4 * unit_of(is_double) * terms + subnormal + 1e-12;
  expect(std::sqrt(error) <= allowed, describe(c, what, i));
}

void test_softmax_kl(const Kernels& kernels, const Case& c, Divergence divergence, bool labelled,
                     bool stream) {
  Random random;
  Inputs in = make_inputs(c, random);
  Rows grad_student(c.student, c.rows, c.classes, c.row_gap, c.class_stride, c.misalign);
  Rows grad_teacher(c.teacher, c.rows, c.classes, c.row_gap, c.class_stride, c.misalign);
  std::vector<double> values(static_cast<size_t>(c.rows)), weights;
  std::vector<float> float_weights;
  std::vector<char> stats(static_cast<size_t>(c.rows * kRowStats * (in.is_double ? 8 : 4)));
  std::vector<int64_t> labels;
  for (int64_t i = 0; i < c.rows; ++i) {
    weights.push_back(i % 3 == 2 ? 0 : 0.5 + random.uniform()),
        float_weights.push_back(static_cast<float>(weights.back()));
    labels.push_back(i % 4 == 3
                         ? -100
                         : static_cast<int64_t>(random.uniform() * static_cast<double>(c.classes)));
  }

  SoftmaxKlParams params;
  params.shape.sizes[0] = c.rows;
  params.classes = c.classes;
  in.student.view(params.student), in.teacher.view(params.teacher);
  params.divergence = divergence, params.beta = 0.7, params.gamma = 0.3,
  params.temperature = c.temperature, params.scale = 0.7;
  params.row_weight = in.is_double ? static_cast<void*>(weights.data()) : float_weights.data();
  params.stream = stream;
  if (labelled) {
    params.cross_entropy.labels = labels.data();
    params.cross_entropy.weight = 0.4, params.cross_entropy.label_smoothing = 0.1;
    params.divergence_weight = 0.6 * c.temperature * c.temperature;
  }
  const int64_t element = in.is_double ? 8 : 4;
  ScratchBlock scratch(softmax_kl_scratch(c.classes) * element);
  const Kernel<SoftmaxKlParams> kernel = in.is_double ? kernels.kl_double : kernels.kl_float;

  const auto check_gradients = [&](const char* what) {
    for (int64_t i = 0; i < c.rows; ++i) {
      const double weight =
          (in.is_double ? weights[static_cast<size_t>(i)] : float_weights[static_cast<size_t>(i)]) *
          0.7;
      Truth truth =
          truth_of(in.s(i), in.t(i), params, labelled ? labels[static_cast<size_t>(i)] : -1);
      for (double& x : truth.by_student) x *= weight;
      for (double& x : truth.by_teacher) x *= weight;
      compare(c, what, grad_student, i, truth.by_student, truth.gradient_terms * weight),
          compare(c, what, grad_teacher, i, truth.by_teacher, truth.gradient_terms * weight);
      // float: the plain form, which serves down to a KL of 0.1, is a difference of numbers near 1;
      // without a fused multiply-add it has 2.4e-6 at that end.
      if (params.row_values != nullptr)
        expect(std::fabs(values[static_cast<size_t>(i)] - truth.value * weight) <=
                   (in.is_double ? 1e-11 : 3e-6) * std::fabs(truth.value * weight) +
                       2 * unit_of(in.is_double) * truth.value_terms * weight + 1e-9,
               describe(c, "loss", i));
    }
    expect(grad_student.gaps_are_whole() && grad_teacher.gaps_are_whole(),
           describe(c, "sentinels", -1));
  };

  // Loss and gradients in one; then the loss and the statistics; then the gradients from those. In
  // two ranges.
  const int64_t half = c.rows / 2;
  params.row_values = values.data();
  grad_student.view(params.grad_student), grad_teacher.view(params.grad_teacher);
  kernel(params, half, c.rows, scratch.data), kernel(params, 0, half, scratch.data);
  check_gradients("forward_grad");

  params.grad_student.data = params.grad_teacher.data = nullptr;
  params.row_stats = stats.data();
  std::fill(values.begin(), values.end(), NAN);
  kernel(params, 0, half, scratch.data), kernel(params, half, c.rows, scratch.data);
  params.row_values = nullptr, params.stats_are_given = true;
  std::vector<double> kept = values;
  const double one = 1;
  const float float_one = 1;
  params.grad_loss = in.is_double ? static_cast<const void*>(&one) : &float_one;
  grad_student.view(params.grad_student), grad_teacher.view(params.grad_teacher);
  kernel(params, 0, c.rows, scratch.data);
  params.row_values = values.data();
  check_gradients("backward");

  // A side alone.
  params.grad_teacher.data = nullptr;
  kernel(params, 0, c.rows, scratch.data);
  grad_teacher.view(params.grad_teacher), params.grad_student.data = nullptr;
  kernel(params, 0, c.rows, scratch.data);
  check_gradients("one side");
}

// Directions: times exp(log_scale) they are the gradients. Every other row is certain of a class by
// so much that its gradients are about exp(-30), which only the careful way can tell.
void test_directions(const Kernels& kernels, const Case& c) {
  Random random;
  Inputs in = make_inputs(c, random);
  for (int64_t i = 1; i < c.rows; i += 2) {
    const auto peak = static_cast<int64_t>(random.uniform() * static_cast<double>(c.classes));
    in.student.set(i, peak, 30 * c.temperature), in.teacher.set(i, peak, 32 * c.temperature);
  }
  Rows grad_student(c.student, c.rows, c.classes, c.row_gap, c.class_stride, c.misalign);
  Rows grad_teacher(c.teacher, c.rows, c.classes, c.row_gap, c.class_stride, c.misalign);
  std::vector<double> scales(static_cast<size_t>(c.rows));
  std::vector<float> float_scales(static_cast<size_t>(c.rows));
  SoftmaxKlParams params;
  params.shape.sizes[0] = c.rows;
  params.classes = c.classes, params.temperature = c.temperature;
  in.student.view(params.student), in.teacher.view(params.teacher);
  grad_student.view(params.grad_student), grad_teacher.view(params.grad_teacher);
  params.log_scales = in.is_double ? static_cast<void*>(scales.data()) : float_scales.data();
  ScratchBlock scratch(softmax_kl_direction_scratch(c.classes) * (in.is_double ? 8 : 4));
  (in.is_double ? kernels.kl_double : kernels.kl_float)(params, 0, c.rows, scratch.data);
  for (int64_t i = 0; i < c.rows; ++i) {
    const double log_scale =
        in.is_double ? scales[static_cast<size_t>(i)] : float_scales[static_cast<size_t>(i)];
    double largest = 0;
    for (int64_t j = 0; j < c.classes; ++j)
      largest = std::fmax(
          largest, std::fmax(std::fabs(grad_student.get(i, j)), std::fabs(grad_teacher.get(i, j))));
    bool is_equal = true;  // but for a constant: one class, and logits that rounded to the same
    for (int64_t j = 1; j < c.classes; ++j)
      is_equal = is_equal && in.student.get(i, j) - in.teacher.get(i, j) ==
                                 in.student.get(i, 0) - in.teacher.get(i, 0);
    if (is_equal) {
      expect(largest == 0 && log_scale == -INFINITY, describe(c, "equal sides", i));
      continue;
    }
    expect(largest > 0.49 && largest < 1.01, describe(c, "the largest entry of a direction", i));
    if (i % 2 == 1) continue;  // double precision's plain formula has nothing to compare with
    Truth truth = truth_of(in.s(i), in.t(i), params, -1);
    for (double& x : truth.by_student) x *= std::exp(-log_scale);
    for (double& x : truth.by_teacher) x *= std::exp(-log_scale);
    const double terms = truth.gradient_terms * std::exp(-log_scale);
    compare(c, "direction", grad_student, i, truth.by_student, terms);
    compare(c, "direction", grad_teacher, i, truth.by_teacher, terms);
  }
  expect(grad_student.gaps_are_whole() && grad_teacher.gaps_are_whole(),
         describe(c, "sentinels", -1));
}

// Logits that no formula likes: the point is that nothing is read or written astray, and that no
// NaN spreads.
void test_hard_values(const Kernels& kernels, const Case& c, Divergence divergence) {
  const double hard[] = {-INFINITY, INFINITY, NAN, 1e4, -1e4, 100, -105};
  Random random;
  Inputs in = make_inputs(c, random);
  for (int64_t i = 1; i < c.rows; i += 2)
    for (int k = 0; k < 2; ++k) {
      Rows& side = random.uniform() < 0.5 ? in.student : in.teacher;
      side.set(i, static_cast<int64_t>(random.uniform() * static_cast<double>(c.classes)),
               hard[static_cast<int>(random.uniform() * 7)]);
    }
  Rows grad_student(c.student, c.rows, c.classes, c.row_gap, c.class_stride, c.misalign);
  Rows grad_teacher(c.teacher, c.rows, c.classes, c.row_gap, c.class_stride, c.misalign);
  std::vector<double> values(static_cast<size_t>(c.rows));
  SoftmaxKlParams params;
  params.shape.sizes[0] = c.rows;
  params.classes = c.classes, params.divergence = divergence, params.temperature = c.temperature;
  in.student.view(params.student), in.teacher.view(params.teacher);
  grad_student.view(params.grad_student), grad_teacher.view(params.grad_teacher);
  params.row_values = values.data();
  ScratchBlock scratch(softmax_kl_scratch(c.classes) * (in.is_double ? 8 : 4));
  (in.is_double ? kernels.kl_double : kernels.kl_float)(params, 0, c.rows, scratch.data);
  for (int64_t i = 0; i < c.rows; i += 2) {
    bool finite = std::isfinite(values[static_cast<size_t>(i)]);
    for (int64_t j = 0; j < c.classes; ++j)
      finite =
          finite && std::isfinite(grad_student.get(i, j)) && std::isfinite(grad_teacher.get(i, j));
    expect(finite, describe(c, "a good row beside a hard one", i));
  }
  for (int64_t i = 1; i < c.rows; i += 2)
    for (int64_t j = 0; j < c.classes; ++j)
      expect(std::isfinite(values[static_cast<size_t>(i)]) == std::isfinite(grad_student.get(i, j)),
             describe(c, "a hard row's gradient is finite where its loss is", i));
  expect(grad_student.gaps_are_whole() && grad_teacher.gaps_are_whole(),
         describe(c, "sentinels", -1));
}

void test_dkl(const Kernels& kernels, const Case& c, bool own_weights) {
  Random random;
  Inputs in = make_inputs(c, random);
  const DType accumulation = in.is_double ? DType::kFloat64 : DType::kFloat32;
  Rows class_weight(accumulation, c.rows, c.classes, 0, 1, 0);
  for (int64_t i = 0; i < c.rows; ++i)
    for (int64_t j = 0; j < c.classes; ++j)
      // About 1 in all: float16 has no room for gradients of thousands.
      class_weight.set(i, j,
                       j % 5 == 4 ? 0 : 2 * random.uniform() / static_cast<double>(c.classes));
  Rows grad_student(c.student, c.rows, c.classes, c.row_gap, c.class_stride, c.misalign);
  Rows grad_teacher(c.teacher, c.rows, c.classes, c.row_gap, c.class_stride, c.misalign);
  std::vector<double> values(static_cast<size_t>(c.rows));
  DklParams params;
  params.shape.sizes[0] = c.rows;
  params.classes = c.classes, params.temperature = c.temperature;
  params.weight_temperature = c.temperature == 1 ? 1 : 2;
  params.alpha = 0.8, params.beta = 1.5, params.symmetric = true;
  in.student.view(params.student), in.teacher.view(params.teacher);
  if (!own_weights) class_weight.view(params.class_weight);
  grad_student.view(params.grad_student), grad_teacher.view(params.grad_teacher);
  params.row_values = values.data();
  ScratchBlock scratch(dkl_scratch(c.classes) * (in.is_double ? 8 : 4));
  (in.is_double ? kernels.dkl_double : kernels.dkl_float)(params, 0, c.rows, scratch.data);
  for (int64_t i = 0; i < c.rows; ++i) {
    const std::vector<double> s = in.s(i), t = in.t(i), q = softmax(s, c.temperature),
                              p = softmax(t, c.temperature);
    std::vector<double> w =
        own_weights ? softmax(t, params.weight_temperature) : Inputs::row(class_weight, i);
    double value = 0, total = 0, mean = 0;
    for (size_t j = 0; j < s.size(); ++j)
      value -= 0.8 * p[j] * std::log(q[j]), total += w[j], mean += w[j] * (t[j] - s[j]);
    mean = total == 0 ? 0 : mean / total;
    std::vector<double> by_student(s.size()), by_teacher(s.size());
    double terms = 0;  // of q - p, and of what is left of d - mean
    for (size_t j = 0; j < s.size(); ++j) {
      const double off = t[j] - s[j] - mean;
      terms = std::fmax(terms,
                        0.8 * (p[j] + q[j]) / c.temperature + 1.5 * total * w[j] * std::fabs(mean));
      value += 1.5 / 2 * total * w[j] * off * off;
      by_teacher[j] = 1.5 * total * w[j] * off;
      by_student[j] = 0.8 * (q[j] - p[j]) / c.temperature - by_teacher[j];
    }
    expect(std::fabs(values[static_cast<size_t>(i)] - value) <=
               (in.is_double ? 1e-11 : 5e-6) * std::fabs(value) + 1e-9,
           describe(c, "dkl loss", i));
    compare(c, "dkl student", grad_student, i, by_student, terms),
        compare(c, "dkl teacher", grad_teacher, i, by_teacher, terms);
  }
  expect(grad_student.gaps_are_whole() && grad_teacher.gaps_are_whole(),
         describe(c, "dkl sentinels", -1));
}

void test_all(const Kernels& kernels) {
  constexpr DType f32 = DType::kFloat32, f64 = DType::kFloat64, f16 = DType::kFloat16,
                  bf16 = DType::kBFloat16;
  const DType pairs[][2] = {{f32, f32}, {f64, f64},  {bf16, bf16},
                            {f16, f16}, {f32, bf16}, {f16, f64}};
  // One vector and its neighbours of every instruction set; the probe's length; a tile and more.
  const int64_t classes[] = {1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 100, 127, 129, 2048, 2049, 4500};
  const double distances[] = {1, 1e-2, 8};
  for (const auto& pair : pairs)
    for (int64_t n : classes)
      for (double distance : distances) {
        // Of short rows, whole blocks of every instruction set and a part of one.
        const int64_t rows = n > 200 ? 2 : n > 40 ? 5 : 37;
        const int64_t layout = (n + static_cast<int64_t>(distance)) % 4;
        const int64_t class_strides[] = {1, 1, 2, 0};
        const Case c{
            pair[0],  pair[1],          rows, n, layout == 0 ? 0 : 3, class_strides[layout], layout,
            distance, n % 2 ? 1.0 : 3.0};
        for (Divergence divergence : {Divergence::kKl, Divergence::kJeffreys, Divergence::kJs})
          test_softmax_kl(kernels, c, divergence, false, n % 4 == 1);
        test_softmax_kl(kernels, c, Divergence::kKl, true, n % 4 == 0);
        for (Divergence divergence : {Divergence::kKl, Divergence::kJeffreys, Divergence::kJs})
          test_hard_values(kernels, c, divergence);
        test_directions(kernels, c);
        test_dkl(kernels, c, true), test_dkl(kernels, c, false);
      }
}

}  // namespace

int main(int argc, char** argv) {
#define AFM_KERNELS_OF(NAME)                                                               \
  Kernels{NAME::softmax_kl_rows_float, NAME::softmax_kl_rows_double, NAME::dkl_rows_float, \
          NAME::dkl_rows_double}
  AFM_RUN_CAPABILITY(argc, argv, test_all, AFM_KERNELS_OF)
}
