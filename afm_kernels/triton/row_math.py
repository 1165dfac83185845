"""The mathematics of a row, as Triton functions that every kernel of ``softmax_kl`` and ``distillation`` shares.

With s' = s/T, t' = t/T, q = softmax(s') and p = softmax(t'), let d = s' - t' and u = log q - log p. For any constant c
near the mean of d under p, with x = d - c,

    r = E_p[x],  a = E_p[expm1(x) - x],  λ = log E_p[exp x] = log1p(a + r),  u = x - λ,  KL(p‖q) = λ - r
    ∂KL/∂t = -p (x - r),  ∂KL/∂s = q - p = p expm1(u)

Note [Near and far]
~~~~~~~~~~~~~~~~~~~
expm1(x) - x is evaluated by its series where |x| < 1/2 (*near*), because the closed form cancels there, and elsewhere
(*far*) by the closed form, which takes no third exponential: exp(t' - max_t')·eˣ = exp(s' - max_s')·f with the row's
factor f = exp(max_s' - max_t' - c). A row with KL >= 1 takes its value from the normalisers (*direct* form), which is
exact there and cannot overflow.

Note [Excluded classes]
~~~~~~~~~~~~~~~~~~~~~~~
A class is excluded on a side whose logit is -inf. d is -inf where only the student excludes it, +inf where only the
teacher does, NaN where both do. ``tl.minimum`` drops a NaN, so clamping d to ±FAR leaves +FAR, with a weight p of
exactly 0, where the teacher excludes the class, and no further mask is needed. A row in which d reaches -inf has
KL = +inf. A masked lane of a tile is -inf on both sides: an excluded class like any other.

Note [Row offset]
~~~~~~~~~~~~~~~~~
s - t is exact where the logits are close, and loses digits where one side carries an offset that the other has
not. Then a whole number near the difference of the maxima is taken off the side that has the offset first, which is
exact: (s - offset_s) - (t - offset_t), where one of the two is 0.

Note [Certain rows]
~~~~~~~~~~~~~~~~~~~
Where one class has nearly all of p, x - r and u are next to nothing there, and rounding would be all that is left of
them. So wherever a class has more than half of p, c is d at that class, exactly: x is 0 there, r is a sum of small
products, and with λ both keep their digits. No entry of a gradient is then a difference of numbers that are not small.
JS takes the logarithms at each side's heaviest class for zero in the same way. A tile knows the heaviest class before
it takes the sums. A streamed row does not; but what loses digits is the sums of one lane, the one that had that class,
and a lane's share of the row is small: where a row turns out certain, that lane's classes are read again.

Note [exp and exp2]
~~~~~~~~~~~~~~~~~~~
For NVIDIA's GPUs Triton compiles ``tl.exp2`` to an instruction that gives 0 for what is below the normal numbers
(ex2.approx.ftz), which gaps of 87 reach, and ``tl.exp`` to one that does not, a few instructions longer. A gradient's
entry may be that small and still be most of what a row has, so it is ``tl.exp`` wherever a class is compared with the
row's largest. ``tl.exp2`` serves the sums of the streaming pass, where a lane's classes are compared with the lane's
own largest. The interpreter knows no difference; ``test_triton_aot.py`` looks at what is compiled.

Note [Row scalars]
~~~~~~~~~~~~~~~~~~
What a gradient needs of its row, in the order of the columns of ``row_stats``:

    max_s, 1/z_s, max_t, 1/z_t     of the logits as they came, and of exp((logit - max)/T)
    centre, tail                   u = (d - centre) - tail
    slope_p                        KL, Jeffreys: E_p[d - centre]; JS: E_p[log m - log p] - base_p
    slope_q                        Jeffreys: E_q[d - centre]; JS: E_q[log q - log m] - base_q; distillation: 1/z of the
                                   student at T = 1
    base_p, base_q                 JS: log m - log p and log q - log m at the heaviest class of p, and of q, where it
                                   has more than half; distillation: 1 - q of the label at T = 1, in the first
    two more                       between the passes of JS over long rows: the lanes of the heaviest classes

The normalisers of a row that has no gradient (its loss is not finite) are NaN, so that its gradient is.
"""

import triton
import triton.language as tl

# With the interpreter on, kernels run on CPU tensors; Triton decides this when a kernel is defined.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

KL = tl.constexpr(0)
JEFFREYS = tl.constexpr(2)
JS = tl.constexpr(3)  # with a β of at most 1/2: launchers exchange the sides

LOG2E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(
    float("inf")
)  # INF - INF is NaN, which as a global constant Triton takes for one that changes

# Stands for ±inf in d. Large enough that no float32 logits that mean anything are so far apart, small enough
# that a sum of 2^26 of them is finite.
FAR = tl.constexpr(1e30)
# Below this the series serves. At 1/2, 8 terms give float32's last digit and 15 give float64's.
NEAR = tl.constexpr(0.5)
# exp2 of this times a float32 is finite; a row whose factor is clamped takes the direct form.
MAX_EXPONENT = tl.constexpr(80.0)


@triton.jit
def scalar(value, dtype: tl.constexpr):
    """A float argument (float64 in every signature, so that 1/T is exact enough) in the accumulation dtype."""
    return tl.full([], value, dtype)


@triton.jit
def stored_as(x, dtype: tl.constexpr):
    """x rounded to nearest, to the dtype that it is stored in."""
    if dtype == tl.bfloat16:
        x = x.to(tl.float32)
        if INTERPRETED:  # which truncates, where the hardware rounds
            bits = x.to(tl.int32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def expm1_minus_identity(x):
    """exp(x) - 1 - x by its Taylor series; good for |x| < 1/2. See Note [Near and far]."""
    if x.dtype == tl.float64:
        tail = x * (1.0 / 17.0)
        for n in tl.static_range(16, 2, -1):
            tail = (tail + 1.0) * (x * (1.0 / n))
        return (tail + 1.0) * (x * x * 0.5)
    else:
        tail = x * 2.4801587e-5 + 1.9841270e-4
        tail = tail * x + 1.3888889e-3
        tail = tail * x + 8.3333333e-3
        tail = tail * x + 4.1666667e-2
        tail = tail * x + 1.6666667e-1
        tail = tail * x + 0.5
        return tail * (x * x)


@triton.jit
def atanh_tail(z, TERMS: tl.constexpr):
    """atanh(z)/z - 1 = z²/3 + z⁴/5 + …, the first TERMS terms."""
    square = z * z
    tail = square * (1.0 / (2 * TERMS + 1))
    for n in tl.static_range(TERMS - 1, 0, -1):
        tail = (tail + 1.0 / (2 * n + 1)) * square
    return tail


@triton.jit
def log1p_parts(y):
    """log1p(y) and y - log1p(y) for -1/2 <= y < e - 1, to the last digit near 0, where the hardware has none left."""
    z = y / (y + 2.0)
    if y.dtype == tl.float64:
        bend = atanh_tail(z, 24)
    else:
        bend = atanh_tail(z, 10)
    return 2.0 * z + 2.0 * z * bend, z * (y - 2.0 * bend)


@triton.jit
def log1p_row(y):
    """The first of ``log1p_parts``."""
    value, _ = log1p_parts(y)
    return value


@triton.jit
def log1p_any(y):
    """log(1 + y) for any y >= 0."""
    low = y < 1.0
    return tl.where(low, log1p_row(tl.where(low, y, 0.0)), tl.log(1.0 + y))


@triton.jit
def row_offsets(max_s, max_t):
    """What to take off s, and off t, before their difference is taken. See Note [Row offset]."""
    gap = max_s - max_t
    offset = tl.where((tl.abs(gap) > 8.0) & (tl.abs(gap) < INF), tl.floor(gap), 0.0)
    is_of_s = tl.abs(max_s) >= tl.abs(max_t)
    return tl.where(is_of_s, offset, 0.0), tl.where(is_of_s, 0.0, -offset)


@triton.jit
def clamp_far(d):
    """d within ±FAR, and +FAR where it is NaN. See Note [Excluded classes]."""
    return tl.maximum(tl.minimum(d, FAR), -FAR)


@triton.jit
def row_scalars(z_s, z_t, apart, c, r, a, lowest, certain, inv_t):
    """centre, tail, E_p[d - centre] and KL of a row from its sums; see the head of the file.

    ``apart`` is the difference of the maxima, less the offsets;
    ``r`` and ``a`` are E_p[x] and E_p[expm1(x) - x] for x = d - c; ``lowest`` is the least d, -inf where the
    student excludes a class that the teacher has; ``certain`` says that c is the heaviest class's.
    """
    log_ratio = apart * inv_t + (tl.log(z_s) - tl.log(z_t))
    direct = (log_ratio - c) - r
    centred = (direct < 1.0) & (tl.abs(r) < 0.5) & (lowest > -INF)
    log_mean, bend = log1p_parts(tl.where(centred, a + r, 0.0))
    kl = tl.where(centred, tl.maximum(a - bend, 0.0), direct)
    # Adding keeps the NaN of a row that has no distribution at all.
    kl = tl.where(lowest == -INF, kl + INF, kl)
    kept = centred | certain
    tail = tl.where(centred, log_mean, tl.where(certain, log_ratio - c, 0.0))
    return tl.where(kept, c, log_ratio), tail, tl.where(kept, r, -direct), kl


@triton.jit
def jeffreys_terms(p, q, u):
    """p·u·expm1(u), whose sum is KL(p‖q) + KL(q‖p). Never negative."""
    near = tl.abs(u) < NEAR
    return tl.where(near, p * u * (u + expm1_minus_identity(u)), (q - p) * u)


@triton.jit
def js_parts(u, beta):
    """log m - log p, log q - log m and more of a class, for m = β p + (1 - β) q and β <= 1/2.

    With e = expm1(-u) and v = β e, log m - log q is log1p(v): nothing of the size of β is a difference of larger
    numbers. Where v is large (not ``low``) most of m is the teacher's. ``rest`` is e + u where u is near 0.
    """
    near = tl.abs(u) < NEAR
    rest = expm1_minus_identity(-u)
    # exp of a negative number only: u of either sign and any size is safe
    fall = tl.exp(-tl.abs(u))
    e = tl.where(near, rest - u, tl.where(u > 0, fall, 1.0 / fall) - 1.0)
    v = beta * e
    low = v < 0.5
    z = v / (v + 2.0)
    if u.dtype == tl.float64:
        bend = atanh_tail(z, 17)
    else:
        bend = atanh_tail(z, 6)
    series = 2.0 * z + 2.0 * z * bend
    log_mix = tl.log((1.0 - beta) * fall + beta)
    m_over_p = tl.where(low, u + series, log_mix)
    q_over_m = tl.where(low, -series, u - log_mix)
    return m_over_p, q_over_m, near, low, rest, e, v * (z + (1.0 + z) * bend)


@triton.jit
def js_logs(u, beta):
    """log m - log p and log q - log m."""
    m_over_p, q_over_m, _, _, _, _, _ = js_parts(u, beta)
    return m_over_p, q_over_m


@triton.jit
def js_terms(p, q, u, beta):
    """A class's share of JS, log m - log p and log q - log m.

    With ψ(y) = (1 + y) log1p(y) - y the share is q (β ψ(e) - ψ(v)): the first-order terms, which sum to nothing, are
    gone before they can cancel. Where most of m is the teacher's it is the sum of the shares of the two divergences.
    """
    m_over_p, q_over_m, near, low, rest, e, bend = js_parts(u, beta)
    spread = tl.where(near, -q * (u * e + rest), (q - p) - p * u)
    value = tl.where(low, beta * spread - q * bend, (1.0 - beta) * q * q_over_m - beta * p * m_over_p)
    return value, m_over_p, q_over_m


@triton.jit
def heaviest(top, rz):
    """The logit of the class with more than half of a side, or +inf, which no such row holds."""
    return tl.where(rz > 0.5, top, INF)


@triton.jit
def row_gradients(
    s, t, max_s, rz_s, max_t, rz_t, centre, tail, slope_p, slope_q, base_p, base_q, inv_t, beta,
    DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """T times the gradients of a row's loss to s and to t. The row's scalars broadcast against s and t."""
    p = tl.exp((t - max_t) * inv_t) * rz_t
    q = tl.exp((s - max_s) * inv_t) * rz_s
    offset_s, offset_t = row_offsets(max_s, max_t)
    x = clamp_far(((s - offset_s) - (t - offset_t)) * inv_t) - centre
    u = x - tail
    if DIVERGENCE == JS:
        m_over_p, q_over_m = js_logs(u, beta)
        # Computed elsewhere, the base may differ by a rounding, which is all there would be.
        above_p = tl.where(t == heaviest(max_t, rz_t), 0.0, base_p - m_over_p)
        above_q = tl.where(s == heaviest(max_s, rz_s), 0.0, q_over_m - base_q)
        grad_s = (1.0 - beta) * q * (above_q - slope_q)
        grad_t = beta * p * (above_p + slope_p)
    else:
        # q - p = p·expm1(u) keeps the digits, and with them the sign, where student and teacher agree.
        grad_s = tl.where(tl.abs(u) < NEAR, p * (u + expm1_minus_identity(u)), q - p)
        grad_t = -p * (x - slope_p)
        if DIVERGENCE == JEFFREYS:
            difference = grad_s
            grad_s = difference + q * (x - slope_q)
            grad_t = grad_t - difference
    return grad_s, grad_t


@triton.jit
def cross_entropy(max_s, z_1, mean_below, label_logit, label, ignore_index, smoothing):
    """-(1 - ε) log q_y - ε mean(log q) at temperature 1; ``mean_below`` is the mean of s - max_s."""
    log_z = tl.log(z_1)
    hard = log_z - (label_logit - max_s)
    # smoothing 1 leaves the label out, unless it is no class at all
    hard = tl.where(hard == INF, tl.where(smoothing == 1.0, 0.0, hard), (1.0 - smoothing) * hard)
    soft = tl.where(smoothing == 0.0, 0.0, smoothing * (log_z - mean_below))
    return tl.where(label == ignore_index, 0.0, hard + soft)


@triton.jit
def mixed_value(kl, hard, alpha, temperature):
    """(1 - α) CE + α T² KL; a term of factor 0 is not looked at."""
    soft = tl.where(alpha == 0.0, 0.0, alpha * temperature * temperature * kl)
    return soft + tl.where(alpha == 1.0, 0.0, (1.0 - alpha) * hard)


@triton.jit
def mixed_gradients(
    s,
    is_label,
    is_class,
    ignored,
    classes,
    max_s,
    rz_1,
    missing,
    grad_s,
    grad_t,
    alpha,
    temperature,
    smoothing,
):
    """T times the gradients of ``mixed_value``, from T times those of KL. ``missing`` is 1 - q of the label."""
    factor = alpha * temperature * temperature
    q = tl.exp(s - max_s) * rz_1
    smoothed = tl.where(is_class, smoothing / classes, 0.0)
    missing = missing + (rz_1 - rz_1)  # NaN in a row that is lost
    hard = tl.where(is_label, smoothing - missing, q) - smoothed
    hard = tl.where(ignored, 0.0, (1.0 - alpha) * temperature * hard)
    grad_s = tl.where(alpha == 1.0, 0.0, hard) + tl.where(alpha == 0.0, 0.0, factor * grad_s)
    return grad_s, tl.where(alpha == 0.0, 0.0, factor * grad_t)
