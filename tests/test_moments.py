import math

import pytest
import torch
from torch import Tensor

from simo_lightning.functional import class_moments
from simo_lightning.functional.moments import ClassMoments, class_blocks, class_sums, compact_labels


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
        torch.testing.assert_close(moments.squared_norms[label], sum(row @ row for row in rows))
        torch.testing.assert_close(moments.fourth[label], sum((row @ row) ** 2 for row in rows))
    torch.testing.assert_close(moments.second_moment, sum(torch.outer(row, row) for row in embeddings))


def test_moments_merge_exactly() -> None:
    embeddings, labels = draw(30, 4), torch.arange(30) % 3
    whole = class_moments(embeddings, labels, 3)
    first, second = class_moments(embeddings[:7], labels[:7], 3), class_moments(embeddings[7:], labels[7:], 3)
    merged = first.merge(second).tensors()
    assert merged.keys() == whole.tensors().keys()
    for name, expected in whole.tensors().items():
        torch.testing.assert_close(merged[name], expected, rtol=1e-12, atol=1e-12)
    assert first.merge(class_moments(embeddings[7:], labels[7:], 3, second_budget_mb=0)).second is None
    with pytest.raises(ValueError, match=r"same \(C, D\) to merge, got \(3, 4\) and \(2, 4\)"):
        whole.merge(class_moments(embeddings[:2], torch.tensor([0, 1]), 2))


def test_batches_added_in_place_equal_the_whole() -> None:
    embeddings, labels = draw(9_000, 3), torch.arange(9_000) * 7 % 40  # more than one chunk
    whole, moments = class_moments(embeddings, labels, 40), ClassMoments.zeros(40, 3)
    before = {name: value.data_ptr() for name, value in moments.tensors().items()}
    for batch, own in zip(embeddings.split(500), labels.split(500), strict=True):
        moments.add_(batch, own)
    for name, value in moments.tensors().items():
        assert value.data_ptr() == before[name]
        torch.testing.assert_close(value, getattr(whole, name), rtol=1e-12, atol=1e-12)


def test_a_batch_takes_no_memory_that_grows_with_the_classes() -> None:
    """Bytes that torch allocates for a batch of 50, by its profiler: (C, D) would be 16 MB."""
    moments, (embeddings, labels) = ClassMoments.zeros(100_000, 20), (draw(50, 20), torch.arange(50) * 1_999)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        moments.add_(embeddings, labels)
    assert sum(max(event.self_cpu_memory_usage, 0) for event in profiler.key_averages()) < 1e6


def test_the_second_moments_of_classes_are_kept_within_the_budget() -> None:
    assert ClassMoments.zeros(1_000, 178, device="meta").second.nbytes <= 256e6  # type: ignore[union-attr]
    assert ClassMoments.zeros(1_000, 179).second is None
    assert ClassMoments.zeros(1_000, 179, torch.float32, "meta").second is not None
    assert ClassMoments.zeros(1_000, 179, device="meta", second_budget_mb=257).second is not None
    embeddings, labels = draw(30, 4), torch.arange(30) % 3
    within, without = (class_moments(embeddings, labels, 3, second_budget_mb=budget) for budget in (1, 0))
    assert (within.second is None, without.second is None) == (False, True)
    torch.testing.assert_close(within.second.sum(dim=0), without.second_moment)  # type: ignore[union-attr]
    line = "^overlap requires moments with second, got None: .* 10,000 classes in 512 dimensions take 20,972 MB, above"
    with pytest.raises(ValueError, match=line):
        ClassMoments.zeros(10_000, 512).required_second("overlap")
    with pytest.raises(ValueError, match="second_budget_mb must be at least 0, got -1"):
        ClassMoments.zeros(3, 2, second_budget_mb=-1)
    with pytest.raises(
        ValueError, match=r"must fit in 4 GiB of torch.float64, got \(10000000000 \+ 2\) \* 2 = 149.0 GiB"
    ):
        ClassMoments.zeros(10**10, 2)


def test_float32_sums_of_many_batches_keep_the_error_of_one_addition() -> None:
    """Against exact sums: what additions round off is kept, where plain sums of 1,000 batches lose digits."""
    embeddings, labels = 1 + draw(4_000, 2).float().abs(), torch.arange(4_000) % 2
    moments, rest, plain = (ClassMoments.zeros(2, 2, torch.float32) for _ in range(3))
    for start in range(0, len(labels), 4):
        rows = slice(start, start + 4)
        moments.add_(embeddings[rows], labels[rows], rest)
        plain.add_(embeddings[rows], labels[rows])
    exact = torch.stack(
        [torch.tensor([math.fsum(column) for column in embeddings[labels == c].T.tolist()]) for c in (0, 1)]
    )
    unit = torch.finfo(torch.float32).eps / 2
    error, lost = (((sums - exact.double()).abs() / exact).max() for sums in (moments.merge(rest).sums, plain.sums))
    assert error <= 3 * unit  # of a batch's own sum of two rows, of the last addition, and of the reference's rounding
    assert lost > 6 * unit


def test_a_value_is_cached_until_more_is_added() -> None:
    calls = []

    def total(moments: ClassMoments) -> float:
        calls.append(1)
        return float(moments.counts.sum())

    moments = class_moments(draw(4, 2), torch.arange(4) % 2, 2)
    assert [moments.cached(total), moments.cached(total), len(calls)] == [4, 4, 1]
    moments.add_(draw(2, 2), torch.arange(2))
    assert [moments.cached(total), len(calls)] == [6, 2]


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
    found = class_moments(embeddings, labels.to(dtype), 5).tensors()
    for name, expected in class_moments(embeddings, labels, 5).tensors().items():
        assert torch.equal(found[name], expected)


def test_an_embedding_that_is_not_finite_changes_the_moments_of_its_class_alone() -> None:
    embeddings, labels = draw(8, 3), torch.tensor([0, 1, 1, 2, 2, 2, 3, 3])  # classes 2 and 3 share a padded block
    expected = class_moments(embeddings, labels, 4)
    embeddings[0] = torch.nan
    found = class_moments(embeddings, labels, 4)
    assert found.second[0].isnan().all()
    for name in ("counts", "sums", "squared_norms", "fourth", "second"):
        assert torch.equal(getattr(found, name)[1:], getattr(expected, name)[1:])


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
