"""Parity of bits: recurrent networks learn a rule that holds for longer strings.

    KERAS_BACKEND=jax python examples/bit_parity.py

Every step says whether the number of ones so far is odd. lstm and slstm flip a state,
which works at any length; mamba's decays are positive and cannot flip one
(Merrill et al. 2024, arXiv:2404.08819; Grazzi et al. 2024, arXiv:2411.12537).

Needs the extra `report` and a backend. Draws the accuracy by the length of the string.
"""

import argparse

import altair as alt
import keras
import numpy as np

import keras_edifice


def strings(rng, count, length):
    """(bits, the parity of each beginning)."""
    bits = rng.integers(2, size=(count, length)).astype("int32")
    return bits, bits.cumsum(axis=1, dtype="int32") % 2


def accuracy_by_length(architecture, arguments):
    """Rows of a length, to twice the trained one, and the accuracy of the parity."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    model = keras_edifice.build(
        architecture,
        vocab_size=2,
        hidden_size=32,
        num_layers=arguments.layers,
        dropout=0.0,
        window_size=None,
    )
    rate = keras.optimizers.schedules.CosineDecay(0.01, arguments.steps)
    model.compile(
        keras.optimizers.Adam(rate, clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    train = strings(rng, 64 * arguments.steps, arguments.length)
    model.fit(*train, batch_size=64, verbose=0)
    bits, parity = strings(rng, 1024, 2 * arguments.length)
    right = model.predict(bits, batch_size=256, verbose=0).argmax(axis=-1) == parity
    return [
        dict(architecture=architecture, length=i + 1, accuracy=float(share))
        for i, share in enumerate(right.mean(axis=0))  # causal: step i is string i + 1
    ]


def main():
    """Prints the accuracy at twice the trained length and draws it at every length."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--architectures", default="lstm,slstm,mamba")
    parser.add_argument("--length", type=int, default=20, help="bits in training")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--chart", default="bit_parity.svg")
    arguments = parser.parse_args()

    rows = []
    for architecture in arguments.architectures.split(","):
        rows += accuracy_by_length(architecture, arguments)
        print(
            f"{architecture}: {rows[-1]['accuracy']:.3f} of the strings of "
            f"{2 * arguments.length} bits, trained on {arguments.length}",
            flush=True,
        )
    lines = (
        alt.Chart(alt.Data(values=rows), title="Parity of the bits so far")
        .mark_line()
        .encode(
            alt.X("length:Q", title="length of the string (dashed: trained)"),
            alt.Y("accuracy:Q", title="strings right").axis(format="%"),
            alt.Color("architecture:N").sort(None),
        )
    )
    trained = alt.Chart(alt.Data(values=[{}])).mark_rule(strokeDash=[4, 4])
    trained = trained.encode(x=alt.datum(arguments.length))
    (lines + trained).save(arguments.chart)


if __name__ == "__main__":
    main()
