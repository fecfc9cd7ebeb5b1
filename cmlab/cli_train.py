"""The commands that make models: `cmlab train`, and `cmlab data`, which prepares what they learn from."""

from __future__ import annotations

import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal

import tyro


def data(
    action: Annotated[Literal["prepare"], tyro.conf.arg(metavar="prepare")],
    source: Annotated[str, tyro.conf.arg(metavar="SOURCE")],
    /,
    size: int | None = None,
    output: Path | None = None,
    colour: Literal["rgb", "grey"] = "rgb",
    flip: bool = False,
    split: str = "train",
    workers: int | None = None,
) -> int:
    """Prepare pictures to train on. Example: cmlab data prepare my-pictures --size 64 --flip

    Crops every picture to its middle square, resizes it, and writes one memory-mapped data set; a picture that cannot be
    read is skipped and listed. Stopped, it goes on where it was when called again.

    Args:
        action: prepare.
        source: imagenet64, bedroom256 or cat256, which are fetched too; or a folder of pictures (subfolders are classes), of an LMDB
            as LSUN has it, or that datasets saved; an uncompressed .tar, also of tars; or the id of a data set of the Hugging Face hub,
            such as ylecun/mnist.
        size: Height and width in pixels.
        output: The folder to write, instead of datasets/<source><size>.
        colour: rgb or grey.
        flip: Pictures may be mirrored in training: photographs, not text.
        split: Of a hub data set.
        workers: Processes; every core without it.
    """
    from cmlab.checks import alone
    from cmlab.prepare import prepare
    from cmlab.prepared import Prepared, data_folder
    from cmlab.raw import RAW, fetch_and_prepare

    if source in RAW:
        alone(source, size=size, output=output, flip=flip, colour=colour == "grey", split=split != "train")
        prepared = fetch_and_prepare(source, workers)
    elif size is None:
        raise ValueError("give the --size of the pictures in pixels")
    else:
        folder = output or data_folder() / f"{Path(source).stem}{size}"
        prepared = [Prepared(prepare(source, folder, size, colour, flip, split, workers))]
    for found in prepared:
        skipped = found.facts["skipped"]
        print(f"{found.count} pictures of {found.num_classes or 'no'} classes, {len(skipped)} skipped: {found.folder}")
        for name, reason in skipped[:10]:
            print(f"skipped {name}: {reason}")
    return 0


def train(
    recipe: Annotated[str, tyro.conf.arg(metavar="RECIPE")],
    /,
    data: str | None = None,
    teacher: str | None = None,
    iterations: int | None = None,
    batch: int | None = None,
    lr: float | None = None,
    sigma_data: float | None = None,
    micro_batches: int | None = None,
    precision: Literal["fp32", "bf16", "fp16"] | None = None,
    checkpointing: bool = False,
    seed: int | None = None,
    output: Path | None = None,
    resume: str | None = None,
    device: str | None = None,
    parallel: Literal["ddp", "fsdp"] = "ddp",
    save_every: int = 100,
    look_every: int | None = None,
    metrics: int = 0,
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard",
    dry_run: bool = False,
    smoke: bool = False,
) -> int:
    """Train a model by a recipe. Example: cmlab train digits-edm --output runs/my-edm

    Saves the state as it goes and the model at the end, as <output>/model. Ctrl-C saves both and says how to go on.
    On several GPUs, where Ctrl-C keeps the last saved state:
    torchrun --nproc_per_node 8 -m cmlab.cli -- train cd-imagenet64-l2 --output runs/cd --resume auto

    Args:
        recipe: The name of a recipe (cmlab recipes lists them), or digits-classifier, tinted-digits-classifier.
        data: A folder that cmlab data prepare wrote, or the name of a data set, instead of the recipe's; the network takes its size
            and classes.
        teacher: A saved denoiser to distil and to start from, instead of the recipe's.
        iterations: Training steps, instead of the recipe's.
        batch: Images a step, over all processes, instead of the recipe's.
        lr: The learning rate, instead of the recipe's.
        sigma_data: Standard deviation of the pixels, which scalings and loss weights assume, instead of the data set's: 0.5 for prepared
            ones.
        micro_batches: In how many parts a batch is computed: more need less memory.
        precision: Of the networks' arithmetic, instead of the recipe's.
        checkpointing: Compute activations twice to keep fewer in memory.
        seed: Of the initial weights and every draw, instead of the recipe's.
        output: The folder to write to, instead of runs/train-<recipe>-<time>.
        resume: The folder of a stopped run, to go on where it stopped; or auto: go on in --output if something is there, else begin.
            Give the same options.
        device: cpu or cuda; the best there is without it.
        parallel: What several processes do with the weights: ddp, a whole copy on each; fsdp, a share on each, for networks that fill
            the memory. A run may go on under the other.
        save_every: Steps between two saved states.
        look_every: Steps between two sheets of samples, in <output>/samples.
        metrics: Measure so many samples at every look.
        tracker: Where losses go.
        dry_run: Only tell what it would be (config, parameters, memory on each device, cost) and what is missing for it.
        smoke: Train 3 steps of a shrunken copy on synthetic pictures, by the same path.
    """
    from cmlab.checks import alone
    from cmlab.data import load_data
    from cmlab.recipes import fitted, get_recipe

    changes = dict(
        iterations=iterations, batch=batch, lr=lr, sigma_data=sigma_data, micro_batches=micro_batches, precision=precision,
        checkpointing=checkpointing or None,
    )  # fmt: skip
    if recipe in ("digits-classifier", "tinted-digits-classifier"):
        others = dict(
            data=data, teacher=teacher, seed=seed, resume=resume, device=device, look_every=look_every, metrics=metrics
        )
        alone(recipe, **changes, **others, parallel=parallel == "fsdp", dry_run=dry_run, smoke=smoke)
        return _train_classifier(recipe, output)
    plan = get_recipe(recipe)
    if data is not None or teacher is not None:
        plan = fitted(plan, load_data(data or plan.data), teacher)
    plan = plan.replace(**{name: value for name, value in changes.items() if value is not None})
    if dry_run:
        return _print_plan(plan, parallel)
    options = dict(
        seed=seed, device=device, parallel=parallel, save_every=save_every, look_every=look_every, tracker=tracker,
        metrics_samples=metrics,
    )  # fmt: skip
    if smoke:
        return _smoke(plan, options)
    return _train(recipe, plan, output, resume, options)


def _print_plan(plan, parallel: str) -> int:
    from cmlab.jobs import is_main, ranks
    from cmlab.planning import report

    for line in report(plan, ranks(), parallel):
        if is_main():
            print(line)
    return 0


def _smoke(plan, options: dict) -> int:
    import tempfile

    from cmlab import jobs, planning

    with tempfile.TemporaryDirectory(prefix="cmlab-smoke-") as folder:
        jobs.run(
            planning.smoke(plan, Path(folder)), Path(folder) / "run", False, **options | {"look_every": 3, "sheet": 2}
        )
    if jobs.is_main():
        print(f"{plan.name}: 3 steps of a shrunken copy ran")
    return 0


def _train(recipe: str, plan, output: Path | None, resume: str | None, options: dict) -> int:
    from cmlab import jobs
    from cmlab.batch import Interrupted
    from cmlab.scaling import ONE_CALL

    folder = jobs.folder_of(recipe, output, resume)
    try:
        model = jobs.run(plan, folder, "auto" if resume == "auto" else resume is not None, **options)
    except Interrupted as stop:
        raise Interrupted(f"{stop}\ngo on with: cmlab {shlex.join(_resumed(sys.argv[1:], folder))}") from None
    finally:
        with suppress(OSError):
            folder.rmdir()  # if nothing came of it
    if jobs.is_main():
        how = f"cmlab sample {model}"
        if len(plan.network.get("shape", (3, 1, 1))) == 1:  # points, not pictures
            sampler = "sample_onestep" if plan.objective.kind.kind in ONE_CALL else "sample_heun"
            how = f"cmlab.{sampler}(cmlab.load({str(model)!r}), …) in Python"
        print(f"model: {model.resolve()}\nsample from it with: {how}")
    return 0


def _resumed(arguments: list[str], folder: Path) -> list[str]:
    """The command line that goes on in a folder: the given one, with --resume in the place of where it wrote."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument.split("=")[0] not in ("--output", "--resume"):
            kept.append(argument)
        skip = argument in ("--output", "--resume")
    return [*kept, "--resume", str(folder)]


def _train_classifier(name: str, output: Path | None) -> int:
    """The eyes of the metrics: under a minute, so there is nothing to resume."""
    from cmlab.batch import free_name, usable_folder
    from cmlab.checkpoints import save
    from cmlab.data import load_data
    from cmlab.models.classifier import accuracy, train_classifier

    folder = usable_folder(output or free_name(Path("runs"), f"train-{name}")) / "model"
    data = name.removesuffix("-classifier")
    model = train_classifier(data)
    share = accuracy(model, load_data(data))
    save(model, folder, data=data, accuracy=round(share, 4))
    print(f"accuracy on held-out digits: {share:.4f}\nmodel: {folder.resolve()}")
    return 0
