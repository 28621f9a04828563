import keras
import numpy as np
import pytest
from keras import ops

from keras_edifice.exporting import export
from keras_edifice.model import EdificeModel
from keras_edifice.ops.routing import (
    add_tokens,
    dispatch_tensors,
    expert_capacity,
    expert_choice,
    expert_dense,
    expert_inputs,
    expert_load,
    expert_outputs,
    from_slots,
    gather_tokens,
    importance_loss,
    load_balance_loss,
    router_z_loss,
    slot_tokens,
    soft_logits,
    soft_tensors,
    to_slots,
    token_choice,
    top_k_mask,
    top_tokens,
)
from keras_edifice.ops.tracing import export_scope
from tests.support.close import assert_close, to_numpy
from tests.support.compiled import compiled
from tests.support.gradients import gradients
from tests.support.numerical import numerical_gradient

rng = np.random.default_rng(0)
FORMS = pytest.mark.parametrize("format", [None, "onnx"], ids=["gathered", "exported"])


def normal(*shape):
    return rng.normal(size=shape).astype("float32")


def softmax(x, axis=-1):
    weights = np.exp(x - x.max(axis, keepdims=True))
    return weights / weights.sum(axis, keepdims=True)


def probabilities(*shape):
    return softmax(2.0 * rng.normal(size=shape)).astype("float32")


def values(function, *arrays):
    """Results of a function of arrays as float64."""
    found = compiled(function)(*map(ops.convert_to_tensor, arrays))
    return keras.tree.map_structure(to_numpy, found)


def marked(scores, k, mask=None):
    """The k largest of each row, the first of equal ones, by a stable sort."""
    out = np.zeros(scores.shape)
    for row in np.ndindex(*scores.shape[:-1]):
        order = np.argsort(-scores[row], kind="stable")
        order = [i for i in order if mask is None or mask[row][i]]
        out[row][order[:k]] = 1.0
    return out


def chosen_by_tokens(p, k, capacity=None, normalize=False, priority="order", mask=None):
    """Gates and slots: the queues of the experts, filled token by token."""
    p = p.astype("float64")
    gates, slots = np.zeros(p.shape), np.full(p.shape, -1)
    for g, (rows, real) in enumerate(
        zip(p, np.ones(p.shape[:2]) if mask is None else mask, strict=True)
    ):
        order = list(range(len(rows)))
        if priority == "probability":
            order.sort(key=lambda t: -rows[t].max())
        queues = [0] * p.shape[-1]
        best = np.argsort(-rows, axis=-1, kind="stable")[:, :k]
        for rank in range(k):
            for t in order:
                if not real[t]:
                    continue
                e, total = best[t, rank], rows[t, best[t]].sum()
                slots[g, t, e] = queues[e]
                if capacity is None or queues[e] < capacity:
                    gates[g, t, e] = rows[t, e] / (total if normalize else 1.0)
                queues[e] += 1
    return gates, slots


@pytest.mark.parametrize("k", [0, 3, 9])
def test_k_largest_are_marked_and_ties_go_to_the_first(k):
    scores = rng.integers(0, 4, size=(5, 4, 6)).astype("float32")
    assert_close(values(lambda x: top_k_mask(x, k), scores), marked(scores, k), 0)


def test_only_what_the_mask_allows_is_marked():
    scores, mask = normal(5, 7), rng.uniform(size=(5, 7)) < 0.5
    mask[0] = False
    found = values(lambda x, m: top_k_mask(x, 3, m), scores, mask)
    assert_close(found, marked(scores, 3, mask), 0)
    assert found[0].sum() == 0


def test_rows_may_ask_for_different_numbers():
    scores, k = normal(3, 6), np.array([[1.0], [4.0], [0.0]], "float32")
    found = values(top_k_mask, scores, k)
    expected = [marked(scores[i], int(k[i, 0])) for i in range(3)]
    assert_close(found, expected, 0)


def test_capacity_is_the_share_rounded_up():
    assert expert_capacity(64, 8, 2, 1.25) == 20
    assert expert_capacity(10, 3, 1, 1.0) == 4
    assert expert_capacity(10, 11, 1, 1.1) == 1  # 1.1 * 10 / 11 is above 1 in floats
    assert expert_capacity(4, 2, 2, 9.0) == 4
    assert expert_capacity(1, 8) == 1
    assert expert_capacity(ops.zeros((2, 12, 3)), 4) == 3


OPTIONS = [
    dict(k=1),
    dict(k=1, capacity=2),
    dict(k=2, capacity=3, normalize=True),
    dict(k=2, capacity=3, priority="probability"),
    dict(k=4, capacity=5, normalize=True, priority="probability"),
]


@FORMS
@pytest.mark.parametrize("options", OPTIONS)
def test_tokens_queue_at_the_experts_of_their_choice(options, format):
    p = probabilities(3, 9, 4)
    p[0, 2] = p[0, 1] = p[0, 0]  # equal priorities: the earlier token first
    mask = rng.uniform(size=(3, 9)) < 0.7
    mask[0] = True
    with export_scope(format):
        gates, slots = values(lambda p, m: token_choice(p, **options, mask=m), p, mask)
    expected_gates, expected_slots = chosen_by_tokens(p, **options, mask=mask)
    assert_close(slots, expected_slots, 0)
    assert_close(gates, expected_gates)


def test_equal_probabilities_go_to_the_first_experts():
    p = np.full((1, 2, 4), 0.25, "float32")
    gates, slots = values(lambda p: token_choice(p, 2), p)
    assert_close(gates[0], [[0.25, 0.25, 0, 0]] * 2, 0)
    assert_close(slots[0], [[0, 0, -1, -1], [1, 1, -1, -1]], 0)


def test_capacity_may_be_computed_for_a_length():
    p = probabilities(2, 6, 3)
    found = values(lambda p, c: token_choice(p, 1, c), p, np.float32(2.0))
    assert_close(found[0], chosen_by_tokens(p, 1, 2)[0])


def test_wrong_numbers_and_priorities_are_refused():
    p = ops.zeros((1, 2, 3))
    with pytest.raises(
        ValueError, match="from 1 to the number of experts, 3, received 4"
    ):
        token_choice(p, 4)
    with pytest.raises(ValueError, match="'probability'.*, received 'gate'"):
        token_choice(p, 1, priority="gate")


@pytest.mark.parametrize("masked", [False, True])
def test_experts_take_their_most_probable_tokens(masked):
    p = probabilities(2, 8, 3)
    p[0, 5] = p[0, 2]
    mask = rng.uniform(size=(2, 8)) < 0.5 if masked else None
    arrays = [p, mask] if masked else [p]
    gates, slots = values(lambda p, m=None: expert_choice(p, 3, m), *arrays)
    keep = None if mask is None else np.repeat(mask[:, None], 3, 1)
    chosen = marked(p.swapaxes(1, 2), 3, keep).swapaxes(1, 2)
    assert_close(gates, p * chosen)
    assert_close(slots, np.where(chosen > 0, chosen.cumsum(1) - 1, -1), 0)
    if not masked:
        load = values(expert_load, slots.astype("int32"))
        assert (load == 3).all()


def experts(x, kernel, bias):
    """(..., d) -> (e, ..., h), each expert on all tokens."""
    return np.stack([np.tanh(x @ w + b) for w, b in zip(kernel, bias, strict=True)])


def mixed(x, kernel, bias, gates):
    """Σ_e gates_e E_e(x), in float64."""
    outputs = experts(x.astype("float64"), kernel, bias)
    return np.einsum("egth,gte->gth", outputs, gates)


def mixture(x, kernel, bias, gates, slots, capacity):
    y = ops.tanh(expert_dense(expert_inputs(x, slots, capacity), kernel, bias))
    return expert_outputs(y, gates, slots, capacity)


@pytest.mark.parametrize(
    ("capacity", "format"), [(1, None), (3, None), (3, "onnx"), (None, None)]
)
def test_mixture_is_the_weighted_sum_of_the_chosen_experts(capacity, format):
    p, x = probabilities(2, 9, 4), normal(2, 9, 5)
    kernel, bias = normal(4, 5, 3), normal(4, 3)
    gates, slots = chosen_by_tokens(p, 2, capacity)
    arrays = x, kernel, bias, gates.astype("float32"), slots.astype("int32")
    with export_scope(format):
        y = values(lambda *z: mixture(*z, capacity), *arrays)
    assert_close(y, mixed(x, kernel, bias, gates))
    dropped = gates.sum(-1) == 0
    assert (y[dropped] == 0).all()
    if capacity == 1:
        assert dropped.any()


@FORMS
def test_places_hold_the_tokens_that_queue_there(format):
    _, slots = chosen_by_tokens(probabilities(2, 7, 3), 2)
    with export_scope(format):
        tokens = values(lambda s: slot_tokens(s, 4), slots.astype("int32"))
    for g, e, c in np.ndindex(2, 3, 4):
        at = np.flatnonzero(slots[g, :, e] == c)
        assert tokens[g, e, c] == (at[0] if len(at) else -1)


def test_dispatch_and_combine_are_the_tensors_of_the_equations():
    p = probabilities(2, 7, 3)
    gates, slots = chosen_by_tokens(p, 2, 4)
    arrays = gates.astype("float32"), slots.astype("int32")
    dispatch, combine = values(lambda *z: dispatch_tensors(*z, 4), *arrays)
    assert_close(dispatch, slots[..., None] == np.arange(4), 0)
    assert_close(combine, gates[..., None] * dispatch)
    assert dispatch.sum(1).max() == 1  # one token at a place
    x, y = normal(2, 7, 5), normal(2, 3, 4, 6)
    d, c = dispatch.astype("float32"), combine.astype("float32")
    assert_close(values(to_slots, x, d), np.einsum("gtec,gtd->gecd", dispatch, x))
    assert_close(values(from_slots, y, c), np.einsum("gtec,gech->gth", combine, y))


@pytest.mark.parametrize("capacity", [3, None])
def test_gradients_reach_tokens_experts_and_gates(capacity):
    logits, x = normal(2, 6, 3), normal(2, 6, 4)
    kernel, bias, weights = normal(3, 4, 2), normal(3, 2), normal(2, 6, 2)

    class Mixture(keras.layers.Layer):
        def build(self, _):
            shapes = logits.shape, kernel.shape, bias.shape
            self.all = [self.add_weight(shape) for shape in shapes]

        def call(self, x):
            logits, kernel, bias = (w * 1.0 for w in self.all)
            gates, slots = token_choice(
                ops.softmax(logits), 2, capacity, normalize=True
            )
            return mixture(x, kernel, bias, gates, slots, capacity)

    layer = Mixture()
    layer.build(None)
    arrays = [logits, kernel, bias]
    layer.set_weights(arrays)
    weights_ = ops.convert_to_tensor(weights)
    found, by_x = gradients(layer, x, lambda y: ops.sum(y * weights_))

    def total(logits, kernel, bias, x):
        gates, _ = chosen_by_tokens(softmax(logits), 2, capacity, normalize=True)
        return (mixed(x, kernel, bias, gates) * weights).sum()

    arrays = [*arrays, x]
    for i, gradient in enumerate([*found, by_x]):
        expected = numerical_gradient(
            lambda z, i=i: total(*arrays[:i], z, *arrays[i + 1 :]), arrays[i]
        )
        assert_close(gradient, expected, 1e-4)


def test_half_precision_is_summed_in_float32():
    p, x = probabilities(1, 8, 4), normal(1, 8, 16)
    x = ops.cast(ops.convert_to_tensor(x), "bfloat16")
    gates, slots = chosen_by_tokens(p, 4)

    def identity(x, gates, slots):
        return expert_outputs(expert_inputs(x, slots, 8), gates, slots, 8)

    arrays = gates.astype("float32"), slots.astype("int32")
    y = compiled(identity)(x, *map(ops.convert_to_tensor, arrays))
    assert keras.backend.standardize_dtype(y.dtype) == "bfloat16"
    # The gates sum to one; bfloat16 keeps 8 bits of the result.
    assert_close(ops.cast(y, "float32"), ops.cast(x, "float32"), 4e-3)


@pytest.mark.parametrize(("k", "format"), [(1, None), (3, "onnx"), (8, None)])
def test_top_tokens_stay_in_the_order_of_the_sequence(k, format):
    scores, x, mask = normal(3, 8), normal(3, 8, 2), np.ones((3, 8), bool)
    mask[1, 3:], mask[2] = False, False
    expected = np.full((3, k), -1)
    for b in range(3):
        at = np.flatnonzero(marked(scores[b], k, mask[b]))
        expected[b, : len(at)] = at
    with export_scope(format):
        tokens = values(lambda s, m: top_tokens(s, k, m), scores, mask)
        rows = values(gather_tokens, x, expected.astype("int32"))
        y = values(add_tokens, x, normal(3, k, 2) * 0 + 10.0, expected.astype("int32"))
    assert_close(tokens, expected, 0)
    for b, i in np.ndindex(3, k):
        assert_close(rows[b, i], x[b, expected[b, i]] * (expected[b, i] >= 0), 0)
    for b, t in np.ndindex(3, 8):
        assert_close(y[b, t], x[b, t] + 10.0 * (t in expected[b]), 1e-6)


def test_tokens_that_are_not_chosen_keep_every_bit():
    x, tokens = normal(2, 9, 4), np.array([[0, 5], [2, -1]], "int32")
    y = values(add_tokens, x, normal(2, 2, 4), tokens)
    untouched = np.ones((2, 9), bool)
    untouched[0, [0, 5]], untouched[1, 2] = False, False
    assert (y[untouched] == x[untouched]).all()
    assert (y[~untouched] != x[~untouched]).all()


def test_gradient_passes_through_gathering_and_adding():
    x, weights = normal(2, 6, 3), normal(2, 6, 3)
    tokens = np.array([[1, 4], [3, -1]], "int32")

    def function(x):
        chosen = ops.convert_to_tensor(tokens)
        return add_tokens(x, ops.square(gather_tokens(x, chosen)), chosen)

    weights_ = ops.convert_to_tensor(weights)
    layer = keras.layers.Activation(function)
    _, found = gradients(layer, x, lambda y: ops.sum(y * weights_))
    slope = np.ones(x.shape)
    for b, t in [(0, 1), (0, 4), (1, 3)]:
        slope[b, t] += 2 * x[b, t]
    assert_close(found, weights * slope)


@pytest.mark.parametrize("normalize", [True, False])
def test_soft_logits_are_scaled_cosines(normalize):
    x, kernel = normal(2, 5, 4), normal(4, 3, 2)
    a, b = x.astype("float64"), kernel.astype("float64")
    if normalize:
        a = a / np.linalg.norm(a, axis=-1, keepdims=True)
        b = b / np.linalg.norm(b, axis=0, keepdims=True)
    found = values(lambda *z: soft_logits(*z, normalize=normalize), x, kernel, 1.7)
    assert_close(found, 1.7 * np.einsum("gtd,dep->gtep", a, b))


def soft_reference(logits, mask):
    dispatch, combine = np.zeros((2, *logits.shape))
    for g in range(len(logits)):
        at = np.flatnonzero(mask[g])
        dispatch[g, at] = softmax(logits[g, at].astype("float64"), 0)
        flat = logits[g, at].reshape(len(at), -1).astype("float64")
        combine[g, at] = softmax(flat).reshape(logits[g, at].shape)
    return dispatch, combine


@pytest.mark.parametrize("shape", [(2, 6, 3, 2), (2, 1, 3, 2), (2, 5, 1, 1)])
def test_slots_are_means_of_tokens_and_tokens_of_slots(shape):
    logits = 30.0 * normal(*shape)
    mask = np.arange(shape[1]) < np.array([[shape[1]], [max(1, shape[1] - 2)]])
    for found, arrays in (
        (values(soft_tensors, logits), [logits, np.ones(shape[:2])]),
        (values(soft_tensors, logits, mask), [logits, mask]),
    ):
        dispatch, combine = soft_reference(*arrays)
        assert_close(found[0], dispatch)
        assert_close(found[1], combine)
        assert_close(found[0].sum(1), np.ones((shape[0], *shape[2:])))
        assert_close(found[1].sum((2, 3)), arrays[1])


def test_soft_gradient_is_that_of_the_equations():
    logits, x, weights = normal(2, 5, 3, 2), normal(2, 5, 4), normal(2, 5, 4)
    mask = np.ones((2, 5), bool)
    mask[1, 3:] = False

    def function(logits):
        real, tokens = ops.convert_to_tensor(mask), ops.convert_to_tensor(x)
        dispatch, combine = soft_tensors(logits, real)
        return from_slots(ops.tanh(to_slots(tokens, dispatch)), combine)

    weights_ = ops.convert_to_tensor(weights)
    layer = keras.layers.Activation(function)
    _, found = gradients(layer, logits, lambda y: ops.sum(y * weights_))

    def total(logits):
        dispatch, combine = soft_reference(logits, mask)
        slots = np.tanh(np.einsum("gtep,gtd->gepd", dispatch, x))
        return (np.einsum("gtep,gepd->gtd", combine, slots) * weights).sum()

    assert_close(found, numerical_gradient(total, logits), 1e-4)


@pytest.mark.parametrize("per_group", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_load_balance_is_share_times_probability(per_group, masked):
    p, mask = probabilities(3, 7, 4), np.ones((3, 7), bool)
    if masked:
        mask[0, 4:], mask[2, 1:] = False, False
    chosen = marked(p, 2).astype("float32")
    groups = [[0], [1], [2]] if per_group else [[0, 1, 2]]
    expected = np.mean(
        [
            4
            * (
                chosen[g][mask[g]].mean(0) * p[g][mask[g]].astype("float64").mean(0)
            ).sum()
            for g in groups
        ]
    )
    arrays = [p, chosen, mask] if masked else [p, chosen]
    found = values(lambda *z: load_balance_loss(*z, per_group=per_group), *arrays)
    assert_close(found, expected)


@pytest.mark.parametrize("k", [1, 2])
def test_a_uniform_router_has_the_load_balance_k(k):
    p = np.full((2, 8, 4), 0.25, "float32")
    chosen = values(lambda p: top_k_mask(p, k), p).astype("float32")
    assert_close(values(load_balance_loss, p, chosen), k)


def test_load_balance_has_a_gradient_through_the_probabilities_alone():
    p = probabilities(2, 5, 3)
    shares = marked(p, 1).mean((0, 1))
    layer = keras.layers.Activation(lambda p: load_balance_loss(p, top_k_mask(p, 1)))
    _, found = gradients(layer, p, lambda y: y)
    assert_close(found, np.broadcast_to(3 * shares / 10, p.shape))


def test_importance_is_the_variation_of_the_sums():
    gates = probabilities(2, 5, 3)
    sums = gates.astype("float64").sum((0, 1))
    expected = sums.var() / sums.mean() ** 2
    assert_close(values(importance_loss, gates), expected)
    even = np.full((2, 5, 3), 0.5, "float32")
    assert_close(values(importance_loss, even), 0.0)


def test_z_loss_is_the_mean_square_of_the_normaliser():
    logits, mask = 5 * normal(2, 5, 3), rng.uniform(size=(2, 5)) < 0.5
    squares = np.log(np.exp(logits.astype("float64")).sum(-1)) ** 2
    assert_close(values(router_z_loss, logits), squares.mean())
    assert_close(values(router_z_loss, logits, mask), squares[mask].mean())


def test_a_long_sequence_is_routed_without_a_tensor_of_its_square():
    p, x = probabilities(1, 4096, 4), normal(1, 4096, 2)
    capacity = expert_capacity(4096, 4, 1, 1.25)

    def routed(p, x):
        gates, slots = token_choice(p, 1, capacity)
        inputs = expert_inputs(x, slots, capacity)
        return expert_outputs(inputs, gates, slots, capacity)

    gates, _ = chosen_by_tokens(p, 1, capacity)
    assert_close(values(routed, p, x), gates.sum(-1, keepdims=True) * x)


@keras.saving.register_keras_serializable("test_routing")
class Routed(keras.layers.Layer):
    """(b, t, d) -> the same: all that this module offers, added up."""

    def __init__(self, length=None, **kwargs):
        super().__init__(**kwargs)
        self.length = length

    def build(self, input_shape):
        width = input_shape[-1]
        self.router = self.add_weight((width, 3), "normal", name="router")
        self.kernel = self.add_weight((3, width, width), "normal", name="kernel")
        self.phi = self.add_weight((width, 3, 2), "normal", name="phi")

    def call(self, x):
        p = ops.softmax(ops.matmul(x, self.router))
        capacity = expert_capacity(x, 3, 2, 0.8)
        places = capacity if self.length else None
        gates, slots = token_choice(p, 2, capacity, priority="probability")
        y = x + self.experts(x, gates, slots, places)
        if self.length:
            y = y + self.experts(x, *expert_choice(p, 2), 2)
            tokens = top_tokens(p[..., 0], 2)
            y = add_tokens(y, ops.tanh(gather_tokens(x, tokens)), tokens)
        self.add_loss(load_balance_loss(p, slots >= 0))
        dispatch, combine = soft_tensors(soft_logits(x, self.phi * 1.0))
        return y + from_slots(ops.tanh(to_slots(x, dispatch)), combine)

    def experts(self, x, gates, slots, capacity):
        y = expert_dense(expert_inputs(x, slots, capacity), self.kernel * 1.0)
        return expert_outputs(ops.tanh(y), gates, slots, capacity)

    def compute_output_shape(self, input_shape):
        return input_shape


def model(length):
    inputs = keras.Input((length, 4), name="inputs")
    return EdificeModel(inputs, Routed(length)(inputs), name="routed")


@pytest.mark.parametrize(
    ("format", "length"), [("onnx", 9), ("onnx", None), ("saved_model", 9)]
)
def test_routing_is_exported(format, length, tmp_path):
    name = "model.onnx" if format == "onnx" else "model"
    assert export(model(length), tmp_path / name, format) <= 1e-4


@pytest.mark.parametrize("length", [9, None])
def test_routing_trains(length):
    trained = model(length)
    before = trained.get_weights()
    jit = "auto" if length is None else keras.backend.backend() != "torch"
    trained.compile("adam", "mse", jit_compile=jit)
    for steps in (9,) if length else (9, 5):
        x = normal(2, steps, 4)
        trained.fit(x, -x, verbose=0)
    for old, new in zip(before, trained.get_weights(), strict=True):
        assert np.abs(new - old).max() > 0
