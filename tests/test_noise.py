import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cmlab.noise import (
    LogNormal,
    add_noise,
    index_of,
    karras_sigmas,
    lognormal_index,
    mu_adaptive,
    scales_doubling,
    scales_halving,
    scales_sqrt,
    sigma_at,
    uniform_index,
    weighting,
)


@given(n=st.integers(2, 300), low=st.floats(1e-4, 1), span=st.floats(1.01, 1e5), rho=st.floats(1, 12))
def test_the_grid_descends_between_exact_end_points(n, low, span, rho):
    sigmas = karras_sigmas(n, low, low * span, rho)
    assert sigmas.dtype == torch.float64 and sigmas.shape == (n,)
    assert sigmas[0] == low * span and sigmas[-1] == low
    assert (sigmas.diff() < 0).all()


@given(index=st.floats(0, 39), rho=st.floats(1, 12))
def test_index_of_inverts_sigma_at(index, rho):
    assert float(index_of(sigma_at(index, 40, rho=rho), 40, rho=rho)) == pytest.approx(index, abs=1e-7)


def test_one_level_is_sigma_max():
    assert karras_sigmas(1).tolist() == [80.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: karras_sigmas(0), "n must be at least 1, got 0"),
        (lambda: karras_sigmas(2.5), "n must be a whole number, got 2.5"),
        (lambda: karras_sigmas(5, 0.0, 80), "need 0 < sigma_min <= sigma_max, got 0.0 and 80"),
        (lambda: karras_sigmas(5, 2.0, 1.0), "got 2.0 and 1.0"),
        (lambda: karras_sigmas(5, rho=math.nan), "rho must be a finite number above 0, got nan"),
        (lambda: sigma_at(40, 40), "index must lie in 0 … 39, got 40"),
        (lambda: index_of(81.0, 40), r"sigma must lie in \[0.002, 80.0\], got 81"),
        (lambda: index_of(math.nan, 40), "sigma must lie in .*, got nan"),
        (lambda: sigma_at(math.nan, 40), "index must lie in 0 … 39, got nan"),
        (lambda: add_noise(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2)), r"noise must have shape \(2, 3\)"),
        (lambda: add_noise(torch.zeros(2, 3), torch.zeros(2, 3), torch.ones(1)), r"sigma must have shape \(2,\)"),
        (lambda: LogNormal(std=0.0), "std must be a finite number above 0, got 0"),
        (lambda: lognormal_index(2, karras_sigmas(5), std=-1.0), "std must be a finite number above 0, got -1"),
        (lambda: weighting("karras", torch.zeros(1)), "sigma must be above 0, got 0"),
        (lambda: weighting("kerras", torch.ones(1)), "Did you mean 'karras'"),
        (lambda: weighting("inverse-gap", torch.ones(1)), "needs the lower level"),
        (lambda: scales_sqrt(11, 10), "step must lie in 0 … 10, got 11"),
        (lambda: scales_halving(0, 10, 1), "start must be at least 2, got 1"),
        (lambda: mu_adaptive(1), "scales must be at least 2"),
        (lambda: mu_adaptive(4, mu_0=1.5), r"mu_0 must lie in \(0, 1\], got 1.5"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_square_root_curriculum_begins_and_ends_where_the_paper_says():
    assert scales_sqrt(0, 1000, 2, 150) == 2
    assert scales_sqrt(1000, 1000, 2, 150) == 151


def test_doubling_curriculum_has_stages_of_equal_length():
    seen = [scales_doubling(k, 800, 10, 1280) for k in range(800)]
    assert [seen.count(10 * 2**stage + 1) for stage in range(8)] == [100] * 8


def test_progressive_distillation_halves_down_to_one_step():
    assert [scales_halving(k, 10, 8) for k in (0, 9, 10, 20, 39, 40, 999)] == [8, 8, 4, 2, 2, 1, 1]


def test_the_target_gets_slower_as_the_grid_gets_finer():
    assert mu_adaptive(2, 2, 0.95) == pytest.approx(0.95**2)
    assert mu_adaptive(3, 2, 0.95) < mu_adaptive(30, 2, 0.95) < 1


def test_lognormal_levels_have_the_stated_moments():
    logs = LogNormal(-1.2, 1.2)(200_000, torch.Generator().manual_seed(0)).log()
    assert logs.mean() == pytest.approx(-1.2, abs=0.02) and logs.std() == pytest.approx(1.2, abs=0.02)


def test_discretised_lognormal_gives_each_interval_its_mass():
    sigmas = karras_sigmas(11)
    index = lognormal_index(400_000, sigmas, -1.1, 2.0, torch.Generator().manual_seed(0))
    cdf = torch.distributions.Normal(-1.1, 2.0).cdf(sigmas.log())
    mass = (cdf[:-1] - cdf[1:]) / (cdf[0] - cdf[-1])
    assert torch.allclose(index.bincount(minlength=10) / 400_000, mass.float(), atol=3e-3)


def test_uniform_indices_reach_every_interval_and_no_further():
    index = uniform_index(10_000, 18, torch.Generator().manual_seed(0))
    assert sorted(set(index.tolist())) == list(range(17))


@pytest.mark.parametrize(
    ("start", "end", "levels"),
    [  # K = 800: K' = floor(800 / (log2 floor(end / start) + 1))
        (10, 1280, {0: 11, 99: 11, 100: 21, 399: 81, 400: 161, 699: 641, 700: 1281, 800: 1281}),  # K' = 800 / 8
        (10, 50, {0: 11, 239: 11, 240: 21, 479: 21, 480: 41, 719: 41, 720: 51, 800: 51}),  # K' = floor(800 / 3.32)
        (10, 59, {239: 11, 240: 21, 480: 41, 719: 41, 720: 60}),  # 59 / 10 is floored: the same K'
        (10, 10, {0: 11, 799: 11, 800: 11}),
    ],
)
def test_doubling_curriculum_is_the_papers_formula(start, end, levels):
    assert {k: scales_doubling(k, 800, start, end) for k in levels} == levels
