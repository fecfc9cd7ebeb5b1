"""Samplers: free functions that turn noise into images. Every one is also a generator of its states (…_states).

noise is N(0, 1) of shape (B, …) and is scaled here by sigmas[0]; sigmas descend and stay above 0 (karras_sigmas). Draws
along the way come from generator (see streams), or from noises, a tensor (draws, B, …). clip_denoised clamps every model
output to [-1, 1], as the released code does. callback(State) sees every step.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmlab.checks import finite, known, loaded, same_shape, whole
from cmlab.noise import karras_sigmas
from cmlab.ode import dpm2_step, euler_step, heun_step
from cmlab.streams import randn_like


class State(NamedTuple):
    """One step of a sampler: x (B, …) as it enters the step at noise level sigma, and the model's clean image there."""

    index: int
    sigma: float
    x: Tensor
    denoised: Tensor


def levels_of(sigmas, least: int = 1) -> list[float]:
    """sigmas as a list of floats. Raises ValueError unless there are `least` or more, finite, above 0 and descending."""
    try:
        levels = [float(s) for s in sigmas]
    except TypeError as error:
        raise TypeError(
            f"sigmas must be a sequence of noise levels, such as karras_sigmas(18), got {sigmas!r}"
        ) from error
    if len(levels) < least or any(not (math.isfinite(s) and s > 0) for s in levels):
        raise ValueError(f"sigmas must be at least {least} finite noise levels above 0, got {levels}")
    if any(b >= a for a, b in zip(levels, levels[1:], strict=False)):
        raise ValueError(f"sigmas must descend, got {levels}")
    return levels


def levels_within(model, sigmas) -> list[float]:
    """levels_of(sigmas), for a consistency model: above its sigma_max it has never been. Raises ValueError there."""
    levels = levels_of(sigmas)
    if levels[0] > loaded(model).sigma_max * (1 + 1e-6):
        raise ValueError(f"sigmas must not exceed the model's sigma_max = {model.sigma_max:g}, got {levels[0]:g}")
    return levels


class _Clipped:
    """The model, with its output clamped to [-1, 1] if asked for."""

    def __init__(self, model, clip: bool):
        self.model, self.clip = loaded(model), clip

    def __call__(self, x: Tensor, sigma: float, labels: Tensor | None) -> Tensor:
        denoised = self.model(x, sigma, labels)
        return denoised.clamp(-1, 1) if self.clip else denoised


class Draws:
    """The k-th draw along the way: noises[k] where given, else fresh from the generator."""

    def __init__(self, noises: Tensor | None, generator, needed: int, x: Tensor):
        if noises is not None:
            same_shape("noises", noises, (needed, *x.shape))
        self.noises, self.generator = noises, generator

    def __call__(self, k: int, x: Tensor) -> Tensor:
        return randn_like(x, self.generator) if self.noises is None else self.noises[k]


def end_of(states: Iterator, callback: Callable | None = None) -> Any:
    """Runs a generator, such as a sampler's states, to its end, and returns what it returns. callback sees what it yields."""
    while True:
        try:
            state = next(states)
        except StopIteration as end:
            return end.value
        if callback is not None:
            callback(state)


def relayed(steps: Iterator, seen: Callable[[int, Any], Any]) -> Iterator:
    """Goes through a generator, yields seen(k, what it yields) for k = 1, 2, …, and returns what it returns."""
    for k in itertools.count(1):
        try:
            yielded = next(steps)
        except StopIteration as end:
            return end.value
        yield seen(k, yielded)


# --- diffusion samplers ---------------------------------------------------------------------------------------------


def _churned(x, sigma, steps, s_churn, s_tmin, s_tmax, s_noise, draw, k):
    """Karras et al. (2022), algorithm 2, lines 4-6: raise the noise level a little with fresh noise. Returns (x, sigma_hat)."""
    if not (s_churn >= 0 and s_noise >= 0):
        raise ValueError(f"s_churn and s_noise must be at least 0, got {s_churn} and {s_noise}")
    gamma = min(s_churn / steps, 2**0.5 - 1) if s_tmin <= sigma <= s_tmax else 0.0
    if gamma == 0:
        return x, sigma
    sigma_hat = sigma * (1 + gamma)
    return x + (sigma_hat**2 - sigma**2) ** 0.5 * s_noise * draw(k, x), sigma_hat


@torch.no_grad()
def _churned_states(
    step, denoiser, noise, sigmas, labels, clip_denoised, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0,
    noises=None, generator=None,
) -> Iterator[State]:  # fmt: skip
    """Karras et al. (2022), algorithm 2, with any solver step: noise up by churn, then step down."""
    model, levels = _Clipped(denoiser, clip_denoised), levels_of(sigmas)
    draw = Draws(noises, generator, len(levels), finite("noise", noise))
    x = noise * levels[0]
    for k, (sigma, next_sigma) in enumerate(zip(levels, [*levels[1:], 0.0], strict=True)):
        x, sigma_hat = _churned(x, sigma, len(levels), s_churn, s_tmin, s_tmax, s_noise, draw, k)
        denoised = model(x, sigma_hat, labels)
        yield State(k, sigma_hat, x, denoised)
        x = step(model, x, sigma_hat, next_sigma, labels, denoised)
    return x


def heun_states(denoiser, noise, sigmas, labels=None, clip_denoised=False, **churn) -> Iterator[State]:
    """The states of sample_heun, which takes the same arguments."""
    return _churned_states(heun_step, denoiser, noise, sigmas, labels, clip_denoised, **churn)


def sample_heun(
    denoiser, noise, sigmas, labels=None, clip_denoised=False, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0,
    noises=None, generator=None, callback=None,
) -> Tensor:  # fmt: skip
    """Heun steps down to sigma 0: Karras et al. (2022), algorithm 1; with s_churn > 0 algorithm 2. 2 len(sigmas) - 1 network calls.

    noises (len(sigmas), B, …) injects the churn's draws. Returns (B, …).
    """
    churn = dict(s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise, noises=noises, generator=generator)
    return end_of(heun_states(denoiser, noise, sigmas, labels, clip_denoised, **churn), callback)


def euler_states(denoiser, noise, sigmas, labels=None, clip_denoised=False) -> Iterator[State]:
    """The states of sample_euler."""
    return _churned_states(euler_step, denoiser, noise, sigmas, labels, clip_denoised)


def sample_euler(denoiser, noise, sigmas, labels=None, clip_denoised=False, callback=None) -> Tensor:
    """Euler steps down to sigma 0 (DDIM in this parameterisation): len(sigmas) network calls. Returns (B, …)."""
    return end_of(euler_states(denoiser, noise, sigmas, labels, clip_denoised), callback)


def dpm_states(denoiser, noise, sigmas, labels=None, clip_denoised=False, **churn) -> Iterator[State]:
    """The states of sample_dpm, which takes the same arguments."""
    return _churned_states(dpm2_step, denoiser, noise, sigmas, labels, clip_denoised, **churn)


def sample_dpm(
    denoiser, noise, sigmas, labels=None, clip_denoised=False, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0,
    noises=None, generator=None, callback=None,
) -> Tensor:  # fmt: skip
    """DPM-Solver-2 steps with the rho = 3 midpoint of the released code, down to sigma 0: 2 len(sigmas) network calls.

    noises (len(sigmas), B, …) injects the churn's draws. Returns (B, …).
    """
    churn = dict(s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise, noises=noises, generator=generator)
    return end_of(dpm_states(denoiser, noise, sigmas, labels, clip_denoised, **churn), callback)


def ancestral_step(sigma: float, next_sigma: float) -> tuple[float, float]:
    """(sigma_down, sigma_up): how far to step down, and how much fresh noise then leads to next_sigma (DDPM's variance)."""
    up = (next_sigma**2 * (sigma**2 - next_sigma**2) / sigma**2) ** 0.5
    return (next_sigma**2 - up**2) ** 0.5, up


@torch.no_grad()
def ancestral_states(
    denoiser, noise, sigmas, labels=None, clip_denoised=False, noises=None, generator=None
) -> Iterator[State]:
    """The states of sample_ancestral."""
    model, levels = _Clipped(denoiser, clip_denoised), levels_of(sigmas)
    draw = Draws(noises, generator, len(levels) - 1, finite("noise", noise))
    x = noise * levels[0]
    for k, (sigma, next_sigma) in enumerate(zip(levels, [*levels[1:], 0.0], strict=True)):
        denoised = model(x, sigma, labels)
        yield State(k, sigma, x, denoised)
        down, up = ancestral_step(sigma, next_sigma)
        x = euler_step(model, x, sigma, down, labels, denoised)
        if up > 0:
            x = x + up * draw(k, x)
    return x


def sample_ancestral(
    denoiser, noise, sigmas, labels=None, clip_denoised=False, noises=None, generator=None, callback=None
) -> Tensor:
    """Euler steps with DDPM's share of fresh noise (ancestral sampling): len(sigmas) network calls.

    noises (len(sigmas) - 1, B, …) injects the draws. Returns (B, …).
    """
    return end_of(ancestral_states(denoiser, noise, sigmas, labels, clip_denoised, noises, generator), callback)


@torch.no_grad()
def progressive_states(denoiser, noise, sigmas, labels=None, clip_denoised=False) -> Iterator[State]:
    """The states of sample_progressive."""
    model, levels = _Clipped(denoiser, clip_denoised), levels_of(sigmas, 2)
    x = finite("noise", noise) * levels[0]
    for k, (sigma, next_sigma) in enumerate(zip(levels, levels[1:], strict=False)):
        denoised = model(x, sigma, labels)
        yield State(k, sigma, x, denoised)
        x = euler_step(model, x, sigma, next_sigma, labels, denoised)
    return x


def sample_progressive(denoiser, noise, sigmas, labels=None, clip_denoised=False, callback=None) -> Tensor:
    """The sampler of progressively distilled models: Euler steps that end at sigmas[-1], without the last one to 0.

    n steps need karras_sigmas(n + 1, …). len(sigmas) - 1 network calls. Returns (B, …).
    """
    return end_of(progressive_states(denoiser, noise, sigmas, labels, clip_denoised), callback)


# --- consistency samplers -------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_onestep(model, noise, labels=None, clip_denoised=False) -> Tensor:
    """One network call from pure noise: f(sigma_max z, sigma_max). Song et al. (2023), sec. 3. noise (B, …) -> (B, …)."""
    return _Clipped(model, clip_denoised)(finite("noise", noise) * model.sigma_max, model.sigma_max, labels)


@torch.no_grad()
def multistep_states(
    model, noise, sigmas, labels=None, noises=None, generator=None, clip_denoised=False
) -> Iterator[State]:
    """The states of sample_multistep: denoised of the last one is the result."""
    clipped, levels = _Clipped(model, clip_denoised), levels_within(model, sigmas)
    draw = Draws(noises, generator, len(levels) - 1, finite("noise", noise))
    denoised, added = torch.zeros_like(noise), levels[0] * noise  # the first jump starts from noise alone
    for k, sigma in enumerate(levels):
        if k > 0:
            added = renoise_std(sigma, model.sigma_min) * draw(k - 1, noise)
        x = denoised + added
        denoised = clipped(x, sigma, labels)
        yield State(k, sigma, x, denoised)
    return denoised


def sample_multistep(
    model, noise, sigmas, labels=None, noises=None, generator=None, clip_denoised=False, callback=None
) -> Tensor:
    """Multistep consistency sampling, Song et al. (2023), algorithm 1: jump to an image, put noise back, jump again.

    One network call per sigma; noises (len(sigmas) - 1, B, …) injects the draws. Returns (B, …).
    """
    return end_of(multistep_states(model, noise, sigmas, labels, noises, generator, clip_denoised), callback)


def renoise_std(sigma: float, sigma_min: float) -> float:
    """sqrt(sigma^2 - sigma_min^2): the fresh noise that takes an image, noisy by sigma_min, to level sigma. Algorithm 1, line 4."""
    if sigma < sigma_min * (1 - 1e-6):
        raise ValueError(f"sigma must be at least sigma_min = {sigma_min}, got {sigma}")
    return max(sigma**2 - sigma_min**2, 0.0) ** 0.5


def sample_ts(
    model, noise, ts: Sequence[int], steps: int = 40, rho: float = 7.0, labels=None, noises=None, generator=None,
    clip_denoised=False,
) -> Tensor:  # fmt: skip
    """The released code's multistep sampler: ts are indices (0, 22, 39) on the grid of `steps` levels, 0 = sigma_max.

    The network is called at every entry but the last, and noise of the next entry's level is put back after each call.
    So the last entry must be steps - 1 (no noise): with any other the result *stays noisy*, as it does there.
    noises (len(ts) - 1, B, …) injects the draws.
    """
    whole("steps", steps, 2)
    if len(ts) < 2 or list(ts) != sorted(set(ts)) or ts[0] < 0 or ts[-1] > steps - 1:
        raise ValueError(f"ts must be two or more increasing indices in 0 … {steps - 1}, got {tuple(ts)}")
    if noises is not None:
        same_shape("noises", noises, (len(ts) - 1, *noise.shape))
    sigmas = karras_sigmas(steps, loaded(model).sigma_min, model.sigma_max, rho)[list(ts)].tolist()
    inner = None if noises is None else noises[: len(ts) - 2]
    x = sample_multistep(model, noise, sigmas[:-1], labels, inner, generator, clip_denoised)
    left = renoise_std(sigmas[-1], model.sigma_min)
    if left == 0:
        return x
    return x + left * (randn_like(x, generator) if noises is None else noises[-1])


# --- which levels for multistep? ------------------------------------------------------------------------------------


def ternary_search(metric: Callable[[float], float], low: float, high: float, calls: int = 12) -> float:
    """The sigma in [low, high] with the smallest metric, if it falls and then rises; searched on a log scale.

    metric(sigma) -> float, smaller is better (say the FD of two-step samples). About `calls` evaluations.
    Song et al. (2023), sec. 3 ("Sampling") search the multistep times this way.
    """
    if not 0 < low < high:
        raise ValueError(f"need 0 < low < high, got {low} and {high}")
    a, b = math.log(low), math.log(high)
    for _ in range(whole("calls", calls, 2) // 2):
        left, right = a + (b - a) / 3, b - (b - a) / 3
        if metric(math.exp(left)) < metric(math.exp(right)):
            b = right
        else:
            a = left
    return math.exp((a + b) / 2)


def search_sigmas(
    metric: Callable[[list[float]], float], steps: int, sigma_max: float, candidates, method: str = "greedy"
) -> list[float]:
    """The levels of a multistep sampler, found one after the other: each new one is the best given those before.

    metric(sigmas) -> float, smaller is better. method "greedy" tries every candidate below the last level, "ternary" searches
    between the last level and the lowest candidate. Returns `steps` descending sigmas, beginning with sigma_max.
    """
    known("method", method, ["greedy", "ternary"])
    candidates = [float(c) for c in candidates]
    if not candidates:
        raise ValueError("candidates must hold one noise level or more, got none")
    sigmas, low = [float(sigma_max)], min(candidates)
    while len(sigmas) < whole("steps", steps):
        lower = [c for c in candidates if c < sigmas[-1]]
        if not lower:
            raise ValueError(f"no candidate lies below {sigmas[-1]:g}: {steps} steps need more or lower candidates")
        if method == "greedy":
            best = min(lower, key=lambda c: metric([*sigmas, c]))
        else:
            best = ternary_search(lambda c: metric([*sigmas, c]), low, sigmas[-1])
        sigmas.append(best)
    return sigmas
