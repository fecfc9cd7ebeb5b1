"""The `cmlab` command. Each subcommand reads its arguments, calls the rooms and says where the results are."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cmlab.cli_train import data, train

Model = Annotated[str, tyro.conf.arg(metavar="MODEL")]
Sweep = Annotated[Path, tyro.conf.arg(metavar="SWEEP.yaml")]

HELP = """Consistency models: the notebook series, training, sampling, editing, evaluation.

Every command explains its options: cmlab tour --help. CMLAB_DEBUG=1 shows where an error comes from."""


FEW = 1000  # pictures: below, a Fréchet distance says more about their number than about their quality


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
        output: The .npz to write, instead of runs/samples-<model>.npz, or -2, -3, … where there is one.
        device: cpu or cuda; cpu without it.
        batch: Pictures a network call, instead of what fits into some hundred MB.
    """
    import torch

    from cmlab import drawing, jobs, pictures

    rank, ranks = int(os.environ.get("RANK", "0")), jobs.ranks()
    if device == "cuda" and ranks > 1:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    loaded = pictures.load_model(model, device)
    path = Path(model)
    name = path.resolve().parent.name if path.name == "model" else path.name  # a training's model is <its folder>/model
    target = pictures.target(output or pictures.free_file(f"samples-{name}", ".npz"), ".npz")
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
        output: The .png to write, instead of runs/edit-<task>.png, or -2, -3, … where there is one.
    """
    from cmlab import pictures

    loaded = pictures.load_model(model)
    target = pictures.target(output or pictures.free_file(f"edit-{task}", ".png"), ".png")
    if any(Path(name).exists() and target.resolve() == Path(name).resolve() for name in images):
        raise ValueError(f"output must not be the picture itself, got {target}")
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
        reference: Another .npz, or a data set: digits, digits:held-out, tinted-digits, tinted-digits:held-out, a prepared one. An .npz
            may hold the moments of a whole data set (mu, sigma), as ADM's reference batches do: the Fréchet distance is to these.
        extractor: digits-classifier, tinted-digits-classifier or inception; the one that fits the size without it.
        device: cpu or cuda; cpu without it.
    """
    from cmlab import metrics, pictures

    pixels, labels = pictures.read_samples(samples)
    real, moments = pictures.read_reference(reference)
    fitting = {(1, 8, 8): "digits-classifier", (3, 16, 16): "tinted-digits-classifier"}
    extractor = extractor or fitting.get(tuple(pixels.shape[1:]), "inception")
    classes = None if extractor == "inception" else labels
    numbers = metrics.evaluate(pictures.batches(pixels), real, extractor, classes, device=device, moments=moments)
    print(f"extractor {extractor}")
    if min(numbers["samples"], numbers["reference"]) < FEW:
        print(
            f"note: fewer than {FEW} pictures on a side; compare such numbers only with those of as many",
            file=sys.stderr,
        )
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


def app(port: int | None = None, open: bool = False) -> int:
    """Serve the demo to this machine's browser: generate, compare, edit. Example: cmlab app --open

    It offers the embedded models, the released ones that have been fetched, and those in runs/. Ctrl-C ends it.

    Args:
        port: Of 127.0.0.1; the first free one from 7860 without it.
        open: Open the page in the browser.
    """
    from cmlab import demo

    demo.launch(demo.build(), port, open)
    return 0


def site(output: Path = Path("site"), open: bool = False) -> int:
    """Build the series as a static site: lessons as they were run, solutions, the package's reference. Example: cmlab site --open

    Nothing is run, fetched or asked outside; the pages are read from the disk or from any web server.

    Args:
        output: The folder to build, which is replaced.
        open: Open the page in the browser at the end.
    """
    from cmlab.site import build

    page = build(output).resolve()
    print(f"site: {page}")
    if open:
        import webbrowser

        webbrowser.open(page.as_uri())
    return 0


COMMANDS = {
    "tour": tour, "doctor": doctor, "recipes": recipes, "train": train, "sample": sample, "edit": edit,
    "evaluate": evaluate, "batch": batch, "refresh": refresh, "fetch": fetch, "export": export, "app": app, "site": site,
    "data": data,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 1 after an error, 130 after Ctrl-C (2, of tyro, for misuse)."""
    try:
        code = tyro.extras.subcommand_cli_from_dict(
            COMMANDS, prog="cmlab", description=HELP, args=arguments, config=(tyro.conf.FlagCreatePairsOff,)
        )
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who reads our output has seen enough, as `cmlab recipes | head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("cmlab: who read the output has gone", file=sys.stderr)
        return 1
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if os.environ.get("CMLAB_DEBUG"):
            raise
        print(f"cmlab: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
