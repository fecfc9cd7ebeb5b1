import pytest
import torch
from golden_tools import SigmasSeen, arrays, assert_close, facts, tiny_consistency_model, tiny_denoiser

from cmlab.noise import karras_sigmas
from cmlab.sampling import (
    sample_ancestral,
    sample_dpm,
    sample_euler,
    sample_heun,
    sample_multistep,
    sample_onestep,
    sample_progressive,
    sample_ts,
)

RUNS = facts("samplers")["runs"]
CHURN = ("s_churn", "s_tmin", "s_tmax", "s_noise")
ENDING = [name for name, run in RUNS.items() if "ts" in run and run["ts"][-1] == run["steps"] - 1]


def sample(name: str, model) -> torch.Tensor:
    """Our sampler for one of the reference's runs, on that run's own noise."""
    run, golden = RUNS[name], arrays("samplers")
    noise, draws = golden["noise"][0], golden["noise"][1 : run["num_draws"]]
    levels = run["steps"] + (run["sampler"] == "progdist")
    sigmas = karras_sigmas(levels, run["sigma_min"], run["sigma_max"], run["rho"])
    common = dict(labels=golden["y"], clip_denoised=run["clip_denoised"])
    churn = {key: run[key] for key in CHURN if key in run}
    return {
        "heun": lambda: sample_heun(model, noise, sigmas, noises=draws, **churn, **common),
        "dpm": lambda: sample_dpm(model, noise, sigmas, noises=draws, **churn, **common),
        "euler": lambda: sample_euler(model, noise, sigmas, **common),
        "ancestral": lambda: sample_ancestral(model, noise, sigmas, noises=draws[:-1], **common),  # the last is times 0
        "progdist": lambda: sample_progressive(model, noise, sigmas, **common),
        "onestep": lambda: sample_onestep(model, noise, **common),
        "multistep": lambda: sample_ts(model, noise, run["ts"], run["steps"], run["rho"], noises=draws, **common),
    }[run["sampler"]]()


@pytest.mark.parametrize("name", RUNS)
def test_samplers_equal_the_reference(name):
    run, golden = RUNS[name], arrays("samplers")
    model = SigmasSeen(tiny_consistency_model() if run["distillation"] else tiny_denoiser())
    images = sample(name, model).clamp(-1, 1)
    assert len(model.seen) == run["num_denoise_calls"]
    assert_close(model.seen, golden[f"sigma_calls_{name}"])
    assert_close(images, golden[f"x0_{name}"])


@pytest.mark.parametrize("name", ENDING)
def test_ts_that_end_at_sigma_min_are_multistep_sampling_at_all_levels_but_the_last(name):
    run, golden = RUNS[name], arrays("samplers")
    sigmas = karras_sigmas(run["steps"])[run["ts"][:-1]]
    noise, draws = golden["noise"][0], golden["noise"][1 : len(sigmas)]
    images = sample_multistep(tiny_consistency_model(), noise, sigmas, golden["y"], noises=draws, clip_denoised=True)
    assert_close(images.clamp(-1, 1), golden[f"x0_{name}"])


def test_ts_that_end_early_leave_the_reference_and_us_with_the_same_noisy_picture():
    golden = arrays("samplers")
    one_step = sample_onestep(tiny_consistency_model(), golden["noise"][0], golden["y"], clip_denoised=True)
    left = karras_sigmas(40)[17]
    noisy = one_step + (left**2 - 0.002**2) ** 0.5 * golden["noise"][1]
    assert_close(noisy.clamp(-1, 1), golden["x0_multistep_0_17"])


def test_index_0_of_ts_is_sigma_max():
    for name, run in RUNS.items():
        if run["sampler"] == "multistep":
            assert run["ts"][0] == 0 and arrays("samplers")[f"sigma_calls_{name}"][0] == pytest.approx(80.0, rel=1e-6)
