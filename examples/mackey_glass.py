"""The Mackey-Glass series: a reservoir forecasts chaos from its own output.

    KERAS_BACKEND=jax python examples/mackey_glass.py

The readout learns to give the next value of x' = 0.2 x(t - 17) / (1 + x(t - 17)^10)
- 0.1 x in closed form, then each forecast is the next input, from several starts. A
small error grows e-fold in a Lyapunov time, here about 170 units: the exponent is about
0.006. Jaeger & Haas 2004, Harnessing Nonlinearity, Science 304, measure after 84.

Needs the extra `report` and a backend. Draws one forecast, and the error by the time.
"""

import argparse

import altair as alt
import keras
import numpy as np

import keras_edifice

WASHOUT = 200  # steps in which the reservoir forgets its start
LYAPUNOV_TIME = 170


def mackey_glass(length, delay=17, dt=0.1):
    """The series less one, sampled every unit of time: (length,), about -0.6 to 0.4.

    Runge-Kutta of fourth order; the delayed value halfway is that of a line.
    """

    def slope(x, delayed):
        return 0.2 * delayed / (1 + delayed**10) - 0.1 * x

    per_unit, lag = round(1 / dt), round(delay / dt)
    x = np.full(lag + 1 + per_unit * (1000 + length), 1.2)  # 1000: to the attractor
    for t in range(lag, len(x) - 1):
        left, right = x[t - lag], x[t - lag + 1]
        k_1 = slope(x[t], left)
        k_2 = slope(x[t] + dt / 2 * k_1, (left + right) / 2)
        k_3 = slope(x[t] + dt / 2 * k_2, (left + right) / 2)
        k_4 = slope(x[t] + dt * k_3, right)
        x[t + 1] = x[t] + dt / 6 * (k_1 + 2 * k_2 + 2 * k_3 + k_4)
    return x[-per_unit * length :: per_unit] - 1


def trained(series, size):
    """A reservoir of `size` whose readout gives the next value of the series."""
    options = dict(
        input_size=1,
        output_size=1,
        reservoir_size=size,
        spectral_radius=1.1,
        bias_scaling=0.2,
        leak_rate=0.5,
        return_sequences=True,
    )
    model = keras_edifice.build("reservoir", washout=WASHOUT, **options)
    x, y = series[None, :-1, None], series[None, 1 + WASHOUT :, None]
    model.fit_readout(x, y, ridge=1e-8)
    every_step = keras_edifice.build("reservoir", **options)
    every_step.set_weights(model.get_weights())
    return every_step


def forecast(model, beginnings, steps):
    """Continues (starts, time) by `steps`, each the input of the next."""
    stream = keras_edifice.streaming(model)
    y, state = stream.prefill(beginnings[..., None])
    y, values = y[:, -1], []
    for _ in range(steps):
        values.append(keras.ops.convert_to_numpy(y)[:, 0])
        y, state = stream.step(y, state)
    return np.stack(values, axis=1)


def main():
    """Prints the error over a Lyapunov time and draws it with a forecast."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", type=int, default=500, help="of the reservoir")
    parser.add_argument("--training", type=int, default=4000, help="steps")
    parser.add_argument("--starts", type=int, default=50)
    parser.add_argument("--horizon", type=int, default=500, help="of each forecast")
    parser.add_argument("--chart", default="mackey_glass.svg")
    arguments = parser.parse_args()
    if arguments.horizon < LYAPUNOV_TIME:
        parser.error(f"--horizon must be at least {LYAPUNOV_TIME}")

    keras.utils.set_random_seed(0)
    apart, steps = 100, arguments.horizon
    length = arguments.training + WASHOUT + apart * arguments.starts + steps
    series = mackey_glass(length).astype("float32")
    model = trained(series[: arguments.training], arguments.size)

    starts = arguments.training + WASHOUT + apart * np.arange(arguments.starts)
    beginnings = np.stack([series[t - WASHOUT : t] for t in starts])
    true = np.stack([series[t : t + steps] for t in starts])
    found = forecast(model, beginnings, steps)

    error = np.square(found - true) / np.var(series, dtype="float64")
    over_time = np.sqrt(error[:, :LYAPUNOV_TIME].mean(axis=1))  # (starts,)
    at_84 = np.sqrt(error[:, 83].mean())
    print(f"median of {arguments.starts} starts: NRMSE {np.median(over_time):.1e}")
    print(f"worst of {arguments.starts} starts: NRMSE {over_time.max():.1e}")
    print(f"after 84 units, all starts: NRMSE {at_84:.1e}")
    draw(true[0], found[0], np.sqrt(error.mean(axis=0)), arguments.chart)


def draw(true, found, error, path):
    """Two panels over the time: the first forecast, and the error of all."""
    curves = dict(series=true, forecast=found)
    rows = [
        dict(time=t + 1, curve=name, x=float(x) + 1)
        for name, curve in curves.items()
        for t, x in enumerate(curve)
    ]
    time = alt.X("time:Q", title="time from the start of the forecast")
    series = alt.Chart(
        alt.Data(values=rows), title="Mackey-Glass, forecast from its own output"
    )
    series = series.mark_line().encode(
        time,
        alt.Y("x:Q", title="x").scale(zero=False),
        alt.Color("curve:N", title=None).sort(None),
        alt.StrokeDash("curve:N", title=None).sort(None),
    )
    rows = [dict(time=t + 1, error=float(e)) for t, e in enumerate(error)]
    errors = alt.Chart(alt.Data(values=rows)).mark_line()
    errors = errors.encode(
        time, alt.Y("error:Q", title="NRMSE of all starts").scale(type="log")
    )
    lyapunov = alt.Chart(alt.Data(values=[{}])).mark_rule(strokeDash=[4, 4])
    lyapunov = lyapunov.encode(x=alt.datum(LYAPUNOV_TIME))
    panels = (series + lyapunov), (errors + lyapunov)
    alt.vconcat(*(p.properties(width=600, height=180) for p in panels)).save(path)


if __name__ == "__main__":
    main()
