"""The table of docs/theory.md from trained runs: python -m benchmarks.tasks.geometry --out FOLDER --grocery DIR.

Of the embeddings that `python -m benchmarks` has kept in FOLDER, for the chosen runs of the closed set.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import normalize

from benchmarks.tables import markdown_table
from benchmarks.tasks.data import make
from benchmarks.tasks.plan import Plan, Run
from benchmarks.tasks.scores import Scores, class_means
from benchmarks.tasks.work import read
from simo_lightning.functional import orthogonal_shares


def geometry(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor) -> Scores:
    """What docs/theory.md makes statements about.

    Args:
        train: Training embeddings ``(N, D)``.
        labels: ``(N,)``, of C classes.
        test: Test embeddings ``(M, D)``.
        test_labels: ``(M,)``.

    Returns:
        ``bound``, the root of Welch's bound for C vectors in D dimensions; ``cosine``, the root mean square cosine of
        two class means of the training images, and ``test_cosine``; ``largest``, their largest one; ``shortest``, the
        length of the shortest class mean of embeddings of length 1; ``opposite``, the share of training embeddings
        with a negative cosine to their class mean; ``share``, the mean largest orthogonal share of the test images.
    """
    classes, dim = int(labels.max()) + 1, train.shape[1]
    means = class_means(train, labels, classes)
    cosines, test_cosines = (
        (normalize(each) @ normalize(each).T)[~torch.eye(classes, dtype=torch.bool)]
        for each in (means, class_means(test, test_labels, classes))
    )
    own = (normalize(train) * normalize(means)[labels]).sum(1)
    return {
        "bound": math.sqrt(max(0, classes - dim) / (dim * (classes - 1))),
        "cosine": float(cosines.square().mean().sqrt()),
        "test_cosine": float(test_cosines.square().mean().sqrt()),
        "largest": float(cosines.max()),
        "shortest": float(means.norm(dim=1).min()),
        "opposite": float((own < 0).double().mean()),
        "share": float(orthogonal_shares(test, means).shares.max(1).values.mean()),
    }


def rows(plan: Plan, data: str, folder: Path) -> list[list[str]]:
    """A row for each loss, mean over the seeds whose embeddings are there."""
    images, found = make("closed", folder, plan.about(data), {}), []
    for loss, entry in plan.losses.items():
        best = plan.best(data, loss)
        runs = [] if best is None else [Run(data, "closed", loss, *best, seed) for seed in plan.seeds]
        kept = [each for each in map(read, map(plan.file, runs)) if each is not None]
        values = [
            geometry(
                torch.from_numpy(each["train"]).float(), images.bank_labels,
                torch.from_numpy(each["test"]).float(), images.test.labels,
            )
            for each in kept
        ]  # fmt: skip
        if values:
            mean = pd.DataFrame(values).mean()
            found.append([entry["title"], str(len(values)), *(f"{value:.3f}" for value in mean)])
    return found


def main(words: Sequence[str] | None = None) -> None:
    """Print a table for each data set whose folder is given."""
    own = argparse.ArgumentParser("python -m benchmarks.tasks.geometry", description=__doc__)
    own.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="of python -m benchmarks")
    plan = Plan()
    plan.add_folders(own)
    given = own.parse_args(words)
    plan.check_folders(own, given)
    plan = Plan(given.out)
    titles = [
        "loss", "seeds", "Welch's bound", "RMS cosine", "test images", "largest", "shortest class mean",
        "opposite to their mean", "largest share",
    ]  # fmt: skip
    for name in plan.data:
        folder = getattr(given, name)
        if folder is not None:
            found = rows(plan, name, folder)
            if not found:
                own.error(f"--out must have embeddings of the closed set of {name}, got none in {given.out}")
            print("\n".join(markdown_table(titles, found)))


if __name__ == "__main__":
    main()
