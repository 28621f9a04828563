"""Selective copying: mamba learns to pick tokens out of noise, s4d does not.

    KERAS_BACKEND=jax python examples/selective_copying.py

Data tokens stand at random places among noise and are to be given in their order at
the end (Gu & Dao 2023, section 4.1). What to keep depends on what it is: mamba's state
space looks at its input, that of s4d is the same for every token.

Needs the extra `report` and a backend. Draws the learning curves.
"""

import argparse

import altair as alt
import keras
import numpy as np

import keras_edifice

KINDS = 16  # of data tokens; then come the noise and the token that asks for an answer


def sequences(rng, count, length, kept):
    """(tokens, answers): `kept` data tokens among `length`, then `kept` times "?"."""
    answers = rng.integers(KINDS, size=(count, kept))
    places = rng.permuted(np.tile(np.arange(length), (count, 1)), axis=1)[:, :kept]
    tokens = np.full((count, length + kept), KINDS)
    np.put_along_axis(tokens, np.sort(places), answers, axis=1)
    tokens[:, length:] = KINDS + 1
    return tokens.astype("int32"), answers.astype("int32")


def learning_curve(architecture, arguments):
    """Rows of the step and the accuracy on sequences not trained on."""
    keras.utils.set_random_seed(0)
    rng, size = np.random.default_rng(0), (arguments.length, arguments.kept)
    test = sequences(rng, 512, *size)
    model = keras_edifice.build(
        architecture,
        vocab_size=KINDS + 2,
        hidden_size=arguments.hidden_size,
        num_layers=2,
        tie_embeddings=False,
        dropout=0.0,
        window_size=sum(size),
    )
    model = keras.Model(model.input, model.output[:, -arguments.kept :])
    rate = keras.optimizers.schedules.CosineDecay(0.005, arguments.steps)
    model.compile(
        keras.optimizers.Adam(rate, clipnorm=1.0),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    rows, every = [], max(1, arguments.steps // 20)
    for step in range(every, arguments.steps + 1, every):
        model.fit(*sequences(rng, 32 * every, *size), batch_size=32, verbose=0)
        accuracy = model.evaluate(*test, batch_size=256, verbose=0)[1]
        rows.append(dict(architecture=architecture, step=step, accuracy=accuracy))
    return rows


def main():
    """Prints the test accuracy of each architecture and draws how it came."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--architectures", default="mamba,s4d")
    parser.add_argument("--length", type=int, default=24, help="data and noise tokens")
    parser.add_argument("--kept", type=int, default=6, help="data tokens")
    parser.add_argument("--hidden-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--chart", default="selective_copying.svg")
    arguments = parser.parse_args()

    rows = []
    for architecture in arguments.architectures.split(","):
        rows += learning_curve(architecture, arguments)
        print(f"{architecture}: {rows[-1]['accuracy']:.3f} of the tokens", flush=True)
    alt.Chart(
        alt.Data(values=rows),
        title=f"Selective copying: {arguments.kept} tokens out of {arguments.length}",
    ).mark_line(point=True).encode(
        alt.X("step:Q", title="training step"),
        alt.Y("accuracy:Q", title="tokens given correctly").axis(format="%"),
        alt.Color("architecture:N").sort(None),
    ).save(arguments.chart)


if __name__ == "__main__":
    main()
