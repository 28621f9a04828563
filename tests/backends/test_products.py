import keras
import pytest
from keras import ops

from keras_edifice.backends.products import multiply_accumulates


def count(function, *shapes):
    inputs = [keras.KerasTensor(shape, "float32") for shape in shapes]
    return multiply_accumulates(lambda tensors: function(*tensors), inputs)[0]


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (ops.matmul, [(2, 3, 4), (4, 5)], 2 * 3 * 4 * 5),
        (ops.matmul, [(6, 2, 3, 4), (6, 2, 4, 5)], 6 * 2 * 3 * 4 * 5),
        (ops.matmul, [(3, 4), (4,)], 3 * 4),
        (ops.dot, [(7,), (7,)], 7),
        (lambda x, y: ops.tensordot(x, y, 2), [(2, 3, 4), (3, 4, 5)], 2 * 3 * 4 * 5),
        (lambda x, y: ops.einsum("bthk,bshk->bhts", x, y), [(2, 3, 4, 5)] * 2, 360),
        (lambda x, y: ops.einsum("...ij,...kj->...ik", x, y), [(6, 2, 4)] * 2, 96),
        (lambda x, y: ops.einsum("bi,bj->bij", x, y), [(2, 3), (2, 4)], 0),
        (lambda x: ops.sum(x * x), [(3, 4)], 0),
        (lambda x: ops.einsum("ij->ji", x), [(3, 4)], 0),
    ],
)
def test_products_count_by_their_sizes(function, shapes, expected):
    assert count(function, *shapes) == expected


def test_a_transposed_factor_counts_the_same():
    assert count(lambda x, y: ops.matmul(ops.transpose(x), y), (3, 4), (3, 5)) == 60


def repeated(x, w):
    return ops.scan(lambda c, _: (c @ w, c), x, length=6)[0]


def backwards(x, w):
    steps = ops.zeros((5, *x.shape))
    return ops.scan(lambda c, s: (c @ w + s, c), x, steps, reverse=True)[0]


def nested(x, w):
    def outer(_, c):
        return ops.fori_loop(0, 3, lambda _, c: c @ w, c) @ w

    return ops.fori_loop(2, 7, outer, x)


def with_a_limit(x, w):
    return ops.while_loop(
        lambda i, x: i < 4, lambda i, x: (i + 1, x @ w), (0, x), maximum_iterations=9
    )[1]


@pytest.mark.parametrize(
    ("function", "products"), [(repeated, 6), (backwards, 5), (nested, 20)]
)
def test_loops_count_by_their_steps(function, products):
    assert count(function, (2, 3), (3, 3)) == products * 2 * 3 * 3


def test_a_loop_that_counts_by_itself():
    if keras.backend.backend() == "jax":  # its trace does not tell the steps
        with pytest.raises(ValueError, match="the steps of a loop depend on the data"):
            count(with_a_limit, (2, 3), (3, 3))
    else:
        assert count(with_a_limit, (2, 3), (3, 3)) == 4 * 2 * 3 * 3


def test_a_loop_over_data_is_refused():
    def function(x, w):
        return ops.while_loop(lambda x: ops.max(x) < 5.0, lambda x: (x @ w,), (x,))[0]

    with pytest.raises(ValueError, match="fixed number of steps"):
        count(function, (2, 3), (3, 3))


def test_outputs_are_described_in_their_structure():
    inputs = [keras.KerasTensor((2, 3), "float32")]
    _, outputs = multiply_accumulates(
        lambda t: {"a": t[0] @ ops.ones((3, 4)), "b": [t[0] > 0, None]}, inputs
    )
    assert outputs["a"].shape == (2, 4) and outputs["a"].dtype == "float32"
    assert outputs["b"][0].dtype == "bool" and outputs["b"][1] is None


def test_what_no_output_needs_counts_where_it_is_computed():
    def function(x, w):
        x @ w @ w
        return x + 1.0

    expected = 2 * 18 if keras.backend.backend() == "torch" else 0
    assert count(function, (2, 3), (3, 3)) == expected


def test_attention_counts_both_of_its_products():
    q, k = (2, 3, 4, 8), (2, 5, 4, 8)  # (batch, tokens, heads, size)
    assert count(ops.dot_product_attention, q, k, k) == 2 * (2 * 4 * 3 * 5 * 8)
