"""Tokens to experts: who computes what, and how the results come together.

    token choice     each token takes its k most probable experts
    expert choice    each expert takes its C most probable tokens
    soft             each slot takes a mean of all tokens, each token one of all slots

Both choices are given as gates and slots, (group, token, expert) each: the weight of
the expert's output in that of the token, and the token's place in the expert's queue,
-1 where it is in none. Places from the capacity C on are dropped: their gate is zero.
The same as tensors of Lepikhin et al. 2020, GShard, arXiv:2006.16668:

    dispatch[g, t, e, c] = [slots[g, t, e] = c],    combine = gates · dispatch
    inputs = einsum("gtec,gtd->gecd", dispatch, x)
    outputs = einsum("gtec,gech->gth", combine, experts(inputs))

`expert_inputs` and `expert_outputs` give these numbers by gathering and adding rows,
in memory linear in the number of tokens; an export takes the tensors. Everything of
the router is computed in float32, and a masked token is in no queue.
"""

import math

from keras import ops

from keras_edifice.ops.graph import gather_nodes, segment_reduce
from keras_edifice.ops.positions import positions
from keras_edifice.ops.straight_through import one_hot_max
from keras_edifice.ops.tracing import exporting, static_length

PRIORITIES = ("order", "probability")


def top_k_mask(scores, k, mask=None):
    """Marks the k largest entries of the last axis, of equal ones the first.

    Args:
        scores: (..., n).
        k: a number, or a tensor that broadcasts to (..., 1).
        mask: broadcastable to the scores, which may be marked; None for all.

    Returns:
        (..., n), zeros and ones in float32, without a gradient.
    """
    scores = ops.stop_gradient(ops.cast(scores, "float32"))
    if mask is not None:
        mask = ops.cast(mask, "bool")
        scores = ops.where(mask, scores, float("-inf"))
    k = ops.cast(k, "float32")
    ordered = ops.flip(ops.sort(scores, axis=-1), axis=-1)
    among = ops.where(positions(ordered, -1) < k, ordered, float("inf"))
    last = ops.min(among, axis=-1, keepdims=True)
    above = ops.cast(scores > last, "float32")
    equal = ops.cast(ops.equal(scores, last), "float32")
    left = k - ops.sum(above, axis=-1, keepdims=True)
    marked = above + equal * ops.cast(
        ops.cumsum(equal, axis=-1) < left + 0.5, "float32"
    )
    return marked if mask is None else marked * ops.cast(mask, "float32")


# Tokens choose, experts choose.


def expert_capacity(tokens, num_experts, k=1, capacity_factor=1.0):
    """Places in an expert's queue: ceil(capacity_factor · k · tokens / num_experts).

    At least one, and at most one for each token.

    Args:
        tokens: number of tokens of a group, or a tensor whose axis 1 they are; that
            way the number may be unknown.
        num_experts: E.
        k: experts of a token.
        capacity_factor: places for each token that is expected.

    Returns:
        A number, or a float32 tensor without a shape where the length is unknown.
    """
    count = tokens if isinstance(tokens, int) else static_length(tokens)
    share = capacity_factor * k / num_experts
    if count is not None:  # less a little, as 1.1 · 10 is above 11
        return max(1, min(count, math.ceil(share * count - 1e-6)))
    count = ops.max(positions(tokens)) + 1.0
    return ops.maximum(ops.minimum(ops.ceil(share * count - 1e-6), count), 1.0)


def token_choice(
    probabilities, k, capacity=None, *, normalize=False, priority="order", mask=None
):
    """Each token takes the k experts that are most probable for it.

    First choices come before second ones, and so on; among those of one rank,
    `priority` decides. So what a token gets depends on later ones where more than one
    choice, or another priority than the order, meets a capacity. Shazeer et al. 2017,
    arXiv:1701.06538; Fedus et al. 2021, arXiv:2101.03961; by probability: Riquelme et
    al. 2021, V-MoE, arXiv:2106.05974.

    Args:
        probabilities: (g, t, e), of the router.
        k: experts of a token.
        capacity: places of an expert, number or tensor; None for no limit.
        normalize: whether the gates of a token sum to one, before any is dropped;
            they are its probabilities otherwise.
        priority: "order", earlier tokens first, or "probability", tokens with the
            largest probability first.
        mask: (g, t), which tokens are real.

    Returns:
        Gates (g, t, e) in float32 and slots (g, t, e) in int32.

    Raises:
        ValueError: k is not from 1 to e, or the priority is unknown.
    """
    if not 1 <= k <= probabilities.shape[-1]:
        raise ValueError(
            f"k must be from 1 to the number of experts, {probabilities.shape[-1]}, "
            f"received {k}; change one of them"
        )
    if priority not in PRIORITIES:
        raise ValueError(f"priority must be one of {PRIORITIES}, received {priority!r}")
    p = ops.cast(probabilities, "float32")
    count_before = _counting(p, priority)
    real = 1.0 if mask is None else ops.expand_dims(ops.cast(mask, "float32"), -1)
    chosen = ops.zeros_like(p)
    slots, taken = chosen - 1.0, 0.0
    for _ in range(k):
        choice = one_hot_max(p, allowed=chosen < 0.5) * real
        slots = ops.where(choice > 0, count_before(choice) + taken, slots)
        taken = taken + ops.sum(choice, axis=1, keepdims=True)
        chosen = chosen + choice
    gates = p * chosen
    if normalize:
        total = ops.sum(gates, axis=-1, keepdims=True)
        gates = gates / ops.where(total > 0, total, 1.0)
    if capacity is not None:
        gates = gates * ops.cast(slots < ops.cast(capacity, "float32"), "float32")
    return gates, ops.cast(slots, "int32")


def _counting(p, priority):
    """The function that counts, for marks (g, t, e), those of tokens that go first."""
    if priority == "order":
        return lambda marks: ops.cumsum(marks, axis=1) - marks
    top = ops.stop_gradient(ops.max(p, axis=-1))  # (g, t)
    if exporting():
        own, other = ops.expand_dims(top, 2), ops.expand_dims(top, 1)
        place = positions(top)
        earlier = ops.expand_dims(place, 0) < ops.expand_dims(place, 1)
        first = ops.logical_or(
            other > own, ops.logical_and(ops.equal(other, own), earlier)
        )
        return lambda marks: ops.matmul(ops.cast(first, "float32"), marks)
    order = ops.argsort(-top, axis=1)
    back = ops.argsort(order, axis=1)

    def count(marks):
        ordered = gather_nodes(marks, order)
        return gather_nodes(ops.cumsum(ordered, axis=1) - ordered, back)

    return count


def expert_choice(probabilities, capacity, mask=None):
    """Each expert takes the tokens that are most probable for it. Not causal.

    Zhou et al. 2022, arXiv:2202.09368.

    Args:
        probabilities: (g, t, e), over the experts.
        capacity: tokens of an expert, number or tensor.
        mask: (g, t), which tokens are real.

    Returns:
        Gates (g, t, e), the probabilities, in float32 and slots (g, t, e) in int32,
        in the order of the tokens.
    """
    p = ops.cast(probabilities, "float32")
    real = None if mask is None else ops.expand_dims(mask, 1)
    chosen = top_k_mask(ops.swapaxes(p, 1, 2), capacity, real)
    chosen = ops.swapaxes(chosen, 1, 2)
    slots = ops.where(chosen > 0, ops.cumsum(chosen, axis=1) - 1.0, -1.0)
    return p * chosen, ops.cast(slots, "int32")


def expert_load(slots, capacity=None):
    """(g, t, e) -> (g, e), float32: how many tokens each expert computes."""
    return ops.sum(_placed(slots, capacity), axis=1)


def _placed(slots, capacity):
    """1 where a token has a place below the capacity, else 0."""
    placed = slots >= 0
    if capacity is not None:
        below = ops.cast(slots, "float32") < ops.cast(capacity, "float32")
        placed = ops.logical_and(placed, below)
    return ops.cast(placed, "float32")


# Rows to the experts and back.


def dispatch_tensors(gates, slots, capacity):
    """`dispatch` and `combine` of the module, as large as t · e · c.

    Args:
        gates: (g, t, e).
        slots: (g, t, e).
        capacity: number of places of an expert.

    Returns:
        Zeros and ones (g, t, e, c), and the weights (g, t, e, c), in float32.
    """
    dispatch = _one_hot_slots(slots, capacity)
    return dispatch, ops.expand_dims(gates, -1) * dispatch


def _one_hot_slots(slots, capacity):
    places = ops.arange(0, capacity, dtype="int32")
    return ops.cast(ops.equal(ops.expand_dims(slots, -1), places), "float32")


def to_slots(x, dispatch):
    """Means or rows of tokens: (g, t, d), (g, t, e, c) -> (g, e, c, d)."""
    y = ops.einsum("gtec,gtd->gecd", dispatch, ops.cast(x, "float32"))
    return ops.cast(y, x.dtype)


def from_slots(y, combine):
    """Outputs of the slots to the tokens: (g, e, c, h), (g, t, e, c) -> (g, t, h)."""
    x = ops.einsum("gtec,gech->gth", combine, ops.cast(y, "float32"))
    return ops.cast(x, y.dtype)


def expert_inputs(x, slots, capacity=None):
    """The token at each place, zeros where there is none.

    Args:
        x: (g, t, d).
        slots: (g, t, e).
        capacity: number of places of an expert. None where each expert computes every
            token: exact for any length, and e / k times the work.

    Returns:
        (g, e, capacity, d), or (g, 1, t, d) for a capacity of None.
    """
    if capacity is None:
        return ops.expand_dims(x, 1)
    if exporting():
        return to_slots(x, _one_hot_slots(slots, capacity))
    experts, width = slots.shape[-1], x.shape[-1]
    tokens = ops.reshape(slot_tokens(slots, capacity), (-1, experts * capacity))
    return ops.reshape(gather_tokens(x, tokens), (-1, experts, capacity, width))


def expert_dense(x, kernel, bias=None):
    """A dense layer of each expert: x W_e + b_e.

    Args:
        x: (g, e, c, d), or (g, 1, c, d) for the same tokens to each expert.
        kernel: (e, d, h).
        bias: (e, h).

    Returns:
        (g, e, c, h).
    """
    kernel = ops.cast(kernel, x.dtype)
    if x.shape[1] == kernel.shape[0]:
        y = ops.einsum("gecd,edh->gech", x, kernel)
    else:
        y = ops.einsum("gcd,edh->gech", x[:, 0], kernel)
    return y if bias is None else y + ops.expand_dims(ops.cast(bias, x.dtype), 1)


def expert_outputs(y, gates, slots, capacity=None):
    """What the experts made of each token, weighed by its gates and summed.

    Args:
        y: (g, e, capacity, h), or (g, e, t, h) for a capacity of None.
        gates: (g, t, e).
        slots: (g, t, e).
        capacity: as in `expert_inputs`.

    Returns:
        (g, t, h), zeros for a token without a place.
    """
    if capacity is None:
        x = ops.einsum("geth,gte->gth", ops.cast(y, "float32"), gates)
        return ops.cast(x, y.dtype)
    if exporting():
        return from_slots(y, dispatch_tensors(gates, slots, capacity)[1])
    experts, width = slots.shape[-1], y.shape[-1]
    tokens = slot_tokens(slots, capacity)
    each = ops.expand_dims(ops.arange(0, experts, dtype="int32"), 1)
    pairs = tokens * experts + each  # where (token, expert) is in the flat gates
    tokens, pairs = (ops.reshape(z, (-1, experts * capacity)) for z in (tokens, pairs))
    weights = gather_nodes(_flat(gates), pairs)
    rows = ops.cast(ops.reshape(y, (-1, experts * capacity, width)), "float32")
    return ops.cast(segment_reduce(rows * weights, tokens, gates), y.dtype)


def slot_tokens(slots, capacity):
    """Which token is at each place: (g, t, e) -> (g, e, capacity), int32, -1 for none.

    Args:
        slots: of `token_choice` or `expert_choice`.
        capacity: number of places of an expert.
    """
    experts, place = slots.shape[-1], positions(slots) + 1.0  # (t,)
    if exporting():
        dispatch = _one_hot_slots(slots, capacity)
        place = ops.reshape(place, (-1, 1, 1))
        return ops.cast(ops.sum(dispatch * place, axis=1) - 1.0, "int32")
    first = capacity * ops.arange(0, experts, dtype="int32")
    index = ops.where(_placed(slots, capacity) > 0, slots + first, -1)
    place = ops.expand_dims(place, -1) * ops.ones_like(slots, dtype="float32")
    all_places = ops.zeros((ops.shape(slots)[0], experts * capacity))
    found = segment_reduce(_flat(place), _flat(index)[..., 0], all_places)
    found = ops.reshape(found - 1.0, (-1, experts, capacity))
    return ops.cast(found, "int32")


def _flat(x):
    """(g, t, e) -> (g, t · e, 1)."""
    return ops.reshape(x, (ops.shape(x)[0], -1, 1))


# Some tokens of a sequence.


def top_tokens(scores, k, mask=None):
    """The k tokens with the largest scores, in the order of the sequence.

    Raposo et al. 2024, Mixture-of-Depths, arXiv:2404.02258. Not causal.

    Args:
        scores: (b, t).
        k: how many, a number.
        mask: (b, t), which tokens are real.

    Returns:
        (b, k), int32, ascending; then -1 where fewer than k tokens are real.
    """
    chosen = ops.expand_dims(top_k_mask(scores, k, mask), -1)
    slots = ops.where(chosen > 0, ops.cumsum(chosen, axis=1) - 1.0, -1.0)
    return slot_tokens(ops.cast(slots, "int32"), k)[:, 0]


def gather_tokens(x, tokens):
    """Rows of each example: (b, t, d), (b, k) -> (b, k, d), zeros for a token of -1."""
    there = ops.expand_dims(tokens >= 0, -1)
    return ops.where(there, gather_nodes(x, tokens), ops.zeros((), dtype=x.dtype))


def add_tokens(x, updates, tokens):
    """Adds rows to some tokens, and leaves the others as they are.

    Args:
        x: (b, t, d).
        updates: (b, k, d).
        tokens: (b, k), which token gets each row; -1 for none.

    Returns:
        (b, t, d).
    """
    return x + ops.cast(segment_reduce(updates, tokens, x), x.dtype)


# Soft mixtures.


def soft_logits(x, kernel, scale=1.0, normalize=True):
    """Of each token for each slot: scale · (x / |x|) · (Φ / |Φ|), in float32.

    Puigcerver et al. 2023, Soft MoE, arXiv:2308.00951, section 2.3.

    Args:
        x: (g, t, d).
        kernel: Φ, (d, e, p) for p slots of an expert.
        scale: number or tensor without a shape.
        normalize: whether tokens and columns of Φ are divided by their lengths.

    Returns:
        (g, t, e, p).
    """
    x, kernel = ops.cast(x, "float32"), ops.cast(kernel, "float32")
    if normalize:
        x, kernel = _unit(x, -1), _unit(kernel, 0)
    return ops.einsum("gtd,dep->gtep", x, kernel) * ops.cast(scale, "float32")


def _unit(x, axis):
    return x * ops.rsqrt(ops.sum(ops.square(x), axis=axis, keepdims=True) + 1e-6)


def soft_tensors(logits, mask=None):
    """Softmax over the tokens for each slot, and over all slots for each token.

    Args:
        logits: (g, t, e, p).
        mask: (g, t), which tokens are real.

    Returns:
        Dispatch and combine weights for `to_slots` and `from_slots`, (g, t, e, p) in
        float32; those of masked tokens are zero.
    """
    logits = ops.cast(logits, "float32")
    combine = _softmax(logits, (2, 3))
    if mask is None:
        return _softmax(logits, 1), combine
    real = ops.expand_dims(ops.cast(mask, "bool"), (2, 3))
    dispatch = _softmax(ops.where(real, logits, -1e30), 1)
    return ops.where(real, dispatch, 0.0), ops.where(real, combine, 0.0)


def _softmax(x, axis):
    """Over one axis or several, which may have a single entry."""
    weights = ops.exp(x - ops.stop_gradient(ops.max(x, axis=axis, keepdims=True)))
    return weights / ops.sum(weights, axis=axis, keepdims=True)


# Losses of a router.


def load_balance_loss(probabilities, chosen, mask=None, per_group=False):
    """E Σ_e f_e P_e: share of the tokens times mean probability of each expert.

    Equal shares give k, the smallest value where the shares follow the probabilities.
    The gradient goes through P alone. Fedus et al. 2021, equations 4 to 6.

    Args:
        probabilities: (g, t, e).
        chosen: (g, t, e), 1 for the experts that a token chose, dropped or not:
            `slots >= 0`, or `top_k_mask(probabilities, k)`.
        mask: (g, t), which tokens count.
        per_group: whether shares and means are those of each group, and the loss
            their mean; over all groups together otherwise.

    Returns:
        A float32 tensor without a shape.
    """
    axes = 1 if per_group else (0, 1)
    shares = ops.stop_gradient(_mean(chosen, mask, axes))
    means = _mean(probabilities, mask, axes)
    products = ops.sum(shares * means, axis=-1)
    return probabilities.shape[-1] * ops.mean(products)


def importance_loss(gates):
    """CV²: squared coefficient of variation of the gates' sums over all tokens.

    Shazeer et al. 2017, equations 6 and 7, without their weight.

    Args:
        gates: (..., e), zeros for tokens that do not count.

    Returns:
        A float32 tensor without a shape.
    """
    gates = ops.reshape(ops.cast(gates, "float32"), (-1, gates.shape[-1]))
    importance = ops.sum(gates, axis=0)
    mean = ops.mean(importance)
    return ops.mean(ops.square(importance - mean)) / (ops.square(mean) + 1e-10)


def router_z_loss(logits, mask=None):
    """Mean of (log Σ_e e^logit)²: keeps the logits small.

    Zoph et al. 2022, ST-MoE, arXiv:2202.08906, equation 5.

    Args:
        logits: (g, t, e).
        mask: (g, t), which tokens count.

    Returns:
        A float32 tensor without a shape.
    """
    totals = ops.logsumexp(ops.cast(logits, "float32"), axis=-1, keepdims=True)
    return _mean(ops.square(totals), mask, (0, 1))[0]


def _mean(x, mask, axes):
    """Over the tokens that count, in float32; zero if none does."""
    x = ops.cast(x, "float32")
    if mask is None:
        return ops.mean(x, axis=axes)
    weights = ops.expand_dims(ops.cast(mask, "float32"), -1)
    count = ops.maximum(ops.sum(weights, axis=axes), 1.0)
    return ops.sum(x * weights, axis=axes) / count
