"""Encoders against torchvision's own models, and each choice by its shapes, parameters and gradients."""

from copy import deepcopy

import pytest
import torch
import torchvision
from torch import Tensor, nn

from simo_lightning.encoders import ImageEncoder
from tests.bounds import assert_float32_error


def images(n: int = 2, channels: int = 3, size: int = 32) -> Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(0))


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_imagenet_stem_at_full_width_is_torchvisions_model(name):
    theirs = torchvision.models.get_model(name, weights=None)
    theirs.fc = nn.Identity()
    ours = ImageEncoder(name, projector="none", embedding_dim=None, stem="imagenet")
    ours.backbone.load_state_dict(theirs.state_dict(), strict=True)
    ours.eval()
    theirs.eval()
    with torch.no_grad():
        torch.testing.assert_close(ours(images(size=64)), theirs(images(size=64)), rtol=0, atol=0)


def test_small_stem_differs_from_torchvision_only_by_its_first_convolution():
    theirs = torchvision.models.resnet18(weights=None)
    fewer = (7 * 7 - 3 * 3) * 3 * 64
    encoder = ImageEncoder("resnet18", embedding_dim=16, image_size=64)
    assert encoder.stem == "small"
    assert parameters(encoder.backbone) == parameters(theirs) - parameters(theirs.fc) - fewer
    assert parameters(encoder.projector) == 512 * 16 + 16


@pytest.mark.parametrize(("stem", "positions"), [("small", 32), ("small_stride2", 16), ("imagenet", 8)])
def test_stem_sets_the_resolution_of_the_first_stage(stem, positions):
    encoder = ImageEncoder("resnet10", stem=stem, width=0.125)
    seen = []
    encoder.backbone.layer1.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    encoder(images())
    assert seen == [(2, 8, positions, positions)]


@pytest.mark.parametrize(
    ("name", "width", "features"), [("resnet10", 0.5, 256), ("resnet10", 0.3, 154), ("resnet50", 0.25, 512)]
)
def test_width_scales_every_channel(name, width, features):
    encoder = ImageEncoder(name, width=width, stem="small_stride2")
    assert encoder.feature_dim == features
    assert encoder.features(images()).shape == (2, features)
    widths = {module.out_channels for module in encoder.backbone.modules() if isinstance(module, nn.Conv2d)}
    full = ImageEncoder(name, stem="small_stride2")
    assert widths == {round(m.out_channels * width) for m in full.backbone.modules() if isinstance(m, nn.Conv2d)}


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("resnet18", {"norm": "layer", "stem": "small_stride2"}, 16),
        ("resnet18", {"norm": "group", "width": 0.3, "stem": "small_stride2"}, 16),
        ("mobilenet_v3_small", {}, 32),
        ("mobilenet_v3_small", {"norm": "layer"}, 32),
        ("mobilenet_v3_small", {"norm": "batch", "in_channels": 1}, 32),
        ("convnext_tiny", {"in_channels": 2}, 32),
        ("resnet18", {"in_channels": 1, "width": 0.25}, 8),
        ("resnet18", {"projector": "mlp", "hidden_dim": 24, "width": 0.25}, 8),
        ("resnet18", {"projector": "mlp", "norm": "layer", "width": 0.25}, 8),
        ("resnet18", {"projector": "none", "embedding_dim": None, "width": 0.25}, 8),
    ],
)
def test_every_parameter_gets_a_finite_gradient(name, options, size):
    encoder = ImageEncoder(name, **{"embedding_dim": 5, **options})
    batch = images(4, options.get("in_channels", 3), size)
    embeddings = encoder(batch)
    assert embeddings.shape == (4, encoder.embedding_dim)
    embeddings.square().sum().backward()
    for parameter_name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize(
    ("norm", "kind", "groups"),
    [("batch", nn.BatchNorm2d, None), ("layer", nn.GroupNorm, 1), ("group", nn.GroupNorm, 32)],
)
def test_norm_is_everywhere_the_chosen_one(norm, kind, groups):
    encoder = ImageEncoder("resnet10", norm=norm)
    norms = [m for m in encoder.modules() if isinstance(m, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm)]
    assert len(norms) == 1 + 4 * 2 + 3  # stem, blocks, shortcuts
    assert all(isinstance(module, kind) for module in norms)
    assert groups is None or all(module.num_groups == groups for module in norms)


def test_layer_norm_is_over_channels_and_positions():
    norm = ImageEncoder("resnet10", norm="layer", width=0.125).backbone.bn1.double()
    values = images(3, 8, 4).double() * 7 + 5
    expected = (values - values.mean((1, 2, 3), keepdim=True)) / (
        values.var((1, 2, 3), correction=0, keepdim=True) + norm.eps
    ).sqrt()
    torch.testing.assert_close(norm(values), expected, rtol=1e-12, atol=1e-12)


def test_group_norm_takes_the_largest_number_of_groups_that_divides():
    norm = ImageEncoder("resnet10", norm="group", width=0.3).backbone.bn1  # 19 channels
    assert (norm.num_channels, norm.num_groups) == (19, 19)
    norm = ImageEncoder("resnet10", norm="group", width=0.75).backbone.bn1  # 48 channels
    assert (norm.num_channels, norm.num_groups) == (48, 24)


def test_a_vit_has_no_head_and_its_error_names_the_smallest_size():
    encoder = ImageEncoder("vit_b_32", embedding_dim=3).eval()
    assert encoder.feature_dim == 768
    with torch.no_grad():
        assert encoder(images(1, size=224)).shape == (1, 3)
    with pytest.raises(ValueError, match="at least 224 x 224 pixels for this backbone, got 32 x 32"):
        encoder(images(1))


def test_first_convolution_for_other_channels_keeps_the_scale_of_the_weights():
    three = torchvision.models.mobilenet_v3_small(weights=None).features[0][0]
    one = ImageEncoder("mobilenet_v3_small", in_channels=1).backbone.features[0][0]
    assert one.weight.shape == (16, 1, 3, 3)
    assert (one.stride, one.padding, one.bias) == (three.stride, three.padding, None)
    assert 0.7 < float((one.weight.std() / three.weight.std()).detach()) < 1.4


def test_a_module_is_a_backbone():
    pooled = nn.Sequential(nn.Conv2d(5, 6, 3), nn.AdaptiveAvgPool2d(1))  # (N, 6, 1, 1)
    encoder = ImageEncoder(pooled, embedding_dim=2, feature_dim=6)
    assert encoder.features(images(2, 5)).shape == (2, 6)
    assert encoder(images(2, 5)).shape == (2, 2)
    pooled.feature_dim = 6
    assert ImageEncoder(pooled, embedding_dim=None, projector="none").embedding_dim == 6


def test_the_same_seed_gives_the_same_weights():
    states = []
    for _ in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            states.append(ImageEncoder("resnet10", width=0.25).state_dict())
    assert all(torch.equal(first, second) for first, second in zip(*(s.values() for s in states), strict=True))


def test_exports_with_a_free_batch_size():
    encoder = ImageEncoder("resnet10", width=0.125, stem="small_stride2").eval()
    exported = torch.export.export(encoder, (images(2),), dynamic_shapes={"images": {0: torch.export.Dim("n")}})
    exact = deepcopy(encoder).double()(images(5).double())
    assert_float32_error(exported.module()(images(5)), encoder(images(5)), exact)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "resnet19"}, r"got 'resnet19'; do you mean resnet1\d"),
        ({"backbone": "squeezenet1_1"}, "'squeezenet1_1' has no linear classifier"),
        (
            {"backbone": "shufflenet_v2_x0_5", "norm": "layer"},
            "norm='layer' does not fit backbone 'shufflenet_v2_x0_5'",
        ),
        ({"backbone": "densenet121", "norm": "group"}, "norm='group' does not fit backbone 'densenet121'"),
        ({"backbone": "convnext_tiny", "norm": "batch"}, "norm='batch' does not fit backbone 'convnext_tiny'"),
        ({"backbone": "mobilenet_v2", "stem": "small"}, "stem must be left at None for backbone 'mobilenet_v2'"),
        ({"backbone": "mobilenet_v2", "width": 0.5}, "width must be left at 1.0 for backbone 'mobilenet_v2'"),
        ({"backbone": nn.Flatten(), "width": 2}, "width must be left at 1.0 for a backbone given as a module, got 2"),
        ({"backbone": nn.Flatten()}, "feature_dim, .* must be given .* got None for Flatten"),
        ({"backbone": "resnet10", "feature_dim": 4}, "feature_dim is only for a backbone given as a module, got 4"),
        ({"backbone": "resnet10", "width": 0}, "width must be above 0, got 0"),
        ({"backbone": "resnet10", "norm": "instance"}, "norm must be one of .* got 'instance'"),
        ({"backbone": "resnet10", "stem": "tiny"}, "stem must be one of .* got 'tiny'"),
        ({"backbone": "resnet10", "embedding_dim": 0}, "embedding_dim must be at least 1, got 0"),
        ({"backbone": "resnet10", "projector": "deep"}, "projector must be one of .* got 'deep'"),
        ({"backbone": "resnet10", "hidden_dim": 8}, "hidden_dim is only for projector='mlp', got hidden_dim=8"),
        ({"backbone": "resnet10", "projector": "none"}, "embedding_dim must be 512 or None, got 16"),
    ],
)
def test_wrong_arguments_raise(options, message):
    with pytest.raises(ValueError, match=message):
        ImageEncoder(**options)


def test_images_and_features_of_the_wrong_shape_raise():
    encoder = ImageEncoder("resnet10", width=0.125)
    with pytest.raises(ValueError, match=r"images must have shape \(N, 3, H, W\), got \(2, 1, 32, 32\)"):
        encoder(images(channels=1))
    with pytest.raises(ValueError, match=r"images must have shape \(N, 3, H, W\), got \(3, 32, 32\)"):
        encoder(images()[0])
    with pytest.raises(ValueError, match=r"\(N, feature_dim=7\), got \(2, 3072\)"):
        ImageEncoder(nn.Flatten(), feature_dim=7)(images())
    with pytest.raises(ValueError, match=r"\(N, feature_dim=3\), got \(2, 3, 32, 32\)"):
        ImageEncoder(nn.Identity(), feature_dim=3)(images())
