"""Recall of key-value pairs: delta rule memories learn to look up what they were told.

    KERAS_BACKEND=jax python examples/key_value_recall.py

A sequence lists pairs of a key and a value, then asks for the keys in another order
(Arora et al. 2023, multi-query associative recall, arXiv:2312.04927). The pairs are
drawn anew for each sequence: nothing but the memory of the sequence can answer.

Needs the extra `report` and a backend. Draws the learning curves.
"""

import argparse

import altair as alt
import keras
import numpy as np

import keras_edifice

KINDS = 16  # of keys, and as many of values


def sequences(rng, count, pairs):
    """(tokens, answers): `pairs` times key and value, then every key once more."""
    keys = rng.permuted(np.tile(np.arange(KINDS), (count, 1)), axis=1)[:, :pairs]
    values = KINDS + rng.integers(KINDS, size=(count, pairs))
    asked = rng.permuted(np.tile(np.arange(pairs), (count, 1)), axis=1)
    listed = np.stack([keys, values], axis=-1).reshape(count, 2 * pairs)
    tokens = np.concatenate([listed, np.take_along_axis(keys, asked, axis=1)], axis=1)
    answers = np.take_along_axis(values, asked, axis=1)
    return tokens.astype("int32"), answers.astype("int32")


def learning_curve(architecture, arguments):
    """Rows of the step and the accuracy on sequences not trained on."""
    keras.utils.set_random_seed(0)
    rng, pairs = np.random.default_rng(0), arguments.pairs
    test = sequences(rng, 512, pairs)
    model = keras_edifice.build(
        architecture,
        vocab_size=2 * KINDS,
        hidden_size=arguments.hidden_size,
        num_layers=1,
        num_heads=2,
        dropout=0.0,
        window_size=3 * pairs,
    )
    model = keras.Model(model.input, model.output[:, -pairs:])
    rate = keras.optimizers.schedules.CosineDecay(0.005, arguments.steps)
    model.compile(
        keras.optimizers.Adam(rate, clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    rows, every = [], max(1, arguments.steps // 20)
    for step in range(every, arguments.steps + 1, every):
        model.fit(*sequences(rng, 32 * every, pairs), batch_size=32, verbose=0)
        accuracy = model.evaluate(*test, batch_size=256, verbose=0)[1]
        rows.append(dict(architecture=architecture, step=step, accuracy=accuracy))
    return rows


def main():
    """Prints the test accuracy of each architecture and draws how it came."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--architectures", default="gated_delta_net,delta_net")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--chart", default="key_value_recall.svg")
    arguments = parser.parse_args()

    rows = []
    for architecture in arguments.architectures.split(","):
        rows += learning_curve(architecture, arguments)
        print(f"{architecture}: {rows[-1]['accuracy']:.3f} of the values", flush=True)
    alt.Chart(
        alt.Data(values=rows), title=f"Recall of {arguments.pairs} key-value pairs"
    ).mark_line(point=True).encode(
        alt.X("step:Q", title="training step"),
        alt.Y("accuracy:Q", title="values recalled").axis(format="%"),
        alt.Color("architecture:N").sort(None),
    ).save(arguments.chart)


if __name__ == "__main__":
    main()
