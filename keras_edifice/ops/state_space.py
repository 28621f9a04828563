"""Linear state spaces that do not change with time: their kernels and recurrences.

    x' = A x + B u,  y = C x;    h_t = Ā h_{t-1} + B̄ u_t,  y_t = C h_t,  k_l = C Ā^l B̄

with A = diag Λ, or A = diag Λ - Σ_r p_r p_r* (DPLR), whose matrices at the start are
in `hippo.py`. Complex numbers are pairs (real part, imaginary part). Axes: n states, r
ranks, `...` features.

Gu et al. 2021, S4, arXiv:2111.00396, and 2022, S4D, arXiv:2206.11893.
"""

import math

import numpy as np
from keras import ops

from keras_edifice.ops.complex_scan import complex_linear_scan, complex_linear_scan_step
from keras_edifice.ops.fourier import irfft
from keras_edifice.ops.long_conv import long_conv
from keras_edifice.ops.pairs import add, conjugate, exact, exp, reciprocal, times
from keras_edifice.ops.positions import positions
from keras_edifice.ops.tracing import exporting, static_length

DISCRETIZATIONS = ("zoh", "bilinear")

_WIDTH = 64
"""Steps of a block where the length is unknown."""


def discretize(Lambda, dt, method="zoh"):
    """A step Δ of x' = Λ x + B u, as Ā = e^rate and B̄ = weight ⊙ B.

    Args:
        Lambda: pair of (..., n).
        dt: Δ, a number or (...).
        method: "zoh" (the input is held: rate = ΔΛ, weight = (e^rate - 1) / Λ) or
            "bilinear" (Ā = (1 + ΔΛ/2) / (1 - ΔΛ/2), weight = Δ / (1 - ΔΛ/2)).

    Returns:
        Pairs rate and weight, (..., n), in float32 (float64 for such a Λ).

    Raises:
        ValueError: unknown method.
    """
    Lambda = exact(Lambda)
    dt = ops.expand_dims(ops.cast(dt, Lambda[0].dtype), -1)
    z = dt * Lambda[0], dt * Lambda[1]
    if method == "zoh":
        rate, weight = z, _mean_of_exp(z)
    elif method == "bilinear":
        rate, weight = _log_of_bilinear(z), reciprocal((1 - z[0] / 2, -z[1] / 2))
    else:
        raise ValueError(
            f"method must be one of {DISCRETIZATIONS}, received {method!r}"
        )
    return rate, (dt * weight[0], dt * weight[1])


def diagonal_modes(Lambda, B, C, dt, discretization="zoh", conjugates=True):
    """A diagonal state space as the r and w of its kernel k_l = Re Σ_n w_n e^{l r_n}.

    Args:
        Lambda: pair of (..., n), the eigenvalues.
        B: pair of (..., n).
        C: pair of (..., n).
        dt: Δ, a number or (...).
        discretization: the method of `discretize`.
        conjugates: whether each eigenvalue also stands for its conjugate.

    Returns:
        Pairs rate and weight, (..., n).
    """
    rate, weight = discretize(Lambda, dt, discretization)
    weight = times(times(exact(C), exact(B)), weight)
    return rate, (2.0 * weight[0], 2.0 * weight[1]) if conjugates else weight


def ssm_kernel_diag(Lambda, B, C, dt, length, discretization="zoh", conjugates=True):
    """The `modal_kernel` of the `diagonal_modes`: (length, ...)."""
    modes = diagonal_modes(Lambda, B, C, dt, discretization, conjugates)
    return modal_kernel(*modes, length)


def modal_kernel(rate, weight, length):
    """The kernel k_l = Re Σ_n w_n e^{l r_n}, in O(√length) memory per mode.

    With l = i m + j it is a product of matrices, w e^{i m r} by e^{j r}.

    Args:
        rate: pair of (..., n), the logarithms of the modes.
        weight: pair of (..., n).
        length: number of taps; or 0, 1, ... (length,), where it is unknown.

    Returns:
        (length, ...) in float32 (float64 for such a rate).
    """
    rate, weight = exact(rate), exact(weight)
    start, place = _split(length, rate[0].dtype)
    weight = ops.expand_dims(weight[0], -2), ops.expand_dims(weight[1], -2)
    re, im = times(weight, _powers(rate, start))  # (..., i, n)
    by_place = ops.concatenate(_powers(rate, place), axis=-1)  # (..., j, 2n)
    kernel = ops.matmul(
        ops.concatenate([re, -im], axis=-1), ops.swapaxes(by_place, -1, -2)
    )
    kernel = ops.reshape(kernel, (*ops.shape(kernel)[:-2], -1))
    kernel = ops.moveaxis(kernel, len(kernel.shape) - 1, 0)
    if isinstance(length, int):
        return kernel[:length]
    return ops.take(kernel, ops.cast(length, "int32"), axis=0)


def modal_conv(x, rate, weight, initial_state=None, return_state=False, mode="fft"):
    """The recurrence h_t = e^r h_{t-1} + x_t, y_t = Re Σ_n w_n h_t, as a convolution.

    Args:
        x: (batch, time, ...).
        rate: pair of (..., n), r; its features are those of x or 1.
        weight: pair of (..., n), w.
        initial_state: pair of (batch, ..., n), h before the first step; zero if None.
        return_state: whether to give h after the last step as well.
        mode: of `long_conv`.

    Returns:
        (batch, time, ...) in the dtype of x; h is a pair in float32 (float64 for a
        float64 rate).
    """
    rate, weight = exact(rate), exact(weight)
    length = static_length(x)
    if length is None:
        length = ops.cast(positions(x), rate[0].dtype)
    y = long_conv(x, modal_kernel(rate, weight, length), mode=mode)
    if initial_state is not None:
        weight = times(weight, times(exp(rate), exact(initial_state)))
        free = modal_kernel(rate, weight, length)  # (t, b, ...)
        y = y + ops.cast(ops.moveaxis(free, 0, 1), y.dtype)
    if not return_state:
        return y
    state = _driven_state(ops.cast(x, rate[0].dtype), rate, length)
    if initial_state is not None:
        count = length if isinstance(length, int) else length[-1] + 1.0
        passed = exp((count * rate[0], count * rate[1]))
        state = add(state, times(passed, exact(initial_state)))
    return y, state


def modal_scan(x, rate, weight, mask, initial_state=None):
    """`modal_conv` as a recurrence that stands still at masked steps.

    The states of all steps are held at once.

    Args:
        x: (batch, time, features), zero at masked steps.
        rate: pair of (features or 1, n), r.
        weight: pair of (features, n), w.
        mask: (batch, time), False for steps that leave h as it is.
        initial_state: pair of (batch, features, n); zero if None.

    Returns:
        (batch, time, features) in the dtype of x, and h after the last step.
    """
    rate, weight = exact(rate), exact(weight)
    rate = tuple(z * ops.ones_like(weight[0]) for z in rate)
    mask = ops.expand_dims(ops.expand_dims(mask, -1), -1)
    re, im = exp(rate)
    decay = ops.where(mask, re, 1.0), ops.where(mask, im, 0.0)
    u = ops.expand_dims(ops.cast(x, re.dtype), -1) * ops.ones_like(re)
    h, state = complex_linear_scan(decay, (u, ops.zeros_like(u)), initial_state, True)
    return ops.cast(ops.sum(times(weight, h)[0], axis=-1), x.dtype), state


def modal_step(x, rate, weight, state):
    """One step of `modal_conv`: (batch, ...) and h -> (batch, ...) and the new h."""
    rate, weight = exact(rate), exact(weight)
    now = ops.expand_dims(ops.cast(x, rate[0].dtype), -1)
    state = complex_linear_scan_step(exp(rate), (now, ops.zeros_like(now)), state)
    return ops.cast(ops.sum(times(weight, state)[0], axis=-1), x.dtype), state


def ssm_kernel_dplr(Lambda, P, B, C, dt, length):
    """Kernel of a DPLR state space by the bilinear method, from its spectrum.

    At ω = e^{-2πij/length}, with s_ab = Σ_n 2Δ a_n b_n / (2(1-ω) - (1+ω) Δλ_n) over
    all n and their conjugates and with κ = (1+ω)/2,

        k̂ = s_CB - κ s_CP (1 + κ s_P̄P)⁻¹ s_P̄B

    S4's algorithm 1 divided by 1 + ω, which has no pole at ω = -1.

    Args:
        Lambda: pair of (..., n), one of each two conjugate eigenvalues.
        P: pair of (r, ..., n).
        B: pair of (..., n).
        C: pair of (..., n), C̃ of `hippo.truncated_output`.
        dt: Δ, (...).
        length: number of taps, an int.

    Returns:
        (length, ...) in float32 (float64 for such a Λ).
    """
    Lambda, P, B, C = exact(Lambda), exact(P), exact(B), exact(C)
    dt = ops.expand_dims(ops.cast(dt, Lambda[0].dtype), -1)
    ranks = [(P[0][r], P[1][r]) for r in range(int(P[0].shape[0]))]
    rows, columns = [C, *map(conjugate, ranks)], [B, *ranks]
    products = [times(row, column) for row in rows for column in columns]
    dt = ops.expand_dims(dt, -1)
    products = [dt * ops.stack(z, axis=-2) for z in zip(*products, strict=True)]
    poles = [dt[..., 0] * z + ops.zeros_like(products[0][..., 0, :]) for z in Lambda]
    half = np.pi / length * np.arange(length // 2 + 1)  # half the angle of ω̄
    sums = _resolvent_sums(half)(*poles, *products)  # (..., (1 + r)², 2f)
    sums = [ops.split(sums[..., k, :], 2, axis=-1) for k in range(len(rows) ** 2)]
    sums = [sums[k : k + len(rows)] for k in range(0, len(sums), len(rows))]
    cos = _constant(np.cos(half), dt.dtype)
    spectrum = _without_ranks(sums, cos)
    spectrum = times(spectrum, (cos, _constant(np.sin(half), dt.dtype)))
    return ops.moveaxis(irfft(spectrum, length), len(spectrum[0].shape) - 1, 0)


def dplr_system(Lambda, P, B, C, dt, length=None):
    """The recurrence of a DPLR state space in real numbers, h = (Re x, Im x).

    Args:
        Lambda: pair of (..., n), one of each two conjugate eigenvalues.
        P: pair of (r, ..., n).
        B: pair of (..., n).
        C: pair of (..., n).
        dt: Δ, (...).
        length: taps of the kernel if C is C̃ of `hippo.truncated_output`, else None.

    Returns:
        Ā (..., 2n, 2n), B̄ (..., 2n) and C (..., 2n) by the bilinear method.
    """
    Lambda, P, B, C = exact(Lambda), exact(P), exact(B), exact(C)
    dt = ops.cast(dt, Lambda[0].dtype)
    n = Lambda[0].shape[-1]
    identity = ops.eye(2 * n, dtype=Lambda[0].dtype)
    re, im = (ops.expand_dims(z, -1) * identity[:n, :n] for z in Lambda)
    turn = [ops.concatenate(z, axis=-1) for z in ([re, -im], [im, re])]
    turn = ops.concatenate(turn, axis=-2)
    p = ops.concatenate(P, axis=-1)
    low = ops.sum(ops.expand_dims(p, -1) * ops.expand_dims(p, -2), axis=0)
    half = ops.expand_dims(dt / 2.0, (-2, -1)) * (turn - 2.0 * low)
    step = _solved(identity - half, identity + half)
    B = ops.expand_dims(dt, -1) * ops.concatenate(B, axis=-1)
    B = _solved(identity - half, ops.expand_dims(B, -1))
    C = ops.expand_dims(2.0 * ops.concatenate([C[0], -C[1]], axis=-1), -1)
    if length is not None:
        rest = identity - _power(step, length)
        C = _solved(ops.swapaxes(rest, -1, -2), C)
    return step, B[..., 0], C[..., 0]


def dplr_step(x, system, state):
    """One step of a `dplr_system`.

    Args:
        x: (batch, ...).
        system: Ā, B̄ and C.
        state: (batch, ..., 2n).

    Returns:
        (batch, ...) in the dtype of x, and the new state.
    """
    A, B, C = system
    now = ops.expand_dims(ops.cast(x, A.dtype), -1)
    state = ops.matmul(A, ops.expand_dims(state, -1))[..., 0] + B * now
    return ops.cast(ops.sum(C * state, axis=-1), x.dtype), state


def dplr_conv(x, system, kernel, initial_state=None, return_state=False, mode="fft"):
    """The recurrence of a `dplr_system` as a convolution with its kernel.

    Args:
        x: (batch, time, ...) of a static length.
        system: Ā, B̄ and C.
        kernel: (taps, ...) of `ssm_kernel_dplr`, no shorter than x.
        initial_state: (batch, ..., 2n), h before the first step; zero if None.
        return_state: whether to give h after the last step as well.
        mode: of `long_conv`.

    Returns:
        (batch, time, ...) in the dtype of x; h is in the dtype of the system.
    """
    y = long_conv(x, kernel, mode=mode)
    if initial_state is None and not return_state:
        return y
    (A, B, C), length = system, x.shape[1]
    count, width = _sizes(length)
    far = _power(A, width)
    if initial_state is not None:
        initial_state = ops.expand_dims(ops.cast(initial_state, A.dtype), -1)
        # C Ā^{im} times Ā^{j+1} h is the output of step im + j.
        rows = _krylov(ops.swapaxes(far, -1, -2), ops.expand_dims(C, -1), count)
        columns = _krylov(A, ops.matmul(A, initial_state), width)
        free = ops.matmul(ops.swapaxes(rows, -1, -2), columns)  # (b, ..., i, j)
        free = ops.reshape(free, (*ops.shape(free)[:-2], -1))[..., :length]
        y = y + ops.cast(ops.moveaxis(free, -1, 1), y.dtype)
    if not return_state:
        return y
    columns = _krylov(A, ops.expand_dims(B, -1), width)  # Ā^j B̄, (..., 2n, j)
    past = _past(ops.cast(x, A.dtype), count, width)
    state = _horner(far, ops.matmul(columns, ops.swapaxes(past, -1, -2)))
    if initial_state is not None:
        state = state + ops.matmul(_power(A, length), initial_state)
    return y, state[..., 0]


def _split(length, dtype):
    """The i m, (i,), and the j, (j,), for l = i m + j to count to the length."""
    if not isinstance(length, int):
        return length[::_WIDTH], ops.arange(0, _WIDTH, dtype=dtype)
    count, width = _sizes(length)
    return width * ops.arange(0, count, dtype=dtype), ops.arange(0, width, dtype=dtype)


def _sizes(length):
    """The numbers of i and of j, about √length each."""
    width = 2 ** math.ceil(math.log2(length) / 2)
    return -(-length // width), width


def _powers(rate, steps):
    """e^{steps r}: (..., n) and (steps,) -> pair of (..., steps, n)."""
    steps = ops.expand_dims(steps, -1)
    return exp(tuple(steps * ops.expand_dims(part, -2) for part in rate))


def _past(x, count, width):
    """The steps from the last to the first, (batch, ..., count, width)."""
    past = ops.moveaxis(ops.flip(x, axis=1), 1, -1)
    missing = count * width - x.shape[1]
    past = ops.pad(past, [(0, 0)] * (len(x.shape) - 1) + [(0, missing)])
    return ops.reshape(past, (-1, *x.shape[2:], count, width))


def _driven_state(x, rate, length):
    """Σ_l e^{l r} x_{T-1-l}, which x leaves behind: pair of (batch, ..., n)."""
    if isinstance(length, int):
        start, place = _split(length, rate[0].dtype)
        past = _past(x, start.shape[0], place.shape[0])
    else:  # a single block, of every mode at every step
        start, place = length[:1], length
        past = ops.expand_dims(ops.moveaxis(ops.flip(x, axis=1), 1, -1), -2)
    by_place = ops.concatenate(_powers(rate, place), axis=-1)  # (..., j, 2n)
    sums = ops.split(ops.matmul(past, by_place), 2, axis=-1)  # (b, ..., i, n)
    return tuple(ops.sum(z, axis=-2) for z in times(sums, _powers(rate, start)))


def _mean_of_exp(z):
    """(e^z - 1) / z, the mean of e^{sz} over s from 0 to 1, exact for small z too."""
    # e^x - 1 = tanh(x/2) (e^x + 1), and cos y - 1 = -2 sin²(y/2).
    scale, sin = ops.exp(z[0]), ops.sin(z[1] / 2.0)
    re = ops.tanh(z[0] / 2.0) * (scale + 1.0) - 2.0 * scale * ops.square(sin)
    small = ops.square(z[0]) + ops.square(z[1]) < 1e-30
    below = ops.where(small, ops.ones_like(z[0]), z[0]), z[1]
    mean = times((re, scale * ops.sin(z[1])), reciprocal(below))
    return ops.where(small, ops.ones_like(re), mean[0]), mean[1]


def _log_of_bilinear(z):
    """The logarithm of (1 + z/2) / (1 - z/2), finite also at z = -2."""
    re, im = z[0] / 2.0, z[1] / 2.0
    square = ops.square(re) + ops.square(im)
    # Near one the logarithm of the absolute value needs the series of artanh.
    s = 2.0 * re / (1.0 + square)
    series = 0.0
    for k in (9, 7, 5, 3, 1):
        series = series * ops.square(s) + 1.0 / k
    above = ops.square(1.0 + re) + ops.square(im)
    below = ops.square(1.0 - re) + ops.square(im)
    log = 0.5 * ops.log(ops.maximum(above, 1e-30) / below)
    size = ops.where(ops.abs(s) < 0.1, s * series, log)
    adjacent = 1.0 - square
    nowhere = ops.logical_and(adjacent == 0.0, im == 0.0)
    adjacent = ops.where(nowhere, ops.ones_like(adjacent), adjacent)
    return size, ops.arctan2(2.0 * im, adjacent)


def _resolvent_sums(half):
    """The function (z, v) -> Σ_n v_n / (2i sin - z_n cos) + v̄_n / (2i sin - z̄_n cos).

    z is (..., n) and v (..., m, n), given as real and imaginary parts; sin and cos are
    of `half` (f,). The result is (..., m, 2f), the imaginary parts after the real ones.
    A few n at a time are added, so that nothing of n times f elements exists, in the
    gradient neither.
    """

    def resolvents(re, im):
        """The pairs 1 / (2i sin - z cos) and the same of z̄, (..., n, f) each."""
        sin, cos = (_constant(f(half), re.dtype) for f in (np.sin, np.cos))
        re, im = cos * ops.expand_dims(re, -1), cos * ops.expand_dims(im, -1)
        return reciprocal((-re, 2.0 * sin - im)), reciprocal((-re, 2.0 * sin + im))

    def table(first, second):
        """What the real and the imaginary part of v count for, (..., 2n, 2f)."""
        (a, b), (c, d) = first, second
        by_real = ops.concatenate([a + c, b + d], axis=-1)
        by_imaginary = ops.concatenate([d - b, a - c], axis=-1)
        return ops.concatenate([by_real, by_imaginary], axis=-2)

    def term(z_re, z_im, v_re, v_im):
        v = ops.concatenate([v_re, v_im], axis=-1)
        return ops.matmul(v, table(*resolvents(z_re, z_im)))

    def gradients(z_re, z_im, v_re, v_im, upstream):
        first, second = resolvents(z_re, z_im)
        weights = ops.swapaxes(table(first, second), -1, -2)
        by_v = ops.split(ops.matmul(upstream, weights), 2, axis=-1)
        v = ops.concatenate([v_re, v_im], axis=-1)
        by_table = ops.matmul(ops.swapaxes(v, -1, -2), upstream)
        (ac, bd), (db, ca) = (
            ops.split(z, 2, axis=-1) for z in ops.split(by_table, 2, axis=-2)
        )
        # d(1/p) = -dp/p², and p is -z cos, or -z̄ cos, but for a constant.
        one = times((ac + ca, bd - db), conjugate(times(first, first)))
        two = times((ac - ca, bd + db), conjugate(times(second, second)))
        cos = _constant(np.cos(half), v_re.dtype)
        by_re = ops.sum(cos * (one[0] + two[0]), axis=-1)
        return by_re, ops.sum(cos * (one[1] - two[1]), axis=-1), *by_v

    @ops.custom_gradient
    def run(*arguments):
        size = int(arguments[0].shape[-1])  # TorchScript has tensors for sizes
        count = size // max(k for k in range(1, 9) if size % k == 0)
        parts = [ops.stack(ops.split(z, count, axis=-1)) for z in arguments]
        sums = term(*(z[0] for z in parts))
        if exporting() == "onnx":  # without a loop
            for k in range(1, count):
                sums = sums + term(*(z[k] for z in parts))
        else:
            sums = ops.fori_loop(
                1,
                count,
                lambda k, sums: sums + term(*(ops.take(z, k, axis=0) for z in parts)),
                sums,
            )

        def gradient(*args, upstream=None):
            upstream = args[0] if upstream is None else upstream
            found = ops.map(lambda part: gradients(*part, upstream), tuple(parts))
            return tuple(
                ops.concatenate(ops.unstack(z, num=count), axis=-1) for z in found
            )

        return sums, gradient

    return run


def _without_ranks(sums, cos):
    """s_CB of the table [[s_CB, s_CP ..], [s_P̄B, s_P̄P ..], ..] as A = diag Λ - Σ p p*.

    Each rank is removed by Sherman and Morrison's formula, or one step of Gauss.
    """
    for r in range(len(sums) - 1, 0, -1):
        re, im = sums[r][r]
        pivot = reciprocal((1.0 + cos * re, cos * im))
        for a in range(r):
            re, im = times(sums[a][r], pivot)
            for b in range(r):
                less = times((cos * re, cos * im), sums[r][b])
                sums[a][b] = sums[a][b][0] - less[0], sums[a][b][1] - less[1]
    return sums[0][0]


def _solved(matrix, columns):
    """The x of matrix x = columns: (..., n, n) and (..., n, k) -> (..., n, k).

    x·(matrix x) > 0 for every x, which those of a stable system fulfil: then blocks
    have inverses too, and an exported file, which has no solver, needs no pivots.
    """
    if exporting() is None:
        return ops.solve(matrix, columns)
    return ops.matmul(_inverse(matrix), columns)


def _inverse(matrix):
    """The inverse by halves: that of the first and of its Schur complement."""
    size = matrix.shape[-1]
    if size == 1:
        return 1.0 / matrix
    k = size // 2
    first, corner = _inverse(matrix[..., :k, :k]), matrix[..., k:, :k]
    right = ops.matmul(first, matrix[..., :k, k:])
    down = ops.matmul(corner, first)
    last = _inverse(matrix[..., k:, k:] - ops.matmul(corner, right))
    right = ops.matmul(right, last)
    above = ops.concatenate([first + ops.matmul(right, down), -right], axis=-1)
    below = ops.concatenate([-ops.matmul(last, down), last], axis=-1)
    return ops.concatenate([above, below], axis=-2)


def _power(matrix, exponent):
    """The matrix to a whole power of at least one, by squaring."""
    result = None
    while exponent:
        if exponent % 2:
            result = matrix if result is None else ops.matmul(result, matrix)
        matrix, exponent = ops.matmul(matrix, matrix), exponent // 2
    return result


def _krylov(matrix, vector, count):
    """v, Mv, ... M^{count-1} v: (..., n, n) and (..., n, 1) -> (..., n, count)."""
    vectors = vector
    while vectors.shape[-1] < count:
        vectors = ops.concatenate([vectors, ops.matmul(matrix, vectors)], axis=-1)
        matrix = ops.matmul(matrix, matrix)
    return vectors[..., :count]


def _horner(matrix, vectors):
    """Σ_i M^i v_i: (..., n, n) and (..., n, i) -> (..., n, 1), halving i each time."""
    while vectors.shape[-1] > 1:
        if vectors.shape[-1] % 2:
            vectors = ops.pad(vectors, [(0, 0)] * (len(vectors.shape) - 1) + [(0, 1)])
        vectors = vectors[..., ::2] + ops.matmul(matrix, vectors[..., 1::2])
        matrix = ops.matmul(matrix, matrix)
    return vectors


def _constant(array, dtype):
    return ops.convert_to_tensor(array, dtype=dtype)
