import copy
import dataclasses
import math
import os
import signal
import subprocess
import sys
from unittest import mock

import pytest
import torch
from toys import random_model, random_net

from cmlab import checkpoints
from cmlab.data import load_data
from cmlab.exact import DatasetDenoiser
from cmlab.noise import LogNormal
from cmlab.objectives import EDM, ConsistencyDistillation, ConsistencyTraining, ProgressiveDistillation
from cmlab.recipes import RECIPES, Recipe, get_recipe
from cmlab.run import Run, TrainingDiverged, multiplies, parts_of
from cmlab.scaling import ConsistencyModel, Denoiser
from cmlab.training import on_interrupt, train

NET = dict(name="mlp", shape=[1, 8, 8], width=16, depth=1, num_classes=10, dropout=0.2, embedding=16)
SMALL = Recipe("small", "digits", NET, EDM(sigma_max=20.0), iterations=12, batch=32, warmup=2, precision="fp32")
TEACHER = random_model(Denoiser, num_classes=10)
OBJECTIVES = {
    "edm": EDM(sigma_max=20.0),
    "cd with a target network": ConsistencyDistillation(sigma_max=20.0, num_scales=6),
    "ct with both curricula": ConsistencyTraining(sigma_max=20.0, end=10),
    "pd, which changes teachers": ProgressiveDistillation(sigma_max=20.0, start=4, stage_steps=2),
}


def losses(recipe, **options):
    return [
        r.loss
        for r in train(recipe, teacher=TEACHER if recipe.objective.needs_teacher else None, device="cpu", **options)
    ]


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
@pytest.mark.parametrize("optimizer", ["adamw", "radam"])
def test_a_killed_run_goes_on_bit_for_bit(objective, optimizer, tmp_path):
    recipe = SMALL.replace(objective=objective, optimizer=optimizer)
    uninterrupted = losses(recipe)
    for step, _ in enumerate(
        train(
            recipe, teacher=TEACHER if objective.needs_teacher else None, device="cpu", folder=tmp_path, save_every=5
        ),
        1,
    ):
        if step == 7:  # two steps after the last save
            break
    assert losses(recipe, folder=tmp_path, resume=True) == uninterrupted[5:]


def test_a_run_killed_by_the_system_resumes(tmp_path):
    """SIGKILL at an arbitrary moment, in a process of its own: no handler can help."""
    code = f"import sys; sys.path.insert(0, {str(os.path.dirname(__file__))!r}); import test_training as t; t.endless({str(tmp_path)!r})"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    for line in child.stdout:
        if int(line) >= 11:
            break
    child.send_signal(signal.SIGKILL)
    child.wait()
    recipe = SMALL.replace(iterations=60)
    resumed = next(train(recipe, device="cpu", folder=tmp_path, resume=True))
    assert resumed.step >= 11
    assert resumed.loss == losses(recipe)[resumed.step - 1]


def endless(folder):
    for record in train(SMALL.replace(iterations=60), device="cpu", folder=folder, save_every=1):
        print(record.step, flush=True)


def test_the_same_seed_gives_the_same_losses_and_another_does_not():
    assert losses(SMALL) == losses(SMALL) != losses(SMALL, seed=1)


def test_training_leaves_the_global_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    losses(SMALL)
    assert torch.equal(torch.rand(3), expected)


def test_edm_training_learns_to_denoise():
    """Seeded and small: after 200 steps the loss is well under that of a network that says nothing."""
    seen = losses(SMALL.replace(iterations=200, batch=128, network=dict(NET, width=128, dropout=0.0), lr=2e-3))
    assert sum(seen[-20:]) < 0.75 * sum(seen[:20])


def test_micro_batches_add_up_to_the_batch():
    """Each part's gradients, taken one by one and averaged, are those that the step takes."""
    recipe = SMALL.replace(micro_batches=4, clip=math.inf)
    run, parts = Run(recipe, load_data("digits"), None, "cpu", 0), []
    for k in range(4):
        run._losses(k, 0, 1)[0].mean().backward()
        parts.append(torch.cat([p.grad.flatten() for p in run.student.parameters()]))
        run.optimizer.zero_grad()
    norm = run.advance(None)[1]
    assert norm == pytest.approx(float(torch.stack(parts).mean(0).norm()), rel=1e-5)
    assert len({float(part.norm()) for part in parts}) == 4, "each part has images and noise of its own"


def test_every_rate_of_averaging_is_kept_and_the_last_is_the_model(tmp_path):
    recipe = SMALL.replace(ema=(0.0, 0.5))
    *_, last = train(recipe, device="cpu", folder=tmp_path)
    run = Run(recipe, load_data("digits"), None, "cpu", 0)
    run.restore(tmp_path)
    newest, slow = (checkpoints.load(tmp_path / name).net for name in ("model-ema-0", "model"))
    assert all(torch.equal(a, b) for a, b in zip(newest.parameters(), run.student.net.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(slow.parameters(), last.model.net.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(slow.parameters(), newest.parameters(), strict=True))


@pytest.fixture
def emulated(monkeypatch):
    """Half precision also where the processor emulates it."""
    monkeypatch.setattr("cmlab.run.multiplies", lambda precision, device: True)


def test_float16_gradients_that_overflow_are_reported_and_left_out(emulated):
    run = Run(SMALL.replace(precision="fp16"), load_data("digits"), None, "cpu", 0)
    before = [p.detach().clone() for p in run.student.parameters()]
    next(run.student.parameters()).register_hook(lambda gradient: gradient * (math.inf if run.step == 0 else 1))
    scale = run.scaler.get_scale()
    run.advance(None)
    assert run.overflows == 1 and run.scaler.get_scale() == scale / 2
    assert all(torch.equal(p, q) for p, q in zip(run.student.parameters(), before, strict=True))
    run.advance(None)
    assert run.overflows == 1 and any(
        not torch.equal(p, q) for p, q in zip(run.student.parameters(), before, strict=True)
    )


def test_float16_training_learns_as_float32_does(emulated):
    wide = SMALL.replace(iterations=40, network=dict(NET, width=64, dropout=0.0))
    full, half = losses(wide), losses(wide.replace(precision="fp16"))
    assert half != full and sum(half[-10:]) == pytest.approx(sum(full[-10:]), rel=0.02)


def test_checkpointing_changes_no_number():
    network = dict(name="unet", image_size=8, in_channels=1, model_channels=32, out_channels=1, num_res_blocks=1)
    network |= dict(attention_resolutions=[2], channel_mult=[1, 1], num_classes=10, dropout=0.3, resblock_updown=True)
    recipe = SMALL.replace(network=network, iterations=3, batch=4)
    assert losses(recipe.replace(checkpointing=True)) == losses(recipe)


def test_a_look_is_taken_as_often_as_asked():
    models = [record.model is not None for record in train(SMALL, device="cpu", look_every=5)]
    assert [k for k, there in enumerate(models, 1) if there] == [5, 10, 12]


def test_resume_auto_begins_and_goes_on(tmp_path):
    uninterrupted = losses(SMALL)
    for step, _ in enumerate(train(SMALL, device="cpu", folder=tmp_path, save_every=5, resume="auto"), 1):
        if step == 7:
            break
    assert losses(SMALL, folder=tmp_path, resume="auto") == uninterrupted[5:]


@pytest.mark.parametrize(
    ("parts", "ranks", "expected"),
    [
        (1, 1, [[(0, 0, 1)]]),
        (4, 2, [[(0, 0, 1), (1, 0, 1)], [(2, 0, 1), (3, 0, 1)]]),
        (2, 4, [[(0, 0, 2)], [(0, 1, 2)], [(1, 0, 2)], [(1, 1, 2)]]),
    ],
)
def test_processes_share_the_parts_out(parts, ranks, expected):
    assert [parts_of(SMALL.replace(micro_batches=parts), rank, ranks) for rank in range(ranks)] == expected


def test_parts_that_cannot_be_shared_out_are_refused():
    with pytest.raises(ValueError, match="batch 32 in 4 micro-batches cannot be shared out over 3 processes"):
        parts_of(SMALL.replace(micro_batches=4), 0, 3)
    with pytest.raises(ValueError, match="at most 504 micro-batches or processes, got 512 and 1"):
        parts_of(SMALL.replace(batch=512, micro_batches=512), 0, 1)


def test_no_two_micro_batches_of_two_steps_share_a_random_stream():
    run = Run(SMALL.replace(batch=504, micro_batches=504), load_data("digits"), None, "cpu", 0)
    last = run._number(1 + 2 * run.parts[-1][0])  # the dropout of the last part
    run.step += 1
    assert last < run._number(0)


def test_the_last_record_carries_the_averaged_model(tmp_path):
    *_, last = train(SMALL, device="cpu", folder=tmp_path)
    assert last.step == last.total == 12 and isinstance(last.model, Denoiser) and not last.model.training
    from cmlab.checkpoints import load

    again, x = load(tmp_path / "model"), torch.zeros(2, 1, 8, 8)
    assert torch.allclose(again(x, 1.0, torch.tensor([0, 1])), last.model(x, 1.0, torch.tensor([0, 1])), atol=1e-6)


def test_consistency_objectives_train_consistency_models():
    *_, last = train(SMALL.replace(objective=OBJECTIVES["ct with both curricula"]), device="cpu")
    x = torch.randn(2, 1, 8, 8)
    assert isinstance(last.model, ConsistencyModel) and torch.equal(last.model(x, 0.002, torch.tensor([0, 1])), x)


def test_gradients_are_clipped_to_the_recipes_norm():
    run, seen = Run(SMALL.replace(clip=1e-3), load_data("digits"), None, "cpu", 0), []

    def look(optimizer, args, kwargs):
        seen.append(torch.cat([p.grad.flatten() for g in optimizer.param_groups for p in g["params"]]).norm())

    run.optimizer.register_step_pre_hook(look)
    norm = run.advance(None)[1]
    assert norm > 1e-3 and float(seen[0]) == pytest.approx(1e-3, rel=1e-2)


def test_a_loss_that_is_not_finite_stops_with_step_sigma_and_checkpoint(tmp_path):
    data = load_data("digits")
    poisoned = dataclasses.replace(data, images=torch.full_like(data.images, float("inf")))
    with pytest.raises(TrainingDiverged, match=r"step 1, sigma \[\d+\.\d+.*state.pt"):
        list(train(SMALL, data=poisoned, device="cpu", folder=tmp_path))


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change():
    run = Run(SMALL, load_data("digits"), None, "cpu", 0)
    weight = next(run.student.parameters())
    weight.register_hook(lambda gradient: gradient * float("nan"))
    before = [p.detach().clone() for p in run.student.parameters()]
    with pytest.raises(TrainingDiverged, match=r"gradient is not finite at step 1; no checkpoint"):
        run.advance(None)
    assert all(torch.equal(p, q) for p, q in zip(run.student.parameters(), before, strict=True))


def test_an_exact_teacher_is_the_denoiser_of_the_training_data():
    run = Run(get_recipe("moons-cd").replace(iterations=1), load_data("moons"), None, "cpu", 0)
    x = run.data.images[:5] + 0.5
    assert torch.equal(run.teacher(x, 0.3), DatasetDenoiser(run.data.images)(x, 0.3))
    conditional = SMALL.replace(objective=OBJECTIVES["cd with a target network"], teacher="exact")
    digits = Run(conditional, load_data("digits"), None, "cpu", 0)
    nearest = digits.teacher(torch.zeros(1, 1, 8, 8), 0.01, torch.tensor([3]))
    threes = digits.data.images[digits.data.labels == 3]
    assert (threes - nearest).flatten(1).abs().amax(1).min() < 1e-5


def test_distillation_without_a_teacher_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="recipe small distils and names no teacher: give one"):
        next(train(SMALL.replace(objective=OBJECTIVES["cd with a target network"]), device="cpu", folder=tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    list(train(SMALL, device="cpu", folder=tmp_path))
    before = (tmp_path / "state.pt").read_bytes()
    with pytest.raises(ValueError, match="holds a run already: go on with it with --resume"):
        next(train(SMALL, device="cpu", folder=tmp_path))
    assert (tmp_path / "state.pt").read_bytes() == before


def test_progressive_distillation_hands_over_to_the_student():
    run = Run(SMALL.replace(objective=OBJECTIVES["pd, which changes teachers"]), load_data("digits"), TEACHER, "cpu", 0)
    while run.recipe.objective.scales(run.step, 6) == run.recipe.objective.scales(0, 6):
        run.advance(None)
    averaged, first = copy.deepcopy(run.ema.module), run.teacher
    run._change_teacher()
    assert run.teacher is not first and not run.optimizer.state
    for model in (run.teacher, run.student):
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), averaged.parameters(), strict=True))
    run.advance(None)  # the average starts again too: of one step it is that step's weights
    assert all(torch.equal(p, q) for p, q in zip(run.ema.module.parameters(), run.student.parameters(), strict=True))


def test_the_teacher_that_was_given_stays_as_it_was():
    teacher = Denoiser(random_net(num_classes=10), sigma_data=0.75).train()
    Run(SMALL.replace(objective=OBJECTIVES["cd with a target network"]), load_data("digits"), teacher, "cpu", 0)
    assert teacher.training and all(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize(
    ("device", "message"),
    [("cpu:3", "device 'cpu:3' was asked for"), ("cuda:99", "'cuda:99' was asked"), ("gpu", "'gpu' cannot be had")],
)
def test_a_device_that_this_process_does_not_have_is_refused(device, message):
    with pytest.raises(ValueError, match=message):
        next(train(SMALL, device=device))


@pytest.mark.parametrize(
    ("seed", "message"), [(-3, "seed must be at least 0"), (2**40, "seed must be at most 4294967295")]
)
def test_seeds_that_do_not_fit_are_refused(seed, message):
    with pytest.raises(ValueError, match=message):
        next(train(SMALL, device="cpu", seed=seed))


def test_bad_resumes_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        next(train(SMALL, device="cpu", folder=tmp_path / "none", resume=True))
    list(train(SMALL, device="cpu", folder=tmp_path))
    with pytest.raises(ValueError, match="belongs to another run: lr .*, not .*; begin a new one"):
        next(train(SMALL.replace(lr=5e-4), device="cpu", folder=tmp_path, resume=True))
    with pytest.raises(ValueError, match="holds a finished run; its model is"):
        next(train(SMALL, device="cpu", folder=tmp_path, resume=True))
    path = tmp_path / "state.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read as a training state.*cut off"):
        next(train(SMALL, device="cpu", folder=tmp_path, resume=True))


def test_a_state_with_code_in_it_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"recipe": Evil()}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="cannot be read as a training state"):
        next(train(SMALL, device="cpu", folder=tmp_path, resume=True))
    assert not (tmp_path / "ran").exists()


def test_an_unwritable_folder_is_found_out_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        next(train(SMALL, device="cpu", folder=tmp_path / "file" / "run"))


def test_the_learning_rate_warms_up_and_ends_at_zero():
    rates = [SMALL.replace(iterations=100, warmup=10, decay=0.5).lr_at(k) for k in range(100)]
    assert rates[0] == pytest.approx(1e-4) and rates[9] == rates[49] == 1e-3 and rates[99] == pytest.approx(2e-5)


def test_recipes_are_named_described_and_checked():
    assert all(recipe.name == name and recipe.cost and recipe.expected for name, recipe in RECIPES.items())
    assert get_recipe("digits-cd").describe()["objective"]["name"] == "ConsistencyDistillation"
    assert EDM(sigmas=LogNormal(0, 1)) != EDM()
    for call, message in [
        (lambda: get_recipe("digit-cd"), "unknown recipe 'digit-cd'. Did you mean 'digits-cd'"),
        (lambda: SMALL.replace(learning_rate=1), "unknown recipe field 'learning_rate'"),
        (lambda: SMALL.replace(iterations=0), "iterations must be at least 1, got 0"),
        (lambda: SMALL.replace(lr=float("nan")), "lr must be a finite number above 0, got nan"),
        (lambda: SMALL.replace(optimizer="adam"), "Known: adamw, radam"),
        (lambda: SMALL.replace(clip=0.0), "clip must be above 0, got 0"),
        (lambda: SMALL.replace(ema=1.5), r"ema must lie in \[0, 1\], got 1.5"),
        (lambda: SMALL.replace(ema=(0.9, 1.5)), r"ema must lie in \[0, 1\], got 1.5"),
        (lambda: SMALL.replace(ema=()), "ema must be one rate or more, got none"),
        (lambda: SMALL.replace(precision="fp8"), "unknown precision 'fp8'. Did you mean 'fp"),
        (lambda: SMALL.replace(micro_batches=5), "micro_batches must divide the batch of 32, got 5"),
        (lambda: SMALL.replace(decay=-0.1), r"decay must lie in \[0, 1\], got -0.1"),
        (lambda: SMALL.replace(warmup=-1), "warmup must be at least 0, got -1"),
        (lambda: SMALL.replace(betas=(0.9, 2.0)), r"betas must lie in \[0, 1\], got 2.0"),
        (lambda: SMALL.replace(seed=-1), "seed must be at least 0, got -1"),
        (lambda: next(train(SMALL, device="meta")), "device 'meta' was asked for, this process runs on"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(
    "has, used", [({"amx_bf16": True}, True), ({"avx512_bf16": True}, True), ({"avx2": True}, False)]
)
def test_bfloat16_is_left_alone_on_a_cpu_that_would_emulate_it(monkeypatch, has, used):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert multiplies("bf16", torch.device("cpu")) == used
    with mock.patch("torch.autocast", wraps=torch.autocast) as autocast:
        next(train(SMALL.replace(precision="bf16")))
    assert {call.kwargs["enabled"] for call in autocast.call_args_list} == {used}


def test_a_run_that_is_told_to_stop_keeps_its_model_and_can_go_on(tmp_path):
    recipe = get_recipe("moons-edm").replace(iterations=8, batch=16)
    asked = iter([False, False, True])
    *_, last = train(recipe, folder=tmp_path / "run", stop=lambda: next(asked))
    assert last.step == 3 and last.total == 8
    kept = checkpoints.load(tmp_path / "run" / "model")
    assert all(torch.equal(a, b) for a, b in zip(kept.parameters(), last.model.parameters(), strict=True))
    *_, end = train(recipe, folder=tmp_path / "run", resume=True)
    *_, whole = train(recipe)
    assert end.step == 8
    assert all(torch.equal(a, b) for a, b in zip(end.model.parameters(), whole.model.parameters(), strict=True))


def test_looks_are_at_least_a_step_apart():
    with pytest.raises(ValueError, match="look_every must be at least 1, got 0"):
        next(train(SMALL, look_every=0))


def test_the_first_ctrl_c_is_a_request_and_the_second_an_order():
    before, asked = signal.signal(signal.SIGINT, signal.default_int_handler), []
    try:
        with pytest.raises(KeyboardInterrupt), on_interrupt(lambda: asked.append(1)):
            signal.raise_signal(signal.SIGINT)
            assert asked == [1]
            signal.raise_signal(signal.SIGINT)
        assert asked == [1] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_teacher_may_be_named(tmp_path):
    recipe = dataclasses.replace(get_recipe("digits-cd-short"), iterations=1, batch=8, teacher=None)
    named, given = (next(train(recipe, teacher=t)).loss for t in ("digits-edm", checkpoints.load("digits-edm")))
    assert named == given
    with pytest.raises(ValueError, match="resume needs folder"):
        next(train(recipe, teacher="digits-edm", resume=True))
