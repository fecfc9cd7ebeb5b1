import math

import pytest
import torch
from toys import draws, random_model

from cmlab.exact import GaussianMixtureDenoiser
from cmlab.noise import karras_sigmas
from cmlab.sampling import (
    ancestral_step,
    heun_states,
    multistep_states,
    sample_ancestral,
    sample_dpm,
    sample_euler,
    sample_heun,
    sample_multistep,
    sample_onestep,
    sample_progressive,
    sample_ts,
    search_sigmas,
    ternary_search,
)
from cmlab.scaling import Denoiser
from cmlab.streams import Streams

SIGMAS = karras_sigmas(18, 0.01, 10.0)
DATA = GaussianMixtureDenoiser(torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), 0.2)


class Counted:
    """A denoiser that remembers the noise levels it was asked for."""

    sigma_min, sigma_max = 0.01, 10.0

    def __init__(self):
        self.sigmas = []

    def __call__(self, x, sigma, labels=None):
        self.sigmas.append(sigma)
        return DATA(x, sigma)


@pytest.mark.parametrize(
    ("sampler", "calls", "slack"),
    [
        (sample_heun, 35, 0.1),
        (sample_euler, 18, 0.2),
        (sample_dpm, 36, 0.1),
        (sample_ancestral, 18, 0.35),  # first order and noisy: its variance is visibly short at 18 steps
        (sample_progressive, 17, 0.2),
    ],
)
def test_samplers_land_on_the_data_with_the_stated_number_of_calls(sampler, calls, slack):
    denoiser = Counted()
    samples = sampler(denoiser, draws(4000, 2), SIGMAS)
    assert len(denoiser.sigmas) == calls
    nearest = torch.cdist(samples, DATA.means).min(1).values
    assert float(nearest.square().mean()) == pytest.approx(2 * 0.2**2, rel=slack)
    assert float((samples[:, 0] > 0).float().mean()) == pytest.approx(0.5, abs=0.03)


def test_multistep_calls_the_network_once_a_level():
    model = Counted()
    sample_multistep(model, draws(3, 2), [10.0, 1.0, 0.1])
    assert model.sigmas == [10.0, 1.0, 0.1]


def test_one_level_of_multistep_is_one_step():
    model, noise = random_model(), draws(3, 1, 8, 8)
    assert torch.equal(sample_multistep(model, noise, [model.sigma_max]), sample_onestep(model, noise))


def test_the_picture_does_not_depend_on_the_batch():
    model = random_model()
    together = Streams(4, seed=1)
    batch = sample_multistep(model, together.randn(4, 1, 8, 8), [80.0, 2.0, 0.5], generator=together)
    alone = Streams(4, seed=1)
    alone.set_done_samples(3)
    single = sample_multistep(model, alone.randn(1, 1, 8, 8), [80.0, 2.0, 0.5], generator=alone)
    assert torch.allclose(batch[3], single[0], atol=1e-5)


def test_injected_noises_replace_the_draws():
    model, noise, noises = random_model(), draws(2, 1, 8, 8), draws(2, 2, 1, 8, 8, seed=1)
    by_hand = sample_onestep(model, noise)
    for z, sigma in zip(noises, (2.0, 0.5), strict=True):
        by_hand = model(by_hand + (sigma**2 - 0.002**2) ** 0.5 * z, sigma)
    assert torch.equal(sample_multistep(model, noise, [80.0, 2.0, 0.5], noises=noises), by_hand)


def test_ts_that_do_not_end_at_the_last_index_leave_noise():
    model, noise = random_model(), draws(500, 1, 8, 8)
    clean = sample_ts(model, noise, [0, 17, 39], 40, generator=torch.Generator().manual_seed(0))
    noisy = sample_ts(model, noise, [0, 17], 40, generator=torch.Generator().manual_seed(0))
    level = float(karras_sigmas(40)[17])
    assert float((noisy - sample_onestep(model, noise)).std()) == pytest.approx(level, rel=0.02)
    assert torch.equal(
        clean, sample_multistep(model, noise, karras_sigmas(40)[[0, 17]], generator=torch.Generator().manual_seed(0))
    )


def test_states_are_those_the_callback_sees():
    noise, seen = draws(2, 2), []
    sample_heun(DATA, noise, SIGMAS, callback=seen.append)
    states = list(heun_states(DATA, noise, SIGMAS))
    assert [s.index for s in seen] == list(range(18)) and [s.sigma for s in seen] == SIGMAS.tolist()
    assert all(torch.equal(a.x, b.x) and torch.equal(a.denoised, b.denoised) for a, b in zip(seen, states, strict=True))


def test_the_last_multistep_state_is_the_result():
    model, noise = random_model(), draws(2, 1, 8, 8)
    states = list(multistep_states(model, noise, [80.0, 1.0], noises=draws(1, 2, 1, 8, 8)))
    assert torch.equal(states[-1].denoised, sample_multistep(model, noise, [80.0, 1.0], noises=draws(1, 2, 1, 8, 8)))


def test_churn_draws_noise_and_none_is_deterministic():
    noise = draws(64, 2)
    first, second = (sample_heun(DATA, noise, SIGMAS, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    assert torch.equal(first, second)
    churned = sample_heun(DATA, noise, SIGMAS, s_churn=10, generator=torch.Generator().manual_seed(0))
    assert (churned - sample_heun(DATA, noise, SIGMAS)).abs().max() > 0.1


def test_ancestral_step_splits_the_variance():
    down, up = ancestral_step(2.0, 1.0)
    assert down**2 + up**2 == pytest.approx(1.0) and ancestral_step(2.0, 0.0) == (0.0, 0.0)


def test_clipping_bounds_what_the_model_says():
    denoiser = random_model(Denoiser)
    assert sample_heun(denoiser, draws(4, 1, 8, 8), karras_sigmas(5), clip_denoised=True).abs().max() <= 1


def test_ternary_search_finds_the_bottom():
    assert ternary_search(lambda s: (math.log(s) - math.log(0.4)) ** 2, 0.01, 10, calls=40) == pytest.approx(
        0.4, rel=0.01
    )


def test_greedy_search_takes_the_best_candidate_of_each_round():
    wanted = {2: 0.5, 3: 0.1}
    found = search_sigmas(lambda s: abs(s[-1] - wanted[len(s)]), 3, 20.0, [5.0, 0.5, 0.2, 0.1])
    assert found == [20.0, 0.5, 0.1]


def test_ternary_search_finds_a_level_between_the_candidates():
    found = search_sigmas(lambda s: abs(math.log(s[-1] / 0.4)), 2, 20.0, [5.0, 0.1], method="ternary")
    assert found[0] == 20.0 and found[1] == pytest.approx(0.4, rel=0.15)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, z: sample_heun(m, z, 5.0), "sigmas must be a sequence of noise levels, such as karras.*got 5.0"),
        (lambda m, z: sample_multistep(m, z, [100.0, 1.0]), "must not exceed the model's sigma_max = 80, got 100"),
        (lambda m, z: sample_heun(m, z, [1.0, 2.0]), r"sigmas must descend, got \[1.0, 2.0\]"),
        (lambda m, z: sample_heun(m, z, [1.0, 0.0]), "finite noise levels above 0"),
        (lambda m, z: sample_heun(m, z, []), "at least 1 finite noise levels"),
        (lambda m, z: sample_heun(m, z / 0, [1.0]), "noise must be finite"),
        (lambda m, z: sample_multistep(m, z, [80.0, 1.0], noises=z), r"noises must have shape \(1, 2, 1, 8, 8\)"),
        (lambda m, z: sample_multistep(m, z, [80.0, 0.001]), "sigma must be at least sigma_min = 0.002, got 0.001"),
        (lambda m, z: sample_ts(m, z, [0, 50], 40), r"increasing indices in 0 … 39, got \(0, 50\)"),
        (lambda m, z: sample_heun(m, z, [1.0], s_churn=-1), "s_churn and s_noise must be at least 0, got -1"),
        (lambda m, z: sample_ts(m, z, [0, 10, 39], noises=z[None]), r"noises must have shape \(2, 2, 1, 8, 8\)"),
        (lambda m, z: sample_onestep(m, z.int()), "noise must be a floating-point tensor"),
        (lambda m, z: sample_onestep(m, z[:, :, :4]), r"x must have shape \(2, 1, 8, 8\), got \(2, 1, 4, 8\)"),
        (lambda m, z: sample_onestep("digits", z), "model must be a model, such as cmlab.load returns, got 'digits'"),
        (lambda m, z: sample_multistep("digits", z, [1.0]), "model must be a model.*got 'digits'"),
        (lambda m, z: sample_ts("digits", z, [0, 39]), "model must be a model.*got 'digits'"),
        (lambda m, z: sample_heun("digits", z, [1.0]), "model must be a model.*got 'digits'"),
        (lambda m, z: search_sigmas(len, 2, 1.0, []), "candidates must hold one noise level or more, got none"),
        (lambda m, z: search_sigmas(len, 4, 1.0, [0.5]), "steps need more or lower candidates"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(random_model(), draws(2, 1, 8, 8))
