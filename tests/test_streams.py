import pytest
import torch

from cmlab.streams import Streams, get_generator, randn_like


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


def test_unknown_generator_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'determ-indiv'"):
        get_generator("determ-individual")
