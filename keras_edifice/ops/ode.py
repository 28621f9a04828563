"""Ordinary differential equations: fixed steps, steps after the error, the adjoint.

    dy/dt = f(t, y)
    k_i = f(t_n + c_i Δ, y_n + Δ Σ_j a_ij k_j),    y_{n+1} = y_n + Δ Σ_i b_i k_i
    a(t) = ∂L/∂y(t):    da/dt = -aᵀ ∂f/∂y,    dL/dθ = -∫ aᵀ ∂f/∂θ dt from t_1 to t_0

The second line is a step of Runge and Kutta; `dopri5` (Dormand & Prince 1980) also
gives an estimate of its error, and so can choose its steps (Hairer, Nørsett & Wanner
1993, II.4). The third line is the adjoint method of Chen et al. 2018, Neural Ordinary
Differential Equations, arXiv:1806.07366: it needs no memory of the steps.

A dynamics `fn` is called as fn(t, y) with t (batch,) and y (batch, ...) and gives
dy/dt, shaped as y. It must not change state while it runs.
"""

from typing import NamedTuple

from keras import backend, ops

from keras_edifice.ops.gradients import vjp
from keras_edifice.ops.precision import exact_dtype
from keras_edifice.ops.tracing import exporting

UNROLLED = 16
"""Repetitions up to which a loop may be written out."""


class Tableau(NamedTuple):
    """Coefficients of an explicit Runge-Kutta step, without those that are zero."""

    nodes: tuple = ()
    """c of each stage after the first."""
    rows: tuple = ()
    """a of each stage after the first."""
    weights: tuple = (1.0,)
    """b."""
    errors: tuple | None = None
    """b - b̂ for a second solution b̂; the last stage is f at the end of the step."""


TABLEAUS = {
    "euler": Tableau(),
    "midpoint": Tableau((1 / 2,), ((1 / 2,),), (0.0, 1.0)),
    "heun": Tableau((1.0,), ((1.0,),), (1 / 2, 1 / 2)),
    "rk4": Tableau(
        (1 / 2, 1 / 2, 1.0),
        ((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)),
        (1 / 6, 1 / 3, 1 / 3, 1 / 6),
    ),
    "rk4_38": Tableau(
        (1 / 3, 2 / 3, 1.0),
        ((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
        (1 / 8, 3 / 8, 3 / 8, 1 / 8),
    ),
    "dopri5": Tableau(
        (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0),
        (
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        ),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        # b̂ of Shampine 1986, a third of b and two thirds of Dormand and Prince's.
        (
            35 / 384 - 1951 / 21600,
            0.0,
            500 / 1113 - 22642 / 50085,
            125 / 192 - 451 / 720,
            -2187 / 6784 + 12231 / 42400,
            11 / 84 - 649 / 6300,
            -1 / 60,
        ),
    ),
}
"""Method -> its coefficients. "rk4_38" is the 3/8 rule of Kutta."""

METHODS = tuple(TABLEAUS)


class _Plan(NamedTuple):
    """How an interval is crossed; `num_steps` None means by steps after the error."""

    method: str
    num_steps: int | None
    rtol: float
    atol: float
    max_steps: int


def ode_step(fn, t, y, dt, method="rk4"):
    """One step of a method, from y(t) to y(t + dt).

    Args:
        fn: the dynamics.
        t: (batch,) or a number.
        y: (batch, ...).
        dt: (batch,) or a number.
        method: one of `METHODS`.

    Raises:
        ValueError: unknown method.
    """
    _check(method, 1)
    tableau, field = TABLEAUS[method], _listed(fn, y.dtype)
    stages = _stages(field, t, [y], dt, tableau)
    return _moved([y], dt, tableau.weights, stages)[0]


def dopri5_step(fn, t, y, dt):
    """One step of "dopri5" and the difference to its solution of fourth order.

    Arguments as in `ode_step`. Returns (y(t + dt), error), both shaped as y; the error
    is of the order dt⁵.
    """
    field = _listed(fn, y.dtype)
    (new,), _, (error,) = _embedded(field, t, [y], dt, field(t, [y]))
    return new, error


def odeint(
    fn,
    y0,
    t,
    method="dopri5",
    num_steps=None,
    rtol=1e-3,
    atol=1e-6,
    max_steps=256,
    return_nfe=False,
):
    """The solution at given times, differentiable in y0, t and what `fn` depends on.

    Steps after the error are those of each example by itself: its solution does not
    depend on the rest of the batch. An example that has not arrived after `max_steps`
    attempts is NaN from there on. Training keeps the stages of every step in memory,
    with steps after the error of every attempt; `odeint_adjoint` does not.

    Args:
        fn: the dynamics.
        y0: (batch, ...), the state at the first time.
        t: (times,) or (batch, times), rising or falling; a known number of times.
        method: one of `METHODS`.
        num_steps: equal steps between two times. None takes steps after the error,
            which "dopri5" alone can.
        rtol: relative part of the tolerated error of a step.
        atol: absolute part.
        max_steps: attempts between two times, for steps after the error.
        return_nfe: whether to give the number of evaluations of `fn` as well.

    Returns:
        (batch, times, ...) in the dtype of y0, computed in float32 (float64 for a
        float64 y0); with `return_nfe` also (batch,).

    Raises:
        ValueError: unknown method; no `num_steps` for a method without an error.
    """
    _check(method, num_steps)
    plan = _Plan(method, num_steps, rtol, atol, max_steps)
    dtype, exact = y0.dtype, exact_dtype(y0)
    y = ops.cast(y0, exact)
    ys, nfe = _trajectory(_listed(fn, exact), y, _times(t, y), plan)
    ys = ops.cast(ys, dtype)
    return (ys, nfe) if return_nfe else ys


def odeint_adjoint(
    fn,
    y0,
    t,
    params,
    method="dopri5",
    num_steps=None,
    rtol=1e-3,
    atol=1e-6,
    max_steps=256,
):
    """`odeint` with the gradient by the adjoint method, which keeps no steps in memory.

    The backward pass integrates y, its adjoint and the gradient in the parameters from
    each time to the one before, in the way of the forward pass; with steps after the
    error it takes the same ones for the whole batch, and the gradient is NaN if
    `max_steps` are too few. There is no gradient in t.

    Args:
        fn: called as fn(t, y, *params). A network with weights is called by
            `stateless_call`; what is not among the parameters gets no gradient.
        y0: (batch, ...), the state at the first time.
        t: (times,) or (batch, times), rising or falling; a known number of times.
        params: list of float tensors or weights that `fn` depends on.
        method: one of `METHODS`.
        num_steps: equal steps between two times; None as in `odeint`.
        rtol: relative part of the tolerated error of a step.
        atol: absolute part.
        max_steps: attempts between two times, for steps after the error.

    Returns:
        (batch, times, ...) in the dtype of y0.

    Raises:
        ValueError: unknown method; no `num_steps` for a method without an error.
    """
    _check(method, num_steps)
    plan = _Plan(method, num_steps, rtol, atol, max_steps)
    dtype, exact = y0.dtype, exact_dtype(y0)
    y = ops.cast(y0, exact)
    # A product is a computed tensor: custom gradients do not take weights themselves.
    params = [ops.convert_to_tensor(p) * 1.0 for p in params]
    return ops.cast(_adjoint(fn, plan, exact)(y, _times(t, y), *params), dtype)


def _adjoint(fn, plan, exact):
    """The function (y0, times, *params) -> states, with the adjoint as gradient."""

    @ops.custom_gradient
    def run(y, times, *params):
        def dynamics(t, y):
            return fn(t, y, *params)

        ys, _ = _trajectory(_listed(dynamics, exact), y, times, plan)
        # PyTorch would keep an output that its own gradient holds on to.
        kept, count = ops.stop_gradient(ys), times.shape[1]

        def gradient(*args, upstream=None):
            upstream = args[0] if upstream is None else upstream

            def interval(i, carry):
                end = count - 1 - i  # of the interval; the backward pass begins there
                z, start = _at(kept, end), _at(times, end)
                field = _backward(fn, exact, start, _at(times, end - 1), params)
                _, adjoint, *by_params = _crossed(field, [z, *carry], plan)
                return [adjoint + _at(upstream, end - 1), *by_params]

            carry = [_at(upstream, count - 1)]
            carry += [ops.zeros_like(p, dtype=exact) for p in params]
            by_y, *by_params = _repeat(interval, carry, count - 1)
            pairs = zip(by_params, params, strict=True)
            by_params = [ops.cast(g, p.dtype) for g, p in pairs]
            return (by_y, ops.zeros_like(times), *by_params)

        return ys, gradient

    return run


def _backward(fn, exact, start, end, params):
    """The field of [y, a, *g] over the unit of time that takes start to end.

    Each example has a time of its own; the steps are of the unit and so the same.
    """
    span = end - start

    def field(s, state):
        y, adjoint, *_ = state

        def speed(y, *params):
            dy = ops.cast(fn(start + s * span, y, *params), exact)
            return _spread(span, y) * dy

        dy, (by_y, *by_params) = vjp(speed, [y, *params], adjoint)
        return [dy, -by_y, *(-ops.cast(g, exact) for g in by_params)]

    return field


def _crossed(field, state, plan):
    """The state after the unit of time, with steps that all its tensors share."""
    zero = ops.sum(ops.zeros_like(state[0]))
    if plan.num_steps is not None:
        return _fixed_steps(field, state, zero, zero + 1.0, plan)
    f = field(zero, state)
    h = _first_step(field, zero, state, f, 1.0, plan)
    return _chosen_steps(field, [h, zero], state, f, zero, zero + 1.0, plan)[1]


def _trajectory(field, y, times, plan):
    """States (batch, times, ...) and the evaluations of the field (batch,)."""
    if plan.num_steps is not None:

        def advance(carry, start, end):
            return _fixed_steps(field, carry, start, end, plan)

        carry = [y]
    else:

        def advance(carry, start, end):
            y, f, *control = carry
            control, (y,), (f,) = _chosen_steps(
                field, control, [y], [f], start, end, plan
            )
            return [y, f, *control]

        start = times[:, 0]
        (f,) = field(start, [y])
        direction = ops.sign(times[:, -1] - start)
        h = _first_step(field, start, [y], [f], direction, plan)
        carry = [y, f, h, ops.zeros_like(h) + 2.0]
    ys, carry = _over_times(advance, carry, times)
    if plan.num_steps is None:
        return ys, carry[-1]
    steps = (times.shape[1] - 1) * plan.num_steps
    return ys, ops.zeros_like(times[:, 0]) + steps * len(TABLEAUS[plan.method].weights)


def _over_times(advance, carry, times):
    """Goes from time to time; the first of the carry at each, and the last carry."""
    count, first = times.shape[1] - 1, carry[0]
    if exporting() == "onnx" or _written_out(count):
        ys = [first]
        for k in range(count):
            carry = advance(carry, times[:, k], times[:, k + 1])
            ys.append(carry[0])
        return ops.stack(ys, axis=1), carry

    def step(carry, interval):
        carry = advance(list(carry), *interval)
        return carry, carry  # TensorFlow wants outputs that are shaped as the carry

    times = ops.transpose(times)
    carry, outputs = ops.scan(step, carry, (times[:-1], times[1:]))
    ys = ops.concatenate([ops.expand_dims(first, 0), outputs[0]], axis=0)
    return ops.swapaxes(ys, 0, 1), carry


def _fixed_steps(field, y, start, end, plan):
    """`num_steps` equal steps from start to end."""
    tableau = TABLEAUS[plan.method]
    dt = (end - start) / plan.num_steps

    def step(i, y):
        t = start + _as_float(i, dt) * dt
        return _moved(y, dt, tableau.weights, _stages(field, t, y, dt, tableau))

    return _repeat(step, y, plan.num_steps)


def _chosen_steps(field, control, y, f, start, end, plan):
    """Steps of "dopri5" after the error, from start to end.

    Args:
        field: the dynamics, of a list of tensors.
        control: [size of the next step, evaluations so far].
        y: list of tensors, the state at start.
        f: list of tensors, the field there.
        start: (batch,), or a number for steps that the whole batch shares.
        end: the same.
        plan: with the tolerances and the number of attempts.

    Returns:
        ([size of the next step, evaluations], state at end, field there).
    """
    size = len(y)
    total, direction = ops.abs(end - start), ops.sign(end - start)

    def attempt(i, carry):
        passed, running, h, nfe = carry[:4]
        y, f = carry[4 : 4 + size], carry[4 + size :]
        left = total - passed
        last = h >= left
        # Only the last step carries a gradient in time: it makes up for the others.
        length = running * ops.where(last, left, ops.stop_gradient(h))
        t, dt = start + direction * passed, direction * length
        new, new_f, error = _embedded(field, t, y, dt, f)
        ratio = _ratio(error, y, new, len(start.shape), plan)
        accepted = ops.logical_and(running > 0.0, ratio <= 1.0)
        arrived = ops.cast(ops.logical_and(accepted, last), running.dtype)
        h = ops.where(running > 0.0, length * _growth(ratio), h)
        return [
            ops.where(accepted, passed + length, passed),
            running * (1.0 - arrived),
            ops.stop_gradient(h),
            nfe + 6.0 * running,
            *_where(accepted, new, y),
            *_where(accepted, new_f, f),
        ]

    running = ops.stop_gradient(ops.cast(total > 0.0, total.dtype))
    carry = [ops.zeros_like(total), running, *control, *y, *f]
    carry = _repeat(attempt, carry, plan.max_steps, lambda carry: carry[1])
    _, running, h, nfe = carry[:4]
    y, f = carry[4 : 4 + size], carry[4 + size :]
    # Beyond the attempts there is no solution to give.
    known = ops.where(running > 0.0, float("nan"), 1.0)
    return [h, nfe], [x * ops.cast(_spread(known, x), x.dtype) for x in y], f


def _first_step(field, t, y, f, direction, plan):
    """The size that Hairer et al. begin with: (batch,), or a number if t is one."""
    rank = len(t.shape)
    y, f = [ops.stop_gradient(x) for x in y], [ops.stop_gradient(x) for x in f]
    scales = [plan.atol + plan.rtol * ops.abs(x) for x in y]
    d0, d1 = _rms(y, scales, rank), _rms(f, scales, rank)
    known = ops.logical_and(d0 >= 1e-5, d1 >= 1e-5)
    h0 = ops.where(known, 0.01 * d0 / ops.maximum(d1, 1e-5), 1e-6)
    moved = _moved(y, direction * h0, (1.0,), [f])
    later = [ops.stop_gradient(x) for x in field(t + direction * h0, moved)]
    change = [a - b for a, b in zip(later, f, strict=True)]
    d2 = _rms(change, scales, rank) / h0
    h1 = _power(0.01 / ops.maximum(ops.maximum(d1, d2), 1e-15), 1 / 5)
    return ops.stop_gradient(ops.minimum(100.0 * h0, h1))


def _ratio(error, y, new, rank, plan):
    """RMS of the error in units of what is tolerated; no gradient flows through it."""
    error, y, new = ([ops.stop_gradient(x) for x in z] for z in (error, y, new))
    largest = [ops.maximum(ops.abs(a), ops.abs(b)) for a, b in zip(y, new, strict=True)]
    ratio = _rms(error, [plan.atol + plan.rtol * x for x in largest], rank)
    return ops.where(ratio < 1e10, ratio, 1e10)  # also what is not a number


def _growth(ratio):
    """The factor from the size of an attempt to that of the next."""
    least = ops.where(ratio <= 1.0, 1.0, 0.2)
    wanted = 0.9 * _power(ops.maximum(ratio, 1e-10), -1 / 5)
    return ops.minimum(ops.maximum(wanted, least), 10.0)


def _rms(tensors, scales, rank):
    """Root mean square of tensors / scales, of each example if rank is 1.

    Of several tensors the largest counts.
    """
    norms = []
    for x, scale in zip(tensors, scales, strict=True):
        axes = tuple(range(rank, len(x.shape)))
        squares = ops.square(x / scale)
        norms.append(ops.sqrt(ops.mean(squares, axis=axes) if axes else squares))
    norm = norms[0]
    for other in norms[1:]:
        norm = ops.maximum(norm, other)
    return norm


def _stages(field, t, y, dt, tableau, first=None):
    """k_1, k_2, ... of a step, a list of tensors each."""
    stages = [field(t, y) if first is None else first]
    for node, row in zip(tableau.nodes, tableau.rows, strict=True):
        stages.append(field(t + node * dt, _moved(y, dt, row, stages)))
    return stages


def _embedded(field, t, y, dt, f):
    """A step of "dopri5" from y with the field f: new state, field there, error."""
    tableau = TABLEAUS["dopri5"]
    stages = _stages(field, t, y, dt, tableau, f)
    new = _moved(y, dt, tableau.weights, stages)
    new_f = field(t + dt, new)
    sums = _weighted(tableau.errors, [*stages, new_f])
    return new, new_f, [_spread(dt, x) * x for x in sums]


def _moved(y, dt, weights, stages):
    """The list y, each tensor moved by dt Σ weights stages."""
    sums = _weighted(weights, stages)
    return [x + _spread(dt, x) * total for x, total in zip(y, sums, strict=True)]


def _weighted(weights, stages):
    """Σ weights stages, for each tensor of a stage."""
    pairs = [(w, k) for w, k in zip(weights, stages, strict=True) if w]
    terms = [[w * x for x in k] for w, k in pairs]
    return [sum(rest, start=first) for first, *rest in zip(*terms, strict=True)]


def _where(condition, new, old):
    return [
        ops.where(_spread(condition, a), a, b) for a, b in zip(new, old, strict=True)
    ]


def _spread(value, x):
    """(batch,) with as many axes as x has; a number as it is."""
    if not getattr(value, "shape", ()):
        return value
    return ops.reshape(value, (-1,) + (1,) * (len(x.shape) - 1))


def _repeat(body, carry, count, running=None):
    """body(i, carry) `count` times, or until nothing in running(carry) is above zero.

    Where it is a loop of the graph, i is a tensor. In an exported file the number is
    fixed: tracers keep the decisions of the example that they saw.
    """
    name, may_stop = backend.backend(), running is not None
    if _written_out(count, may_stop):
        if may_stop and exporting() and count > 4 * UNROLLED:
            raise ValueError(
                f"the file would hold {count} attempts one after another, expected at "
                f"most {4 * UNROLLED}; lower max_steps, or take equal steps"
            )
        stops = may_stop and name == "torch" and not exporting()
        for i in range(count):
            if stops and not _any(running(carry)):
                break
            carry = body(i, carry)
        return carry
    if name == "jax":

        def step(i, carry):
            if not may_stop or exporting():
                return body(i, carry)
            goes_on = _any(running(carry))
            return ops.cond(goes_on, lambda: body(i, carry), lambda: carry)

        return ops.fori_loop(0, count, step, carry)

    def goes_on(i, *carry):
        return _any(running(carry)) if may_stop else i < count

    # XLA differentiates a loop of TensorFlow only with a bound.
    _, *carry = ops.while_loop(
        goes_on,
        lambda i, *carry: (i + 1, *body(i, list(carry))),
        (0, *carry),
        maximum_iterations=count,
    )
    return carry


def _written_out(count, may_stop=False):
    """Whether repetitions are written out: on PyTorch all, as its loops are that.

    The ONNX exporter of JAX takes no loop that looks at tensors outside of it, and many
    steps written out only slowly: those are left to another exporter.
    """
    name = backend.backend()
    if name == "torch" or count <= 1:
        return True
    if name == "jax":
        return exporting() == "onnx" and count <= UNROLLED
    return count <= UNROLLED and not may_stop


def _any(running):
    return ops.any(running > 0.0)


def _at(x, i):
    """x[:, i] for a number or a tensor i."""
    return x[:, i] if isinstance(i, int) else ops.take(x, i, axis=1)


def _as_float(i, like):
    return i if isinstance(i, int) else ops.cast(i, like.dtype)


def _power(x, exponent):
    """The power of an x > 0, in operations that every exporter takes."""
    return ops.exp(exponent * ops.log(x))


def _listed(fn, exact):
    """The dynamics of one tensor as that of a list, which the steps work on."""
    return lambda t, y: [ops.cast(fn(t, y[0]), exact)]


def _times(t, y):
    """(batch, times) in the dtype of y."""
    t = ops.cast(ops.convert_to_tensor(t), y.dtype)
    if len(t.shape) == 2:
        return t
    example = y
    while len(example.shape) > 1:
        example = example[:, 0]
    return ops.expand_dims(ops.zeros_like(example), 1) + t


def _check(method, num_steps):
    if method not in METHODS:
        raise ValueError(
            f"method must be one of {', '.join(map(repr, METHODS))}, "
            f"received {method!r}"
        )
    if num_steps is None and TABLEAUS[method].errors is None:
        raise ValueError(
            f"method {method!r} has no error to choose its steps after; "
            "pass num_steps, or method='dopri5'"
        )
