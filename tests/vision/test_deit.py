import math

import keras
import numpy as np
import pytest

import keras_edifice
from keras_edifice.vision.deit import TeacherLogits, cross_entropy, soft_distillation
from tests.support.close import assert_close, to_numpy
from tests.support.compiled import compiled
from tests.support.counting import count_weights
from tests.support.initial import is_truncated
from tests.support.shaking import shake

rng = np.random.default_rng(0)
SMALL = dict(
    image_size=8,
    patch_size=4,
    num_channels=2,
    embed_size=12,
    num_layers=2,
    num_heads=3,
    num_classes=5,
    classifier_activation=None,
)


def small(**options):
    return shake(keras_edifice.build("deit", **{**SMALL, **options}))


def images(side=8, examples=2):
    return rng.normal(size=(examples, side, side, 2)).astype("float32")


def teacher(num_classes=5, activation="softmax"):
    options = dict(input_channels=2, hidden_size=4, block_sizes=[1], stem="cifar")
    head = dict(num_classes=num_classes, classifier_activation=activation)
    return shake(keras_edifice.build("resnet", **options, **head))


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def normalise(x, gamma, beta):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * gamma + beta


def attend(x, qkv, b_qkv, out, b_out, num_heads):
    d, width = x.shape[-1], x.shape[-1] // num_heads
    y, q_k_v = np.zeros_like(x), x @ qkv + b_qkv
    for h in range(num_heads):
        part = slice(h * width, (h + 1) * width)
        q, k, v = (q_k_v[..., i * d : (i + 1) * d][..., part] for i in range(3))
        y[..., part] = softmax(q @ k.swapaxes(1, 2) / np.sqrt(width)) @ v
    return y @ out + b_out


def reference(x, model, num_layers=2, num_heads=3, patch=4):
    """Section 4 of the paper in float64: the logits of both heads."""
    w = iter(to_numpy(weight) for weight in model.weights)
    b, side = len(x), x.shape[1] // patch
    x = x.reshape(b, side, patch, side, patch, -1)
    z = np.einsum("bricjk,ijkd->brcd", x, next(w)) + next(w)
    distillation, label = next(w), next(w)
    tokens = [np.repeat(t, b, axis=0) for t in (label, distillation)]
    z = np.concatenate([*tokens, z.reshape(b, side * side, -1)], axis=1) + next(w)
    for _ in range(num_layers):
        h = normalise(z, next(w), next(w))
        z = z + attend(h, next(w), next(w), next(w), next(w), num_heads)
        h = normalise(z, next(w), next(w)) @ next(w) + next(w)
        h = h * (1 + np.vectorize(math.erf)(h / math.sqrt(2))) / 2
        z = z + h @ next(w) + next(w)
    z = normalise(z, next(w), next(w))
    heads = {p: to_numpy(v) for p, v in ((v.path, v) for v in model.weights)}
    return [
        z[:, i] @ heads[f"{name}/kernel"] + heads[f"{name}/bias"]
        for i, name in enumerate(["predictions", "teacher_predictions"])
    ]


def test_output_is_the_mean_of_both_heads_in_the_equations():
    model, x = small(), images()
    by_label, by_teacher = reference(x.astype("float64"), model)
    assert_close(model(x), (by_label + by_teacher) / 2, 1e-4)


def test_a_teacher_of_other_classes_keeps_the_heads_apart():
    model, x = small(teacher_num_classes=7), images()
    outputs = model(x)
    assert set(outputs) == {"cls", "dist"}
    by_label, by_teacher = reference(x.astype("float64"), model)
    assert by_teacher.shape == (2, 7)
    assert_close(outputs["cls"], by_label, 1e-4)
    assert_close(outputs["dist"], by_teacher, 1e-4)


@pytest.mark.parametrize(
    ("variant", "distilled", "plain"),
    [
        ("ti16", 5_910_800, 5_717_416),
        ("s16", 22_436_432, 22_050_664),
        ("b16", 87_338_192, 86_567_656),
        ("b16_384", 87_630_032, 86_859_496),
    ],
)
def test_published_sizes(variant, distilled, plain):
    assert count_weights("deit", variant=variant) == (distilled, 0)
    assert count_weights("deit", variant=variant, distillation=None) == (plain, 0)


def test_without_distillation_it_is_a_vision_transformer():
    options = {k: v for k, v in SMALL.items() if k != "classifier_activation"}
    plain, vit = small(distillation=None), keras_edifice.build("vit", **options)
    assert [w.path for w in plain.weights] == [w.path for w in vit.weights]
    vit.set_weights(plain.get_weights())
    x = images()
    assert_close(softmax(to_numpy(plain(x))), vit(x))


def test_two_tokens_precede_those_of_the_patches():
    model, x = small(return_sequences=True), images()
    assert tuple(model(x).shape) == (2, 4 + 2, 12)
    assert tuple(model.get_layer("positions").table.shape) == (1, 6, 12)


def test_features_are_those_of_the_class_token_and_the_patches():
    tokens, x = small(return_sequences=True), images()
    features, maps = small(num_classes=None), small(features_only=True)
    for other in (features, maps):
        other.set_weights(tokens.get_weights())
    y = to_numpy(tokens(x))
    assert_close(features(x), y[:, 0], 1e-6)
    (name, grid), *others = maps(x).items()
    assert (name, others) == ("stride_4", [])
    assert_close(grid, y[:, 2:].reshape(2, 2, 2, 12), 1e-6)


def test_patches_may_answer_to_the_labels():
    model, mean, x = small(), small(pool="mean"), images()
    tokens = small(return_sequences=True)
    for other in (mean, tokens):
        other.set_weights(model.get_weights()[: len(other.weights)])
    y = to_numpy(tokens(x))
    heads = [mean.get_layer(f"{by}predictions") for by in ("", "teacher_")]
    answers = y[:, 2:].mean(1), y[:, 1]
    expected = [to_numpy(head(z)) for head, z in zip(heads, answers, strict=True)]
    assert_close(mean(x), sum(expected) / 2, 1e-5)


def test_positions_alone_tell_the_patches_apart():
    model, x = small(), images()
    moved = x[:, :, [4, 5, 6, 7, 0, 1, 2, 3]]
    assert np.abs(to_numpy(model(x)) - to_numpy(model(moved))).max() > 1e-2
    table = model.get_layer("positions").table
    table.assign(np.zeros(table.shape))
    assert_close(model(moved), model(x))


def test_silent_distillation_head_leaves_half_of_the_class_logits():
    model, x = small(), images()
    for weight in model.get_layer("teacher_predictions").weights:
        weight.assign(np.zeros(weight.shape))
    by_label, _ = reference(x.astype("float64"), model)
    assert_close(model(x), by_label / 2, 1e-4)


def test_loss_of_hard_distillation_is_equation_3():
    student, x = small(), images()
    model, y = student.distill(teacher()), np.array([3, 1])
    out = model(x)
    by_label, by_teacher = (np.log(softmax(to_numpy(out[k]))) for k in ("cls", "dist"))
    answers = to_numpy(out["teacher"]).argmax(-1)
    smooth = 0.9 * np.eye(5)[y] + 0.1 / 5
    terms = -(smooth * by_label).sum(-1) / 2 - by_teacher[[0, 1], answers] / 2
    assert_close(model.compute_loss(x, y, out), terms.mean())
    weights = np.array([0.5, 2.0], "float32")
    assert_close(model.compute_loss(x, y, out, weights), (weights * terms).mean())


def test_loss_of_soft_distillation_is_equation_2():
    options = dict(distillation="soft", alpha=0.1, temperature=3.0, label_smoothing=0.0)
    student, x, judge = small(**options), images(), teacher()
    model, y = student.distill(judge), np.array([3, 1])
    out = model(x)
    wanted = to_numpy(judge(x)) ** (1 / 3)
    wanted = wanted / wanted.sum(-1, keepdims=True)
    given = softmax(to_numpy(out["dist"]) / 3)
    kl = (wanted * np.log(wanted / given)).sum(-1)
    label = -np.log(softmax(to_numpy(out["cls"])))[[0, 1], y]
    terms = 0.9 * label + 0.1 * 9 * kl
    assert_close(model.compute_loss(x, y, out), terms.mean(), 1e-4)


def test_labels_may_be_numbers_columns_or_probabilities():
    logits = keras.ops.convert_to_tensor(rng.normal(size=(2, 3)).astype("float32"))
    y = np.array([2, 0])
    expected = to_numpy(cross_entropy(y, logits, 0.1))
    for target in (y[:, None], np.eye(3, dtype="float32")[y]):
        assert_close(cross_entropy(target, logits, 0.1), expected, 1e-6)
    plain = -np.log(softmax(to_numpy(logits)))[[0, 1], y]
    assert_close(cross_entropy(y, logits), plain)


def test_divergence_from_oneself_is_zero():
    z = keras.ops.convert_to_tensor(rng.normal(size=(2, 3)).astype("float32"))
    assert_close(soft_distillation(z, z, 2.0), np.zeros(2), 0)
    other = keras.ops.convert_to_tensor(rng.normal(size=(2, 3)).astype("float32"))
    assert (to_numpy(soft_distillation(z, other, 2.0)) > 0).all()


def test_logits_of_a_teacher_of_either_kind_are_the_same():
    logits, probabilities = teacher(activation=None), teacher()
    probabilities.set_weights(logits.get_weights())
    x, student = images(), small()
    outputs = [
        softmax(to_numpy(student.distill(judge, from_logits)(x)["teacher"]))
        for judge, from_logits in [(logits, True), (probabilities, False)]
    ]
    assert_close(*outputs)


def test_one_step_with_a_contradicting_teacher_parts_the_heads():
    model, x = small(label_smoothing=0.0), images(examples=4)
    label, by_teacher = (
        model.get_layer(name) for name in ("predictions", "teacher_predictions")
    )
    by_teacher.set_weights(label.get_weights())
    judge = teacher()
    head = judge.get_layer("predictions")
    head.set_weights([np.zeros((4, 5)), 9.0 * np.eye(5)[1]])  # always the second
    before = to_numpy(label.bias)
    training = model.distill(judge)
    training.compile(keras.optimizers.SGD(0.1))
    training.fit(x, np.zeros(4, "int32"), batch_size=4, verbose=0)
    moved = [to_numpy(layer.bias) - before for layer in (label, by_teacher)]
    assert moved[0][0] > 0 > moved[0][1]
    assert moved[1][1] > 0 > moved[1][0]


def test_fitting_trains_the_student_and_leaves_the_teacher():
    student, judge = small(), teacher()
    model = student.distill(judge)
    assert {id(v) for v in model.trainable_variables} == {
        id(v) for v in student.trainable_variables
    }
    known, old = judge.get_weights(), student.get_weights()
    model.compile(keras.optimizers.AdamW(1e-2, weight_decay=0.1))
    log = model.fit(images(examples=8), np.arange(8) % 5, epochs=2, verbose=0).history
    assert log["loss"][1] < log["loss"][0]
    halves = [log[name][1] for name in ("classification", "distillation")]
    assert_close(log["loss"][1], np.mean(halves), 1e-4)
    for weight, before in zip(judge.get_weights(), known, strict=True):
        assert_close(weight, before, 0)
    assert all(np.any(a != b) for a, b in zip(student.get_weights(), old, strict=True))


def test_training_goes_on_after_saving(tmp_path):
    model, x, y = small().distill(teacher()), images(), np.array([3, 1])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded) is type(model)
    expected = model.compute_loss(x, y, model(x))
    assert_close(loaded.compute_loss(x, y, loaded(x)), expected, 1e-6)
    assert len(loaded.trainable_variables) == len(model.trainable_variables)


def test_loaded_student_can_be_distilled_into(tmp_path):
    student, judge, x = small(), teacher(), images()
    student.save(tmp_path / "student.keras")
    loaded = keras.saving.load_model(tmp_path / "student.keras")
    outputs, expected = loaded.distill(judge)(x), student.distill(judge)(x)
    for name in ("cls", "dist", "teacher"):
        assert_close(outputs[name], expected[name], 1e-6)


def test_answers_of_a_teacher_may_be_a_second_target():
    model = small(teacher_num_classes=7)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(
        "sgd", {"cls": loss, "dist": loss}, loss_weights=dict(cls=0.5, dist=0.5)
    )
    x, y = images(), np.array([3, 1])
    given = {"cls": y, "dist": np.array([6, 0])}
    found = model.evaluate(x, given, return_dict=True, verbose=0)["loss"]
    outputs = model(x)
    terms = [
        -np.log(softmax(to_numpy(outputs[k])))[[0, 1], given[k]]
        for k in ("cls", "dist")
    ]
    assert_close(found, np.mean(terms), 1e-4)


def test_models_without_two_heads_cannot_be_distilled_into():
    for options in (dict(distillation=None), dict(num_classes=None)):
        with pytest.raises(ValueError, match="distill needs a model with two heads"):
            small(**options).distill(teacher())
    with pytest.raises(ValueError, match=r"teacher must give 5 classes .* \(None, 7\)"):
        small().distill(teacher(7))
    with pytest.raises(ValueError, match="teacher must give 5 .* shape None"):
        small().distill(small(teacher_num_classes=5))
    with pytest.raises(ValueError, match="teacher_num_classes needs distillation"):
        small(distillation=None, teacher_num_classes=7)


def test_weights_move_to_another_image_size(tmp_path):
    model, large = small(), small(image_size=16)
    model.save_weights(tmp_path / "small.weights.h5")
    large.load_weights(tmp_path / "small.weights.h5")
    table, old = (m.get_layer("positions").table for m in (large, model))
    assert tuple(table.shape) == (1, 2 + 16, 12)
    assert_close(table[:, :2], old[:, :2], 0)
    assert np.isfinite(to_numpy(compiled(large)(images(16)))).all()


def test_weights_start_truncated():
    keras.utils.set_random_seed(0)
    model = keras_edifice.build("deit", **{**SMALL, "embed_size": 48})
    for weight in model.weights:
        values = to_numpy(weight)
        if weight.name == "kernel":
            assert is_truncated(values), weight.path
        elif weight.name in ("token", "table"):
            assert 0.01 < values.std() < 0.03, weight.path
        elif weight.name == "bias":
            assert not values.any()


def test_regularisers_act_in_training_alone():
    x = images()
    for option in ("dropout", "attention_dropout", "drop_path"):
        model = small(**{option: 0.5})
        assert_close(model(x), model(x), 0)
        moved = to_numpy(model(x, training=True)) - to_numpy(model(x))
        assert np.abs(moved).max() > 0.1


def test_config_keeps_the_arguments():
    layer = TeacherLogits(True, name="a")
    layer = TeacherLogits.from_config(layer.get_config())
    assert layer.from_logits is True


def test_head_gives_probabilities_unless_logits_are_asked_for():
    model, x = small(classifier_activation="softmax"), images()
    logits = small()
    logits.set_weights(model.get_weights())
    assert_close(model(x), softmax(to_numpy(logits(x))))
