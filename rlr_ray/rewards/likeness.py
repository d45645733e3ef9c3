"""How like a reference's pictures others are, without a judge: improved precision and recall, and distances.

Precision falls where pictures look like none of the reference's, recall where they are no longer as varied.
Kynkaanniemi et al. 2019 (arXiv:1904.06991). Distances are Euclidean, between features. n pictures, N of the reference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

REFERENCES = {"base": "the base model's pictures", "real": "real pictures"}
LIKENESS = {
    "precision": "precision",
    "recall": "recall",
    "nn": "distance to the nearest",
    "pairwise": "distance within a prompt",
}
Summary = dict[str, dict[str, dict[str, float]]]  # by reference, measure, and before or after
NEIGHBOURS = 3  # the paper's k
_FEWEST = 8  # differences that say what their error is
_ROWS = 1024  # pictures whose distances are in memory at a time


@dataclass(frozen=True)
class Pictures:
    """Features of n pictures, and which prompt each is of."""

    features: Tensor  # [n, D]
    prompts: Tensor  # [n], by number

    def __getitem__(self, chosen: Tensor) -> Pictures:
        return Pictures(self.features[chosen], self.prompts[chosen])


@dataclass(frozen=True)
class Likeness:
    """What is measured of each picture; nan where it cannot be. The means are the measures."""

    precision: Tensor  # [n] 1 if it lies in the reference's manifold, else 0
    recall: Tensor  # [N] of each of the reference's: 1 if it lies in the pictures' manifold, else 0
    nn: Tensor  # [n] distance to the nearest one of the reference, over the reference's own
    pairwise: Tensor  # [n] mean distance to the others of its prompt, over the reference's own

    @property
    def means(self) -> dict[str, float]:
        return {name: float(values.nanmean()) for name, values in vars(self).items()}

    def changes(self, before: Likeness) -> dict[str, tuple[float, float]]:
        """Mean difference to `before`, of the same chains and reference, and its standard error; nan of a few.

        Of two evaluations of one model on different chains, the ratio of the two has a standard deviation of .9 to 1.1.
        """
        changes = {}
        for name, values in vars(self).items():
            difference = values - getattr(before, name)
            known = difference[~difference.isnan()]
            error = (
                float(known.std()) * math.sqrt(self._shares(name, len(known))) if len(known) >= _FEWEST else math.nan
            )
            changes[name] = float(known.mean()), error
        return changes

    def _shares(self, name: str, count: int) -> float:
        """By which a difference's variance is divided.

        Those that cover the reference are a sample too, as the reference is; a pair's distance counts for both.
        """
        return {"recall": 1 / count + 1 / len(self.precision), "pairwise": 4 / count}.get(name, 1 / count)


@dataclass(frozen=True)
class Reference:
    """Pictures that others are compared with.

    `half`: where they are a base model's, of the very chains that are compared: then each half of the chains is
    compared with the other half of the reference, or every chain would be like itself. None: all with all.
    """

    pictures: Pictures
    half: Tensor | None = None  # [N], 0 or 1
    by_prompt: bool = True  # whether the nearest is looked for among those of the same prompt

    @classmethod
    def base(cls, pictures: Pictures) -> Reference:
        """The base model's own, halved within each prompt where every prompt has several, else within all."""
        same = pictures.prompts[:, None] == pictures.prompts
        repeated = bool((same.sum(1) > 1).all())
        number = same.tril(-1).sum(1) if repeated else torch.arange(len(same))
        return cls(pictures, number % 2, repeated)

    def of(self, pictures: Pictures) -> Likeness:
        parts = list(self._parts(pictures))
        distance, spread = self._own
        return Likeness(
            torch.cat([_inside(one, other, radii) for one, other, radii in parts]),
            torch.cat([_inside(other, one, _radii(one)) for one, other, _ in parts]),
            torch.cat([_nearest(one, other, 1, self.by_prompt) for one, other, _ in parts]) / distance,
            within_prompt(pictures) / spread,
        )

    def _parts(self, pictures: Pictures) -> list[tuple[Pictures, Pictures, Tensor]]:
        """Pictures, those of the reference that they are compared with, and these ones' radii."""
        if self.half is None:
            return [(pictures, self.pictures, self._radii[0])]
        return [(pictures[self.half != i], self.pictures[self.half == i], self._radii[i]) for i in (0, 1)]

    @cached_property
    def _radii(self) -> list[Tensor]:
        parts = [self.pictures] if self.half is None else [self.pictures[self.half == i] for i in (0, 1)]
        return [_radii(part) for part in parts]

    @cached_property
    def _own(self) -> tuple[float, float]:
        """The reference's own mean distances: to the nearest other, and within a prompt; nan if a prompt is unknown."""
        nearest = (
            _nearest(self.pictures, self.pictures, 2, self.by_prompt)  # the first is itself
            if self.half is None
            else torch.cat([_nearest(*part[:2], 1, self.by_prompt) for part in self._parts(self.pictures)])
        )
        spread = within_prompt(self.pictures).nanmean() if self.by_prompt or self.half is not None else math.nan
        return float(nearest.nanmean()), float(spread)


def within_prompt(pictures: Pictures) -> Tensor:  # [n]
    """Each picture's mean distance to the others of its prompt; nan if there is none."""
    sums = [
        (_distances(rows, pictures) * (rows.prompts[:, None] == pictures.prompts)).sum(1) for rows in _rows(pictures)
    ]
    others = (pictures.prompts[:, None] == pictures.prompts).sum(1) - 1
    return torch.where(others > 0, torch.cat(sums) / others, math.nan)


def _inside(pictures: Pictures, centres: Pictures, radii: Tensor) -> Tensor:  # [n]
    """1 for each picture within the radius [N] of some centre, else 0; nan if the radii are unknown."""
    inside = torch.cat([(_distances(rows, centres) <= radii).any(1) for rows in _rows(pictures)])
    return torch.where(radii.isnan().any(), math.nan, inside.double())


def _radii(pictures: Pictures) -> Tensor:  # [n]
    """Each picture's distance to its k-th nearest other; nan if there are not so many."""
    return _nearest(pictures, pictures, NEIGHBOURS + 1, False)  # the first is itself


def _nearest(pictures: Pictures, others: Pictures, k: int, by_prompt: bool) -> Tensor:  # [n]
    """Distance to the k-th nearest of the others, of the same prompt; nan if there is none."""
    if len(others.prompts) < k:
        return pictures.features.new_full((len(pictures.prompts),), math.nan, dtype=torch.float64)
    distances = []
    for rows in _rows(pictures):
        apart = _distances(rows, others)
        if by_prompt:
            apart = apart.masked_fill(rows.prompts[:, None] != others.prompts, math.inf)
        distances.append(apart.kthvalue(k, dim=1).values)
    nearest = torch.cat(distances)
    return nearest.masked_fill(nearest.isinf(), math.nan)


def _distances(pictures: Pictures, others: Pictures) -> Tensor:  # [n, N]
    """In double precision, or a picture would be at some distance from itself."""
    return torch.cdist(pictures.features.double(), others.features.double())


def _rows(pictures: Pictures) -> list[Pictures]:
    parts = zip(pictures.features.split(_ROWS), pictures.prompts.split(_ROWS), strict=True)
    return [Pictures(*part) for part in parts]


def summarised(before: Mapping[str, Likeness], after: Mapping[str, Likeness]) -> Summary:
    """By reference and measure: the means before and after, the change and its standard error; those that are known."""
    summary: Summary = {}
    for reference, likeness in after.items():
        changes, means = likeness.changes(before[reference]), likeness.means
        summary[reference] = {
            name: {"before": mean, "after": means[name], "change": changes[name][0], "change_se": changes[name][1]}
            for name, mean in before[reference].means.items()
            if not math.isnan(changes[name][1])
        }
    return summary
