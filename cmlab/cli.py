"""The `cmlab` command. Each subcommand reads its arguments, calls the rooms and says where the results are."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

Model = Annotated[str, tyro.conf.arg(metavar="MODEL")]
Sweep = Annotated[Path, tyro.conf.arg(metavar="SWEEP.yaml")]

HELP = """Consistency models: the notebook series, training, sampling, editing, evaluation.

Every command explains its options: cmlab tour --help. CMLAB_DEBUG=1 shows where an error comes from."""


def tour(
    fast: bool = False,
    only: tuple[str, ...] = (),
    output: Path | None = None,
    resume: Path | None = None,
    open: bool = False,
    lab: bool = False,
) -> int:
    """Run the whole series on the embedded data. Example: cmlab tour --only 02 04

    Writes executed notebooks, figures, results.json and index.html into runs/tour-<time>. A lesson that fails does
    not stop the others; the page shows its error, and the exit code is 1.

    Args:
        fast: The small size that the tests run, for a first look: minutes instead of a quarter of an hour.
        only: Lessons by number or name; all without it.
        output: The folder to write to, instead of runs/tour-<time>.
        resume: The folder of a stopped run: go on with what is not done.
        open: Open the page in the browser at the end.
        lab: Start JupyterLab at 00_start_here instead.
    """
    from cmlab import tour as rooms
    from cmlab.checks import alone

    if lab:
        alone("--lab", fast=fast, only=only, output=output, resume=resume, open=open)
        return _jupyter_lab(rooms.lessons_folder())
    run = rooms.run_tour(only, fast, output, resume)
    return _finish(run, open)


def _jupyter_lab(folder: Path) -> int:
    import subprocess

    start = next(iter(sorted(folder.glob("00_*.ipynb"))), folder)
    command = [sys.executable, "-m", "jupyter", "lab", "--ip=127.0.0.1", f"--ServerApp.root_dir={folder}", str(start)]
    return subprocess.call([*command, "--allow-root"])  # rented machines have no other user


def _finish(run, open_page: bool = False) -> int:
    """Says where a run is; exit code 1 if something failed."""
    page = (run.folder / "index.html").resolve()
    for job in run.failed:
        print(f"{job.name} failed, {job.error['cell']}: {job.error['message']}", file=sys.stderr)
    print(f"results: {page}")
    if open_page:
        import webbrowser

        webbrowser.open(page.as_uri())
    return 1 if run.failed else 0


def doctor() -> int:
    """Tell what this machine has, what is missing and what to do about it. Example: cmlab doctor"""
    from cmlab.doctor import examine

    return examine()


def recipes() -> int:
    """List the training recipes with their cost and expected result. Example: cmlab recipes"""
    from cmlab.recipes import RECIPES

    rows = [("recipe", "data", "objective", "steps", "batch", "cost", "expected")]
    for r in RECIPES.values():
        rows.append((r.name, r.data, type(r.objective).__name__, str(r.iterations), str(r.batch), r.cost, r.expected))
    _print_table(rows)
    return 0


def _print_table(rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def train(
    recipe: Annotated[str, tyro.conf.arg(metavar="RECIPE")],
    /,
    iterations: int | None = None,
    micro_batches: int | None = None,
    precision: Literal["fp32", "bf16", "fp16"] | None = None,
    checkpointing: bool = False,
    seed: int | None = None,
    output: Path | None = None,
    resume: str | None = None,
    device: str | None = None,
    save_every: int = 100,
    look_every: int | None = None,
    metrics: int = 0,
    tracker: Literal["tensorboard", "wandb", "none"] = "tensorboard",
    dry_run: bool = False,
    smoke: bool = False,
) -> int:
    """Train a model by a recipe. Example: cmlab train digits-edm --output runs/my-edm

    Saves the state as it goes and the model at the end, as <output>/model. Ctrl-C keeps the last saved state. On several GPUs:
    torchrun --nproc_per_node 8 -m cmlab.cli -- train cd-imagenet64-l2 --output runs/cd --resume auto

    Args:
        recipe: The name of a recipe (cmlab recipes lists them), or digits-classifier, tinted-digits-classifier.
        iterations: Training steps, instead of the recipe's.
        micro_batches: In how many parts a batch is computed: more need less memory.
        precision: Of the networks' arithmetic, instead of the recipe's.
        checkpointing: Compute activations twice to keep fewer in memory.
        seed: Of the initial weights and every draw, instead of the recipe's.
        output: The folder to write to, instead of runs/train-<recipe>-<time>.
        resume: The folder of a stopped run, to go on where it stopped; or auto: go on in --output if something is there, else begin.
            Give the same options.
        device: cpu or cuda; the best there is without it.
        save_every: Steps between two saved states.
        look_every: Steps between two sheets of samples, in <output>/samples.
        metrics: Measure so many samples at every look.
        tracker: Where losses go.
        dry_run: Only tell what it would be: config, parameters, memory on each device, cost.
        smoke: Train 3 steps of a shrunken copy on synthetic pictures, by the same path.
    """
    from cmlab.checks import alone
    from cmlab.recipes import get_recipe

    if recipe in ("digits-classifier", "tinted-digits-classifier"):
        alone(recipe, iterations=iterations, seed=seed, resume=resume, device=device)
        return _train_classifier(recipe, output)
    given = dict(
        iterations=iterations, micro_batches=micro_batches, precision=precision, checkpointing=checkpointing or None
    )
    plan = get_recipe(recipe).replace(**{name: value for name, value in given.items() if value is not None})
    if dry_run:
        return _print_plan(plan)
    options = dict(
        seed=seed, device=device, save_every=save_every, look_every=look_every, tracker=tracker, metrics_samples=metrics
    )
    if smoke:
        return _smoke(plan, options)
    return _train(recipe, plan, output, resume, options)


def _print_plan(plan) -> int:
    from cmlab.jobs import ranks
    from cmlab.planning import report

    for line in report(plan, ranks()):
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

    folder = jobs.folder_of(recipe, output, resume)
    try:
        model = jobs.run(plan, folder, "auto" if resume == "auto" else resume is not None, **options)
    except Interrupted as stop:
        raise Interrupted(f"{stop}\ngo on with: cmlab {' '.join(_resumed(sys.argv[1:], folder))}") from None
    if jobs.is_main():
        print(f"model: {model.resolve()}\nsample from it with: cmlab sample {model}")
    return 0


def _resumed(arguments: list[str], folder: Path) -> list[str]:
    """The command line that goes on in a folder: the given one, with --resume in the place of where it wrote."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument not in ("--output", "--resume"):
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


def fetch(names: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = (), /) -> int:
    """Fetch released checkpoints. Example: cmlab fetch cd_imagenet64_lpips

    Without a name: lists the twelve and tells which are here. A download that was cut goes on where it stopped.

    Args:
        names: Names of released checkpoints, or all.
    """
    from cmlab import released

    if not names:
        return _list_released()
    wanted = list(released.RELEASED) if names == ("all",) else [released.get_released(name).name for name in names]
    for name in wanted:
        print(f"{name}: {released.fetch(name)}   (licence: {released.LICENCE})")
    return 0


def _list_released() -> int:
    from cmlab.released import RELEASED

    rows = [("checkpoint", "model", "here", "published FID by network calls", "two-step ts")]
    for one in RELEASED.values():
        fid = ", ".join(f"{value} in {calls}" for calls, value in one.fid.items())
        ts = f"{','.join(map(str, one.ts))} of {one.steps}" if one.ts else ""
        rows.append((one.name, one.kind, "yes" if one.path.is_file() else "no", fid, ts))
    _print_table(rows)
    return 0


def export(
    model: Model, folder: Annotated[Path, tyro.conf.arg(metavar="FOLDER")], /, to: Literal["diffusers"] = "diffusers"
) -> int:
    """Write a consistency model in another form. Example: cmlab export cd_imagenet64_l2 my-pipeline --to diffusers

    diffusers: a folder that ConsistencyModelPipeline.from_pretrained reads.

    Args:
        model: A consistency model over a U-Net of the released kind: a released name, a .pt file or a folder.
        folder: The folder to write.
        to: The form.
    """
    from cmlab import checkpoints

    print(f"{to}: {checkpoints.export(checkpoints.load(model), folder)}")
    return 0


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

    Crops every picture to its middle square, resizes it, and writes one memory-mapped data set; what is no picture is skipped
    and listed. Stopped, it goes on where it was when called again.

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
        alone(source, size=size, output=output, flip=flip)
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


def sample(
    model: Model,
    /,
    num: int = 100,
    steps: int | None = None,
    sampler: str | None = None,
    seed: int = 0,
    labels: tuple[int, ...] = (),
    output: Path | None = None,
    device: str | None = None,
    batch: int | None = None,
) -> int:
    """Draw pictures from a model. Example: cmlab sample digits-cd --num 50 --steps 2

    Writes an .npz (arr_0: uint8 pixels, N x H x W x C; arr_1: labels) and a .png sheet beside it. A seed gives each picture its own
    noise: the first ten of 100 are the same as 10. Stopped, it goes on where it was. On several GPUs, which share the pictures out:
    torchrun --nproc_per_node 8 -m cmlab.cli -- sample cd_imagenet64_lpips --num 50000 --output runs/samples.npz

    Args:
        model: The name of an embedded or released model, or the path of a saved one.
        num: How many pictures.
        steps: Network calls of a consistency model (1), steps of a diffusion sampler (18). Two calls of a released model are made
            at the levels that were published for it.
        sampler: onestep, multistep for consistency models; heun, euler, dpm, ancestral for diffusion models.
        seed: Of the noise.
        labels: Classes to draw, in turn; all of them without it.
        output: The .npz to write, instead of runs/samples-<model>.npz.
        device: cpu or cuda; cpu without it.
        batch: Pictures a network call, instead of what fits into some hundred MB.
    """
    import torch

    from cmlab import drawing, jobs, pictures

    rank, ranks = int(os.environ.get("RANK", "0")), jobs.ranks()
    if device == "cuda" and ranks > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    loaded = pictures.load_model(model, device)
    target = pictures.target(output or Path("runs") / f"samples-{Path(model).name}.npz", ".npz")
    drawing.draw_to(target, drawing.Drawing(loaded, num, steps, sampler, seed, labels, batch), model, rank, ranks)
    if rank == 0:
        sheet = target.with_suffix(".png")
        pictures.save_sheet(sheet, torch.stack(list(drawing.first_of(target, 100))))
        print(f"samples: {target.resolve()}\nsheet:   {sheet.resolve()}")
    return 0


def edit(
    model: Model,
    task: Annotated[str, tyro.conf.arg(metavar="TASK")],
    images: Annotated[tuple[str, ...], tyro.conf.arg(metavar="IMAGE [IMAGE]")],
    /,
    mask: str = "lower",
    factor: int = 4,
    sigma: float = 1.0,
    label: int | None = None,
    steps: int = 10,
    num: int = 8,
    seed: int = 0,
    denoiser: str | None = None,
    output: Path | None = None,
) -> int:
    """Edit a picture without training for it. Example: cmlab edit tinted-digits-cd inpaint held-out:7 --mask lower

    Writes a .png: the picture, what the task knows of it, and num results.

    Args:
        model: A consistency model: an embedded name or a folder.
        task: inpaint, colorize, super-resolve, denoise, stroke, or interpolate (between two pictures).
        images: A picture file (two to interpolate), or held-out:N for a picture of the model's data set.
        mask: What inpaint fills in: lower, upper, left, right, center, or a picture file whose black part is filled in.
        factor: Of super-resolve: the picture is averaged over blocks of factor x factor pixels.
        sigma: Noise level of denoise (put on the picture) and stroke (small: close to it).
        label: The class, for class-conditional models; a held-out picture brings its own.
        steps: Network calls.
        num: How many results, or pictures on the way of interpolate.
        seed: Of the noise.
        denoiser: For interpolate: the diffusion model that finds the pictures' noises.
        output: The .png to write, instead of runs/edit-<task>.png.
    """
    from cmlab import pictures

    loaded = pictures.load_model(model)
    target = pictures.target(output or Path("runs") / f"edit-{task}.png", ".png")
    options = dict(
        mask=mask, factor=factor, sigma=sigma, label=label, steps=steps, num=num, seed=seed, denoiser=denoiser
    )
    pictures.save_sheet(target, pictures.edit_picture(loaded, task, images, **options), columns=num + 2)
    print(f"result: {target.resolve()}")
    return 0


def evaluate(
    samples: Annotated[Path, tyro.conf.arg(metavar="SAMPLES")],
    reference: Annotated[str, tyro.conf.arg(metavar="REFERENCE")],
    /,
    extractor: str | None = None,
    device: str | None = None,
) -> int:
    """Measure samples against real pictures. Example: cmlab evaluate runs/samples-digits-cd.npz digits:held-out

    Prints Fréchet distance, inception score, KID, precision, recall, and label accuracy where the samples have labels.

    Args:
        samples: An .npz as cmlab sample writes it (arr_0: uint8, N x H x W x C).
        reference: Another .npz, or a data set: digits, digits:held-out, tinted-digits, tinted-digits:held-out.
        extractor: digits-classifier, tinted-digits-classifier or inception; the one that fits the size without it.
        device: cpu or cuda; cpu without it.
    """
    from cmlab import metrics, pictures

    images, labels = pictures.read_samples(samples)
    real = pictures.read_reference(reference)
    fitting = {(1, 8, 8): "digits-classifier", (3, 16, 16): "tinted-digits-classifier"}
    extractor = extractor or fitting.get(tuple(images.shape[1:]), "inception")
    numbers = metrics.evaluate(
        images.split(1000), real.split(1000), extractor, None if extractor == "inception" else labels, device=device
    )
    print(f"extractor {extractor}")
    _print_table(
        [(name, f"{value:.4f}" if isinstance(value, float) else str(value)) for name, value in numbers.items()]
    )
    return 0


def batch(sweep: Sweep, /, output: Path | None = None, resume: Path | None = None, open: bool = False) -> int:
    """Run notebooks over a grid of parameters. Example: cmlab batch sweep.yaml

    The file: notebook: notebooks/02_….ipynb, parameters: {fast: true}, grid: {seed: [0, 1, 2]}, timeout: 600. Writes
    results.json, results.csv and index.html into runs/sweep-<time>.

    Args:
        sweep: The YAML file.
        output: The folder to write to, instead of runs/sweep-<time>.
        resume: The folder of a stopped sweep: go on with what is not done.
        open: Open the page in the browser at the end.
    """
    from cmlab.tour import run_sweep

    return _finish(run_sweep(sweep, output, resume), open)


def refresh(lessons: Annotated[tuple[str, ...], tyro.conf.arg(metavar="LESSON ...")] = (), /, all: bool = False) -> int:
    """Run lessons at full size and keep the outputs in the notebooks. Example: cmlab refresh 02

    For who edits a lesson: a notebook is replaced only if every cell succeeds and the result may be committed.

    Args:
        lessons: By number or name, or notebook files.
        all: Every numbered lesson.
    """
    from tqdm.auto import tqdm

    from cmlab.batch import read
    from cmlab.committed import refresh as refresh_one
    from cmlab.tour import find_lessons

    if bool(lessons) == all:
        raise ValueError("name lessons (cmlab refresh 02) or give --all")
    paths = [Path(name) for name in lessons if name.endswith(".ipynb")]
    paths += (
        find_lessons([name for name in lessons if not name.endswith(".ipynb")])
        if all or len(paths) < len(lessons)
        else []
    )
    for path in paths:
        with tqdm(total=len(read(path).cells), desc=path.stem, unit="cell") as bar:
            refresh_one(path, on_cell=lambda done, bar=bar: bar.update(done - bar.n))
        print(f"refreshed: {path}")
    return 0


COMMANDS = {
    "tour": tour, "doctor": doctor, "recipes": recipes, "train": train, "sample": sample, "edit": edit,
    "evaluate": evaluate, "batch": batch, "refresh": refresh, "fetch": fetch, "export": export,
    "data": data,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 after an error, 130 after Ctrl-C (2, of tyro, for misuse)."""
    try:
        return tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="cmlab", description=HELP, args=arguments, config=(tyro.conf.FlagCreatePairsOff,)
        )
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if os.environ.get("CMLAB_DEBUG"):
            raise
        print(f"cmlab: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
