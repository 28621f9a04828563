import json

import numpy as np
import pytest

from keras_edifice.comparison import compare, contest
from keras_edifice.errors import one_line

SMALL = "mlp:hidden_sizes=[16]"


@pytest.fixture(scope="module")
def outcome():
    """A good contender, the same with fewer weights, and three that cannot run."""
    return compare(
        f"{SMALL},resnet,mlp:hidden_sizes=[2],nope,mlp:hidden_sizes=[0]",
        epochs=3,
        progress=False,
    )


def test_rows_are_ranked_by_accuracy_and_failures_come_last(outcome):
    ranks = [row.rank for row in outcome.rows]
    assert ranks == [1, 2, None, None, None]
    assert outcome.rows[0].accuracy >= outcome.rows[1].accuracy
    assert not outcome.failed


def test_a_contender_that_fails_is_a_row_with_its_error(outcome):
    errors = {row.label: row.error for row in outcome.rows if row.error}
    assert "takes image data, rings is vector data" in errors["resnet"]
    assert "unknown architecture 'nope'" in errors["nope"]
    assert "hidden_sizes[0] must be >= 1" in errors["mlp:hidden_sizes=[0]"]
    assert all("\n" not in error for error in errors.values())


def test_a_contender_learns_the_rings(outcome):
    best = outcome.rows[0]
    assert best.label == SMALL
    assert best.accuracy > 0.7


def test_what_is_measured_is_the_model(outcome):
    row, data = outcome.rows[0], outcome.data
    assert row.parameters == row.model.count_params() == 2 * 16 + 16 + 16 * 5 + 5
    guesses = np.argmax(row.model.predict(data.x_test, verbose=0), axis=-1)
    assert row.accuracy == pytest.approx(np.mean(guesses == data.y_test))
    assert row.accuracy == pytest.approx(row.curve["val_accuracy"][-1], abs=1e-6)
    assert row.training_seconds > 0 and row.prediction_milliseconds > 0


def test_the_curve_has_every_epoch(outcome):
    curve = outcome.rows[0].curve
    assert set(curve) == {"loss", "accuracy", "val_loss", "val_accuracy"}
    assert all(len(values) == 3 for values in curve.values())
    assert curve["loss"][-1] < curve["loss"][0]


def test_equal_accuracy_puts_the_smaller_one_first():
    rows = [
        contest.Row("big", "mlp", accuracy=0.5, parameters=9),
        contest.Row("broken", "mlp", error="no"),
        contest.Row("small", "mlp", accuracy=0.5, parameters=3),
        contest.Row("best", "mlp", accuracy=0.9, parameters=99),
    ]
    ranked = contest._ranked(rows)
    assert [row.label for row in ranked] == ["best", "small", "big", "broken"]
    assert [row.rank for row in ranked] == [1, 2, 3, None]


def test_a_seed_repeats_the_result(outcome):
    again = compare(SMALL, epochs=3, progress=False).rows[0]
    assert again.curve["loss"] == pytest.approx(outcome.rows[0].curve["loss"], rel=1e-4)
    other = compare(SMALL, epochs=1, seed=1, progress=False).rows[0]
    assert abs(other.curve["loss"][0] - again.curve["loss"][0]) > 1e-3


@pytest.fixture
def untrained(monkeypatch):
    """Contenders report two epochs and a result without having run."""

    def train(model, row, inputs, data, settings, steps):
        for epoch in range(settings.epochs):
            steps.epoch(row, epoch, {"loss": 1.0, "accuracy": 0.5})
        row.training_seconds = 1.0

    def measure(model, row, *rest):
        row.accuracy, row.parameters = 0.5, 7

    monkeypatch.setattr(contest, "_train", train)
    monkeypatch.setattr(contest, "_measure", measure)


def test_an_exception_in_training_stops_nobody_else(untrained, monkeypatch):
    train = contest._train

    def broken(model, row, *rest):
        if row.label == "mlp":
            raise RuntimeError("the machine\nis on fire")
        train(model, row, *rest)

    monkeypatch.setattr(contest, "_train", broken)
    rows = compare(f"mlp,{SMALL}", epochs=1, progress=False).rows
    assert [row.label for row in rows] == [SMALL, "mlp"]
    assert rows[1].error == "RuntimeError: the machine"


def test_a_model_that_converts_is_measured_converted(monkeypatch):
    build = contest.Contender.classifier

    def convertible(self, data):
        model = build(self, data)

        def convert(calibration):
            assert calibration.shape == (800, 2)
            for weight in model.weights:
                weight.assign(np.zeros(weight.shape, "float32"))
            return model

        object.__setattr__(model, "convert", convert)
        return model

    monkeypatch.setattr(contest.Contender, "classifier", convertible)
    (row,) = compare(SMALL, epochs=1, progress=False).rows
    assert row.accuracy == pytest.approx(0.2)  # zeros choose class 0 always
    before = 100 * row.curve["val_accuracy"][-1]
    assert f"{before:.1f} % before the conversion" in row.notes


def test_json_holds_everything_but_the_model(outcome):
    held = json.loads(outcome.to_json())
    assert [row["rank"] for row in held["rows"]] == [1, 2, None, None, None]
    assert held["rows"][0]["accuracy"] == outcome.rows[0].accuracy
    assert held["rows"][0]["options"] == {"hidden_sizes": [16]}
    assert "model" not in held["rows"][0]
    assert held["settings"]["epochs"] == 3
    assert held["data"]["test_examples"] == 200


def test_json_has_null_where_a_number_is_not_finite():
    assert contest._plain({"loss": [float("nan"), 1.0]}) == {"loss": [None, 1.0]}


def test_the_table_shows_each_contender(outcome):
    lines = outcome.table().splitlines()
    assert lines[0].split()[:3] == ["rank", "architecture", "family"]
    assert len(lines) == 2 + 5
    assert f"{100 * outcome.rows[0].accuracy:.1f} %" in lines[2]
    assert "failed: unknown architecture 'nope'" in lines[5]
    assert outcome.table() in str(outcome)


def test_progress_is_told_after_every_epoch_and_contender(untrained):
    told = []
    compare(
        f"nope,{SMALL}",
        epochs=2,
        progress=lambda done, total, row, logs: told.append(
            (done, total, row.label, bool(logs))
        ),
    )
    assert told == [
        (2, 4, "nope", False),
        (3, 4, SMALL, True),
        (4, 4, SMALL, True),
        (4, 4, SMALL, False),
    ]


def test_without_a_terminal_there_is_a_line_for_each_contender(untrained, capsys):
    compare(f"{SMALL},nope", epochs=2)
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0] == f"{SMALL}: 50.0 % of the test set, 1.0 s"
    assert "nope: failed: unknown architecture" in lines[1]
    assert len(lines) == 2


def test_in_a_terminal_there_is_a_bar(untrained, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    compare(SMALL, epochs=2)
    assert "2/2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(epochs=0), "epochs must be a whole number >= 1, received 0"),
        (dict(batch_size=1.5), "batch_size must be a whole number"),
        (dict(learning_rate=0), "learning_rate must be > 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        compare("mlp", progress=False, **options)


def test_digits_train_image_and_vector_architectures():
    outcome = compare(
        "mlp,vit:num_layers=1:embed_size=16", data="digits", epochs=1, progress=False
    )
    assert not any(row.error for row in outcome.rows)
    mlp = next(row for row in outcome.rows if row.label == "mlp")
    assert mlp.accuracy > 0.7


def test_every_row_of_an_unlucky_comparison_may_fail():
    outcome = compare("gat,nope", data="wine", epochs=1, progress=False)
    assert outcome.failed
    assert [row.rank for row in outcome.rows] == [None, None]
    assert outcome.table().count("failed:") == 2


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("first\nsecond"), "first"),
        (RuntimeError("  a   b "), "RuntimeError: a b"),
        (KeyError("x"), "KeyError: 'x'"),
        (RuntimeError(), "RuntimeError"),
        (FileNotFoundError(2, "no such file", "a.csv"), "no such file: a.csv"),
        (
            ValueError(
                "Exception encountered when calling Dense.call().\n\n"
                "\x1b[1mbad shape\x1b[0m\n\nArguments received"
            ),
            "bad shape",
        ),
    ],
)
def test_an_error_becomes_one_line(error, line):
    assert one_line(error) == line
