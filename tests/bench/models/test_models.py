"""ResNet for CIFAR: the published sizes, the shortcut without parameters, weights that depend on the seed alone."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from bench.models import MODELS, ResidualBlock, resnet32, resnet_cifar


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.73)], ids=lambda value: str(value)
)
def test_sizes_are_those_of_the_paper(depth: int, millions: float) -> None:
    model = resnet_cifar(depth, 10)
    layers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert len(layers) == depth
    assert count(model) / 1e6 == pytest.approx(millions, abs=0.0051)


def test_resnet32_parameters() -> None:
    assert count(resnet32(10)) == 464_154
    model = resnet32(100)
    assert count(model) == 470_004
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert all(module.bias is None for module in convolutions)
    assert count(model) - sum(module.weight.numel() for module in convolutions) == 8_772


@pytest.mark.parametrize("depth", [2, 7, 30, 33, -4])
def test_depth_must_fit(depth: int) -> None:
    with pytest.raises(ValueError, match=rf"depth must be 6n \+ 2 .* got {depth}$"):
        resnet_cifar(depth, 10)


def test_num_classes_must_be_positive() -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        resnet32(0)


def test_stages_halve_the_image_and_double_the_width() -> None:
    model = resnet32(7)
    x = model.conv1(torch.ones(2, 3, 32, 32))
    for stage, shape in zip(
        (model.layer1, model.layer2, model.layer3), [(16, 32, 32), (32, 16, 16), (64, 8, 8)], strict=True
    ):
        assert len(stage) == 5
        x = stage(x)
        assert x.shape == (2, *shape)
    assert model(torch.ones(2, 3, 32, 32)).shape == (2, 7)


def test_shortcut_takes_every_second_pixel_and_appends_zeros() -> None:
    x = torch.arange(2 * 3 * 6 * 6, dtype=torch.float32).reshape(2, 3, 6, 6)
    block = ResidualBlock(3, 8, stride=2)
    shortcut = block.shortcut(x)
    assert shortcut.shape == (2, 8, 3, 3)
    for n in range(2):
        for channel in range(8):
            for row in range(3):
                for column in range(3):
                    expected = x[n, channel, 2 * row, 2 * column] if channel < 3 else 0
                    assert shortcut[n, channel, row, column] == expected
    assert ResidualBlock(3, 3, stride=1).shortcut(x) is x


def test_block_adds_the_shortcut_before_the_last_relu() -> None:
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    block = ResidualBlock(4, 8, stride=2)
    nn.init.zeros_(block.bn2.weight)  # leaves the shortcut alone
    assert torch.equal(block(x), torch.relu(block.shortcut(x)))


def test_weights_depend_on_the_seed_alone() -> None:
    first = resnet32(10, seed=3).state_dict()
    torch.rand(5)
    again = resnet32(10, seed=3).state_dict()
    other = resnet32(10, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


def test_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    resnet32(10, seed=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_do_not_depend_on_the_order_of_building() -> None:
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(lambda seed: resnet32(10, seed=seed), [0, 1, 0, 1]))
    assert torch.equal(models[0].conv1.weight, models[2].conv1.weight)
    assert torch.equal(models[1].fc.weight, models[3].fc.weight)
    assert torch.equal(models[1].fc.weight, resnet32(10, seed=1).fc.weight)


def test_batch_norm_begins_as_the_identity() -> None:
    for module in resnet32(10).modules():
        if isinstance(module, nn.BatchNorm2d):
            values = (module.weight, module.bias, module.running_mean, module.running_var, module.num_batches_tracked)
            for value, expected in zip(values, (1, 0, 0, 1, 0), strict=True):
                assert value is not None
                assert (value == expected).all()


def test_initial_variances() -> None:
    model = resnet32(100, seed=0)
    convolution = model.get_parameter("layer3.1.conv1.weight")
    assert convolution.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert model.fc.weight.std().item() == pytest.approx((1 / 64) ** 0.5, rel=0.05)
    assert not model.fc.bias.any()


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_every_depth_is_built_by_name(depth: int) -> None:
    model = MODELS[f"resnet{depth}"](5, seed=1)
    assert sum(isinstance(module, nn.Conv2d) for module in model.modules()) == depth - 1
    assert all(map(torch.equal, model.parameters(), resnet_cifar(depth, 5, seed=1).parameters()))
    assert model.fc.out_features == 5


def test_gradients_reach_every_parameter() -> None:
    model = resnet32(10)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    loss = nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 3]))
    for (name, _), gradient in zip(
        model.named_parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True
    ):
        assert gradient.isfinite().all(), name
        assert gradient.any(), name
