import keras
import numpy as np
import pytest
from keras import ops

from keras_edifice.blocks.kv_cache import KVCache
from tests.support.close import assert_close, to_numpy
from tests.support.compiled import compiled

rng = np.random.default_rng(0)
SHAPES = {"k": (2, 3), "c": (4,)}


def entries(time, batch=3):
    return {
        name: ops.convert_to_tensor(
            rng.normal(size=(batch, time, *shape)).astype("float32")
        )
        for name, shape in SHAPES.items()
    }


def parts(entries, *cuts):
    """The entries cut along time."""
    bounds = [0, *cuts, entries["k"].shape[1]]
    for begin, end in zip(bounds, bounds[1:], strict=False):
        yield {name: x[:, begin:end] for name, x in entries.items()}


def reference(slots, rolling, tokens):
    """A dict of slots for each row: the last token that was put in each."""
    rows = []
    for row in tokens:
        held = {}
        for position, token in enumerate(row):
            if rolling or position < slots:
                held[position % slots] = (position, token)
        rows.append(held)
    return rows


def assert_holds(cache, state, tokens):
    """Each slot of the state holds what it should of the tokens k, row by row."""
    positions, k = to_numpy(cache.positions(state)), to_numpy(state["k"])
    for b, held in enumerate(reference(cache.slots, cache.rolling, tokens)):
        for slot in range(cache.slots):
            position, token = held.get(slot, (-1, None))
            assert positions[b, slot] == position
            if token is not None:
                assert_close(k[b, slot], token, 0)


@pytest.mark.parametrize("rolling", [False, True])
@pytest.mark.parametrize("cuts", [(), (1,), (4,), (3, 4), (1, 2, 3, 4, 5, 6, 7)])
def test_slots_hold_the_tokens_for_any_split(rolling, cuts):
    cache = KVCache(5, rolling)
    state, tokens = cache.initial_state(3, SHAPES), entries(8)
    update = compiled(cache.update)
    for part in parts(tokens, *cuts):
        state = update(state, part)
    assert (to_numpy(state["length"]) == 8).all()
    assert_holds(cache, state, to_numpy(tokens["k"]))


@pytest.mark.parametrize("rolling", [False, True])
def test_rows_of_different_lengths_keep_to_themselves(rolling):
    cache = KVCache(4, rolling)
    state, tokens = cache.initial_state(3, SHAPES), entries(6)
    mask = np.array([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1]], bool)
    state = cache(state, tokens, mask=ops.convert_to_tensor(mask))
    more = entries(1)
    state = cache(state, more)
    assert (to_numpy(state["length"]) == [4, 5, 6]).all()
    k, added = to_numpy(tokens["k"]), to_numpy(more["k"])
    rows = [np.concatenate([k[b][mask[b]], added[b]]) for b in range(3)]
    assert_holds(cache, state, rows)


def test_masked_tokens_have_no_position_of_their_own():
    cache = KVCache(6)
    state = cache.update(cache.initial_state(2, SHAPES), entries(2, batch=2))
    mask = ops.convert_to_tensor(np.array([[0, 1, 1], [1, 1, 0]], bool))
    now = cache.next_positions(state, entries(3, batch=2)["k"], mask)
    assert_close(now, [[1, 2, 3], [2, 3, 3]], 0)
    assert_close(cache.next_positions(state, mask), [[2, 3, 4]] * 2, 0)


def test_a_state_is_left_as_it_was():
    cache = KVCache(4, rolling=True)
    state = cache.update(cache.initial_state(3, SHAPES), entries(3))
    before = {name: to_numpy(x) for name, x in state.items()}
    cache.update(state, entries(2))
    for name, x in state.items():
        assert_close(x, before[name], 0)


def test_beams_are_reordered():
    cache = KVCache(4)
    state = cache.update(cache.initial_state(3, SHAPES), entries(2))
    mask = ops.convert_to_tensor(np.array([[1], [0], [1]], bool))
    state = cache.update(state, entries(1), mask)
    rows = ops.convert_to_tensor(np.array([1, 1, 0], "int32"))
    chosen = cache.reorder(state, rows)
    assert (to_numpy(chosen["length"]) == [2, 2, 3]).all()
    for name in SHAPES:
        assert_close(chosen[name], to_numpy(state[name])[[1, 1, 0]], 0)


def test_shapes_stay_so_that_a_step_compiles_once():
    cache, traces = KVCache(4, rolling=True), []
    state = cache.initial_state(3, SHAPES)

    def update(state, part):
        traces.append(None)
        return cache.update(state, part)

    run = compiled(update)
    for part in parts(entries(7), *range(1, 7)):
        new = run(state, part)
        assert all(new[name].shape == x.shape for name, x in state.items())
        state = new
    assert len(traces) == (1 if keras.backend.backend() == "jax" else 7)


def test_entries_keep_their_dtype():
    cache = KVCache(4, dtype="mixed_bfloat16")
    state = cache.initial_state(3, SHAPES)
    assert keras.backend.standardize_dtype(state["k"].dtype) == "bfloat16"
    state = cache.initial_state(3, SHAPES, dtype="float32", slots=7)
    state = cache(state, entries(2))
    assert keras.backend.standardize_dtype(state["k"].dtype) == "float32"
    assert state["k"].shape == (3, 7, 2, 3)


def test_config_keeps_the_arguments():
    cache = KVCache.from_config(KVCache(5, rolling=True).get_config())
    assert (cache.slots, cache.rolling) == (5, True)
