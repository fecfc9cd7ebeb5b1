"""Two processes that share every weight out are one with the same global batch: FSDP2 on the CPU, under torchrun with gloo."""

import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
from processes import run_ranks
from test_training import OBJECTIVES, SMALL, TEACHER
from torch import nn
from torch.distributed.fsdp import FSDPModule

from cmlab import checkpoints
from cmlab.cli import main
from cmlab.continuous import ContinuousDistillation, MeanFlowTraining
from cmlab.data import load_data
from cmlab.models.small import Block
from cmlab.objectives import EasyConsistencyTuning
from cmlab.run import Run
from cmlab.scaling import Denoiser
from cmlab.training import train

# The gradient is clipped at every step, and comes in two parts a rank: with dropout that does not depend on the ranks.
PARTS = SMALL.replace(micro_batches=4, clip=0.05, ema=(0.5, 0.9))
UNET = dict(
    name="unet", image_size=8, in_channels=1, model_channels=32, out_channels=1, num_res_blocks=1, num_classes=10,
    attention_resolutions=[2], channel_mult=[1, 1], dropout=0.3, resblock_updown=True,
)  # fmt: skip
RECIPES = {
    "edm": PARTS,
    "cd with a target": PARTS.replace(objective=OBJECTIVES["cd with a target network"], optimizer="radam"),
    "ect without one": PARTS.replace(objective=EasyConsistencyTuning(sigma_max=20.0)),
    "pd, which changes teachers": PARTS.replace(objective=OBJECTIVES["pd, which changes teachers"]),
    "scd": PARTS.replace(objective=ContinuousDistillation(sigma_max=20.0, tangent_warmup=0.0)),
    "meanflow": PARTS.replace(objective=MeanFlowTraining(sigma_max=20.0), network=SMALL.network | {"jumps": True}),
    "checkpointed unet": PARTS.replace(
        objective=OBJECTIVES["ct with both curricula"], network=UNET, checkpointing=True, iterations=4
    ),
}
MOVED = ["cd with a target", "pd, which changes teachers"]  # between one process and two: all that a state holds
STOP = 7


def told(recipe, **options):
    """[loss, norm of the gradient] of every step."""
    teacher = TEACHER if recipe.objective.needs_teacher else None
    return [[r.loss, r.grad_norm] for r in train(recipe, teacher=teacher, device="cpu", **options)]


def begin(recipe, folder, **options):
    """Trains STOP steps, of which the last is not saved."""
    teacher = TEACHER if recipe.objective.needs_teacher else None
    for record in train(recipe, teacher=teacher, device="cpu", folder=folder, save_every=STOP - 1, **options):
        if record.step == STOP:
            break


def run_of(name, **changes):
    return Run(RECIPES[name].replace(**changes), load_data("digits"), TEACHER, "cpu", 0, "fsdp")


def held(run):
    """Of every model and of the optimizer's state, [how many numbers this rank holds, of how many]."""
    models = {"student": run.student, "target": run.target, "teacher": run.teacher}
    models |= {f"average {k}": average for k, average in enumerate(run.emas)}
    weights = {name: list(model.parameters()) for name, model in models.items()}
    weights["moments"] = [state["exp_avg"] for state in run.optimizer.state.values()]
    return {
        name: [sum(w.to_local().numel() for w in some), sum(w.numel() for w in some)] for name, some in weights.items()
    }


def overflowing(rank):
    """A gradient that overflows in the share of one rank only: what it does to a step."""
    import cmlab.run

    cmlab.run.multiplies = lambda precision, device: True  # float16 also where the processor emulates it
    run = run_of("edm", precision="fp16")
    before = [p.to_local().clone() for p in run.student.parameters()]
    backward, scale = run._backward, run.scaler.get_scale()

    def broken():
        losses = backward()
        if rank == 0:
            run.student.net.enter.weight.grad.to_local()[0] = math.inf
        return losses

    run._backward = broken
    run.advance(None)
    kept = all(torch.equal(p.to_local(), q) for p, q in zip(run.student.parameters(), before, strict=True))
    left_out, lowered = run.overflows, run.scaler.get_scale() / scale
    run._backward = backward
    run.advance(None)
    return dict(kept=kept, left_out=left_out, lowered=lowered, later=run.overflows)


def by_command_line(folder):
    """Trains and looks by `cmlab train`; returns which models and blocks were called: sharded ones, whole ones."""
    called = set()

    def look(module, arguments):
        if isinstance(module, (Denoiser, Block)):
            kind = Denoiser if isinstance(module, Denoiser) else Block
            called.add(f"{'sharded' if isinstance(module, FSDPModule) else 'whole'} {kind.__name__}")

    hook = nn.modules.module.register_module_forward_pre_hook(look)
    options = ["--device", "cpu", "--tracker", "none", "--iterations", "2", "--look-every", "1", "--parallel", "fsdp"]
    assert main(["train", "digits-edm", "--output", str(folder), *options]) == 0
    hook.remove()
    return sorted(called)


def shared(folder):
    """What every rank does."""
    rank = int(os.environ["RANK"])
    seen = {name: told(recipe, parallel="fsdp") for name, recipe in RECIPES.items()}
    for name in MOVED:
        begin(RECIPES[name], folder / name / "from fsdp to one", parallel="fsdp")
        begin(RECIPES[name], folder / name / "from fsdp to ddp", parallel="fsdp")
        told(RECIPES[name], folder=folder / name / "from fsdp to ddp", resume=True)
        told(RECIPES[name], folder=folder / name / "from one to fsdp", resume=True, parallel="fsdp")
    run = run_of("cd with a target")
    run.advance(None)
    seen["held"], seen["overflow"] = held(run), overflowing(rank)
    seen["called"] = by_command_line(folder / "command line")
    (folder / f"{rank}.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    for name in MOVED:
        told(RECIPES[name], folder=folder / name / "one")
        begin(RECIPES[name], folder / name / "from one to fsdp")
    run_ranks(__file__, str(folder))
    for name in MOVED:
        told(RECIPES[name], folder=folder / name / "from fsdp to one", resume=True)
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", RECIPES)
def test_two_ranks_that_share_the_weights_have_the_losses_and_norms_of_one_process(ranks, name):
    alone = torch.tensor(told(RECIPES[name]))
    assert (alone[:, 1] > RECIPES[name].clip).all(), "else it says nothing of clipping"
    for rank in ranks:
        torch.testing.assert_close(torch.tensor(rank[name]), alone, rtol=1e-5, atol=1e-7)


def test_every_number_of_every_model_lies_on_one_rank(ranks):
    """About half on each: what is cut are rows, and a layer may have an odd number of them, or one."""
    first, second = (rank["held"] for rank in ranks)
    for what, (here, total) in first.items():
        assert here + second[what][0] == total and 0.4 < here / total < 0.6, what
    assert {"student", "target", "teacher", "average 0", "average 1", "moments"} == set(first)


@pytest.mark.parametrize("way", ["from fsdp to one", "from one to fsdp", "from fsdp to ddp"])
@pytest.mark.parametrize("name", MOVED)
def test_a_run_goes_on_under_another_sharing_as_if_it_had_not_been_stopped(folder, name, way):
    moved, expected = (torch.load(folder / name / one / "state.pt", weights_only=True) for one in (way, "one"))
    assert moved.keys() == expected.keys() and moved["step"] == 12
    for what in ("student", "emas", "target", "teacher", "optimizer"):
        torch.testing.assert_close(moved[what], expected[what], rtol=1e-5, atol=1e-5)
    for model in ("model", "model-ema-0.5"):
        one, other = (checkpoints.load(folder / name / place / model).state_dict() for place in (way, "one"))
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_an_overflow_on_one_rank_leaves_the_step_out_on_all(ranks):
    for rank in ranks:
        assert rank["overflow"] == dict(kept=True, left_out=1, lowered=0.5, later=1)


def test_the_command_line_trains_sharded_and_looks_at_a_whole_copy_on_one_rank(folder, ranks):
    sharded, whole = ["sharded Block", "sharded Denoiser"], ["whole Block", "whole Denoiser"]
    assert ranks[0]["called"] == sharded + whole and ranks[1]["called"] == sharded
    sheets = sorted(path.name for path in (folder / "command line" / "samples").iterdir())
    assert sheets == ["step-00000001.png", "step-00000002.png"]


def test_one_process_has_nothing_to_share():
    assert told(PARTS, parallel="fsdp") == told(PARTS)


def test_an_unknown_way_to_share_names_the_known():
    with pytest.raises(ValueError, match="unknown parallel 'fsdp2'. Did you mean 'fsdp'. Known: ddp, fsdp"):
        next(train(SMALL, device="cpu", parallel="fsdp2"))


if __name__ == "__main__":
    shared(Path(sys.argv[1]))
