import json

import keras
import numpy as np
import pytest
from typer.testing import CliRunner

from keras_edifice.backends.peer_models import PEER_MODELS, PeerModel
from keras_edifice.backends.selection import installed
from keras_edifice.benchmark.architectures import PARTS, Case, measure
from keras_edifice.commands import app
from keras_edifice.registry import info

SIZES = dict(batch=2, width=8, least=0.0, progress=lambda line: None)


def test_each_part_of_a_sequence_is_measured_at_each_length():
    rows = measure(["lstm"], lengths=(4, 8), **SIZES)
    assert [(row.length, row.part) for row in rows] == [
        (length, part) for length in (4, 8) for part in PARTS
    ]
    for row in rows:
        assert row.implementation == f"keras_edifice, {keras.backend.backend()}"
        assert 0 < row.fastest <= row.milliseconds <= row.slowest


def test_what_is_no_sequence_has_no_length_and_no_stream():
    rows = measure(["mlp"], {"input_size": 4}, **SIZES)
    assert [(row.length, row.part) for row in rows] == [
        (None, "forward"),
        (None, "training step"),
    ]


def test_sizes_and_options_reach_the_model():
    entry = info("lstm")
    options = entry.resolve(dict(embed_size=8, hidden_size=8, window_size=5))
    case = Case(entry, options, 5, 3, 0.0)
    assert case.x.shape == (3, 5, 8)
    before = [v.numpy() for v in case.model.trainable_variables]
    list(case.rows("training step"))
    after = [v.numpy() for v in case.model.trainable_variables]
    assert all(np.abs(a - b).max() > 0 for a, b in zip(before, after, strict=True))


@pytest.mark.skipif(not installed("torch"), reason="the peers are PyTorch's")
def test_an_independent_implementation_runs_in_turn():
    rows = measure(["lstm"], lengths=(6,), peers=True, parts=("forward",), **SIZES)
    ours, theirs = rows
    assert theirs.implementation == "torch.nn.LSTM (PyTorch)"
    low, middle, high = theirs.ratio
    assert ours.ratio is None and 0 < low <= middle <= high


@pytest.mark.skipif(not installed("torch"), reason="the peers are PyTorch's")
def test_a_peer_trains():
    entry = info("gru")
    options = entry.resolve(dict(embed_size=4, hidden_size=4))
    x = np.random.default_rng(0).normal(size=(2, 5, 4)).astype("float32")
    peer = PeerModel(PEER_MODELS["gru"]["torch.nn.GRU"](options), x, x[:, 0])
    assert peer.forward().shape == (2, 4)
    assert peer.peak_bytes() > 0
    losses = [peer.train() for _ in range(5)]
    assert losses[-1] < losses[0]


def test_every_peer_is_that_of_a_sequence_or_an_image():
    for name in PEER_MODELS:
        assert info(name).kind in ("sequence", "image")


def test_unknown_parts_are_refused():
    with pytest.raises(ValueError, match="unknown part 'backward'; they are 'forward'"):
        measure(["lstm"], parts=("backward",), **SIZES)


def test_command_takes_names_and_options(tmp_path):
    command = ["bench", "min_gru", "num_layers=1", "--lengths", "4,8", "--width", "8"]
    command += ["--batch", "1", "--parts", "forward", "--seconds", "0"]
    command += ["--backend", keras.backend.backend()]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert "min_gru, forward" in done.stdout and "twice the length" in done.stdout
    done = CliRunner().invoke(app, [*command, "--json"])
    assert [row["length"] for row in json.loads(done.stdout)] == [4, 8]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["sums"], "unknown architecture 'sums'"),
        (["lstm", "colour=3"], "no option 'colour'"),
        (["lstm", "--parts", "other"], "unknown part 'other'"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message):
    command = ["bench", *arguments, "--backend", keras.backend.backend()]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1
