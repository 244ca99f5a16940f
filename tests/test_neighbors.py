"""The search for the largest cosines against a plain float64 matrix and faiss, on one process and on three."""

import os
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from simo_lightning.functional.knn import knn_predict
from simo_lightning.functional.neighbors import GRID, largest_keys, no_key, similarities_of, ties_of
from simo_lightning.functional.retrieval import retrieval_scores
from simo_lightning.functional.unknown import neighbor_similarity
from simo_lightning.metrics import MAPAtR
from simo_lightning.metrics.sharded import (
    class_counts_over_ranks,
    class_means_over_ranks,
    knn_predict_over_ranks,
    kth_similarity_over_ranks,
    retrieval_scores_over_ranks,
)
from tests.rank_processes import saved, start_ranks

CLASSES = 7


def rows(n: int, dim: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed))


def many_ties(n: int, seed: int = 0) -> Tensor:
    """Embeddings of which many have the same direction, and lengths that do not matter."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(-1, 2, (n, 3), generator=generator).float()
    return corners * torch.rand(n, 1, generator=generator).add(0.5)


def matrix_keys(queries: Tensor, bank: Tensor, k: int, labels: Tensor, own: Tensor | None = None) -> np.ndarray:
    """As the definition says: all cosines in float64, rounded; of equal ones the lowest class first."""
    units = [each.double().numpy() for each in (queries, bank)]
    units = [each / np.maximum(np.linalg.norm(each, axis=1, keepdims=True), 1e-300) for each in units]
    keys = np.round(units[0] @ units[1].T * GRID).astype(np.int64) * CLASSES + (CLASSES - 1 - labels.numpy())
    if own is not None:
        keys[np.arange(len(keys)), own.numpy()] = no_key(CLASSES)
    return -np.sort(-keys, axis=1)[:, :k]


def found(queries: Tensor, bank: Tensor, k: int, labels: Tensor, own: Tensor | None = None, chunk: int | None = None):
    return largest_keys(queries, bank, k, lambda _, row: CLASSES - 1 - labels[row], CLASSES, own, chunk)


@pytest.mark.parametrize("draw", [rows, many_ties], ids=["random", "ties"])
@pytest.mark.parametrize("k", [1, 20, 2500])
def test_keys_are_those_of_a_float64_matrix(draw, k):
    queries, bank, labels = draw(70), draw(3001, seed=1), torch.arange(3001) % CLASSES
    expected = matrix_keys(queries, bank, k, labels)
    for chunk in (None, 10_000, 400_000):
        np.testing.assert_array_equal(found(queries, bank, k, labels, chunk=chunk).numpy(), expected)
    order = torch.randperm(3001, generator=torch.Generator().manual_seed(2))
    np.testing.assert_array_equal(found(queries, bank[order], k, labels[order]).numpy(), expected)


def test_a_query_is_not_its_own_neighbour():
    bank, labels = rows(2000), torch.arange(2000) % CLASSES
    own = torch.arange(0, 2000, 3)
    expected = matrix_keys(bank[own], bank, 5, labels, own)
    np.testing.assert_array_equal(found(bank[own], bank, 5, labels, own).numpy(), expected)


def test_collapsed_embeddings_are_neighbours_of_the_lowest_class():
    bank = torch.ones(3000, 4) + 1e-9 * rows(3000, 4)
    keys = found(bank[:40], bank, 20, torch.arange(3000) % CLASSES, chunk=100_000)
    assert (similarities_of(keys, CLASSES) == 1).all()
    assert (ties_of(keys, CLASSES) == CLASSES - 1).all()  # class 0


def test_a_small_bank_leaves_keys_empty():
    keys = found(rows(3), rows(2, seed=1), 4, torch.tensor([0, 1]))
    assert (keys[:, 2:] == no_key(CLASSES)).all()
    assert (keys[:, :2] > no_key(CLASSES)).all()


def test_similarities_are_those_of_faiss():
    queries, bank = (torch.nn.functional.normalize(rows(n, 64, n)) for n in (300, 20_000))
    theirs, _ = faiss.knn(queries.numpy(), bank.numpy(), 20, metric=faiss.METRIC_INNER_PRODUCT)
    ours = similarities_of(largest_keys(queries, bank, 20, lambda query, row: torch.zeros_like(query + row), 1), 1)
    bound = (64 + 8) * 2.0**-24 + 0.5 / GRID  # of a float32 product, and of the rounding
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=0, atol=bound)


def test_the_product_is_in_full_precision_whatever_is_set():
    queries, bank, labels = rows(50, 64), rows(4000, 64, 1), torch.arange(4000) % CLASSES
    expected, before = found(queries, bank, 5, labels), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(found(queries, bank, 5, labels), expected)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def test_no_tensor_of_a_search_exceeds_its_chunks():
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and function is not torch.ops.aten.lift_fresh.default:
                largest = max(largest, result.nbytes)
            return result

    queries, bank, labels = rows(3000), rows(20_000, seed=1), torch.arange(20_000) % 10_000
    with Largest():
        knn_predict(queries, bank, labels, num_classes=10_000, chunk_bytes=2**18)
    # labels take 160 kB; a matrix (M, N) would take 240 MB and one (M, C) 120 MB
    assert largest <= 3 * 2**18


SHARES = {"bank": [300, 0, 700], "queries": [0, 50, 31]}  # of each process


def shared_job(folder: Path) -> None:
    dist.init_process_group("gloo")
    torch.save(evaluated(int(os.environ["RANK"])), folder / f"found.{os.environ['RANK']}.pt")
    dist.destroy_process_group()


def evaluated(rank: int) -> list[Tensor]:
    """What each process finds for its own queries, with duplicates in the bank; leave-one-out in the bank itself."""
    bank, bank_labels = many_ties(1000), torch.arange(1000) % 5 * 3
    queries, labels = many_ties(81, seed=1), torch.arange(81) % 7
    own_bank, own = (own_part(rank, name) for name in ("bank", "queries"))
    counts = class_counts_over_ranks(bank_labels[own_bank])
    position = torch.arange(SHARES["bank"][rank])
    part, part_labels = bank[own_bank], bank_labels[own_bank]
    metric = MAPAtR()
    if len(position):
        metric.update(part, part_labels)
    return [
        knn_predict_over_ranks(queries[own], part, part_labels, counts, chunk_bytes=20_000),
        knn_predict_over_ranks(queries[own], part, part_labels, counts, k=400),
        kth_similarity_over_ranks(queries[own], part, 7),
        *retrieval_scores_over_ranks(part, part_labels, part, part_labels, (1, 300), position, chunk_bytes=50_000),
        *retrieval_scores_over_ranks(queries[own], labels[own], part, part_labels, (1, 4)),
        class_means_over_ranks(part, part_labels, counts),
        metric.compute(),
    ]


def own_part(rank: int, name: str) -> slice:
    start = sum(SHARES[name][:rank])
    return slice(start, start + SHARES[name][rank])


def test_three_processes_with_unequal_and_empty_shares_find_what_one_finds(tmp_path):
    assert start_ranks(3, shared_job, tmp_path) == [0, 0, 0]
    bank, bank_labels, queries, labels = many_ties(1000), torch.arange(1000) % 5 * 3, many_ties(81, seed=1), None
    labels = torch.arange(81) % 7
    expected = [
        knn_predict(queries, bank, bank_labels),
        knn_predict(queries, bank, bank_labels, k=400),
        neighbor_similarity(queries, bank, 7),
        *retrieval_scores(bank, bank_labels, ks=(1, 300)),
        *retrieval_scores(queries, labels, bank, bank_labels, (1, 4)),
    ]
    parts = saved(tmp_path, "found", 3)
    for number, whole in enumerate(expected):
        joined = torch.cat([part[number] for part in parts])
        if number == 2:
            torch.testing.assert_close(joined, whole, rtol=0, atol=11 * 2.0**-24 + 1 / GRID)
        else:
            torch.testing.assert_close(joined, whole, rtol=0, atol=0, equal_nan=True)
    unit = torch.nn.functional.normalize(bank.double())
    means = torch.stack([unit[bank_labels == label].mean(dim=0) for label in range(13)])
    for part in parts:
        torch.testing.assert_close(part[-2], means.float(), equal_nan=True)
        assert part[-1] == retrieval_scores(bank, bank_labels).average_precision.double().mean().float()
