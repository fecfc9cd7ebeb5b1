import pytest
import torch
from golden_tools import arrays, assert_close, facts

from cmlab.noise import karras_sigmas, mu_adaptive, scales_halving, scales_sqrt, weighting
from cmlab.sampling import ancestral_step
from cmlab.scaling import ConsistencyModel, Denoiser, boundary_scalings, edm_scalings

PRECISIONS = [("f32", 1e-4), ("f64", 1e-12)]  # as the reference runs; the same functions in float64
CASES = facts("ema_and_scales")["cases"]


@pytest.fixture(params=PRECISIONS, ids=lambda p: p[0])
def precision(request):
    return request.param


@pytest.mark.parametrize("n", [1, 2, 10, 18, 40])
@pytest.mark.parametrize(("grid", "arguments"), [("karras", (0.002, 80.0, 7.0)), ("karras_alt", (0.01, 50.0, 5.0))])
def test_grids_equal_the_reference_without_its_trailing_zero(n, grid, arguments, precision):
    suffix, tolerance = precision
    golden = arrays("schedules")[f"{grid}/n{n}/{suffix}"]
    assert golden[-1] == 0
    assert_close(karras_sigmas(n, *arguments), golden[:-1], tolerance)


@pytest.mark.parametrize("name", ["snr", "snr+1", "karras", "truncated-snr", "uniform"])
def test_weightings_equal_the_reference(name, precision):
    suffix, tolerance = precision
    golden = arrays("schedules")
    assert_close(weighting(name, golden[f"sigmas/{suffix}"], 0.5), golden[f"weight/{name}/{suffix}"], tolerance)


def test_scalings_equal_the_reference(precision):
    suffix, tolerance = precision
    golden = arrays("schedules")
    sigma = golden[f"sigmas/{suffix}"]
    ours = {"edm": edm_scalings(sigma, 0.5), "boundary": boundary_scalings(sigma, 0.5, 0.002)}
    for kind, scalings in ours.items():
        for name, value in zip(("c_skip", "c_out", "c_in"), scalings, strict=True):
            assert_close(value, golden[f"scalings_{kind}/{name}/{suffix}"], tolerance)


@pytest.mark.parametrize("kind", [Denoiser, ConsistencyModel])
def test_the_networks_time_equals_the_reference(kind, precision):
    suffix, tolerance = precision
    golden = arrays("schedules")
    *_, c_noise = kind(torch.nn.Identity()).scalings(golden[f"sigmas/{suffix}"])
    assert_close(c_noise, golden[f"rescaled_t/{suffix}"], tolerance)


def test_ancestral_steps_equal_the_reference(precision):
    suffix, tolerance = precision
    golden = arrays("schedules")
    levels = golden["karras/n10/f32"].tolist()
    down, up = zip(*(ancestral_step(a, b) for a, b in zip(levels, levels[1:], strict=False)), strict=True)
    assert_close(down, golden[f"ancestral/sigma_down/{suffix}"], tolerance)
    assert_close(up, golden[f"ancestral/sigma_up/{suffix}"], tolerance)


def released(case: dict, step: int) -> tuple[float, int]:
    """(mu, N) from our curricula, chosen by the released code's names."""
    args = case["args"]
    if args["scale_mode"] == "progdist":
        return 1.0, scales_halving(step, args["distill_steps_per_iter"], args["start_scales"])
    start, scales = args["start_scales"], args["start_scales"]
    if args["scale_mode"] == "progressive":
        scales = scales_sqrt(step, args["total_steps"], start, args["end_scales"])
    adaptive = args["target_ema_mode"] == "adaptive"
    return mu_adaptive(scales, start, args["start_ema"]) if adaptive else args["start_ema"], scales


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_curricula_equal_the_reference(case):
    ours = [released(case, step) for step in case["step"]]
    assert [scales for _, scales in ours] == case["num_scales"]
    assert [mu for mu, _ in ours] == pytest.approx(case["target_ema"], rel=1e-12)
