import numpy as np
import pytest
import torch
from torch.utils.data import DistributedSampler

from simo_lightning.data import ClassBalancedSampler, EvaluationSampler, pair_indices
from simo_lightning.data.sampler import evaluation_batch_size

UNEQUAL = torch.tensor([0] * 41 + [1] * 7 + [2] * 12 + [3] * 4 + [4] * 9)


def blocks_of(sampler, epoch):
    sampler.set_epoch(epoch)
    indices = torch.tensor(list(sampler))
    assert len(indices) == len(sampler)
    return indices.view(-1, sampler.batch_size)


def most_blocks(chunks, classes_per_batch):
    """Brute force: the most blocks of P different classes over every order of taking them."""
    best, states = 0, {tuple(sorted(chunks))}
    while True:
        after = set()
        for state in states:
            present = [place for place, count in enumerate(state) if count]
            for bits in range(2 ** len(present)):
                taken = [place for bit, place in enumerate(present) if bits >> bit & 1]
                if len(taken) == classes_per_batch:
                    after.add(tuple(sorted(count - (place in taken) for place, count in enumerate(state))))
        if not after:
            return best
        best, states = best + 1, after


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("labels", [torch.arange(120) % 6, UNEQUAL], ids=["equal", "unequal"])
def test_every_batch_is_balanced_on_every_rank_and_globally(labels, world_size):
    classes, images = 3, 2
    samplers = [ClassBalancedSampler(labels, classes, images, 5, rank, world_size) for rank in range(world_size)]
    whole = ClassBalancedSampler(labels, classes, images, 5)
    for epoch in range(4):
        shares = [blocks_of(sampler, epoch) for sampler in samplers]
        assert len({len(share) for share in shares}) == 1
        for share in shares:
            for block in share:
                assert len(block.unique()) == classes * images
                counts = labels[block].bincount()
                assert sorted(counts[counts > 0].tolist()) == [images] * classes
        union = torch.stack(shares, 1).flatten(0, 1)
        assert torch.equal(union, blocks_of(whole, epoch)[: len(union)])
        assert len(whole) // whole.batch_size - len(union) < world_size
        assert len(union.unique()) == union.numel()


def test_equal_classes_are_visited_once():
    labels = torch.arange(100) % 10
    sampler = ClassBalancedSampler(labels, 5, 2)
    for epoch in range(3):
        assert sorted(blocks_of(sampler, epoch).flatten().tolist()) == list(range(100))


def test_what_rests_in_one_epoch_comes_in_another():
    sampler = ClassBalancedSampler(UNEQUAL, 3, 2)
    seen = {index for epoch in range(30) for index in blocks_of(sampler, epoch).flatten().tolist()}
    assert seen == set(range(len(UNEQUAL)))


@pytest.mark.parametrize("seed", range(12))
def test_number_of_batches_against_brute_force(seed):
    random = np.random.default_rng(seed)
    chunks = random.integers(1, 6, size=4)
    labels = torch.from_numpy(np.repeat(np.arange(4), chunks * 2 + random.integers(0, 2, size=4)))
    for classes in range(1, 5):
        sampler = ClassBalancedSampler(labels, classes, 2, seed)
        expected = most_blocks(chunks.tolist(), classes)
        assert sampler.batches == expected
        assert len(blocks_of(sampler, seed)) == expected


def test_order_depends_on_seed_and_epoch_alone():
    first, again = (ClassBalancedSampler(UNEQUAL, 3, 2, seed=3) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(blocks_of(first, 2), blocks_of(again, 2))
    assert not torch.equal(blocks_of(first, 2), blocks_of(first, 3))
    other = ClassBalancedSampler(UNEQUAL, 3, 2, seed=4)
    assert not torch.equal(blocks_of(first, 2), blocks_of(other, 2))
    assert not torch.equal(blocks_of(first, 4), blocks_of(other, 3))  # seed + epoch would make them the same


def test_start_batch_leaves_out_and_keeps_the_length():
    sampler = ClassBalancedSampler(UNEQUAL, 3, 2, rank=1, world_size=2)
    everything, length = list(sampler), len(sampler)
    sampler.start_batch = 2
    assert list(sampler) == everything[2 * 6 :]
    assert len(sampler) == length


def test_indices_without_images_are_no_classes():
    labels = torch.tensor([0, 0, 3, 3, 7, 7])
    assert len(ClassBalancedSampler(labels, 3, 2)) == 6
    with pytest.raises(ValueError, match=r"classes_per_batch must lie in 1..3.*got 4"):
        ClassBalancedSampler(labels, 4, 2)


TAIL = torch.tensor([0] * 41 + [1] * 7 + [2] * 12 + [4] * 4 + [5] * 3 + [6] * 1)  # class 3 has no image
K = 4


def tail_sampler(small="repeat", sampling="natural", classes=3, seed=5, rank=0, world_size=1, labels=TAIL):
    return ClassBalancedSampler(labels, classes, K, seed, rank, world_size, small, sampling)


def appearances(blocks, labels=TAIL):
    """Batches that hold each class, and a check that each batch holds K images of each of its classes."""
    counts = torch.stack([labels[block].bincount(minlength=int(labels.max()) + 1) for block in blocks])
    assert set(counts.unique().tolist()) <= {0, K}
    assert ((counts > 0).sum(1) == (counts > 0).sum(1)[0]).all()
    return (counts > 0).sum(0).tolist()


@pytest.mark.parametrize("sampling", ["natural", "sqrt", "balanced"])
def test_small_classes_are_filled_evenly(sampling):
    sampler, seen = tail_sampler(sampling=sampling), set()
    for epoch in range(6):
        blocks = blocks_of(sampler, epoch)
        appearances(blocks)
        seen |= set(blocks.flatten().tolist())
        for block in blocks:
            for label, size in ((5, 3), (6, 1)):
                uses = block[TAIL[block] == label].unique(return_counts=True)[1].tolist()
                assert uses == [] or (len(uses) == size and max(uses) - min(uses) <= 1)
            large = block[(TAIL[block] != 5) & (TAIL[block] != 6)]
            assert len(large.unique()) == len(large)  # only small classes repeat within a batch
    assert {index for index in range(len(TAIL)) if TAIL[index] > 4} <= seen


def test_small_classes_are_left_out():
    for sampling in ("natural", "sqrt", "balanced"):
        sampler = tail_sampler("skip", sampling)
        counts = appearances(torch.cat([blocks_of(sampler, epoch) for epoch in range(5)]))
        assert counts[5:] == [0, 0]
        assert min(counts[label] for label in (0, 1, 2, 4)) > 0
    with pytest.raises(ValueError, match=r"lie in 1..4, the number of training classes of at least 4 images, got 5"):
        tail_sampler("skip", classes=5)


def test_natural_sampling_takes_at_most_one_pass():
    sampler = tail_sampler()
    for epoch in range(4):
        blocks = blocks_of(sampler, epoch)
        assert len(blocks) == most_blocks([10, 1, 3, 1, 1, 1], 3) == 3
        counts = appearances(blocks)
        assert all(count <= most for count, most in zip(counts, (10, 1, 3, 0, 1, 1, 1), strict=True))
        large = blocks[TAIL[blocks] < 5]
        assert len(large.unique()) == len(large)


def capped(weights, total, most):
    """Shares min(level * weight, most) with sum ``total``, by bisection."""
    low, high = 0.0, 1e9
    for _ in range(200):
        level = (low + high) / 2
        low, high = (level, high) if sum(min(level * w, most) for w in weights) < total else (low, level)
    return [min(low * w, most) for w in weights]


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("sampling", ["sqrt", "balanced"])
def test_appearances_are_those_of_the_definition(sampling, classes):
    sampler = tail_sampler(sampling=sampling, classes=classes)
    sizes = [41, 7, 12, 0, 4, 3, 1]
    batches = (10 + 1 + 3 + 1 + 1 + 1) // classes
    weights = [size**0.5 if sampling == "sqrt" else float(size > 0) for size in sizes]
    expected = np.array(capped(weights, batches * classes, batches))
    found = np.array([appearances(blocks_of(sampler, epoch)) for epoch in range(400)])
    assert (len(sampler), set(found.sum(1))) == (batches * classes * K, {batches * classes})
    assert (np.abs(found - expected) < 1 + 1e-6).all()
    # a rounded share has variance at most 1/4: five standard errors of the mean of 400 epochs
    assert np.abs(found.mean(0) - expected).max() < 5 * 0.5 / 20


@pytest.mark.parametrize("sampling", ["sqrt", "balanced"])
def test_a_pass_ends_before_a_class_is_used_again(sampling):
    sampler = tail_sampler(sampling=sampling)
    for epoch in range(5):
        blocks = blocks_of(sampler, epoch)
        counts = appearances(blocks)
        for label, chunks in ((0, 10), (1, 1), (2, 3), (4, 1)):
            uses = blocks[TAIL[blocks] == label].bincount()
            assert uses.max() <= -(-counts[label] // chunks)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("sampling", ["natural", "sqrt", "balanced"])
def test_ranks_share_an_epoch_of_small_classes(sampling, world_size):
    whole = tail_sampler(sampling=sampling)
    ranks = [tail_sampler(sampling=sampling, rank=rank, world_size=world_size) for rank in range(world_size)]
    for epoch in range(3):
        shares = [blocks_of(sampler, epoch) for sampler in ranks]
        union = torch.stack(shares, 1).flatten(0, 1)
        assert torch.equal(union, blocks_of(whole, epoch)[: len(union)])
        assert len(whole) // whole.batch_size - len(union) < world_size
    assert not torch.equal(blocks_of(whole, 0), blocks_of(whole, 1))
    assert torch.equal(blocks_of(tail_sampler(sampling=sampling), 1), blocks_of(whole, 1))


@pytest.mark.parametrize("sampling", ["natural", "sqrt", "balanced"])
def test_equal_classes_are_visited_once_however_they_are_sampled(sampling):
    labels = torch.arange(96) % 8
    for epoch in range(3):
        blocks = blocks_of(tail_sampler(sampling=sampling, classes=4, labels=labels), epoch)
        assert sorted(blocks.flatten().tolist()) == list(range(96))


def test_ten_thousand_classes():
    generator = torch.Generator().manual_seed(0)
    labels = torch.cat([torch.arange(10_000), (torch.rand(90_000, generator=generator) ** 3 * 10_000).long()])
    for sampling in ("natural", "balanced"):
        blocks = blocks_of(tail_sampler(sampling=sampling, classes=10, labels=labels), 0)
        counts = torch.tensor(appearances(blocks[:20], labels))
        assert counts.sum() == 200
        used = torch.zeros(len(blocks), 10_000, dtype=torch.bool).scatter_(1, labels[blocks], True).sum(0)
        assert used.min() >= (1 if sampling == "balanced" else 0)
        assert used.sum() == 10 * len(blocks)
        if sampling == "balanced":
            assert used.max() - used.min() <= 1


def test_lightning_takes_them_for_distributed_samplers():
    assert isinstance(ClassBalancedSampler(UNEQUAL, 2, 2), DistributedSampler)
    assert isinstance(EvaluationSampler(3), DistributedSampler)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((UNEQUAL, 6, 2), r"classes_per_batch must lie in 1..5, the number of training classes, got 6"),
        ((UNEQUAL, 0, 2), "classes_per_batch"),
        ((UNEQUAL, 2, 1), "samples_per_class must be at least 2"),
        ((UNEQUAL, 2, 5), "class 3 has 4 images, got 5"),
        ((UNEQUAL.float(), 2, 2), r"integers of shape \(N,\), got torch.float32"),
        ((UNEQUAL[None], 2, 2), r"integers of shape \(N,\)"),
        ((UNEQUAL - 1, 2, 2), "non-negative class indices, got -1"),
        ((UNEQUAL, 2, 2, -1), "seed must be non-negative, got -1"),
        ((torch.tensor([0, 0, 1, 1]), 2, 2, 0, 0, 2), "2 ranks for 1 batches"),
        ((UNEQUAL, 2, 2, 0, 0, 1, "fill"), "small_classes must be one of 'repeat', 'skip', 'error', got 'fill'"),
        ((UNEQUAL, 2, 2, 0, 0, 1, "skip", "log"), "class_sampling must be one of .*, got 'log'"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClassBalancedSampler(*arguments)


@pytest.mark.parametrize("size, world_size", [(1, 1), (10, 1), (10, 3), (11, 4), (4, 4)])
def test_evaluation_shares_hold_every_image_once(size, world_size):
    shares = [list(EvaluationSampler(size, rank, world_size)) for rank in range(world_size)]
    assert sorted(index for share in shares for index in share) == list(range(size))
    assert all(share == sorted(share) for share in shares)
    assert [len(EvaluationSampler(size, rank, world_size)) for rank in range(world_size)] == [len(s) for s in shares]


def test_evaluation_needs_an_image_for_each_rank():
    with pytest.raises(ValueError, match="got 2 images for 3 ranks"):
        EvaluationSampler(2, 0, 3)


def test_every_rank_evaluates_as_many_batches():
    for world_size in range(1, 6):
        for size in range(world_size, 60):
            for limit in range(1, 12):
                batch = evaluation_batch_size(size, world_size, limit)
                numbers = {-(-len(EvaluationSampler(size, rank, world_size)) // batch) for rank in range(world_size)}
                assert len(numbers) == 1
                assert batch <= max(limit, 5)


def test_pair_indices_against_a_loop():
    labels = torch.randint(3, (9,), generator=torch.Generator().manual_seed(0))
    similar, dissimilar = pair_indices(labels)
    pairs = [(i, j) for i in range(9) for j in range(i + 1, 9)]
    assert [tuple(p) for p in similar.tolist()] == [(i, j) for i, j in pairs if labels[i] == labels[j]]
    assert [tuple(p) for p in dissimilar.tolist()] == [(i, j) for i, j in pairs if labels[i] != labels[j]]
    assert [part.shape for part in pair_indices(labels[:1])] == [(0, 2), (0, 2)]
    with pytest.raises(ValueError, match="labels must have shape"):
        pair_indices(labels[None])


def test_a_sampler_keeps_its_labels_when_the_tensor_moves_to_shared_memory() -> None:
    """As a loader with spawned workers moves it, which frees the memory that the tensor had before."""
    labels = torch.arange(3).repeat(100_000)
    sampler = ClassBalancedSampler(labels, classes_per_batch=3, samples_per_class=4)
    expected = [*sampler]
    labels.share_memory_().zero_()
    assert [*sampler] == expected
