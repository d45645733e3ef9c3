"""Denoising schedules: a step's mean, linear in the latent and the model's output, and its Gaussian noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
_SETTLED = 0.84  # signal level of a step's input from which the step changes little: noise of 0.4 at most


@dataclass(frozen=True)
class Schedule:
    """Coefficients of `x_next = latent_coefficient[k] x + output_coefficient[k] output + sigma[k] z`, z ~ N(0, I).

    A step's input is, as when the model was trained, `signal[k] x0 + noise[k] e` of a clean latent x0 and e ~ N(0, I).
    Python floats, computed in double precision: they enter a chain of any dtype, on any device, without a host copy.
    """

    timesteps: tuple[float, ...]  # [T] what the denoiser is told
    latent_coefficient: tuple[float, ...]  # [T]
    output_coefficient: tuple[float, ...]  # [T]
    sigma: tuple[float, ...]  # [T] standard deviation of a step's noise
    clean: tuple[
        tuple[float, float], ...
    ] = ()  # [T] weights of latent and output in the clean latent that they predict
    signal: tuple[float, ...] = ()  # [T] the clean latent's share of each step's input
    noise: tuple[float, ...] = ()  # [T] standard deviation of the noise in each step's input
    end: tuple[float, float] = (1.0, 0.0)  # signal and noise of the last latent

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def kappa(self) -> tuple[float, ...]:  # [T]
        """Shift of a step's mean by its model output, in sigmas; inf where there is no noise.

        Half order's variance grows with its square.
        """
        pairs = zip(self.output_coefficient, self.sigma, strict=True)
        return tuple(abs(c) / s if s else math.inf for c, s in pairs)

    @property
    def alpha_bar(self) -> tuple[float, ...]:  # [T]
        """Signal level of each step's input, signal^2 / (signal^2 + noise^2): DDIM's cumulative alpha.

        Of a flow, alpha of the input scaled to variance 1, so that one range says the same of every kind of model.
        """
        return tuple(a**2 / (a**2 + b**2) for a, b in zip(self.signal, self.noise, strict=True))

    def mean(self, k: int, latent: Tensor, output: Tensor) -> Tensor:
        """Mean of x_next at step k; `latent` and `output` [B, C, H, W], `output` what the model predicted."""
        return self.latent_coefficient[k] * latent + self.output_coefficient[k] * output


def steps_off(schedule: Schedule, below: float) -> int:
    """Last steps that are better left to the base model: an adapter there costs much divergence and changes little.

    Where the adapter changes the model's output by d, step k diverges from the base model's by kappa_k^2 |d|^2 / 2 nats
    (core/kl.py). From the end back, a step counts while its noise, by what the output moves there, 1 / kappa_k, is less
    than `below` times that of the step before: the same d then costs more than 1 / below^2 times as much. It is never a
    step of large change: its input is settled, alpha-bar at least 0.84.

    Ancestral samplers end so: for DDIM at eta 1, kappa_k^2 = SNR_out / SNR_in - 1, SNR = alpha-bar / (1 - alpha-bar),
    and the last step goes to an SNR of a thousand, or to no noise at all; at other eta alike. Flow SDEs do not: their
    kappa grows by sqrt(2) at the end. Without noise (eta 0) every step's divergence is infinite, and none counts; nor
    does any of a schedule that does not say its signal. It fails where an adapter hardly changes the output at the end:
    then no step was dear.
    """
    kappa, level = schedule.kappa, schedule.alpha_bar
    off = 0
    for k in range(len(level) - 1, 0, -1):
        if not (level[k] >= _SETTLED and below * kappa[k] > kappa[k - 1]):
            break
        off += 1
    return off


def ddim_schedule(
    timesteps: Sequence[float],  # [T]
    alphas_in: Sequence[float],  # [T] cumulative alpha at each step's input
    alphas_out: Sequence[float],  # [T] cumulative alpha at each step's output
    *,
    eta: float | Sequence[float],  # or [T]
    prediction_type: str = "epsilon",
) -> Schedule:
    """DDIM (Song et al. 2021, equations 12 and 16); `eta = 0` has no noise.

    `eta = 1` is the ancestral DDPM sampler with the smaller of its two variances, and on alphas 1 / (1 + s^2) it is
    Euler ancestral on noise levels s, whose latent is this one times sqrt(1 + s^2).

    With a, a' the cumulative alphas at a step's input and output and e the noise that the output stands for:
    `sigma^2 = eta^2 (1 - a') / (1 - a) * (1 - a / a')` and
    `mean = sqrt(a') (x - sqrt(1 - a) e) / sqrt(a) + sqrt(1 - a' - sigma^2) e`.
    """
    etas = eta if isinstance(eta, Sequence) else [eta] * len(timesteps)
    levels_and_noise = zip(alphas_in, alphas_out, etas, strict=True)
    steps = [_ddim_step(a, b, own, prediction_type) for a, b, own in levels_and_noise]
    latent, output, sigma = zip(*steps, strict=True)
    clean = tuple(_clean_and_noise(a, prediction_type)[:2] for a in alphas_in)
    *levels, end = [(math.sqrt(a), math.sqrt(1 - a)) for a in (*alphas_in, alphas_out[-1])]
    signal, noise = zip(*levels, strict=True)
    return Schedule(tuple(timesteps), latent, output, sigma, clean, signal, noise, end)


def flow_schedule(
    timesteps: Sequence[float],  # [T]
    sigmas: Sequence[float],  # [T + 1] noise's share s of each step's input, and of the last one's output
    *,
    noise_level: float | Sequence[float],  # or [T]
) -> Schedule:
    """The SDE sampler of Flow-GRPO (Liu et al. 2025, arXiv:2505.05470, equation 9) for flow matching.

    The latent at time s is x = (1 - s) x0 + s e, e ~ N(0, I), and the model's output v = E[e - x0 | x], so the score is
    -(x + (1 - s) v) / s. The ODE dx = v ds has the same marginals as, from s = 1 down, the SDE

        dx = (v + g^2 / (2 s) (x + (1 - s) v)) ds + g dw,  for any g (Song et al. 2021, arXiv:2011.13456, section 4.3).

    With the paper's g = a sqrt(s / (1 - s)), a the noise level, a step of Euler-Maruyama from s to s' < s has, where
    h = a^2 (s - s') / (1 - s),

        mean = x - (s - s') v - h / 2 (x + (1 - s) v),  sigma^2 = s h.

    At a = 0 that is Euler's step. Its signal is that of the marginal at s', (1 - s') E[x0 | x]; its noise has the
    variance s'^2 + h (s - s') + h^2 / 4, so marginals are kept up to O(h^2) a step, and pictures of few steps at a high
    a are noisy. At s = 1 g is infinite: the first step takes s' for s in 1 - s, as the authors' code does, so h = a^2
    there, and later steps forget its excess. The last step keeps its sigma, which is small if its s is.
    """
    noises = noise_level if isinstance(noise_level, Sequence) else [noise_level] * len(timesteps)
    steps = []
    for k, (s, after) in enumerate(itertools.pairwise(sigmas)):
        h = noises[k] ** 2 * (s - after) / (1 - (s if k else after))
        steps.append((1 - h / 2, after - s - h / 2 * (1 - s), math.sqrt(s * h)))
    latent, output, sigma = zip(*steps, strict=True)
    *levels, end = [(1 - s, s) for s in sigmas]
    clean = tuple((1.0, -s) for _, s in levels)
    signal, noise = zip(*levels, strict=True)
    return Schedule(tuple(timesteps), latent, output, sigma, clean, signal, noise, end)


def _ddim_step(a: float, b: float, eta: float, prediction_type: str) -> tuple[float, float, float]:
    sigma = eta * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
    clean_x, clean_o, noise_x, noise_o = _clean_and_noise(a, prediction_type)
    to_clean, to_noise = math.sqrt(b), math.sqrt(max(1 - b - sigma**2, 0.0))
    return to_clean * clean_x + to_noise * noise_x, to_clean * clean_o + to_noise * noise_o, sigma


def _clean_and_noise(a: float, prediction_type: str) -> tuple[float, float, float, float]:
    """Weights of latent and output in the predicted clean latent, then in the predicted noise."""
    signal, noise = math.sqrt(a), math.sqrt(1 - a)
    if prediction_type == "epsilon":
        return 1 / signal, -noise / signal, 0.0, 1.0
    if prediction_type == "v_prediction":
        return signal, -noise, noise, signal
    if prediction_type == "sample":
        return 0.0, 1.0, 1 / noise, -signal / noise
    raise ValueError(f"prediction_type is {prediction_type!r}; allowed: {', '.join(PREDICTION_TYPES)}")
