import pytest
import torch
from torch import Tensor

from simo_lightning.functional import class_moments
from simo_lightning.functional.moments import class_blocks, class_sums, compact_labels, squared_gram_norms


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_sums_equal_the_loops() -> None:
    embeddings, labels = draw(11, 3), [0, 3, 3, 1, 0, 0, 3, 3, 3, 1, 0]
    moments = class_moments(embeddings, torch.tensor(labels), num_classes=5)
    for label in range(5):
        rows = [row for row, own in zip(embeddings, labels, strict=True) if own == label]
        assert moments.counts[label] == len(rows)
        if not rows:
            assert moments.means[label].isnan().all()
            assert moments.second[label].eq(0).all()
            continue
        mean = sum(rows) / len(rows)
        torch.testing.assert_close(moments.means[label], mean)
        torch.testing.assert_close(moments.scatter[label], sum(((row - mean) ** 2).sum() for row in rows))
        torch.testing.assert_close(moments.second[label], sum(torch.outer(row, row) for row in rows))
        torch.testing.assert_close(moments.fourth[label], sum((row @ row) ** 2 for row in rows))


def test_moments_merge_exactly() -> None:
    embeddings, labels = draw(30, 4), torch.arange(30) % 3
    whole = class_moments(embeddings, labels, 3)
    first, second = class_moments(embeddings[:7], labels[:7], 3), class_moments(embeddings[7:], labels[7:], 3)
    for merged, expected in zip(first.merge(second), whole, strict=True):
        torch.testing.assert_close(merged, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"same \(C, D\) to merge, got \(3, 4\) and \(2, 4\)"):
        whole.merge(class_moments(embeddings[:2], torch.tensor([0, 1]), 2))


def test_labels_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"labels must be in 0..2 for num_classes=3, got 0..3"):
        class_moments(draw(4, 2), torch.arange(4), 3)


@pytest.mark.parametrize("labels", [[5, 5, 2], [-4, 7, -4, 0], [10**15, -(10**15), 3, 3], []], ids=str)
def test_compact_labels_equals_unique(labels: list[int]) -> None:
    values = torch.tensor(labels, dtype=torch.long)
    _, index, counts = values.unique(return_inverse=True, return_counts=True)
    mine = compact_labels(values)
    assert mine[0].tolist() == index.tolist()
    assert mine[1].tolist() == counts.tolist()


@pytest.mark.parametrize("num_classes", [3, 100])
def test_class_sums_below_and_above_the_one_hot_limit(num_classes: int) -> None:
    values, index = draw(50, 2), torch.arange(50) * 7 % num_classes
    expected = torch.zeros(num_classes, 2, dtype=torch.float64)
    for value, label in zip(values, index.tolist(), strict=True):
        expected[label] += value
    torch.testing.assert_close(class_sums(values, index, num_classes), expected)
    torch.testing.assert_close(class_sums(values[:, 0], index, num_classes), expected[:, 0])


@pytest.mark.parametrize(
    "sizes", [[4, 4, 4], [1, 2, 3, 4, 30, 5], [100] + [1] * 50], ids=["equal", "ragged", "long tail"]
)
def test_blocks_hold_every_row_once_and_at_most_twice_the_rows(sizes: list[int]) -> None:
    index = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))]
    rows = torch.arange(1.0, len(index) + 1)[:, None]
    seen, area = {}, 0
    for members, block in class_blocks(rows, index, torch.tensor(sizes)):
        area += block.shape[0] * block.shape[1]
        for member, own in zip(members.tolist(), block.squeeze(2), strict=True):
            seen[member] = own[own > 0].tolist()
    assert seen == {c: rows[index == c].flatten().tolist() for c in range(len(sizes))}
    assert area <= 2 * len(index)


@pytest.mark.parametrize("dim", [2, 9])
def test_squared_gram_norms_by_either_matrix(dim: int) -> None:
    embeddings, labels = draw(12, dim), torch.tensor([0, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    norms = squared_gram_norms(embeddings, labels, torch.tensor([1, 2, 9]))
    for label in range(3):
        rows = embeddings[labels == label]
        torch.testing.assert_close(norms[label], sum((a @ b) ** 2 for a in rows for b in rows))
