"""The other papers' models: their published sizes, independent restatements of what they compute, seeded weights."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional

from bench.models import MODELS, alexnet, alexnet_fc, googlenet, lstm, ncf, resnet9, resnet18, resnet50, senet18
from bench.models.language import detached

IMAGE_MODELS = [alexnet, alexnet_fc, resnet9, resnet18, resnet50, senet18, googlenet]


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def images(num: int, side: int = 32) -> torch.Tensor:
    return torch.randn(num, 3, side, side, generator=torch.Generator().manual_seed(7))


def threshold(num_parameters: int) -> float:
    """Sahu et al. 2021, table 6: λ = 1 / (2·√k_min), k_min a count, 0.1% of the parameters."""
    return 1 / (2 * math.sqrt(math.ceil(0.001 * num_parameters)))


# ---- sizes


@pytest.mark.parametrize(
    ("build", "num_classes", "num_parameters", "stated"),
    [
        (resnet18, 10, 11_173_962, 4.73e-3),
        (resnet18, 100, 11_220_132, 4.72e-3),
        (googlenet, 10, 6_166_250, 6.37e-3),
        (googlenet, 100, 6_258_500, 6.32e-3),
        (senet18, 10, 11_389_726, 4.68e-3),
        (senet18, 100, 11_436_256, 4.68e-3),
    ],
)
def test_sizes_are_those_that_the_stated_thresholds_imply(
    build: Callable[..., nn.Module], num_classes: int, num_parameters: int, stated: float
) -> None:
    assert count(build(num_classes)) == num_parameters
    assert round(threshold(num_parameters), 5) == stated


@pytest.mark.parametrize(
    ("build", "num_parameters"), [(alexnet, 2_255_296), (alexnet_fc, 23_272_266), (resnet9, 6_573_120)]
)
def test_sizes_of_the_layerwise_papers_models(build: Callable[..., nn.Module], num_parameters: int) -> None:
    assert count(build(10)) == num_parameters


def test_sizes_of_resnet50() -> None:
    assert count(resnet50(1_000, imagenet=True)) == 25_557_032  # torchvision's
    assert count(resnet50(10)) == 23_520_842  # kuangliu's


def test_size_of_the_language_model() -> None:
    assert count(lstm(28_869)) == 28_949_319


def test_size_of_ncf() -> None:
    assert count(ncf(138_493, 26_744)) == 31_832_577


# ---- what is computed


def normalised(x: torch.Tensor, norm: nn.BatchNorm2d) -> torch.Tensor:
    """Batch norm in evaluation mode, from its definition."""
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    scale = norm.weight / torch.sqrt(var + norm.eps)
    return (x - mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]


def with_statistics(model: nn.Module) -> nn.Module:
    """In evaluation mode, with running statistics, scales and shifts that are not trivial."""
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight.data, module.bias.data):
                assert tensor is not None
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.eval()


class Walk:
    """The model's layers in the order of `modules()`, taken one by one."""

    def __init__(self, model: nn.Module) -> None:
        leaves = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
        self.layers = iter([module for module in model.modules() if isinstance(module, leaves)])

    def conv(self, x: torch.Tensor, stride: int = 1, norm: bool = True) -> torch.Tensor:
        layer = next(self.layers)
        assert isinstance(layer, nn.Conv2d)
        x = functional.conv2d(x, layer.weight, layer.bias, stride, layer.kernel_size[0] // 2)
        return normalised(x, next(self.layers)) if norm else x

    def linear(self, x: torch.Tensor) -> torch.Tensor:
        layer = next(self.layers)
        assert isinstance(layer, nn.Linear)
        return functional.linear(x, layer.weight, layer.bias)

    def end(self) -> None:
        assert next(self.layers, None) is None


def largest(x: torch.Tensor, side: int) -> torch.Tensor:
    """The largest of each square."""
    n, channels, height, width = x.shape
    return x.view(n, channels, height // side, side, width // side, side).amax((3, 5))


@pytest.mark.parametrize("width", [1.0, 0.25])
def test_resnet9_restated(width: float) -> None:
    """conv_bn, pool and residual in the order of dawn.py's dictionaries."""
    model = with_statistics(resnet9(10, width=width, seed=2))
    walk, x = Walk(model), images(2)
    x = walk.conv(x).relu()
    x = largest(walk.conv(x).relu(), 2)
    x = x + walk.conv(walk.conv(x).relu()).relu()
    x = largest(walk.conv(x).relu(), 2)
    x = largest(walk.conv(x).relu(), 2)
    x = x + walk.conv(walk.conv(x).relu()).relu()
    x = 0.125 * walk.linear(largest(x, 4).flatten(1))
    walk.end()
    assert torch.allclose(model(images(2)), x, rtol=1e-4, atol=1e-5)


def test_alexnet_restated() -> None:
    model = with_statistics(alexnet(10, seed=2))
    walk, x = Walk(model), images(2)
    x = largest(walk.conv(x, stride=2).relu(), 2)
    assert x.shape == (2, 64, 8, 8)
    x = largest(walk.conv(x).relu(), 2)
    x = walk.conv(walk.conv(x).relu()).relu()
    x = largest(largest(walk.conv(x).relu(), 2), 2)
    x = 0.125 * walk.linear(x.flatten(1))
    walk.end()
    assert torch.allclose(model(images(2)), x, rtol=1e-4, atol=1e-5)


def test_alexnet_fc_restated() -> None:
    model = alexnet_fc(10, seed=2).eval()
    walk, x = Walk(model), images(2)
    x = largest(walk.conv(x, stride=2, norm=False).relu(), 2)
    x = largest(walk.conv(x, norm=False).relu(), 2)
    x = walk.conv(walk.conv(x, norm=False).relu(), norm=False).relu()
    x = largest(walk.conv(x, norm=False).relu(), 2)
    assert x.shape == (2, 256, 2, 2)
    x = walk.linear(walk.linear(walk.linear(x.flatten(1)).relu()).relu())
    walk.end()
    assert torch.allclose(model(images(2)), x, rtol=1e-4, atol=1e-6)


def test_resnet18_restated() -> None:
    model = with_statistics(resnet18(10, width=0.5, seed=2))
    walk, x = Walk(model), images(2)
    x = walk.conv(x).relu()
    for i in range(8):
        changes = i in (2, 4, 6)
        y = walk.conv(walk.conv(x, stride=1 + changes).relu())
        x = (y + (walk.conv(x, stride=2) if changes else x)).relu()
    assert x.shape == (2, 256, 4, 4)
    x = walk.linear(x.mean((2, 3)))
    walk.end()
    assert torch.allclose(model(images(2)), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("imagenet", "side"), [(False, 32), (True, 64)])
def test_resnet50_restated(imagenet: bool, side: int) -> None:
    model = with_statistics(resnet50(10, width=0.125, imagenet=imagenet, seed=2))
    walk, x = Walk(model), images(2, side)
    x = walk.conv(x, stride=1 + imagenet).relu()
    if imagenet:
        x = functional.max_pool2d(x, 3, 2, padding=1)
    for stage, blocks in enumerate((3, 4, 6, 3)):
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            y = walk.conv(walk.conv(walk.conv(x).relu(), stride=stride).relu())
            x = (y + (x if block else walk.conv(x, stride=stride))).relu()
    assert x.shape == (2, 256, side // (32 if imagenet else 8), side // (32 if imagenet else 8))
    x = walk.linear(x.mean((2, 3)))
    walk.end()
    assert torch.allclose(model(images(2, side)), x, rtol=1e-4, atol=1e-5)


def test_senet18_restated() -> None:
    model = with_statistics(senet18(10, width=0.5, seed=2))
    walk, x = Walk(model), images(2)
    x = walk.conv(x).relu()
    for i in range(8):
        changes = i in (2, 4, 6)
        y = walk.conv(walk.conv(x, stride=1 + changes).relu()).relu()
        shortcut = walk.conv(x, stride=2) if changes else x
        gate = torch.sigmoid(walk.linear(walk.linear(y.mean((2, 3))).relu()))
        x = (y * gate[:, :, None, None] + shortcut).relu()
    assert x.shape == (2, 258, 4, 4)
    x = walk.linear(x.mean((2, 3)))
    walk.end()
    assert torch.allclose(model(images(2)), x, rtol=1e-4, atol=1e-5)


def test_googlenet_restated() -> None:
    model = with_statistics(googlenet(10, width=0.25, seed=2))
    walk, x = Walk(model), images(2)
    x = walk.conv(x).relu()
    for i in range(9):
        if i in (2, 7):
            x = functional.max_pool2d(x, 3, 2, padding=1)
        single = walk.conv(x).relu()
        three = walk.conv(walk.conv(x).relu()).relu()
        five = walk.conv(walk.conv(walk.conv(x).relu()).relu()).relu()
        pool = walk.conv(functional.max_pool2d(x, 3, 1, padding=1)).relu()
        x = torch.cat((single, three, five, pool), 1)
    assert x.shape == (2, 256, 8, 8)
    x = walk.linear(x.mean((2, 3)))
    walk.end()
    assert torch.allclose(model(images(2)), x, rtol=1e-4, atol=1e-5)


def test_language_model_restated() -> None:
    """The cell's equations, word by word; the state of one call is the next one's."""
    model = lstm(11, units=6, num_layers=2, seed=4).eval()
    words = torch.randint(0, 11, (5, 3), generator=torch.Generator().manual_seed(0))
    weights = dict(model.lstm.named_parameters())
    hidden = [torch.zeros(3, 6) for _ in range(2)]
    cell = [torch.zeros(3, 6) for _ in range(2)]
    expected = []
    for row in words:
        x = model.embedding[row]
        for layer in range(2):
            gates = x @ weights[f"weight_ih_l{layer}"].T + weights[f"bias_ih_l{layer}"]
            gates = gates + hidden[layer] @ weights[f"weight_hh_l{layer}"].T + weights[f"bias_hh_l{layer}"]
            i, f, g, o = gates.split(6, 1)
            cell[layer] = f.sigmoid() * cell[layer] + i.sigmoid() * g.tanh()
            x = hidden[layer] = o.sigmoid() * cell[layer].tanh()
        expected.append(x @ model.embedding.T + model.bias)
    logits, state = model(words, model.initial_state(3))
    assert torch.allclose(logits, torch.stack(expected), atol=1e-6)
    first, middle = model(words[:2], model.initial_state(3))
    assert middle[0].requires_grad
    middle = detached(middle)
    assert not any(part.requires_grad for part in middle)
    second, last = model(words[2:], middle)
    assert torch.allclose(torch.cat((first, second)), logits, atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(last, state, strict=True))


def test_language_models_dropout() -> None:
    model = lstm(11, units=6, num_layers=2, dropout=0.5, seed=4)
    words = torch.zeros(5, 3, dtype=torch.int64)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first, _ = model(words, model.initial_state(3))
        second, _ = model(words, model.initial_state(3))
    assert not torch.equal(first, second)
    assert (model.embedding == lstm(11, units=6, num_layers=2, dropout=0.5, seed=4).embedding).all()


def test_one_layer_has_no_dropout_between_layers() -> None:
    assert lstm(11, units=6, num_layers=1).lstm.dropout == 0


def test_ncf_restated() -> None:
    model = ncf(20, 30, factors=5, layers=(8, 7, 3), seed=4).eval()
    users, items = torch.tensor([3, 19, 0, 3]), torch.tensor([29, 0, 7, 8])
    product = model.mf_users.weight[users] * model.mf_items.weight[items]
    x = torch.cat((model.mlp_users.weight[users], model.mlp_items.weight[items]), 1)
    walk = Walk(model)
    x = walk.linear(walk.linear(x).relu()).relu()
    x = walk.linear(torch.cat((product, x), 1))[:, 0]
    walk.end()
    assert torch.allclose(model(users, items), x, atol=1e-7)


# ---- initial weights


def small_models() -> dict[str, Callable[[int], nn.Module]]:
    return {
        **{build.__name__: lambda seed, build=build: build(5, width=0.25, seed=seed) for build in IMAGE_MODELS},
        "senet18": lambda seed: senet18(5, seed=seed),  # narrow ones have gates of one neuron, which may be dead
        "resnet50 for ImageNet": lambda seed: resnet50(5, width=0.1, imagenet=True, seed=seed),
        "lstm": lambda seed: lstm(50, units=9, seed=seed),
        "ncf": lambda seed: ncf(12, 9, factors=3, layers=(4, 3), seed=seed),
    }


@pytest.mark.parametrize("name", small_models())
def test_weights_depend_on_the_seed_alone(name: str) -> None:
    build = small_models()[name]
    first = build(3).state_dict()
    state = torch.get_rng_state()
    torch.rand(5)
    torch.set_rng_state(state)
    with ThreadPoolExecutor(4) as pool:
        models = [model.state_dict() for model in pool.map(build, [3, 4, 3, 4])]
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in first.items():
        assert torch.equal(value, models[0][key])
        assert torch.equal(value, models[2][key])
        assert torch.equal(models[1][key], models[3][key])
        if value.dim() > 1:  # biases and batch norm may be constants
            assert not torch.equal(value, models[1][key])


@pytest.mark.parametrize("name", small_models())
def test_gradients_reach_every_parameter(name: str) -> None:
    model = small_models()[name](0)
    if name == "lstm":
        words = torch.arange(51) % 50
        logits, _ = model(words[:50].view(5, 10), model.initial_state(10))
        loss = functional.cross_entropy(logits.flatten(0, 1), words[1:])
    elif name == "ncf":
        users, items = torch.arange(24) % 12, torch.arange(24) % 9
        loss = functional.binary_cross_entropy_with_logits(model(users, items), (users % 2).float())
    else:
        loss = functional.cross_entropy(model(images(20)), torch.arange(20) % 5)
    names, parameters = zip(*model.named_parameters(), strict=True)
    for key, gradient in zip(names, torch.autograd.grad(loss, parameters), strict=True):
        assert gradient.isfinite().all(), key
        assert gradient.any(), key
        assert gradient.dtype == torch.float32


def test_default_weights_are_those_of_pytorchs_constructors() -> None:
    """Uniform in ±1/√fan-in: bounds reached, none passed, and the variance of such a distribution."""
    model = resnet18(10)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            bound = module.weight[0].numel() ** -0.5
            assert 0.98 * bound < module.weight.abs().max() <= bound
            assert module.weight.var().item() == pytest.approx(bound**2 / 3, rel=0.1)
    reference = nn.Conv2d(64, 128, 3)
    assert 0.98 < reference.weight.abs().max().item() * (64 * 9) ** 0.5 <= 1 + 1e-6
    # An LSTM's: ±1/√units.
    bound = 40**-0.5
    for parameter in lstm(7, units=40).lstm.parameters():
        assert 0.9 * bound < parameter.abs().max() <= bound


def test_initial_weights_of_the_others() -> None:
    imagenet = resnet50(10, width=0.5, imagenet=True)
    weight = next(m.weight for m in reversed(list(imagenet.modules())) if isinstance(m, nn.Conv2d))
    assert weight.std().item() == pytest.approx((2 / weight.shape[0]) ** 0.5, rel=0.05)
    model = lstm(500, units=20)
    assert 0.099 < model.embedding.abs().max() <= 0.1
    assert not model.bias.any()
    recommender = ncf(300, 200)
    assert recommender.mlp_items.weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert recommender.mlp[0].weight.abs().max().item() == pytest.approx((6 / 512) ** 0.5, rel=0.01)
    assert recommender.final.weight.abs().max().item() == pytest.approx((3 / 128) ** 0.5, rel=0.05)
    assert recommender.final.weight.abs().max() <= (3 / 128) ** 0.5


# ---- arguments


def test_image_models_are_built_by_name() -> None:
    for name, build in MODELS.items():
        if name not in ("resnet44", "resnet56", "resnet110"):
            small = build(5, seed=1) if name in ("resnet20", "resnet32") else build(5, seed=1, width=0.1)
            assert small.eval()(images(1)).shape == (1, 5), name


@pytest.mark.parametrize("build", IMAGE_MODELS)
def test_image_models_arguments(build: Callable[..., nn.Module]) -> None:
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        build(0)
    for width in (0, -1, math.nan):
        with pytest.raises(ValueError, match=f"width must be above 0, got {width}"):
            build(10, width=width)
    assert count(build(2, width=1e-9)) > 0


def test_language_models_arguments() -> None:
    for name in ("vocabulary_size", "units", "num_layers"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            lstm(**{"vocabulary_size": 5, name: 0})
    with pytest.raises(ValueError, match="dropout must be from 0 to below 1, got 1"):
        lstm(5, dropout=1)


def test_ncfs_arguments() -> None:
    for name in ("num_users", "num_items", "factors"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            ncf(**{"num_users": 5, "num_items": 5, name: 0})
    with pytest.raises(ValueError, match="dropout must be from 0 to below 1, got -1"):
        ncf(5, 5, dropout=-1)
    for layers in ((), (3, 2), (4, 0)):
        with pytest.raises(ValueError, match="layers must be positive sizes, the first of them even"):
            ncf(5, 5, layers=layers)
