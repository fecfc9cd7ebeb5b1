import pytest
import torch
from golden_tools import TINY, arrays, assert_close, tiny_consistency_model, tiny_denoiser, tiny_unet


@pytest.mark.parametrize("name", TINY)
def test_denoisers_equal_the_reference(name):
    golden = arrays(f"denoise_{name}")
    call = golden["x_t"], golden["sigmas"], golden.get("y")
    assert_close(tiny_denoiser(name)(*call), golden["denoised_edm"])
    assert_close(tiny_consistency_model(name)(*call), golden["denoised_distill"])


@pytest.mark.parametrize("name", TINY)
def test_the_network_inside_sees_what_the_reference_feeds_it(name):
    golden = arrays(f"denoise_{name}")
    sigma = golden["sigmas"]
    _, _, c_in, c_noise = tiny_denoiser(name).scalings(sigma)
    output = tiny_unet(name)(c_in.reshape(-1, 1, 1, 1) * golden["x_t"], c_noise, golden.get("y"))
    assert_close(output, golden["model_output"])


@pytest.mark.parametrize("name", TINY)
def test_at_sigma_min_the_image_stays_bit_for_bit(name):
    golden = arrays(f"denoise_{name}")
    first = golden["sigmas"] == 0.002
    images, labels = golden["x_t"][first], golden["y"][first] if "y" in golden else None
    assert len(images) == 1 and torch.equal(golden["denoised_distill"][first], images)
    assert torch.equal(tiny_consistency_model(name)(images, 0.002, labels), images)
