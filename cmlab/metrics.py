"""Sample quality: Fréchet distance, inception score, KID, precision and recall, memorisation.

Features are (N, D) tensors or arrays, one row an image; statistics are float64. A number means little without its
protocol: which features, which reference, how many samples on each side. Features, probabilities and images of another
shape, or with NaN or infinities, raise ValueError, a count that is no whole number TypeError.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cmlab.checks import finite, same_shape, whole
from cmlab.exact import squared_distances
from cmlab.extractors import Features, get_extractor


def _features(argument: str, values) -> Tensor:
    """values (N, D) as a finite float64 tensor with two rows or more."""
    values = finite(argument, torch.as_tensor(values).double())
    if values.ndim != 2 or len(values) < 2:
        raise ValueError(f"{argument} must have shape (N, D) with N >= 2, got {tuple(values.shape)}")
    return values


# --- Fréchet distance -----------------------------------------------------------------------------------------------


@dataclass
class GaussianStatistics:
    """Mean and covariance of features, gathered batch by batch in float64: memory does not grow with the samples.

    mean is (D,) and scatter (D, D), both None before the first batch. Batches merge by the formula of Chan et al.
    (1979), so that the result does not depend on how the samples were cut up.
    """

    count: int = 0
    mean: Tensor | None = None
    scatter: Tensor | None = field(default=None, repr=False)  # sum of (x - mean)(x - mean)^T

    def update(self, features) -> GaussianStatistics:
        """Takes in a batch of features (N, D), N >= 1; returns self. Raises ValueError for another D than before."""
        batch = finite("features", torch.as_tensor(features).double())
        if batch.ndim != 2 or len(batch) == 0:
            raise ValueError(f"features must have shape (N, D) with N >= 1, got {tuple(batch.shape)}")
        if self.mean is None:
            self.mean, self.scatter = torch.zeros_like(batch[0]), batch.new_zeros(batch.shape[1], batch.shape[1])
        same_shape("features", batch, (len(batch), len(self.mean)))
        shift, total = batch.mean(0) - self.mean, self.count + len(batch)
        centred = batch - batch.mean(0)
        self.scatter = self.scatter + centred.T @ centred + torch.outer(shift, shift) * self.count * len(batch) / total
        self.mean, self.count = self.mean + shift * len(batch) / total, total
        return self

    @property
    def cov(self) -> Tensor:
        """The covariance (D, D), with the N - 1 denominator. Raises ValueError before two samples were seen."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        return self.scatter / (self.count - 1)


def frechet_from_moments(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)): Heusel et al. (2017), eq. 6. 0 or more, up to rounding.

    Means (D,) and covariances (D, D), float64. The trace of the root comes from the eigenvalues of the symmetric
    C_a^(1/2) C_b C_a^(1/2), which is stable for singular covariances too (fewer samples than features), where a general
    matrix root is not. Raises ValueError for features of two lengths.
    """
    same_shape("the second mean", mean_b, mean_a.shape)
    same_shape("the second covariance", cov_b, cov_a.shape)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0)
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * product.sqrt().sum())


def frechet_from_statistics(a: GaussianStatistics, b: GaussianStatistics) -> float:
    """frechet_from_moments of what was gathered. Raises ValueError for fewer than 2 samples on either side, too."""
    cov_a, cov_b = a.cov, b.cov  # first: without samples there is no mean either
    return frechet_from_moments(a.mean, cov_a, b.mean, cov_b)


def frechet_distance(features_a, features_b) -> float:
    """The Fréchet distance between Gaussians fitted to features (N, D) and (M, D): FID, if they are Inception's.

    Heusel et al. (2017), eq. 6. Biased upwards for few samples: compare only at equal sample sizes.
    Raises ValueError unless N, M >= 2 and both have the same D.
    """
    a, b = _features("features_a", features_a), _features("features_b", features_b)
    return frechet_from_statistics(GaussianStatistics().update(a), GaussianStatistics().update(b))


# --- inception score, KID -------------------------------------------------------------------------------------------


@dataclass
class ClassStatistics:
    """What the inception score (Salimans et al. 2016) is made of, gathered batch by batch: memory does not grow."""

    count: int = 0
    total: Tensor | float = 0.0  # sum of p(class | image), (K,)
    certainty: float = 0.0  # sum of p ln p

    def update(self, probabilities) -> ClassStatistics:
        """Takes in a batch of class probabilities (N, K), N >= 1; returns self.

        Raises ValueError unless they are in [0, 1] and rows sum to 1, and for another K than before.
        """
        p = finite("probabilities", torch.as_tensor(probabilities).double())
        if p.ndim != 2 or len(p) == 0 or (p < 0).any() or (p.sum(1) - 1).abs().max() > 1e-3:
            raise ValueError(f"probabilities must be (N, K), rows >= 0 that sum to 1, got shape {tuple(p.shape)}")
        if self.count:
            same_shape("probabilities", p, (len(p), len(self.total)))
        self.count, self.total = self.count + len(p), self.total + p.sum(0)
        self.certainty += float(torch.xlogy(p, p).sum())
        return self

    @property
    def score(self) -> float:
        """exp(E KL(p(class | image) || p(class))) = exp(mean of sum p ln p - sum q ln q), with q the mean of p: 1 … K.

        Raises ValueError before the first sample.
        """
        if self.count == 0:
            raise ValueError("an inception score needs at least 1 sample, got 0")
        q = self.total / self.count
        return math.exp(self.certainty / self.count - float(torch.xlogy(q, q).sum()))


def inception_score(probabilities, split_size: int | None = None) -> float:
    """exp(E KL(p(class | image) || p(class))): Salimans et al. (2016). probabilities (N, K), rows summing to 1.

    1 … K: sure about each image, undecided about all. split_size=5000 averages over consecutive parts, as the released
    evaluator does; None takes all at once. Raises ValueError for N = 0, rows that do not sum to 1, or split_size < 1.
    """
    p = torch.as_tensor(probabilities)
    parts = p.split(max(len(p), 1) if split_size is None else whole("split_size", split_size))
    return sum(ClassStatistics().update(part).score for part in parts) / len(parts)


def kernel_distance(
    features_a, features_b, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID: the squared maximum mean discrepancy with the kernel (x y / D + 1)^3, unbiased (Binkowski et al. 2018).

    features (N, D) and (M, D) -> (mean, standard deviation) over random subsets of subset_size rows (at most the
    smaller set); the same seed gives the same subsets. 0: no difference; being unbiased it may fall a little below.
    Raises ValueError unless N, M >= 2, both have the same D, subsets >= 1 and subset_size >= 2.
    """
    a, b = _features("features_a", features_a), _features("features_b", features_b)
    same_shape("features_b", b, (len(b), a.shape[1]))
    size = min(whole("subset_size", subset_size, 2), len(a), len(b))
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(whole("subsets", subsets)):
        x, y = (v[torch.randperm(len(v), generator=generator)[:size]] for v in (a, b))
        values.append(_mmd2(x, y))
    values = torch.stack(values)
    return float(values.mean()), float(values.std(correction=0))


def _mmd2(x: Tensor, y: Tensor) -> Tensor:
    def kernel(u, v):
        return (u @ v.T / u.shape[1] + 1) ** 3

    n, m = len(x), len(y)
    xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
    return (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1)) - 2 * xy.mean()


# --- precision and recall, memorisation -----------------------------------------------------------------------------


def manifold_radii(features, k: int = 3, chunk: int = 2048) -> Tensor:
    """The *squared* distance from each feature (N, D) to its k-th nearest other one: (N,) float64.

    Kynkäänniemi et al. (2019), eq. 1. Works through chunk rows at a time. Raises ValueError unless 1 <= k < N.
    """
    f = _features("features", features)
    if whole("k", k) >= len(f):
        raise ValueError(f"k must be below the number of samples {len(f)}, got {k}")
    return torch.cat([squared_distances(part, f).kthvalue(k + 1, dim=1).values for part in f.split(chunk)])


def precision_recall(real, fake, k: int = 3) -> tuple[float, float]:
    """The share of fake features inside the real ones' k-nearest-neighbour balls, and the reverse.

    Kynkäänniemi et al. (2019), alg. 1. real (N, D), fake (M, D) -> (precision, recall), each in [0, 1].
    Raises ValueError unless both have the same D and 1 <= k < N, M.
    """
    real, fake = _features("real", real), _features("fake", fake)
    same_shape("fake", fake, (len(fake), real.shape[1]))
    return _covered(fake, real, manifold_radii(real, k)), _covered(real, fake, manifold_radii(fake, k))


def _covered(points: Tensor, centres: Tensor, radii: Tensor, chunk: int = 2048) -> float:
    inside = [(squared_distances(part, centres) <= radii).any(1) for part in points.split(chunk)]
    return float(torch.cat(inside).double().mean())


def nearest_neighbour_ratio(samples: Tensor, train: Tensor, held_out: Tensor) -> float:
    """Mean distance from samples to their nearest training image, over that of held-out images: all (N, …) pixels.

    About 1: as far from the training set as new real data. Well below: the model repeats what it has seen. 0: copies.
    Raises ValueError for images of two shapes, and if every held-out image is in train.
    """
    return _ratio(_nearest("samples", samples, train).mean(), _nearest("held_out", held_out, train).mean(), "held_out")


def _nearest(argument: str, images: Tensor, train: Tensor) -> Tensor:
    """The distance in pixel space from each image (N, …) to its nearest one of train: (N,) float64."""
    same_shape(argument, finite(argument, images), (len(images), *train.shape[1:]))
    train = finite("train", train).double().flatten(1)
    parts = images.double().flatten(1).split(1024)
    nearest = torch.cat([squared_distances(part, train).argmin(1) for part in parts])
    # measured again: in the expanded square a copy is a rounding error away from itself
    return torch.cat([(a - train[i]).norm(dim=1) for a, i in zip(parts, nearest.split(1024), strict=True)])


def _ratio(ours: Tensor, real: Tensor, argument: str) -> float:
    if real == 0:
        raise ValueError(f"{argument} must hold images that are not in train, to compare with; all of them are")
    return float(ours / real)


def sliced_wasserstein(a: Tensor, b: Tensor, projections: int = 256, seed: int = 0) -> float:
    """The mean over random directions of the projections' 1-Wasserstein distance, 0 or more. a, b (N, D), N >= 2.

    Rabin et al. (2011), with the first power. The same seed gives the same directions. Raises ValueError if a and b
    differ in shape, and for projections < 1.
    """
    a, b = _features("a", a), _features("b", b)
    same_shape("b", b, a.shape)
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(whole("projections", projections), a.shape[1], generator=generator, dtype=torch.float64)
    directions = directions / directions.norm(dim=1, keepdim=True)
    return float(((a @ directions.T).sort(0).values - (b @ directions.T).sort(0).values).abs().mean())


# --- images to numbers ----------------------------------------------------------------------------------------------

KEPT = 10_000  # features a side for the metrics that compare pairs: their work grows with the square


@dataclass
class Reservoir:
    """At most size rows of a stream, each as likely to be kept as any other. A stream that fits is kept whole.

    rows is (min(N, size), D), None before the first; the same seed keeps the same rows of the same stream.
    """

    size: int = KEPT
    seed: int = 0
    rows: Tensor | None = None
    tickets: Tensor | None = field(default=None, repr=False)  # a random number for each kept row: the highest stay

    def __post_init__(self):
        self._generator = torch.Generator().manual_seed(self.seed)

    def update(self, rows: Tensor) -> Reservoir:
        """Takes in rows (N, D); returns self."""
        tickets = torch.rand(len(rows), generator=self._generator, dtype=torch.float64)
        if self.rows is not None:
            rows, tickets = torch.cat([self.rows, rows]), torch.cat([self.tickets, tickets])
        if len(rows) > self.size:
            kept = tickets.topk(self.size).indices
            rows, tickets = rows[kept], tickets[kept]
        self.rows, self.tickets = rows, tickets
        return self


@dataclass
class Summary:
    """What the metrics need of any number of images, in memory that does not grow with them."""

    gaussian: GaussianStatistics = field(default_factory=GaussianStatistics)
    classes: ClassStatistics = field(default_factory=ClassStatistics)
    kept: Reservoir = field(default_factory=Reservoir)

    def update(self, seen: Features) -> Summary:
        """Takes in what an extractor saw in a batch; returns self. Raises ValueError for another D or K than before."""
        self.gaussian.update(seen.features)
        self.classes.update(seen.probabilities)
        self.kept.update(seen.features)
        return self


def evaluate(
    samples: Tensor | Iterable[Tensor],
    reference: Tensor | Iterable[Tensor],
    extractor: str = "digits-classifier",
    labels: Tensor | None = None,
    train: Tensor | None = None,
    device: str | None = None,
    moments: tuple[Tensor, Tensor] | None = None,
) -> dict[str, float]:
    """All metrics of samples against reference images: each one tensor or batches of (B, C, H, W) in [-1, 1].

    Returns fd, is, kid, precision, recall, samples and reference (the two counts); where labels (N,) say which class
    each sample should be, accuracy; where train is given, nearest_neighbour_ratio, with reference as held-out images.
    moments, mean (D,) and covariance (D, D) of features, are those of a data set of which reference is only a part: fd is to them.
    Memory is flat: kid, precision and recall look at 10,000 random features a side, the others at all.
    Raises ValueError for an unknown extractor, images that do not suit it, fewer than 4 on either side, moments of other
    features, labels of another number than the samples, and a reference that is all in train; and what get_extractor raises.
    """
    extract = get_extractor(extractor, device)
    fake, classes, near = _summarize("samples", samples, extract, train)
    real, _, real_near = _summarize("reference", reference, extract, train)
    precision, recall = precision_recall(real.kept.rows, fake.kept.rows)
    result = {
        "fd": frechet_from_moments(
            fake.gaussian.mean, fake.gaussian.cov, *(moments or (real.gaussian.mean, real.gaussian.cov))
        ),
        "is": fake.classes.score,
        "kid": kernel_distance(fake.kept.rows, real.kept.rows, subsets=20)[0],
        "precision": precision,
        "recall": recall,
        "samples": fake.gaussian.count,
        "reference": real.gaussian.count,
    }
    if labels is not None:
        same_shape("labels", labels, classes.shape)
        result["accuracy"] = float((classes == labels.cpu()).double().mean())
    if train is not None:
        result["nearest_neighbour_ratio"] = _ratio(near, real_near, "reference")
    return result


def _summarize(
    argument: str, images, extract: Callable[[Tensor], Features], train: Tensor | None
) -> tuple[Summary, Tensor, Tensor | None]:
    """The summary of a stream, the class seen in each image (N,), and the mean distance to the nearest of train."""
    summary, classes, distances = Summary(), [], []
    for batch in [images] if isinstance(images, Tensor) else images:
        try:
            seen = extract(batch)
        except ValueError as error:
            raise ValueError(f"the {argument} images do not suit the extractor: {error}") from error
        summary.update(seen)
        classes.append(seen.probabilities.argmax(1))
        if train is not None:
            distances.append(_nearest(argument, batch, train))
    if not classes:
        raise ValueError(f"{argument} must hold at least one batch of images, got none")
    return summary, torch.cat(classes), torch.cat(distances).mean() if distances else None
