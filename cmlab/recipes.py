"""Named experiments: data + network + objective + training constants, each with its cost and what to expect of it."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from cmlab.checks import known, positive, whole, within
from cmlab.continuous import ContinuousDistillation, ContinuousTraining, MeanFlowTraining
from cmlab.distances import LPIPS, PseudoHuber, l2
from cmlab.noise import LogNormal
from cmlab.objectives import (
    EDM,
    ConsistencyDistillation,
    ConsistencyTraining,
    EasyConsistencyTuning,
    ImprovedConsistencyTraining,
    Objective,
    ProgressiveDistillation,
)
from cmlab.released import RELEASED


@dataclass(frozen=True)
class Recipe:
    """All that a training run is made of. batch is the global one, over all processes.

    The learning rate warms up over warmup steps, stays, and falls to zero over the last decay share of the run. ema is the
    decay of the averaged weights that are kept, or several, of which the last is the model; clip the largest gradient norm
    (math.inf: none). precision is "fp32", "bf16" or "fp16" (with loss scaling); on a device that does not multiply it, float32.
    micro_batches is in how many parts a batch is computed, one after the other or on as many devices: each has random numbers
    of its own. checkpointing computes activations twice to keep fewer (U-Net only). teacher and init_from name saved models;
    teacher="exact" is the closed-form denoiser of the training data. sigma_data replaces that of the data set. Raises
    ValueError or TypeError for a bad value.
    """

    name: str
    data: str
    network: dict
    objective: Objective
    iterations: int
    batch: int = 256
    lr: float = 1e-3
    warmup: int = 100
    decay: float = 0.4
    betas: tuple[float, float] = (0.9, 0.99)
    optimizer: str = "adamw"
    ema: float | tuple[float, ...] = 0.999
    clip: float = 10.0
    precision: str = "bf16"
    micro_batches: int = 1
    checkpointing: bool = False
    seed: int = 0
    teacher: str | None = None
    init_from: str | None = None
    sigma_data: float | None = None
    cost: str = ""  # measured on 2 CPU cores with bfloat16 instructions
    expected: str = ""
    note: str = ""  # where paper and released code differ

    def __post_init__(self):
        whole("iterations", self.iterations)
        whole("batch", self.batch)
        positive("lr", self.lr)
        if self.sigma_data is not None:
            positive("sigma_data", self.sigma_data)
        if not self.clip > 0:
            raise ValueError(f"clip must be above 0, got {self.clip}")
        known("precision", self.precision, PRECISIONS)
        if self.batch % whole("micro_batches", self.micro_batches):
            raise ValueError(f"micro_batches must divide the batch of {self.batch}, got {self.micro_batches}")
        whole("warmup", self.warmup, 0)
        whole("seed", self.seed, 0)
        if not self.emas:
            raise ValueError("ema must be one rate or more, got none")
        for name, share in (
            ("decay", self.decay),
            *(("ema", rate) for rate in self.emas),
            *(("betas", b) for b in self.betas),
        ):
            within(name, share, 0, 1)
        known("optimizer", self.optimizer, ["adamw", "radam"])

    @property
    def emas(self) -> tuple[float, ...]:
        """ema as a tuple, of one or more."""
        return self.ema if isinstance(self.ema, tuple) else (self.ema,)

    def replace(self, **changes) -> Recipe:
        """A copy with the given fields changed. Raises ValueError for a field that a recipe does not have."""
        for field in changes:
            known("recipe field", field, [f.name for f in dataclasses.fields(self)])
        return dataclasses.replace(self, **changes)

    def lr_at(self, step: int) -> float:
        """The learning rate of a step (from 0): linear warm-up, constant, linear to zero."""
        left = (self.iterations - step) / max(self.decay * self.iterations, 1)
        return self.lr * min(1.0, (step + 1) / max(self.warmup, 1), left)

    def describe(self) -> dict:
        """The resolved configuration as plain values, for JSON."""
        fields = dataclasses.asdict(self)
        fields["objective"] = {"name": type(self.objective).__name__} | {
            k: v if isinstance(v, (int, float, str, type(None))) else getattr(v, "__name__", repr(v))
            for k, v in vars(self.objective).items()
        }
        return fields | {"betas": list(self.betas), "clip": self.clip if math.isfinite(self.clip) else None}


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MLP = dict(name="mlp", width=512, depth=4, num_classes=10)
DIGITS_NET = dict(**MLP, shape=[1, 8, 8])
FORGETFUL = dict(**DIGITS_NET, dropout=0.3)  # a teacher without dropout copies its training digits
DIGITS = dict(sigma_min=0.002, sigma_max=20.0)  # beyond 20 nothing of a digit is left: 8 x 8 pixels of deviation 0.75
TINTED_NET = dict(name="mlp", shape=[3, 16, 16], width=464, depth=4)
TINTED = dict(sigma_min=0.002, sigma_max=40.0)
# The released models' network and scalings in small: what is learnt here about loading, sampling and exporting holds for them.
TINTED_UNET = dict(
    name="unet", image_size=16, in_channels=3, out_channels=3, model_channels=32, num_res_blocks=1,
    attention_resolutions=[2, 4], channel_mult=[1, 2, 2], num_classes=10, num_head_channels=32, use_scale_shift_norm=True,
    resblock_updown=True,
)  # fmt: skip
MOONS_NET = dict(name="mlp", shape=[2], width=128, depth=3, embedding=64)
MOONS = dict(sigma_min=0.002, sigma_max=10.0)
DISTIL = dict(num_scales=6, substeps=2, mu_0=0.95, distance=PseudoHuber(0.03))
FROM_EDM = dict(data="digits", network=DIGITS_NET, init_from="digits-edm")
# Continuous time differentiates by the noise level: an embedding that changes slowly with it, and a tangent hardly cut (lesson 07).
SLOW = dict(highest=1.0)
STEADY = dict(normalize=1.0, tangent_warmup=0.5)

_ALL = [
    Recipe(
        "digits-edm", "digits", FORGETFUL, EDM(**DIGITS), iterations=1500, batch=512, lr=1.5e-3,
        cost="75 s", expected="35 calls: FD 0.12 to train (real held-out digits: 0.47)",
    ),
    Recipe(
        "digits-cd", objective=ConsistencyDistillation(**DIGITS, **DISTIL), iterations=4000, batch=1024, lr=2e-3, decay=0.6,
        teacher="digits-edm", **FROM_EDM,
        cost="14 min", expected="FD 0.13 in one call, 0.12 in two (teacher 0.12)",
    ),
    Recipe(
        "digits-cd-short", objective=ConsistencyDistillation(**DIGITS, **DISTIL), iterations=300, batch=512, lr=2e-3,
        decay=0.6, teacher="digits-edm", **FROM_EDM,
        cost="30 s", expected="FD about 1.5 x its teacher's in one call",
    ),
    Recipe(
        "digits-ct-short", objective=ConsistencyTraining(**DIGITS, start=2, end=40, mu_0=0.9, distance=PseudoHuber(0.03)),
        iterations=400, batch=512, **FROM_EDM,
        cost="25 s", expected="a coarse one-step model: see lesson 03",
    ),
    Recipe(
        "digits-ict-short", objective=ImprovedConsistencyTraining(**DIGITS, start=10, end=80, distance=PseudoHuber(0.03)),
        iterations=400, batch=512, **FROM_EDM,
        cost="25 s", expected="see lesson 03",
    ),
    Recipe(
        "digits-ect-short", objective=EasyConsistencyTuning(**DIGITS, distance=PseudoHuber(0.03)),
        iterations=400, batch=512, **FROM_EDM,
        cost="25 s", expected="see lesson 03",
    ),
    Recipe(
        "digits-pd-short", objective=ProgressiveDistillation(**DIGITS, start=8, stage_steps=100), iterations=500, batch=256,
        teacher="digits-edm", **FROM_EDM,
        cost="25 s", expected="a one-step model by three halvings: see lesson 03",
    ),
    Recipe(
        "digits-scd-short", objective=ContinuousDistillation(**DIGITS, **STEADY), iterations=300, batch=512, lr=5e-4, decay=0.6,
        teacher="digits-edm", **FROM_EDM | {"network": DIGITS_NET | SLOW},
        cost="30 s", expected="FD about that of digits-cd-short in one call: see lesson 07",
    ),
    Recipe(
        "digits-sct-short", objective=ContinuousTraining(**DIGITS, **STEADY), iterations=350, batch=512, lr=5e-4, decay=0.6,
        **FROM_EDM | {"network": DIGITS_NET | SLOW},
        cost="30 s", expected="see lesson 07",
    ),
    Recipe(
        "digits-meanflow-short", objective=MeanFlowTraining(**DIGITS), iterations=350, batch=512, decay=0.6,
        **FROM_EDM | {"network": DIGITS_NET | SLOW | {"jumps": True}},
        cost="30 s", expected="see lesson 07",
    ),
    Recipe(
        "digits-ct", objective=EasyConsistencyTuning(**DIGITS, distance=PseudoHuber(0.03)), iterations=3000, batch=1024,
        **FROM_EDM,
        cost="6 min", expected="FD 0.15 in one call, without a teacher in the loss",
    ),
    Recipe(
        "tinted-digits-edm", "tinted-digits", TINTED_NET, EDM(**TINTED, sigmas=LogNormal(-0.8, 1.4)), iterations=9000,
        batch=512, lr=1.2e-3,
        cost="17 min", expected="the teacher of tinted-digits-cd",
    ),
    Recipe(
        "tinted-digits-cd", "tinted-digits", TINTED_NET,
        # editing visits every sigma: the finer grid leaves no gaps between the levels that are trained
        ConsistencyDistillation(**TINTED, num_scales=18, mu_0=0.95, distance=PseudoHuber(0.03)),
        iterations=2000, batch=1024, lr=1.5e-3, decay=0.6, teacher="tinted-digits-edm", init_from="tinted-digits-edm",
        cost="11 min", expected="within 0.1 RMSE of its teacher's ODE at every level; editing: see lesson 05",
    ),
    Recipe(
        "tinted-unet-edm", "tinted-digits", TINTED_UNET, EDM(), iterations=1200, batch=128, lr=1.5e-3, sigma_data=0.5, ema=0.995,
        cost="15 min", expected="the teacher of tinted-unet-cd",
    ),
    Recipe(
        "tinted-unet-cd", "tinted-digits", TINTED_UNET,
        ConsistencyDistillation(num_scales=18, mu_0=0.95, distance=PseudoHuber(0.03)), iterations=800, batch=128, lr=1e-3, sigma_data=0.5,
        ema=0.995, teacher="tinted-unet-edm", init_from="tinted-unet-edm",
        cost="20 min", expected="tinted digits in one call, by the released models' code: lesson 06",
    ),
    Recipe(
        "moons-edm", "moons", MOONS_NET, EDM(**MOONS), iterations=1500, batch=384, lr=2e-3, precision="fp32",
        cost="10 s", expected="two moons, sliced Wasserstein about that of real points",
    ),
    Recipe(
        "moons-cd", "moons", MOONS_NET,
        ConsistencyDistillation(**MOONS, num_scales=18, mu_0=0.95, distance=PseudoHuber(0.03)), iterations=1000, batch=256,
        lr=3e-3, precision="fp32", teacher="exact",
        cost="15 s", expected="one call within 1.3 x its teacher's sliced Wasserstein",
    ),
    Recipe(
        "moons-ct", "moons", MOONS_NET,
        ConsistencyTraining(**MOONS, start=2, end=40, mu_0=0.9, distance=PseudoHuber(0.03)), iterations=1500, batch=384,
        precision="fp32",
        cost="15 s", expected="two moons without a teacher",
    ),
    Recipe(
        "moons-scd", "moons", MOONS_NET | SLOW, ContinuousDistillation(**MOONS, **STEADY, weight="uniform"), iterations=1000,
        lr=2e-3, decay=0.6, precision="fp32", teacher="exact",
        cost="15 s", expected="one call as close to the data as moons-cd's",
    ),
    Recipe(
        "moons-sct", "moons", MOONS_NET | SLOW, ContinuousTraining(**MOONS, **STEADY, weight="uniform"), iterations=1000,
        lr=2e-3, decay=0.6, precision="fp32",
        cost="10 s", expected="two moons without a teacher and without a grid",
    ),
    Recipe(
        "moons-meanflow", "moons", MOONS_NET | SLOW | {"jumps": True}, MeanFlowTraining(**MOONS), iterations=1000, lr=3e-3,
        precision="fp32",
        cost="10 s", expected="two moons by average velocities",
    ),
]  # fmt: skip
_PUBLISHED_EMA = (0.999, 0.9999, 0.9999432189950708)
_LSUN_EMA = (0.9999, 0.99994, 0.9999432189950708)  # of CD and CT
_PUBLISHED = dict(warmup=0, decay=0.0, betas=(0.9, 0.999), optimizer="radam", clip=math.inf, precision="fp16")
_COST = "64 A100 (paper)"


def _published(data: str) -> list[Recipe]:
    """The four trainings of one data set, by the released commands (scripts/launch.sh of consistency_models at e32b69e)."""
    small, teacher = data == "imagenet64", f"edm_{data}"
    network = dict(name="unet", **RELEASED[teacher].architecture)
    shared = dict(data=data, network=network, **_PUBLISHED)
    batch, ema = (2048, _PUBLISHED_EMA) if small else (256, _LSUN_EMA)
    parts = dict(batch=batch, micro_batches=batch // (32 if small else 4), ema=ema)
    batches = "" if small else "batch 2048 in the paper, 256 in the commands. "
    distilled = dict(
        teacher=teacher, init_from=teacher, iterations=600_000, lr=8e-6 if small else 1e-5, **parts, **shared
    )
    fid = {name: RELEASED[f"{name}_{data}{end}"].fid for name, end in (("edm", ""), ("cd", "_lpips"), ("ct", ""))}
    edm_batch = 4096 if small else 256
    return [
        Recipe(
            f"edm-{data}", objective=EDM(), iterations=600_000, batch=edm_batch, micro_batches=edm_batch // (32 if small else 4), lr=1e-4,
            ema=_PUBLISHED_EMA, **shared | {"network": network | {"dropout": 0.1}},
            cost=_COST, expected=f"published FID {fid['edm'][79]} in 79 network calls",
            note="The command names no last step; 600,000 is what distillation gets.",
        ),
        Recipe(
            f"cd-{data}-l2", objective=ConsistencyDistillation(num_scales=40, mu_0=0.95, distance=l2), **distilled,
            cost=_COST, expected="no FID was published for this distance",
            note=f"{batches}The released create_model_and_diffusion drops loss_norm and always trains with LPIPS; here L2 is L2.",
        ),
        Recipe(
            f"cd-{data}-lpips", objective=ConsistencyDistillation(num_scales=40, mu_0=0.95, distance=LPIPS()), **distilled,
            cost=_COST, expected=f"published FID {fid['cd'][1]} in one call, {fid['cd'][2]} in two",
            note=f"{batches}LPIPS is the authors' network (max pooling); the released code uses piq's with average pooling.",
        ),
        Recipe(
            f"ct-{data}", objective=ConsistencyTraining(start=2, end=200 if small else 150, mu_0=0.95, distance=LPIPS()),
            init_from=teacher, iterations=800_000 if small else 1_000_000, lr=1e-4 if small else 5e-5, **parts, **shared,
            cost=_COST, expected=f"published FID {fid['ct'][1]} in one call, {fid['ct'][2]} in two",
            note=f"{batches}Learning rate {'8e-6' if small else '1e-5'} in the paper, this one in the commands. It starts from EDM.",
        ),
    ]  # fmt: skip


_ALL += [recipe for data in ("imagenet64", "bedroom256", "cat256") for recipe in _published(data)]
RECIPES = {recipe.name: recipe for recipe in _ALL}


def get_recipe(name: str) -> Recipe:
    """A recipe by name. Raises ValueError for an unknown one, naming the nearest."""
    return RECIPES[known("recipe", name, RECIPES)]


def fitted(recipe: Recipe, data, teacher: str | None = None) -> Recipe:
    """The recipe on another data set (data.Data or data.Prepared), its network with that one's shape and classes.

    teacher, the name or path of a denoiser that knows these pictures, takes the place of the model that the recipe distils, starts
    from, or both. Without it a recipe that only starts from a model starts from random weights. What the recipe tells of its cost
    and results, which are those of its own data, is left out. Raises ValueError if a recipe that
    distils gets no teacher, one that takes none gets one, or a U-Net something else than square pictures.
    """
    roles = [role for role in ("teacher", "init_from") if getattr(recipe, role) not in (None, "exact")]
    if "teacher" in roles and teacher is None:
        raise ValueError(f"teacher is missing: {recipe.name} distils {recipe.teacher}, which does not know {data.name}")
    if teacher is not None and not roles:
        raise ValueError(f"teacher must be left out, got {teacher!r}: {recipe.name} takes none")
    network = recipe.network | {"num_classes": data.num_classes} | _sizes(recipe.network["name"], data)
    told = dict(cost="", expected="", note="")  # of the recipe's own data
    return recipe.replace(data=data.name, network=network, **dict.fromkeys(roles, teacher), **told)


def _sizes(network: str, data) -> dict:
    if network == "mlp":
        return {"shape": list(data.shape)}
    if len(data.shape) != 3 or data.shape[1] != data.shape[2]:
        raise ValueError(f"data must be square pictures for a U-Net, got {data.name} of shape {tuple(data.shape)}")
    return {"image_size": data.shape[1], "in_channels": data.shape[0], "out_channels": data.shape[0]}
