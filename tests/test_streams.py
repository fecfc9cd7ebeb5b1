from unittest import mock

import pytest
import torch

from cmlab.streams import Streams, get_generator, rand, randint, randn, randn_like, seeded


@pytest.mark.parametrize("individual", [True, False])
def test_a_sample_gets_the_same_noise_whatever_the_batch_size(individual):
    whole = Streams(6, seed=3, individual=individual).randn(6, 2, 2)
    parts = Streams(6, seed=3, individual=individual)
    first = parts.randn(4, 2, 2)
    parts.set_done_samples(4)
    assert torch.equal(torch.cat([first, parts.randn(2, 2, 2)]), whole)


def test_ranks_share_the_samples_out_without_overlap():
    whole = Streams(6, seed=1).randn(6, 3)
    ranks = [Streams(6, seed=1, rank=r, world_size=2).randn(3, 3) for r in (0, 1)]
    assert torch.equal(torch.stack(ranks, 1).flatten(0, 1), whole)


def test_streams_keep_the_dtype_of_what_they_imitate():
    assert randn_like(torch.zeros(2, 3, dtype=torch.float64), Streams(2)).dtype == torch.float64


def test_asking_for_more_samples_than_there_are_is_refused():
    with pytest.raises(ValueError, match="samples 0 … 3 asked of streams for num_samples = 2"):
        Streams(2).randn(4, 1)


def test_seeded_numbers_are_those_of_the_seed_and_leave_no_trace():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(5)
    inside = torch.rand(2)
    torch.manual_seed(3)
    with mock.patch("torch.cuda.manual_seed_all") as other_devices, seeded(5):
        assert torch.equal(torch.rand(2), inside)
    assert torch.equal(torch.rand(2), expected) and not other_devices.called


def test_unknown_generator_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'determ-indiv'"):
        get_generator("determ-individual")


def test_with_a_stride_a_sample_is_the_same_however_many_there_are():
    few, many = (Streams(n, seed=2, stride=1000).randn(n, 3) for n in (10, 100))
    assert torch.equal(few, many[:10])
    assert not torch.equal(Streams(10, seed=2).randn(10, 3), Streams(100, seed=2).randn(100, 3)[:10])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: randn((2,), 7), "generator must be None, a torch.Generator or a stream of get_generator, got 7"),
        (lambda: rand((2,), "determ"), "got 'determ'; for a seed write torch.Generator"),
        (lambda: randint(0, 2, (2,), 1.0), "generator must be None"),
        (lambda: rand((2,), Streams(2)), "generator must be None, a torch.Generator, got <cmlab.streams.Streams"),
        (lambda: Streams(2, seed=-1), "seed must be at least 0, got -1"),
        (lambda: Streams(10, stride=9), "stride must be at least 10, got 9"),
        (lambda: Streams(2).set_done_samples(-1), "done must be at least 0, got -1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()
