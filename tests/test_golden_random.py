import pytest
import torch
from golden_tools import arrays

from cmlab.streams import get_generator

GOLDEN = arrays("random")


@pytest.fixture(params=["determ", "determ-indiv"])
def name(request):
    return request.param


def test_streams_equal_the_reference_bit_for_bit(name):
    stream = get_generator(name, num_samples=4, seed=42)
    assert torch.equal(stream.randn(2, 3, 8, 8), GOLDEN[f"{name}/randn_1"])
    assert torch.equal(stream.randn_like(torch.zeros(2, 3, 8, 8)), GOLDEN[f"{name}/randn_2"])
    assert torch.equal(stream.randint(0, 1000, (2,)), GOLDEN[f"{name}/randint_3"])
    stream.set_done_samples(2)
    assert torch.equal(stream.randn(2, 3, 8, 8), GOLDEN[f"{name}/after_set_done_samples_2/randn_1"])


def test_a_batch_of_four_equals_the_reference_bit_for_bit(name):
    assert torch.equal(get_generator(name, 4, 42).randn(4, 3, 8, 8), GOLDEN[f"{name}/batch4/randn_1"])
