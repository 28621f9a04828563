"""Bases of functions of one variable: B-splines and others, and rational functions.

    B⁰_m(x) = [t_m <= x < t_{m+1}]
    Bᵖ_m(x) = (x - t_m) / (t_{m+p} - t_m) B^{p-1}_m(x)
            + (t_{m+p+1} - x) / (t_{m+p+1} - t_{m+1}) B^{p-1}_{m+1}(x)
    d/dx Bᵖ_m = p (B^{p-1}_m / (t_{m+p} - t_m) - B^{p-1}_{m+1} / (t_{m+p+1} - t_{m+1}))

with x/0 = 0: the recursion of Cox and de Boor (de Boor 1978, A Practical Guide to
Splines, chapters IX and X). A spline of order k on G intervals has G + 2k + 1 knots, k
of them beyond each end, and G + k bases, which sum to one between the ends. Liu et al.
2024, KAN, arXiv:2404.19756.

Bases are tensors in float32. What happens between epochs, knots and fits to samples,
is NumPy in float64.
"""

import numpy as np
from keras import ops

# B-splines on tensors.


def bspline_basis(x, knots, order=3):
    """The values of all bases at x, differentiable in x as often as the spline is.

    The backward pass takes the derivative's own formula: it keeps the input, not the
    recursion.

    Args:
        x: (..., i).
        knots: (i, n), ascending along the last axis, or (n,) for all i. They get no
            gradient.
        order: k, the degree of the pieces.

    Returns:
        (..., i, n - 1 - k) in x's dtype; zeros beyond the knots.
    """
    knots = ops.stop_gradient(ops.cast(knots, "float32"))
    y = _differentiable(order)(ops.cast(x, "float32"), knots)
    return ops.cast(y, x.dtype)


def bspline_derivative(x, knots, order=3):
    """d/dx of the bases; arguments and shape as in `bspline_basis`."""
    knots = ops.stop_gradient(ops.cast(knots, "float32"))
    y = _slopes(ops.cast(x, "float32"), knots, order, _differentiable(order - 1))
    return ops.cast(y, x.dtype)


def _differentiable(order):
    """The function (x, knots) -> bases whose gradient is the formula of the module."""

    @ops.custom_gradient
    def basis(x, knots):
        def gradient(*args, upstream=None):
            upstream = args[0] if upstream is None else upstream
            slopes = _slopes(x, knots, order, _differentiable(order - 1))
            return ops.sum(upstream * slopes, axis=-1), ops.zeros_like(knots)

        x_column = ops.expand_dims(x, -1)
        steps = _steps(x_column, knots)
        return _cox_de_boor(x_column, knots, order, steps, _inverse), gradient

    return basis


def _steps(x, knots):
    """Bases of order zero, (..., i, n - 1)."""
    inside = ops.logical_and(x >= knots[..., :-1], x < knots[..., 1:])
    return ops.cast(inside, x.dtype)


def _inverse(width):
    """1 / width, zero where the knots coincide."""
    return ops.where(width > 0, 1.0 / ops.where(width > 0, width, 1.0), 0.0)


def _cox_de_boor(x, knots, order, bases, inverse):
    """Bases of `order` from those of order zero, for arrays as well as for tensors."""
    for p in range(1, order + 1):
        by_width = inverse(knots[..., p:] - knots[..., :-p])
        rising = (x - knots[..., : -p - 1]) * by_width[..., :-1]
        falling = (knots[..., p + 1 :] - x) * by_width[..., 1:]
        bases = rising * bases[..., :-1] + falling * bases[..., 1:]
    return bases


def _slopes(x, knots, order, lower):
    """Derivatives of the bases, from the function `lower` for those one order below."""
    if order == 0:
        column = ops.expand_dims(x, -1)
        return ops.zeros_like(_steps(column, knots))
    by_width = order * _inverse(knots[..., order:] - knots[..., :-order])
    bases = lower(x, knots) * by_width
    return bases[..., :-1] - bases[..., 1:]


# Knots and fits in NumPy.


def uniform_knots(low, high, grid_size, order=3):
    """G + 1 knots from `low` to `high`, and k more on each side at the same distance.

    Args:
        low: where the first interval begins.
        high: where the last one ends.
        grid_size: G, number of intervals.
        order: k.

    Returns:
        NumPy array (G + 2k + 1,), float64.
    """
    return extended_knots(np.linspace(low, high, grid_size + 1), order)


def extended_knots(points, order=3):
    """Adds k knots beyond each end, at the mean distance of the points.

    Args:
        points: (..., G + 1), ascending.
        order: k.

    Returns:
        NumPy array (..., G + 2k + 1), float64.
    """
    points = np.asarray(points, "float64")
    first, last = points[..., :1], points[..., -1:]
    step = (last - first) / (points.shape[-1] - 1)
    beyond = np.arange(1, order + 1)
    before, after = first - step * beyond[::-1], last + step * beyond
    return np.concatenate([before, points, after], axis=-1)


def adapted_knots(x, grid_size, order=3, grid_eps=0.02):
    """Knots where the samples are: a mean of uniform ones and of quantiles.

    Args:
        x: (n, i), samples. One that never varies is taken for an interval of length
            one around its value.
        grid_size: G.
        order: k.
        grid_eps: weight of the uniform points; that of the quantiles is the rest.

    Returns:
        NumPy array (i, G + 2k + 1), float64.
    """
    x = np.asarray(x, "float64")
    share = np.linspace(0.0, 1.0, grid_size + 1)
    quantiles = np.quantile(x, share, axis=0).T  # (i, G + 1)
    low, high = quantiles[:, :1], quantiles[:, -1:]
    constant = high <= low
    low, high = np.where(constant, low - 0.5, low), np.where(constant, high + 0.5, high)
    uniform = low + (high - low) * share
    mixed = grid_eps * uniform + (1.0 - grid_eps) * quantiles
    return extended_knots(np.where(constant, uniform, mixed), order)


def spline_values(x, knots, coefficients, order=3):
    """Each edge's spline at samples, in float64.

    Args:
        x: (n, i).
        knots: (i, G + 2k + 1), or (G + 2k + 1,) for all i.
        coefficients: (i, o, G + k).
        order: k.

    Returns:
        NumPy array (n, i, o).
    """
    bases = _numpy_basis(x, knots, order)
    return np.einsum("nim,iom->nio", bases, np.asarray(coefficients, "float64"))


def fit_coefficients(x, y, knots, order=3):
    """Coefficients of the splines nearest to samples, by least squares in float64.

    Where the samples do not determine them, the shortest vector is taken.

    Args:
        x: (n, i).
        y: (n, i, o), the value of each edge at its x.
        knots: (i, G + 2k + 1), or (G + 2k + 1,) for all i.
        order: k.

    Returns:
        NumPy array (i, o, G + k).
    """
    bases, y = _numpy_basis(x, knots, order), np.asarray(y, "float64")
    fits = [np.linalg.lstsq(bases[:, i], y[:, i])[0] for i in range(y.shape[1])]
    return np.stack(fits).swapaxes(1, 2)


def refit_coefficients(x, coefficients, knots, new_knots, order=3):
    """Coefficients on new knots for the same values at samples.

    Args:
        x: (n, i), samples.
        coefficients: (i, o, G + k).
        knots: those that the coefficients belong to.
        new_knots: of any number G' + 2k + 1.
        order: k.

    Returns:
        NumPy array (i, o, G' + k).
    """
    values = spline_values(x, knots, coefficients, order)
    return fit_coefficients(x, values, new_knots, order)


def _numpy_basis(x, knots, order):
    x, knots = np.asarray(x, "float64")[..., None], np.asarray(knots, "float64")
    steps = ((x >= knots[..., :-1]) & (x < knots[..., 1:])).astype("float64")

    def inverse(width):
        return np.divide(1.0, width, out=np.zeros_like(width), where=width > 0)

    return _cox_de_boor(x, knots, order, steps, inverse)


# Other bases.


def chebyshev_basis(x, degree):
    """T_0 ... T_degree: T_0 = 1, T_1 = x, T_n = 2 x T_{n-1} - T_{n-2}.

    Args:
        x: (..., i), from -1 to 1, as tanh gives it.
        degree: of the last polynomial.

    Returns:
        (..., i, degree + 1).
    """
    z = ops.cast(x, "float32")
    terms = [ops.ones_like(z), z]
    for _ in range(2, degree + 1):
        terms.append(2.0 * z * terms[-1] - terms[-2])
    return ops.cast(ops.stack(terms[: degree + 1], axis=-1), x.dtype)


def fourier_basis(x, grid_size):
    """cos(n x) and sin(n x) for n = 1 ... grid_size.

    Args:
        x: (..., i).
        grid_size: number of frequencies.

    Returns:
        (..., i, 2 grid_size), cosines first.
    """
    frequencies = ops.arange(1, grid_size + 1, dtype="float32")
    angles = ops.expand_dims(ops.cast(x, "float32"), -1) * frequencies
    y = ops.concatenate([ops.cos(angles), ops.sin(angles)], axis=-1)
    return ops.cast(y, x.dtype)


def rbf_basis(x, low, high, grid_size):
    """exp(-((x - c) / h)²) at `grid_size` centres c from `low` to `high`, h apart.

    Li 2024, FastKAN, arXiv:2405.06721.

    Args:
        x: (..., i).
        low: first centre.
        high: last centre.
        grid_size: number of centres, two or more.

    Returns:
        (..., i, grid_size).
    """
    width = (high - low) / (grid_size - 1)
    centres = ops.convert_to_tensor(np.linspace(low, high, grid_size, dtype="float32"))
    distance = (ops.expand_dims(ops.cast(x, "float32"), -1) - centres) / width
    return ops.cast(ops.exp(-ops.square(distance)), x.dtype)


def sine_basis(x, frequencies, phases):
    """sin(ω_m x_i + φ_im).

    Reinhardt et al. 2024, SineKAN, arXiv:2407.04149.

    Args:
        x: (..., i).
        frequencies: ω, (m,).
        phases: φ, (i, m) or (m,).

    Returns:
        (..., i, m).
    """
    frequencies = ops.cast(frequencies, "float32")
    angles = ops.expand_dims(ops.cast(x, "float32"), -1) * frequencies
    return ops.cast(ops.sin(angles + ops.cast(phases, "float32")), x.dtype)


# Rational functions.


def group_rational(x, numerator, denominator, form="abs_sum"):
    """(a_0 + a_1 x + ... ) / Q(x) with one Q for each group of channels.

        "abs_sum":  Q = 1 + |b_1| |x| + |b_2| |x|² + ...
        "paper":    Q = 1 + |b_1 x + b_2 x² + ...|

    Q is never below one. Yang & Wang 2024, KAT, arXiv:2409.10594; the first form is
    that of their code, and so is the slope of one that |z| has at zero, without which
    b = 0 would never learn.

    Args:
        x: (..., c).
        numerator: a, (m + 1,) for all groups or (groups, m + 1).
        denominator: b, (groups, n); channel j is in group j // (c / groups).
        form: "abs_sum" or "paper".

    Returns:
        (..., c) in x's dtype, computed in float32.

    Raises:
        ValueError: the groups do not divide the channels, or the form is unknown.
    """
    groups, channels = denominator.shape[0], x.shape[-1]
    if channels % groups:
        raise ValueError(
            f"the channels must be a multiple of the {groups} groups, received "
            f"{channels}; change one of them"
        )
    if form not in ("abs_sum", "paper"):
        raise ValueError(f"form must be 'abs_sum' or 'paper', received {form!r}")
    z = ops.cast(x, "float32")
    a, b = ops.cast(numerator, "float32"), ops.cast(denominator, "float32")
    a = _per_channel(a, channels) if len(a.shape) == 2 else a
    b = _per_channel(b, channels)
    top = _horner(z, a)
    if form == "abs_sum":
        size = _absolute(z)
        below = size * _horner(size, _absolute(b))
    else:
        below = _absolute(z * _horner(z, b))
    return ops.cast(top / (1.0 + below), x.dtype)


def _per_channel(coefficients, channels):
    """(groups, n) -> (channels, n)."""
    return ops.repeat(coefficients, channels // coefficients.shape[0], axis=0)


def _horner(x, coefficients):
    """Σ_n coefficients[..., n] xⁿ, coefficients (n,) or (c, n)."""
    value = coefficients[..., -1]
    for n in range(coefficients.shape[-1] - 2, -1, -1):
        value = value * x + coefficients[..., n]
    return value


def _absolute(x):
    """|x| with the slope 1 at zero."""
    return ops.where(x < 0, -x, x)
