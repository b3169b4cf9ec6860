"""Backbones against timm's, the small stem, and the paper's projector."""

import pytest
import timm
import torch
from torch import nn

from corinfomax import network
from corinfomax.recipes.fields import Backbone, Projector, Tuning
from corinfomax.recipes.published import RECIPES


def test_blocks_begin_as_identities_by_default():
    for zero in (True, False):
        model = network.build_backbone(Backbone(name="resnet18", zero_init_last=zero))
        lasts = [block.bn2.weight for stage in (model.layer1, model.layer2) for block in stage]
        assert all(bool((weight == (0 if zero else 1)).all()) for weight in lasts)


def test_a_backbone_is_timms_own():
    torch.manual_seed(0)
    ours = network.build_backbone(Backbone(name="resnet18"))
    torch.manual_seed(0)
    theirs = timm.create_model("resnet18", num_classes=0)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(a.equal(b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))


@pytest.mark.parametrize("stride", [1, 2])
def test_the_small_stem_keeps_small_images_large(stride):
    model = network.build_backbone(Backbone(small_stem=True, stem_stride=stride, layers=(1, 1, 1, 1)))
    assert model.conv1.kernel_size == (3, 3)
    shapes = []
    model.layer1.register_forward_hook(lambda _, inputs, __: shapes.append(inputs[0].shape))
    features = model(torch.zeros(2, 3, 32, 32))
    assert shapes == [(2, 64, 32 // stride, 32 // stride)]
    assert features.shape == (2, 512)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_the_papers_network_begins_as_the_published_one(name):
    """Torch's initialisation in the new stem and the linear layers, He's by fan-out in the other convolutions."""
    recipe = RECIPES[name].recipe
    torch.manual_seed(0)
    model = network.Network(recipe.backbone, recipe.projector, size=recipe.size)
    for layer_name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fan_in = layer.weight[0].numel()
            std = (1 / (3 * fan_in)) ** 0.5
            if isinstance(layer, nn.Conv2d) and layer_name != "backbone.conv1":
                std = (2 / (layer.out_channels * layer.kernel_size[0] ** 2)) ** 0.5
            few = 3 / layer.weight.numel() ** 0.5
            assert float(layer.weight.detach().std()) == pytest.approx(std, rel=max(0.02, few)), layer_name
        if isinstance(layer, nn.Linear) and layer.bias is not None:
            assert float(layer.bias.detach().abs().max()) == pytest.approx(layer.in_features**-0.5, rel=0.05)
        if isinstance(layer, nn.BatchNorm2d):
            assert bool((layer.weight == (0 if layer_name.endswith("bn2") else 1)).all()) and not layer.bias.any()
    assert float(model.backbone.conv1.weight.detach().std()) == pytest.approx(0.111, abs=0.004)


def test_the_weights_of_a_seed_stay_those_of_earlier_versions():
    """Scores in the docs are those of a seed: whoever changes the order of the draws measures them anew."""
    recipe = RECIPES["mnist5k"].recipe
    torch.manual_seed(0)
    model = network.Network(recipe.backbone, recipe.projector, size=recipe.size)
    drawn = [
        float(weight.detach().double().sum()) for weight in (model.backbone.conv1.weight, model.projector[0].weight)
    ]
    assert drawn == pytest.approx([-2.2762, -12.0591], abs=1e-3)


def test_residual_branches_start_at_zero():
    model = network.build_backbone(Backbone(name="resnet18"))
    assert all((block.bn2.weight == 0).all() for block in model.layer1)


@pytest.mark.parametrize("name", ["convnext_atto", "vit_tiny_patch16_224", "mobilenetv3_small_050", "resnet26"])
def test_any_timm_network_works(name):
    model = network.Network(Backbone(name=name), Projector(widths=(32, 8)))
    assert model.backbone(torch.zeros(2, 3, 224, 224)).shape == (2, network.feature_width(model.backbone))
    assert model(torch.randn(2, 3, 224, 224)).shape == (2, 8)


def test_the_projector_is_the_papers():
    layers = network.build_projector(512, Projector(widths=(2048, 2048, 64)))
    assert [type(layer) for layer in layers] == [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    assert [layer.bias is not None for layer in layers if isinstance(layer, nn.Linear)] == [True, True, False]
    with_norm = network.build_projector(512, Projector(widths=(8192, 8192, 512), batch_norm=True))
    norm = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert [type(layer) for layer in with_norm] == [*norm, *norm, nn.Linear]


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipes_network_gives_projections(name):
    recipe = RECIPES[name].recipe
    model = network.Network(recipe.backbone, recipe.projector)
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, recipe.projector.widths[-1])


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        (Backbone(name="resnet19"), "timm knows no network 'resnet19'"),
        (Backbone(name="vit_tiny_patch16_224", small_stem=True), "small_stem replaces"),
        (Backbone(name="vit_tiny_patch16_224", layers=(1, 1, 1, 1)), "does not take layers"),
        (Backbone(layers=(1, 1)), "a ResNet has four stages"),
        (Backbone(layers=(0, 1, 1, 1)), "the first needs a block"),
        (Backbone(channels=(8, 16, 32)), "a ResNet has four stages"),
        (Backbone(layers=(1, 1, 1, 0), channels=(8, 8, 8, 16)), "stage 3 has no block, so its width stays 8"),
    ],
)
def test_impossible_backbones_are_refused(backbone, message):
    with pytest.raises(ValueError, match=message):
        network.build_backbone(backbone)


def test_the_small_stem_is_as_wide_as_the_first_of_the_channels():
    narrow = network.build_backbone(Backbone(small_stem=True, layers=(1, 1, 1, 1), channels=(16, 32, 64, 128)))
    assert narrow.conv1.weight.shape == (16, 3, 3, 3)
    assert narrow.layer1[0].downsample is None
    assert narrow(torch.zeros(2, 3, 16, 16)).shape == (2, 128)
    # timm's initialisation: variance 2 / (fan out)
    for convolution in (narrow.conv1, narrow.layer1[0].conv1):
        assert float(convolution.weight.detach().std()) == pytest.approx((2 / (16 * 9)) ** 0.5, rel=0.15)
    # A Bottleneck's shortcut widens 64 channels, so its stem keeps timm's width.
    wide = network.build_backbone(
        Backbone(name="resnet50", small_stem=True, layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))
    )
    assert wide.conv1.out_channels == 64
    assert wide(torch.zeros(2, 3, 16, 16)).shape == (2, 32)


@pytest.mark.parametrize("name", ["xcit_nano_12_p8_224", "efficientvit_m0", "swin_tiny_patch4_window7_224"])
def test_the_next_side_that_a_network_takes_is_one(name):
    side = network.smallest_side(Backbone(name=name), 21)
    assert network.measure(Backbone(name=name), side) is not None
    assert 21 < side <= 64


def test_a_network_of_fixed_input_size_gets_the_views_size():
    model = network.build_backbone(Backbone(name="vit_tiny_patch16_224"), size=32)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 192)


def test_a_network_whose_blocks_timm_does_not_know_trains_whole():
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    network.freeze(backbone, Tuning(batch_norm="keep"))
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert not backbone[1].training
    with pytest.raises(
        ValueError, match=r"timm does not know the blocks of Sequential: train them all: --tuning.blocks 1"
    ):
        network.freeze(backbone, Tuning(blocks=0.5))
