"""The demo's page: tabs, what their controls do to each other, and how it is served."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from inspect import Parameter, signature
from pathlib import Path

import gradio as gr
import torch

from cmlab import drawing, pictures
from cmlab.demo import work
from cmlab.demo.choices import Choice, choices, choose, missing
from cmlab.demo.closed import close
from cmlab.demo.results import Results
from cmlab.demo.uploads import LARGEST_BYTES, canvas, on_canvas, read_canvas

WAITING = 32  # jobs in the queue at most; one is done at a time
# Held by who calls a model: a cancelled job ends its call after gradio has begun the next job.
AT_WORK = threading.Lock()
PAUSE = 0.3  # seconds between two signs of life of a job
READ = 30  # seconds that an error stays in the page
THREADS = 8  # each keeps some MB of its own
FIRST, FIRST_TO_EDIT = "digits-cd", "tinted-digits-cd"
LOCAL = dict(font=["ui-sans-serif", "system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
TITLE = "Consistency models"
INTRO = """# Consistency models
Pictures from noise in one network call. Choose a model and press **Generate**; compare it with its teacher; edit pictures, which it was
never trained for. Everything is computed on this machine."""
CSS = """img { image-rendering: pixelated } .image-container { padding-top: 2rem }
.gradio-container { max-width: 1100px !important; margin: auto !important }"""
HINTS = {
    "inpaint": "Paint over what is to be filled in, in any colour. The rest stays as it is.",
    "colorize": "The picture's brightness is kept, the colours are new. Paint is part of the picture.",
    "super-resolve": "The picture is averaged over blocks of *factor* pixels, and given detail again. Paint is part of the picture.",
    "denoise": "Noise of level *sigma* is put on the picture, and taken off again. Paint is part of the picture.",
    "stroke": "Draw roughly what you want: the model makes a picture of it. A small *sigma* stays close to the drawing.",
    "interpolate": "Pictures on the way between this one and the second. A diffusion model of the same data finds their noises.",
}


def build() -> gr.Blocks:
    """The page. Every job is a function of its inputs: two visitors share nothing but the models."""
    close()
    results = Results(Path(os.environ["GRADIO_TEMP_DIR"]))  # gradio serves what lies there
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 3600)) as demo:
        gr.Markdown(INTRO)
        with gr.Tab("Generate"):
            _generate_tab(demo, results)
        with gr.Tab("Compare"):
            _compare_tab(demo, results)
        with gr.Tab("Edit"):
            _edit_tab(demo, results)
        with gr.Tab("Models"):
            table = gr.Markdown(models_table())
            demo.load(models_table, outputs=table, api_visibility="private")
    return demo.queue(default_concurrency_limit=1, max_size=WAITING)


def launch(demo: gr.Blocks, port: int | None = None, open_page: bool = False) -> None:
    """Serves the page on this machine only, until Ctrl-C or SIGTERM. port: 7860, or the next free one."""
    if threading.current_thread() is threading.main_thread():  # under `gradio app.py` it is not
        # ends as Ctrl-C does: what was uploaded and made is removed
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    demo.launch(
        server_name="127.0.0.1", server_port=port, inbrowser=open_page, share=False, max_threads=THREADS, max_file_size=LARGEST_BYTES,
        theme=gr.themes.Default(**LOCAL), css=CSS, footer_links=["api"], run_history=False,
    )  # fmt: skip


# --- shared by the tabs ---------------------------------------------------------------------------------------------


def told(job: Callable) -> Callable:
    """The generator function job, with errors of the input shown in the page, and a progress bar for the shares that it yields."""
    bar = Parameter("progress", Parameter.POSITIONAL_OR_KEYWORD, default=gr.Progress())

    def run(*values):
        *inputs, progress = values
        try:
            progress(0.0, desc="reading the model")
            shares = job(*inputs)
            last = time.monotonic()
            while True:
                with AT_WORK:
                    share = next(shares)
                if time.monotonic() - last > PAUSE:
                    last = time.monotonic()
                    progress(min(share, 0.99), desc="drawing")
                    yield gr.skip()  # here a cancelled job ends
        except StopIteration as end:
            yield end.value
        except (
            ValueError,
            TypeError,
            OSError,
            RuntimeError,
        ) as error:  # the last one is torch's, out of memory for example
            raise refusal(error) from error

    # gradio reads off it what to call the inputs in the interface for programs, and where the progress goes
    run.__signature__ = signature(job).replace(parameters=[*signature(job).parameters.values(), bar])
    return run


def refusal(error: Exception) -> gr.Error:
    """What the page says of an input that does not do."""
    return gr.Error(str(error).split("\n")[0], duration=READ, print_exception=False)


def job_of(button: gr.Button, cancel: gr.Button, job: Callable, inputs: list, outputs: list, name: str) -> None:
    """A button that starts a job, one at a time for all visitors, and one that cancels it."""
    event = button.click(told(job), inputs, outputs, api_name=name, concurrency_id="model", concurrency_limit=1)
    cancel.click(None, cancels=[event], api_visibility="private")


def shown(label: str, **options) -> gr.Image:
    """A place for a sheet of pictures."""
    # without gradio's button that uploads a picture to its makers' site
    buttons = ["download", "fullscreen"]
    return gr.Image(label=label, type="filepath", format="png", interactive=False, buttons=buttons, **options)


def buttons(label: str) -> tuple[gr.Button, gr.Button]:
    with gr.Row():
        return gr.Button(label, variant="primary", elem_id=label.lower()), gr.Button(
            "Cancel", elem_id=f"cancel-{label.lower()}"
        )


def class_field(choice: Choice, otherwise: str = "all in turn if empty") -> dict:
    """What the field of classes says for a model, as keyword arguments; empty at first."""
    if choice.num_classes is None:
        return dict(value="", placeholder="this model has none", interactive=False)
    return dict(value="", placeholder=f"0 … {choice.num_classes - 1}; {otherwise}", interactive=True)


def chosen(name: str) -> Choice:
    """choose, for what follows a menu: a name that is typed there and unknown is an error in the page."""
    try:
        return choose(name)
    except ValueError as error:
        raise refusal(error) from error


def classes_of(name: str, otherwise: str = "all in turn if empty") -> dict:
    """The field of classes for another model."""
    return gr.update(**class_field(chosen(name), otherwise))


def consistency_models() -> list[str]:
    """The names of those that compare and edit."""
    return [name for name, choice in choices().items() if choice.consistency]


def read_classes(text: str | None) -> tuple[int, ...]:
    """The classes that the field says, "3" or "3 5 7"; none if it is empty. Raises ValueError for anything but numbers."""
    try:
        return tuple(int(word) for word in (text or "").replace(",", " ").split())
    except ValueError:
        raise ValueError(f"class must be a number, or several, such as 3 or 3 5 7, got {text!r}") from None


def models_table() -> str:
    """What is here and what is missing, as Markdown."""
    rows = ["| model | kind | pictures | classes |", "| --- | --- | --- | --- |"]
    for choice in choices().values():
        kind = "consistency" if choice.consistency else "diffusion"
        shape = " × ".join(map(str, choice.shape[1:])) + (", grey" if choice.shape[0] == 1 else "")
        rows.append(f"| {choice.name} | {kind} | {shape} | {choice.num_classes or 'none'} |")
    absent = [f"| {name} | `{command}` |" for name, command in missing()]
    if absent:
        rows += ["", "Released models that are not on this disk, and the command that fetches each:", ""]
        rows += ["| model | command |", "| --- | --- |", *absent]
    return "\n".join(rows)


# --- generate -------------------------------------------------------------------------------------------------------


def _generate_tab(demo: gr.Blocks, results: Results) -> None:
    first = choose(FIRST)
    with gr.Row():
        with gr.Column():
            model = gr.Dropdown(list(choices()), value=FIRST, allow_custom_value=True, label="model", elem_id="model")
            with gr.Row():
                sampler = gr.Dropdown(
                    list(drawing.CONSISTENCY), value="multistep", allow_custom_value=True, label="sampler", elem_id="sampler"
                )  # fmt: skip
                steps = gr.Slider(1, work.MOST_STEPS, value=1, step=1, precision=0, label="steps", elem_id="steps")
            plan = gr.Markdown(describe_plan(FIRST, "multistep", 1, ""), elem_id="plan")
            with gr.Row():
                label = gr.Textbox(**class_field(first), label="class", elem_id="class")
                seed = gr.Number(0, precision=0, minimum=0, maximum=work.LARGEST_SEED, label="seed", elem_id="seed")
            num = gr.Slider(1, work.MOST_PICTURES, value=20, step=1, precision=0, label="pictures", elem_id="num")
            with gr.Accordion("As the released code names them", open=False):
                timesteps = gr.Textbox("", label="timesteps (ts)", info="0,22,39 or 0,106,200 of 201; instead of steps")
                names = ["determ-indiv", "determ", "dummy"]
                info = "a stream for each picture, one for all, or fresh numbers, whatever the seed"
                generator = gr.Dropdown(names, value=names[0], label="generator", info=info)
                dropout = gr.Slider(0, 0.9, value=0, step=0.05, label="dropout", info="the released sampler has none")
            start, cancel = buttons("Generate")
        with gr.Column():
            sheet = shown("pictures", elem_id="sheet")
            said = gr.Textbox(label="cost", interactive=False, elem_id="said")
            files = gr.File(label="download", file_count="multiple", interactive=False, elem_id="files")
    model.change(for_model, model, [sampler, steps, label], api_visibility="private")
    for control in (model, sampler, steps, timesteps):
        control.change(describe_plan, [model, sampler, steps, timesteps], plan, api_visibility="private", queue=False)
    demo.load(lambda: gr.update(choices=list(choices())), outputs=model, api_visibility="private")
    inputs = [model, sampler, steps, label, seed, num, timesteps, generator, dropout]
    job_of(start, cancel, partial(generate, results), inputs, [sheet, said, files], "generate")


def for_model(name: str) -> tuple[dict, dict, dict]:
    """The controls that fit another model: sampler, steps and classes."""
    choice = chosen(name)
    if choice.consistency:
        sampler, steps = gr.update(choices=list(drawing.CONSISTENCY), value="multistep"), gr.update(value=1)
    else:
        sampler, steps = gr.update(choices=list(drawing.DIFFUSION), value="heun"), gr.update(value=18)
    return sampler, steps, gr.update(**class_field(choice))


def describe_plan(name: str, sampler: str, steps: int, timesteps: str) -> str:
    """The noise levels that steps and timesteps mean, as a sentence."""
    try:
        choice = choose(name)
        levels = work.levels_of(choice, timesteps)
        levels = levels or drawing.plan(choice, steps, sampler)[1]
    except ValueError as error:
        return f"⚠ {error}"
    shown = [f"{level:.3g}" for level in levels]
    text = ", ".join(shown if len(shown) <= 8 else [*shown[:4], "…", *shown[-3:]])
    return f"{len(levels)} step{'s' * (len(levels) > 1)}, at noise level{'s' * (len(levels) > 1)} σ = {text}"


def generate(
    results: Results, model: str, sampler: str, steps: int, label: str, seed: int, num: int, timesteps: str, generator: str,
    dropout: float,
) -> Iterator:  # fmt: skip
    """The Generate button: the sheet, the cost, and the files."""
    made = yield from work.generate(
        model, sampler, steps, timesteps, generator, dropout, read_classes(label), seed, num
    )
    files = results.keep(made)
    levels = ", ".join(f"{level:.3g}" for level in made.levels[:8])
    return str(files[0]), f"{made.said}; σ {levels}{' …' * (len(made.levels) > 8)}", [str(file) for file in files]


# --- compare --------------------------------------------------------------------------------------------------------


def _compare_tab(demo: gr.Blocks, results: Results) -> None:
    with gr.Row():
        model = gr.Dropdown(
            consistency_models(),
            value=FIRST,
            allow_custom_value=True,
            label="consistency model",
            elem_id="compare-model",
        )
        label = gr.Textbox(**class_field(choose(FIRST)), label="class", elem_id="compare-class")
        seed = gr.Number(0, precision=0, minimum=0, maximum=work.LARGEST_SEED, label="seed", elem_id="compare-seed")
        num = gr.Slider(1, 16, value=8, step=1, precision=0, label="pictures", elem_id="compare-num")
    start, cancel = buttons("Compare")
    names = ("one call", "two calls", "teacher")
    sheets = [shown(name, height=120) for name in names]
    said = gr.Markdown(elem_id="compared")
    model.change(classes_of, model, label, api_visibility="private")
    demo.load(lambda: gr.update(choices=consistency_models()), outputs=model, api_visibility="private")
    job_of(start, cancel, partial(compare, results), [model, label, seed, num], [*sheets, said], "compare")


def compare(results: Results, model: str, label: str, seed: int, num: int) -> Iterator:
    """The Compare button: three sheets (the last one None where no teacher is here) and a table of their costs."""
    made = yield from work.compare(model, read_classes(label), seed, num)
    sheets = [str(results.keep(one, columns=num)[0]) for one in made.values()]
    rows = [
        "The same noise in every row.",
        "",
        "| from the same noise | network calls a picture | seconds |",
        "| --- | --- | --- |",
    ]
    rows += [f"| {what} | {one.calls} | {one.seconds:.2f} |" for what, one in made.items()]
    if len(sheets) < 3:
        rows.append("\nNo diffusion model of the same data is on this disk.")
    return *sheets, *[None] * (3 - len(sheets)), "\n".join(rows)


# --- edit -----------------------------------------------------------------------------------------------------------


def _edit_tab(demo: gr.Blocks, results: Results) -> None:
    first = choose(FIRST_TO_EDIT)
    with gr.Row():
        with gr.Column():
            model = gr.Dropdown(
                consistency_models(),
                value=FIRST_TO_EDIT,
                allow_custom_value=True,
                label="consistency model",
                elem_id="edit-model",
            )
            task = gr.Dropdown(pictures.TASKS, value="inpaint", label="task", elem_id="task")
            hint = gr.Markdown(HINTS["inpaint"], elem_id="hint")
            picture = canvas(on_canvas(held_out(first, 3)[0]), label="picture", elem_id="canvas")
            with gr.Row():
                number = gr.Number(3, precision=0, minimum=0, label="held-out picture", elem_id="held-out")
                take, blank = gr.Button("Take it", elem_id="take"), gr.Button("Empty canvas", elem_id="blank")
            with gr.Column(visible=False) as beside:  # a canvas that is updated would forget how it reads pictures
                second = canvas(on_canvas(held_out(first, 4)[0]), label="second picture", elem_id="second")
        with gr.Column():
            label = gr.Textbox(**class_field(first, "needed"), label="class of the picture", elem_id="edit-class")
            with gr.Row():
                steps = gr.Slider(
                    1, work.MOST_STEPS, value=10, step=1, precision=0, label="steps", elem_id="edit-steps"
                )
                num = gr.Slider(1, 16, value=6, step=1, precision=0, label="results", elem_id="edit-num")
            with gr.Row():
                factor = gr.Slider(2, 16, value=4, step=1, precision=0, label="factor", info="super-resolve")
                sigma = gr.Slider(0.05, 20, value=1, step=0.05, label="sigma", info="denoise, stroke")
            seed = gr.Number(0, precision=0, minimum=0, maximum=work.LARGEST_SEED, label="seed")
            start, cancel = buttons("Edit")
            sheet = shown("picture, what is known, results", elem_id="edited")
            said = gr.Textbox(label="cost", interactive=False, elem_id="edit-said")
            files = gr.File(label="download", file_count="multiple", interactive=False)
    model.change(partial(classes_of, otherwise="needed"), model, label, api_visibility="private")
    task.change(
        lambda name: (HINTS[name], gr.update(visible=name == "interpolate")),
        task,
        [hint, beside],
        api_visibility="private",
    )
    take.click(take_held_out, [model, number], [picture, label], api_visibility="private")
    blank.click(lambda: on_canvas(None), None, picture, api_visibility="private")
    inputs = [model, task, picture, second, label, steps, num, factor, sigma, seed]
    demo.load(lambda: gr.update(choices=consistency_models()), outputs=model, api_visibility="private")
    job_of(start, cancel, partial(edit, results), inputs, [sheet, said, files], "edit")


def held_out(choice: Choice, number: int) -> tuple[torch.Tensor, int]:
    """A picture that the model has not seen, and its class. Raises ValueError where nothing was held back, or not so many."""
    if choice.data is None:
        raise ValueError(f"nothing is known of the data of {choice.name}: upload a picture")
    return pictures.read_picture(choice, f"held-out:{number}")


def take_held_out(model: str, number: int) -> tuple[dict, dict]:
    """The Take it button: a held-out picture on the canvas, and its class where the model wants one."""
    try:
        choice = choose(model)
        picture, label = held_out(choice, number)
    except (ValueError, TypeError, OSError) as error:
        raise refusal(error) from error
    return on_canvas(picture), gr.update() if choice.num_classes is None else gr.update(value=str(label))


def edit(
    results: Results, model: str, task: str, picture: dict, second: dict, label: str, steps: int, num: int, factor: int,
    sigma: float, seed: int,
) -> Iterator:  # fmt: skip
    """The Edit button: the row of pictures, the cost, and the files."""
    shape = choose(model).shape
    image, mask = read_canvas(picture, shape, painted_is_mask=task == "inpaint")
    if task == "interpolate":
        image = torch.cat([image, read_canvas(second, shape, painted_is_mask=False)[0]])
    made = yield from work.edit(model, task, image, mask, read_classes(label), factor, sigma, steps, num, seed)
    files = results.keep(made, columns=4)
    return str(files[0]), made.said, [str(file) for file in files]
