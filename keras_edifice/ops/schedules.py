"""How much noise at which time: tables of diffusion models, and their continuous forms.

    x_t = α_t x_0 + σ_t ε,    ᾱ_t = Π_s (1 - β_s),    α_t = √ᾱ_t,    σ_t = √(1 - ᾱ_t)
    v = α ε - σ x_0,          score = -ε / σ,         SNR = α² / σ²
    dx = f(t) x dt + g(t) dw,    x_t = m(t) x_0 + σ(t) ε        in continuous time

Ho et al. 2020, Denoising Diffusion Probabilistic Models, arXiv:2006.11239; Song et al.
2020, DDIM, arXiv:2010.02502, and Score-Based Generative Modeling, arXiv:2011.13456.

Tables are float64 arrays, made while a model is built: a product of a thousand factors
and 1 - ᾱ near zero do not survive float32. `table_at` looks them up in the graph.
"""

from dataclasses import dataclass

import numpy as np
from keras import ops

SCHEDULES = ("linear", "quadratic", "cosine", "sigmoid")
PREDICTIONS = ("eps", "x0", "v")
SPACINGS = ("uniform", "quad", "linspace")


class NoiseSchedule:
    """Tables of length T, the steps, in float64.

    The posterior is q(x_{t-1} | x_t, x_0), whose mean is
    posterior_x0 · x_0 + posterior_xt · x_t (Ho et al., eq. 7).

    Args:
        betas: (T,), the variance that each step adds, between 0 and 1.

    Attributes:
        betas: β.
        alpha_bars: ᾱ.
        previous_alpha_bars: ᾱ of the step before; 1 for the first step.
        alphas: α = √ᾱ, the factor of x_0.
        sigmas: σ = √(1 - ᾱ), the factor of the noise.
        snr: ᾱ / (1 - ᾱ).
        log_snr: its logarithm.
        posterior_x0: √ᾱ_{t-1} β_t / (1 - ᾱ_t).
        posterior_xt: √(1 - β_t) (1 - ᾱ_{t-1}) / (1 - ᾱ_t).
        posterior_variance: β̃_t = β_t (1 - ᾱ_{t-1}) / (1 - ᾱ_t), zero at first.
        posterior_log_variance: ln β̃, with that of the second step at first, as Nichol
            & Dhariwal 2021 (arXiv:2102.09672) use it between ln β̃ and ln β.

    Raises:
        ValueError: betas outside of (0, 1].
    """

    def __init__(self, betas):
        self.betas = betas = np.asarray(betas, "float64")
        if betas.ndim != 1 or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError(
                "betas must be a list of numbers above 0 and up to 1, received "
                f"{betas.shape} from {betas.min()} to {betas.max()}"
            )
        self.alpha_bars = np.cumprod(1.0 - betas)
        self.previous_alpha_bars = np.append(1.0, self.alpha_bars[:-1])
        self.alphas = np.sqrt(self.alpha_bars)
        self.sigmas = np.sqrt(1.0 - self.alpha_bars)
        self.snr = snr_of_alpha_bar(self.alpha_bars)
        self.log_snr = log_snr_of_alpha_bar(self.alpha_bars)
        missing = 1.0 - self.alpha_bars
        before = 1.0 - self.previous_alpha_bars
        self.posterior_x0 = np.sqrt(self.previous_alpha_bars) * betas / missing
        self.posterior_xt = np.sqrt(1.0 - betas) * before / missing
        self.posterior_variance = betas * before / missing
        positive = self.posterior_variance.copy()
        positive[0] = positive[1] if len(betas) > 1 else betas[0]
        self.posterior_log_variance = np.log(positive)

    def __len__(self):
        return len(self.betas)

    def respaced(self, timesteps):
        """The schedule that takes only the given steps, in rising order.

        Its β are those between the ᾱ of the steps, as the sampler of Nichol & Dhariwal
        has them; its step i stands for timesteps[i] of this schedule.
        """
        return NoiseSchedule(betas_of_alpha_bars(self.alpha_bars[timesteps]))


def noise_schedule(name="linear", num_timesteps=1000, beta_start=1e-4, beta_end=0.02):
    """The tables of a named schedule.

    Args:
        name: "linear" in β (Ho et al.), "quadratic" (linear in √β: that of latent
            diffusion), "cosine" in √ᾱ with β up to 0.999 (Nichol & Dhariwal), or
            "sigmoid", from -6 to 6, between the two β.
        num_timesteps: T.
        beta_start: first β; not of "cosine".
        beta_end: last β; not of "cosine".

    Raises:
        ValueError: unknown name.
    """
    if name == "linear":
        betas = np.linspace(beta_start, beta_end, num_timesteps)
    elif name == "quadratic":
        betas = np.linspace(beta_start**0.5, beta_end**0.5, num_timesteps) ** 2
    elif name == "cosine":
        alpha_bars = cosine_alpha_bar(np.arange(1, num_timesteps + 1) / num_timesteps)
        betas = np.minimum(betas_of_alpha_bars(alpha_bars), 0.999)
    elif name == "sigmoid":
        rise = 1.0 / (1.0 + np.exp(-np.linspace(-6.0, 6.0, num_timesteps)))
        betas = beta_start + (beta_end - beta_start) * rise
    else:
        raise ValueError(_choice("schedule", SCHEDULES, name))
    return NoiseSchedule(betas)


def cosine_alpha_bar(fraction, offset=0.008):
    """Cosine form of ᾱ at a fraction of the steps, 1 at 0, as an array.

    Nichol & Dhariwal 2021, eq. 17.
    """
    angle = (np.asarray(fraction, "float64") + offset) / (1.0 + offset) * np.pi / 2
    return np.cos(angle) ** 2 / np.cos(offset / (1.0 + offset) * np.pi / 2) ** 2


def sampling_timesteps(num_timesteps, sample_steps, spacing="uniform"):
    """Steps of the schedule that a sampler visits, rising: an int array.

    Args:
        num_timesteps: T.
        sample_steps: S, at most T.
        spacing: "uniform" 0, c, 2c ... with c = ⌊T / S⌋, or "quad"
            ⌊linspace(0, √(0.8 T), S)²⌋, both of DDIM; "linspace" from 0 to T - 1,
            rounded, of the respaced DDPM. "quad" visits a low step twice where S is
            large, which changes nothing in a DDIM step.

    Raises:
        ValueError: unknown spacing; more steps than there are.
    """
    if not 1 <= sample_steps <= num_timesteps:
        raise ValueError(
            f"sample_steps must be from 1 to num_timesteps = {num_timesteps}, "
            f"received {sample_steps}"
        )
    if spacing == "uniform":
        return np.arange(sample_steps) * (num_timesteps // sample_steps)
    if spacing == "quad":
        roots = np.linspace(0.0, np.sqrt(0.8 * num_timesteps), sample_steps)
        return (roots**2).astype("int64")
    if spacing == "linspace":
        return np.linspace(0, num_timesteps - 1, sample_steps).round().astype("int64")
    raise ValueError(_choice("spacing", SPACINGS, spacing))


def betas_of_alpha_bars(alpha_bars):
    """Variances β that steps from ᾱ = 1 add to get the given ᾱ one after another."""
    alpha_bars = np.asarray(alpha_bars, "float64")
    return 1.0 - alpha_bars / np.append(1.0, alpha_bars[:-1])


def snr_of_alpha_bar(alpha_bar):
    """Signal-to-noise ratio ᾱ / (1 - ᾱ), as an array."""
    alpha_bar = np.asarray(alpha_bar, "float64")
    return alpha_bar / (1.0 - alpha_bar)


def alpha_bar_of_snr(snr):
    """Inverse of `snr_of_alpha_bar`."""
    snr = np.asarray(snr, "float64")
    return snr / (1.0 + snr)


def log_snr_of_alpha_bar(alpha_bar):
    """Logarithm of ᾱ / (1 - ᾱ), as an array; minus infinity where no signal is left."""
    alpha_bar = np.asarray(alpha_bar, "float64")
    with np.errstate(divide="ignore"):
        return np.log(alpha_bar) - np.log1p(-alpha_bar)


def alpha_bar_of_log_snr(log_snr):
    """Inverse of `log_snr_of_alpha_bar`."""
    return 1.0 / (1.0 + np.exp(-np.asarray(log_snr, "float64")))


def sigma_of_alpha_bar(alpha_bar):
    """Noise beside a signal of scale one, √((1 - ᾱ) / ᾱ): that of the VE form."""
    alpha_bar = np.asarray(alpha_bar, "float64")
    return np.sqrt((1.0 - alpha_bar) / alpha_bar)


def alpha_bar_of_sigma(sigma):
    """Inverse of `sigma_of_alpha_bar`."""
    return 1.0 / (1.0 + np.square(np.asarray(sigma, "float64")))


def karras_sigma(fraction, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """σ at a fraction of the grid of Karras et al. 2022, `sigma_min` at 0.

    (σ_min^{1/ρ} + fraction (σ_max^{1/ρ} - σ_min^{1/ρ}))^ρ, arXiv:2206.00364, eq. 5.

    Args:
        fraction: number, array or tensor between 0 and 1.
        sigma_min: least σ.
        sigma_max: greatest σ.
        rho: ρ; the larger, the denser the grid is near `sigma_min`.
    """
    low, high = sigma_min ** (1.0 / rho), sigma_max ** (1.0 / rho)
    return (low + fraction * (high - low)) ** rho


def karras_sigmas(num_steps, sigma_min=0.002, sigma_max=80.0, rho=7.0):
    """The grid of `num_steps` σ, rising from `sigma_min` to `sigma_max`: an array."""
    fraction = np.linspace(0.0, 1.0, num_steps)
    return karras_sigma(fraction, sigma_min, sigma_max, rho)


def table_at(table, t, like):
    """Entries of a table, float32, that multiply the examples of a tensor.

    Args:
        table: (T,), an array.
        t: (batch,) of integers, or a number for the whole batch.
        like: (batch, ...).

    Returns:
        (batch, 1, ...) with as many axes as `like`, or a number.
    """
    values = ops.convert_to_tensor(np.asarray(table, "float32"))
    return per_example(ops.take(values, t, axis=0), like)


def per_example(value, like):
    """(batch,) -> (batch, 1, ...) with as many axes as `like`; numbers as they are."""
    if not getattr(value, "shape", ()):
        return value
    return ops.reshape(value, (-1,) + (1,) * (len(like.shape) - 1))


def noised(x0, eps, alpha, sigma):
    """x_t = α x_0 + σ ε."""
    return alpha * x0 + sigma * eps


def target_of(prediction, x0, eps, alpha, sigma):
    """What a network of a `prediction` is trained to give: ε, x_0 or v = α ε - σ x_0.

    Raises:
        ValueError: unknown prediction.
    """
    _check_prediction(prediction)
    if prediction == "eps":
        return eps
    return x0 if prediction == "x0" else alpha * eps - sigma * x0


def x0_and_eps(prediction, output, x, alpha, sigma):
    """Both x_0 and ε from what a network says at x = α x_0 + σ ε.

    For "v", α² + σ² must be 1.

    Args:
        prediction: "eps", "x0" or "v".
        output: of the network, shaped as x.
        x: the noised input.
        alpha: α, broadcast to x.
        sigma: σ, broadcast to x.

    Raises:
        ValueError: unknown prediction.
    """
    _check_prediction(prediction)
    if prediction == "eps":
        return (x - sigma * output) / alpha, output
    if prediction == "x0":
        return output, (x - alpha * output) / sigma
    return alpha * x - sigma * output, sigma * x + alpha * output


def score_of_eps(eps, sigma):
    """∇ ln p(x_t) = -ε / σ."""
    return -eps / sigma


def ddim_coefficients(alpha_bar, next_alpha_bar, eta=0.0):
    """Factors of a DDIM step from ᾱ to the next ᾱ, of less noise; arrays.

    x ← a x_0 + b ε + s z with a = √ᾱ', s = η √((1 - ᾱ')/(1 - ᾱ)) √(1 - ᾱ/ᾱ') and
    b = √(1 - ᾱ' - s²) (Song et al. 2020, eq. 12 and 16). With η = 0 the next ᾱ may
    also be that of more noise: so data is encoded.

    Returns:
        (a, b, s).
    """
    alpha_bar = np.asarray(alpha_bar, "float64")
    following = np.asarray(next_alpha_bar, "float64")
    s = np.zeros(np.broadcast_shapes(alpha_bar.shape, following.shape))
    if eta:
        s = eta * np.sqrt((1 - following) / (1 - alpha_bar))
        s = s * np.sqrt(1.0 - alpha_bar / following)
    b = np.sqrt(np.maximum(1.0 - following - s**2, 0.0))
    return np.sqrt(following), b, s


@dataclass(frozen=True)
class VP:
    """Variance-preserving SDE, the limit of DDPM; β rises linearly over t from 0 to 1.

    dx = -½ β(t) x dt + √β(t) dw. Times are tensors of any shape.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    prior_std = 1.0

    def beta(self, t):
        """β(t)."""
        return self.beta_min + t * (self.beta_max - self.beta_min)

    def integral(self, t):
        """B(t), the integral of β from 0 to t."""
        return t * (self.beta_min + 0.5 * t * (self.beta_max - self.beta_min))

    def marginal(self, t):
        """(m, σ) of x_t = m x_0 + σ ε: m = e^{-B/2}, σ² = 1 - m²."""
        total = self.integral(t)
        return ops.exp(-0.5 * total), ops.sqrt(_one_minus_exp(total))

    def coefficients(self, t):
        """(f, g) of dx = f x dt + g dw."""
        beta = self.beta(t)
        return -0.5 * beta, ops.sqrt(beta)

    def discrete(self, times):
        """Factors (f, G) of the steps x ← (1 + f) x + G z at N times, as arrays.

        Those of DDPM, with β_i = β(i / (N - 1)) / N: f = √(1 - β_i) - 1, G = √β_i.
        """
        size = len(times)
        betas = np.linspace(self.beta_min, self.beta_max, size) / size
        betas = betas[_index(times)]
        return np.sqrt(1.0 - betas) - 1.0, np.sqrt(betas)


@dataclass(frozen=True)
class SubVP(VP):
    """Sub-VP SDE: the drift of VP, with a variance that is never above that of VP."""

    def marginal(self, t):
        """(m, σ) with σ = 1 - m²."""
        total = self.integral(t)
        return ops.exp(-0.5 * total), _one_minus_exp(total)

    def coefficients(self, t):
        """(f, g) with g² = β (1 - e^{-2B})."""
        beta = self.beta(t)
        return -0.5 * beta, ops.sqrt(beta * _one_minus_exp(2.0 * self.integral(t)))

    def discrete(self, times):
        """As that of VP, by Euler and Maruyama: f = -β / (2 N), G = g / √N."""
        times = np.asarray(times, "float64")
        beta, total = self.beta(times) / len(times), self.integral(times)
        return -0.5 * beta, np.sqrt(-beta * np.expm1(-2.0 * total))


@dataclass(frozen=True)
class VE:
    """Variance-exploding SDE: no drift, σ(t) rises by a constant factor per time.

    dx = σ(t) √(2 ln(σ_max / σ_min)) dw. The data count as having σ_min at time 0.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0

    @property
    def prior_std(self):
        """Of x at time 1, whatever x_0 was."""
        return self.sigma_max

    def marginal(self, t):
        """(m, σ): m = 1, σ = σ_min (σ_max / σ_min)^t."""
        return ops.ones_like(t), self.sigma_min * ops.exp(self._log_ratio() * t)

    def coefficients(self, t):
        """(f, g): f = 0, g = σ √(2 ln(σ_max / σ_min))."""
        _, sigma = self.marginal(t)
        return ops.zeros_like(t), sigma * (2.0 * self._log_ratio()) ** 0.5

    def discrete(self, times):
        """As that of VP: f = 0, G² = σ_i² - σ_{i-1}², and σ_0² at first."""
        sigmas = np.geomspace(self.sigma_min, self.sigma_max, len(times))
        spreads = np.sqrt(np.diff(sigmas**2, prepend=0.0))
        return np.zeros(len(times)), spreads[_index(times)]

    def _log_ratio(self):
        return float(np.log(self.sigma_max / self.sigma_min))


SDES = {"vp": VP, "ve": VE, "subvp": SubVP}


def marginal_slopes(sde, t):
    """(dm/dt, dσ/dt) of the mean's factor and the standard deviation of an SDE.

    From dm/dt = f m and dσ²/dt = 2 f σ² + g². So the velocity of
    x_t = m x_0 + σ ε is dm/dt x_0 + dσ/dt ε.
    """
    mean, std = sde.marginal(t)
    drift, diffusion = sde.coefficients(t)
    return drift * mean, drift * std + 0.5 * ops.square(diffusion) / std


def _index(times):
    """The step i = ⌊t (N - 1)⌋ of each of N times between 0 and 1."""
    steps = np.asarray(times, "float64") * (len(times) - 1)
    return np.floor(steps + 1e-6).astype("int64")  # a step may be rounded to below it


def _one_minus_exp(x):
    """1 - e^{-x} without loss of digits where x is small: tanh(x/2) (1 + e^{-x})."""
    return ops.tanh(0.5 * x) * (1.0 + ops.exp(-x))


def _check_prediction(prediction):
    if prediction not in PREDICTIONS:
        raise ValueError(_choice("prediction", PREDICTIONS, prediction))


def _choice(name, choices, received):
    return (
        f"{name} must be one of {', '.join(map(repr, choices))}, received {received!r}"
    )
