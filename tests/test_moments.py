import pytest
import torch
from torch import Tensor

from simo_lightning.functional import class_moments
from simo_lightning.functional.moments import class_blocks, class_sums, compact_labels


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


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32], ids=str)
def test_labels_of_any_integer_dtype(dtype: torch.dtype) -> None:
    embeddings, labels = draw(9, 3), torch.arange(9) % 4
    for found, expected in zip(
        class_moments(embeddings, labels.to(dtype), 5), class_moments(embeddings, labels, 5), strict=True
    ):
        assert torch.equal(found, expected)


def test_an_embedding_that_is_not_finite_changes_the_moments_of_its_class_alone() -> None:
    embeddings, labels = draw(8, 3), torch.tensor([0, 1, 1, 2, 2, 2, 3, 3])  # classes 2 and 3 share a padded block
    expected = class_moments(embeddings, labels, 4)
    embeddings[0] = torch.nan
    found = class_moments(embeddings, labels, 4)
    assert found.second[0].isnan().all()
    for values, whole in zip(found, expected, strict=True):
        assert torch.equal(values[1:], whole[1:])


@pytest.mark.parametrize(
    "sizes", [[4, 4, 4], [1, 2, 3, 4, 30, 5], [100] + [1] * 50, [3, 0, 2, 0]], ids=["equal", "ragged", "tail", "empty"]
)
def test_blocks_hold_every_index_once_and_fewer_than_twice_as_many(sizes: list[int]) -> None:
    index = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(0))]
    seen, area = {}, 0
    for members, block in class_blocks(index, torch.tensor(sizes)):
        area += block.numel()
        for member, indices in zip(members.tolist(), block, strict=True):
            seen[member] = indices[indices >= 0].tolist()
    assert seen == {c: (index == c).nonzero().flatten().tolist() for c, size in enumerate(sizes) if size}
    assert area < 2 * len(index)
