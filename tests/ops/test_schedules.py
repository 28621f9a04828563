import math

import keras
import numpy as np
import pytest
from keras import ops

from keras_edifice.exporting import export
from keras_edifice.model import EdificeModel
from keras_edifice.ops.schedules import (
    PREDICTIONS,
    SCHEDULES,
    SDES,
    NoiseSchedule,
    alpha_bar_of_log_snr,
    alpha_bar_of_sigma,
    alpha_bar_of_snr,
    betas_of_alpha_bars,
    cosine_alpha_bar,
    ddim_coefficients,
    karras_sigma,
    karras_sigmas,
    log_snr_of_alpha_bar,
    marginal_slopes,
    noise_schedule,
    noised,
    per_example,
    sampling_timesteps,
    score_of_eps,
    sigma_of_alpha_bar,
    snr_of_alpha_bar,
    table_at,
    target_of,
    x0_and_eps,
)
from tests.support.close import assert_close, to_numpy

rng = np.random.default_rng(0)
every_schedule = pytest.mark.parametrize("name", SCHEDULES)
every_sde = pytest.mark.parametrize("name", list(SDES))


def betas_by_hand(name, T, start, end):
    """The definitions, one step after another."""
    if name == "cosine":

        def f(t):
            return math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2

        return [min(1 - f(t + 1) / f(t), 0.999) for t in range(T)]
    betas = []
    for t in range(T):
        u = t / (T - 1)
        if name == "linear":
            betas.append(start + u * (end - start))
        elif name == "quadratic":
            betas.append((start**0.5 + u * (end**0.5 - start**0.5)) ** 2)
        else:
            betas.append(start + (end - start) / (1 + math.exp(6 - 12 * u)))
    return betas


@every_schedule
def test_tables_are_the_products_of_the_definitions(name):
    schedule = noise_schedule(name, 50, 1e-3, 0.3)
    betas = betas_by_hand(name, 50, 1e-3, 0.3)
    assert_close(schedule.betas, betas, 1e-13)
    alpha_bar = before = 1.0
    for t, beta in enumerate(betas):
        alpha_bar = alpha_bar * (1 - beta)
        expected = dict(
            alpha_bars=alpha_bar,
            previous_alpha_bars=before,
            alphas=math.sqrt(alpha_bar),
            sigmas=math.sqrt(1 - alpha_bar),
            snr=alpha_bar / (1 - alpha_bar),
            log_snr=math.log(alpha_bar / (1 - alpha_bar)),
        )
        for table, value in expected.items():
            assert_close(getattr(schedule, table)[t], value, 1e-12)
        before = alpha_bar


def test_the_usual_schedules_reach_their_prior():
    assert noise_schedule().alpha_bars[-1] < 1e-4
    assert noise_schedule("cosine").alpha_bars[-1] < 1e-4
    latent = noise_schedule("quadratic", 1000, 0.0015, 0.0195)
    assert_close(latent.betas[[0, -1]], [0.0015, 0.0195], 1e-15)
    assert latent.alpha_bars[-1] < 1e-3
    assert max(noise_schedule("cosine").betas) == 0.999
    assert cosine_alpha_bar(0.0) == 1.0


@every_schedule
def test_the_posterior_is_that_of_two_normal_distributions(name):
    schedule = noise_schedule(name, 20, 1e-2, 0.4)
    for t in range(1, 20):
        beta, before = schedule.betas[t], schedule.alpha_bars[t - 1]
        # q(x_t | x_{t-1}) q(x_{t-1} | x_0) by completing the square: precisions add.
        precision = (1 - beta) / beta + 1 / (1 - before)
        assert_close(schedule.posterior_variance[t], 1 / precision, 1e-12)
        assert_close(
            schedule.posterior_xt[t], math.sqrt(1 - beta) / beta / precision, 1e-12
        )
        assert_close(
            schedule.posterior_x0[t],
            math.sqrt(before) / (1 - before) / precision,
            1e-12,
        )
    assert_close([schedule.posterior_x0[0], schedule.posterior_xt[0]], [1, 0], 1e-12)
    assert schedule.posterior_variance[0] == 0.0
    logarithms = schedule.posterior_log_variance
    assert logarithms[0] == logarithms[1]
    assert_close(np.exp(logarithms[1:]), schedule.posterior_variance[1:], 1e-12)


def test_transforms_and_their_inverses():
    alpha_bars = noise_schedule("linear", 200).alpha_bars
    snr, log_snr = snr_of_alpha_bar(alpha_bars), log_snr_of_alpha_bar(alpha_bars)
    sigma = sigma_of_alpha_bar(alpha_bars)
    assert_close(np.log(snr), log_snr, 1e-12)
    assert_close(sigma**-2, snr, 1e-12)
    assert_close(alpha_bar_of_snr(snr), alpha_bars, 1e-12)
    assert_close(alpha_bar_of_log_snr(log_snr), alpha_bars, 1e-12)
    assert_close(alpha_bar_of_sigma(sigma), alpha_bars, 1e-12)
    betas = betas_of_alpha_bars(alpha_bars)
    assert_close(betas, noise_schedule("linear", 200).betas, 1e-12)
    assert log_snr_of_alpha_bar(0.0) == -np.inf
    # Where 1 - ᾱ is small, the tables keep the digits that float32 would lose.
    assert_close(noise_schedule().log_snr[0], math.log(0.9999) - math.log(1e-4), 1e-9)


def test_steps_of_samplers():
    assert sampling_timesteps(1000, 4).tolist() == [0, 250, 500, 750]
    assert sampling_timesteps(10, 3).tolist() == [0, 3, 6]
    assert sampling_timesteps(1000, 3, "quad").tolist() == [0, 200, 800]
    assert sampling_timesteps(1000, 3, "linspace").tolist() == [0, 500, 999]
    for spacing in ("uniform", "linspace"):
        assert sampling_timesteps(7, 7, spacing).tolist() == list(range(7))


def test_respaced_tables_keep_the_noise_of_their_steps():
    schedule = noise_schedule("linear", 100)
    steps = sampling_timesteps(100, 10, "linspace")
    short = schedule.respaced(steps)
    assert len(short) == 10
    assert_close(short.alpha_bars, schedule.alpha_bars[steps], 1e-13)
    assert_close(schedule.respaced(np.arange(100)).betas, schedule.betas, 1e-12)


def test_ddim_with_eta_one_and_all_steps_is_ddpm():
    schedule = noise_schedule("linear", 30, 1e-3, 0.2)
    a, b, s = ddim_coefficients(
        schedule.alpha_bars, schedule.previous_alpha_bars, eta=1.0
    )
    assert_close(s**2, schedule.posterior_variance, 1e-13)
    # With ε = (x_t - α x_0) / σ the step is that of the posterior.
    assert_close(b / schedule.sigmas, schedule.posterior_xt, 1e-13)
    from_x0 = a - b * schedule.alphas / schedule.sigmas
    assert_close(from_x0, schedule.posterior_x0, 1e-13)


def test_ddim_without_noise_encodes_and_decodes():
    schedule = noise_schedule("linear", 30, 1e-3, 0.2)
    x0, eps = rng.normal(size=(2, 5))
    low, high = schedule.alpha_bars[20], schedule.alpha_bars[4]
    for start, end in ((low, high), (high, low), (low, 1.0)):
        a, b, s = ddim_coefficients(start, end)
        expected = np.sqrt(end) * x0 + np.sqrt(1 - end) * eps
        assert_close(a * x0 + b * eps, expected, 1e-13)
        assert s == 0.0


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_gives_back_data_and_noise(prediction):
    schedule = noise_schedule("cosine", 40)
    x0, eps = rng.normal(size=(2, 3, 4, 4, 2)).astype("float32")
    t = ops.convert_to_tensor(np.array([3, 17, 30], "int32"))
    x0, eps = ops.convert_to_tensor(x0), ops.convert_to_tensor(eps)
    alpha = table_at(schedule.alphas, t, x0)
    sigma = table_at(schedule.sigmas, t, x0)
    assert alpha.shape == (3, 1, 1, 1)
    assert_close(alpha[:, 0, 0, 0], schedule.alphas[[3, 17, 30]], 1e-6)
    x = noised(x0, eps, alpha, sigma)
    output = target_of(prediction, x0, eps, alpha, sigma)
    found = x0_and_eps(prediction, output, x, alpha, sigma)
    assert_close(found[0], x0)
    assert_close(found[1], eps)


def test_the_velocity_is_the_slope_along_the_angle():
    # α = cos φ, σ = sin φ: v is dx/dφ (Salimans & Ho 2022, appendix D).
    x0, eps, phi, step = 0.7, -1.3, 0.4, 1e-6

    def x(phi):
        return math.cos(phi) * x0 + math.sin(phi) * eps

    v = target_of("v", x0, eps, math.cos(phi), math.sin(phi))
    assert_close(v, (x(phi + step) - x(phi - step)) / (2 * step), 1e-8)


def test_the_score_is_the_slope_of_the_log_density():
    alpha, sigma, x0, x, step = 0.8, 0.6, 0.5, 1.1, 1e-6

    def log_density(x):
        return -0.5 * ((x - alpha * x0) / sigma) ** 2

    eps = (x - alpha * x0) / sigma
    slope = (log_density(x + step) - log_density(x - step)) / (2 * step)
    assert_close(score_of_eps(eps, sigma), slope, 1e-8)


def test_a_number_of_steps_is_for_the_whole_batch():
    x = ops.zeros((2, 3))
    assert table_at([1.0, 2.0, 3.0], 1, x) == 2.0
    assert per_example(0.5, x) == 0.5


def test_the_grid_of_karras_is_that_of_the_paper():
    grid, N, rho = karras_sigmas(18), 18, 7
    for i in range(N):  # the paper numbers from the greatest
        root = 80 ** (1 / rho) + i / (N - 1) * (0.002 ** (1 / rho) - 80 ** (1 / rho))
        assert_close(grid[N - 1 - i], root**rho, 1e-12)
    number = ops.convert_to_tensor(np.float32(N - 1))
    index = ops.convert_to_tensor(np.arange(N, dtype="float32"))
    assert_close(karras_sigma(index / number) / grid, np.ones(N))


def statistics(sde, t):
    """(m, σ, f, g) of an SDE at an array of times, in float64, from its definition."""
    t = np.asarray(t, "float64")
    if hasattr(sde, "sigma_min"):
        sigma = sde.sigma_min * (sde.sigma_max / sde.sigma_min) ** t
        g = sigma * np.sqrt(2 * np.log(sde.sigma_max / sde.sigma_min))
        return np.ones_like(t), sigma, np.zeros_like(t), g
    beta = sde.beta_min + t * (sde.beta_max - sde.beta_min)
    total = 0.5 * t**2 * (sde.beta_max - sde.beta_min) + t * sde.beta_min
    if type(sde).__name__ == "VP":
        return np.exp(-total / 2), np.sqrt(-np.expm1(-total)), -beta / 2, np.sqrt(beta)
    g = np.sqrt(-beta * np.expm1(-2 * total))
    return np.exp(-total / 2), -np.expm1(-total), -beta / 2, g


@every_sde
def test_sdes_are_those_of_the_paper(name):
    sde, t = SDES[name](), np.array([1e-5, 1e-3, 0.03, 0.4, 1.0], "float32")
    time = ops.convert_to_tensor(t)
    found = [*sde.marginal(time), *sde.coefficients(time)]
    for actual, expected in zip(found, statistics(sde, t), strict=True):
        scale = np.maximum(np.abs(expected), 1e-30)
        assert_close(to_numpy(actual) / scale, expected / scale)


@every_sde
def test_moments_follow_from_the_drift_and_the_diffusion(name):
    sde, n = SDES[name](), 20000
    mean, _, _, _ = statistics(sde, 0.0)
    variance = statistics(sde, 0.0)[1] ** 2
    for i in range(n):  # dm = f m dt, dσ² = (2 f σ² + g²) dt, at the middle of a step
        _, _, f, g = statistics(sde, (i + 0.5) / n)
        mean = mean * np.exp(f / n)
        variance = variance * np.exp(2 * f / n) + g**2 / n * np.exp(f / n)
    m, std = sde.marginal(ops.ones((1,)))
    assert_close(m, [mean])
    assert_close(std, [np.sqrt(variance)])
    assert abs(math.sqrt(variance) / sde.prior_std - 1) < 1e-4


@every_sde
def test_slopes_are_those_of_the_marginals(name):
    sde, t, step = SDES[name](), np.array([0.05, 0.4, 0.9]), 1e-6
    after, before = statistics(sde, t + step)[:2], statistics(sde, t - step)[:2]
    found = marginal_slopes(sde, ops.convert_to_tensor(t.astype("float32")))
    for actual, a, b in zip(found, after, before, strict=True):
        # The slope of σ is a difference of large numbers where σ is nearly constant.
        assert_close(actual, (a - b) / (2 * step), 1e-4)


@every_sde
def test_discrete_steps_become_the_sde(name):
    sde, n = SDES[name](), 4000
    times = np.linspace(1.0, 1e-5, n)  # as samplers go
    f, G = sde.discrete(times)
    _, _, drift, diffusion = statistics(sde, times)
    inside = slice(0, n - 10)  # the first step of VE brings in σ_0 as a whole
    scale = max(1.0, np.abs(drift).max())
    assert_close(f[inside] * n / scale, drift[inside] / scale, 5e-3)
    ratio = G[inside] * math.sqrt(n) / diffusion[inside]
    assert_close(ratio, np.ones(n - 10), 5e-3)


def test_discrete_steps_are_those_of_the_released_code():
    vp, ve = SDES["vp"](), SDES["ve"]()
    times = np.linspace(1.0, 1e-3, 1000)
    f, G = vp.discrete(times)
    betas = np.linspace(0.1 / 1000, 20 / 1000, 1000)[::-1]
    assert_close(f, np.sqrt(1 - betas) - 1, 1e-15)
    assert_close(G, np.sqrt(betas), 1e-15)
    _, G = ve.discrete(np.linspace(1.0, 1e-5, 1000))
    sigmas = np.exp(np.linspace(np.log(0.01), np.log(50), 1000))
    expected = np.sqrt(sigmas**2 - np.append(0.0, sigmas[:-1]) ** 2)[::-1]
    assert_close(G, expected, 1e-12)
    f, _ = vp.discrete(np.linspace(1.0, 0.0, 101))  # each step once, whatever rounding
    assert len(set(f)) == 101


@keras.saving.register_keras_serializable("tests")
class Denoise(keras.layers.Layer):
    """x_t and its step -> the mean of the posterior, for a network that says 0.3 x."""

    def call(self, x, t):
        schedule, sde = noise_schedule("cosine", 20), SDES["subvp"]()
        alpha, sigma = (table_at(z, t, x) for z in (schedule.alphas, schedule.sigmas))
        x0, _ = x0_and_eps("v", 0.3 * x, x, alpha, sigma)
        mean = table_at(schedule.posterior_x0, t, x) * x0
        mean = mean + table_at(schedule.posterior_xt, t, x) * x
        _, std = sde.marginal(ops.cast(t, "float32") / 20.0)
        return mean + 0.1 * per_example(std, x)

    def compute_output_shape(self, x_shape, t_shape):
        return x_shape


@pytest.mark.parametrize("format", ["onnx", "saved_model"])
def test_tables_are_exported(format, tmp_path):
    x, t = keras.Input((4, 3), name="x"), keras.Input((), dtype="int32", name="t")
    y = Denoise()(keras.layers.Dense(3)(x), t)
    model = EdificeModel({"x": x, "t": t}, y, name="denoise")
    path = tmp_path / ("model.onnx" if format == "onnx" else "model")
    assert export(model, path, format) <= 1e-5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: noise_schedule("cubic"),
            "schedule must be one of 'linear', .* 'cubic'",
        ),
        (lambda: sampling_timesteps(10, 2, "log"), "spacing must be one of 'uniform'"),
        (
            lambda: sampling_timesteps(10, 11),
            "from 1 to num_timesteps = 10, received 11",
        ),
        (lambda: target_of("mu", 0, 0, 0, 0), "prediction must be one of 'eps', 'x0'"),
        (lambda: x0_and_eps("mu", 0, 0, 0, 0), "prediction must be one of 'eps', 'x0'"),
        (lambda: NoiseSchedule([0.1, 0.0]), "above 0 and up to 1, received"),
    ],
)
def test_what_does_not_exist_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
