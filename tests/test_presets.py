"""Presets: which tensors have which bits, that the integer model is the trained one, and what a target refuses."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from comparisons import decibels
from torch import Tensor, nn

import fxquant
from fxquant import Recipe, Scheme, Setting
from fxquant.cli.entry import main
from fxquant.errors import RecipeError
from fxquant.nn.fake_quantize import FakeQuantize, WeightQuantize
from fxquant.passes.facts import Placed
from fxquant.recipe import FIRST


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.short = None if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (x if self.short is None else self.short(x)))


class ResNet(nn.Sequential):
    """A stem, three blocks of which two change the size, a pool and a classifier: 9 weighted layers."""

    def __init__(self) -> None:
        stem = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
        tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)]
        super().__init__(*stem, Block(8, 8), Block(8, 16), Block(16, 16), *tail)


class Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.adds = inputs == outputs
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, 12, 1), nn.BatchNorm2d(12), nn.ReLU6()),
            *(nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12), nn.ReLU6()),
            *(nn.Conv2d(12, outputs, 1), nn.BatchNorm2d(outputs)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.adds else self.body(x)


class MobileNet(nn.Sequential):
    """A stem, three inverted residuals of which the second adds, a pool and a classifier: 11 weighted layers."""

    def __init__(self) -> None:
        stem = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU6()]
        tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)]
        super().__init__(*stem, Inverted(4, 6), Inverted(6, 6), Inverted(6, 8), *tail)


class ViT(nn.Module):
    """Patches, one block with attention written out, a head: 6 weighted layers and 2 products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.place = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 16, 16) * 0.1)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2) + self.place
        q, k, v = self.qkv(self.norm1(x)).reshape(-1, 16, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
        scores = torch.matmul(q * 8**-0.5, k.transpose(-2, -1)).softmax(-1)
        x = x + self.out(torch.matmul(scores, v).transpose(1, 2).reshape(-1, 16, 16))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(x.mean(1))


IMAGE = (4, 3, 16, 16)
NETS = {"resnet": ResNet, "mobilenet": MobileNet, "vit": ViT}


def prepared(net: str, preset: str, bits: int, **others: object) -> nn.Module:
    torch.manual_seed(0)
    recipe = Recipe.preset(preset, weight_bits=bits, activation_bits=bits, **{"rule": "lsq", **others})
    return fxquant.prepare(NETS[net]().train(), torch.randn(IMAGE), qat=True, recipe=recipe)


def weights(model: nn.Module) -> Counter[int]:
    return Counter(part.scheme.bits for part in model.modules() if isinstance(part, WeightQuantize))


def tensors(model: nn.Module) -> Counter[int]:
    parts = (part for part in model.modules() if isinstance(part, FakeQuantize))
    return Counter(part.scheme.bits for part in parts if not isinstance(part, WeightQuantize))


def read_by(model: nn.Module, name: str) -> list[int]:
    """The bits of the tensors that calls of one op read, in the order of the graph."""
    found = []
    for node in model.graph.nodes:
        if node.meta.get("entry") is not None and node.meta["entry"].name == name and node.op == "call_module":
            for read in node.all_input_nodes:
                while Placed(read).continues:
                    (read,) = read.users
                quantizer = getattr(model.get_submodule(str(read.target)), "output_quantizer", None)
                found.append(quantizer.scheme.bits)
    return found


ACADEMIC = {
    # 8 bits: the input; the stem's ReLU and the second sum, which a convolution and a sum read; the branches and the
    # shortcut that sums add (1 + 2 + 1); the last sum, which the pool reads; the pool. 4 bits: one within each block; the
    # first sum, which only convolutions read; and one for each convolution that reads the stem or the second sum.
    "resnet": ({8: 2, 4: 7}, {8: 1 + 2 + 4 + 1 + 1, 4: 3 + 1 + 2}),
    # 8 bits: the input; what the sum adds; what the pool reads and gives. 4 bits: the stem; two in each block; the sum,
    # which only a convolution reads; and one for the convolution that reads what the sum adds.
    "mobilenet": ({8: 2, 4: 9}, {8: 1 + 2 + 2, 4: 1 + 6 + 1 + 1}),
}


@pytest.mark.parametrize("net", list(ACADEMIC))
def test_academic_counts(net):
    model = prepared(net, "academic", 4)
    of_weights, of_tensors = ACADEMIC[net]
    assert weights(model) == of_weights
    assert tensors(model) == of_tensors
    layers = read_by(model, "conv2d") + read_by(model, "linear")
    assert layers[0] == layers[-1] == 8 and set(layers[1:-1]) == {4}
    assert set(read_by(model, "add")) == {8}


def test_academic_counts_in_a_transformer():
    model = prepared("vit", "academic", 4)
    assert weights(model) == {8: 2, 4: 4}
    assert set(read_by(model, "matmul")) == {4}
    assert read_by(model, "linear") == [4, 4, 4, 4, 8]
    assert set(read_by(model, "add")) == set(read_by(model, "layer_norm")) == {8}


@pytest.mark.parametrize("net", list(NETS))
@pytest.mark.parametrize("bits", [4, 2])
def test_deploy_has_one_width(net, bits):
    model = prepared(net, "deploy", bits)
    assert set(weights(model)) == set(tensors(model)) == {bits}


CASES = [(net, preset, bits) for net in NETS for preset in ("academic", "deploy") for bits in (4, 2)]
QUICK = [("resnet", "academic", 2), ("resnet", "deploy", 4), ("mobilenet", "academic", 4), ("vit", "academic", 2)]


@pytest.mark.parametrize(
    ("net", "preset", "bits"),
    [pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.long]) for case in CASES],
)
def test_the_integer_model_is_the_trained_one(net, preset, bits):
    model = prepared(net, preset, bits)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(IMAGE)).square().mean().backward()
        optimizer.step()
    frozen, integer = fxquant.freeze(model), fxquant.convert(model)
    images = torch.randn(32, *IMAGE[1:])
    with torch.no_grad():
        assert decibels(frozen(images), integer(images)) >= 60
        assert decibels(model.eval()(images), frozen(images)) >= 60


def test_without_rounding_it_is_the_float_model():
    torch.manual_seed(0)
    model, images = ResNet().eval(), torch.randn(IMAGE)
    quantized = fxquant.prepare(model, images, recipe=Recipe.preset("academic", activation_bits=2), verify=True)
    fxquant.calibrate(quantized, [images], progress=False)
    with fxquant.quantizers_off(quantized):
        assert torch.allclose(quantized(images), model(images), atol=1e-5)


def test_the_diff_and_the_file_name_it(tmp_path):
    model, float_model = prepared("resnet", "academic", 4), ResNet()
    text = str(fxquant.diff(float_model, model))
    assert "preset academic W4A4 lsq" in text.splitlines()[0]
    assert text.count("rounded anew for") == 2
    model(torch.randn(IMAGE)).sum().backward()
    fxquant.save(model, tmp_path / "model.pt")
    again = fxquant.load(float_model, tmp_path / "model.pt").eval()
    images = torch.randn(IMAGE)
    assert torch.equal(again(images), model.eval()(images))
    assert "preset academic W4A4 lsq" in str(fxquant.diff(float_model, again))


def test_by_name_alone_deploy_is_the_default():
    torch.manual_seed(0)
    model, images = ResNet().eval(), torch.randn(IMAGE)
    ones = [fxquant.prepare(model, images, recipe=recipe) for recipe in ("deploy", None)]
    for one in ones:
        fxquant.calibrate(one, [images], progress=False)
    assert torch.equal(*(one(images) for one in ones))


def test_settings_of_ones_own_come_first():
    recipe = Recipe.preset("academic", weight_bits=4, activation_bits=4, settings={FIRST: None, "4": None})
    model = fxquant.prepare(ResNet(), torch.randn(IMAGE), qat=True, recipe=recipe)
    assert weights(model) == {8: 1, 4: 7 - 3}


@pytest.mark.parametrize(
    ("rule", "of_weights", "of_tensors"),
    [("pact", {"observed"}, {"pact"}), ("dorefa", {"dorefa", "observed"}, {"dorefa"})],
)
def test_a_rule_that_lacks_something_leaves_that_observed(rule, of_weights, of_tensors):
    """PACT has no weights; DoReFa no 8 bits of weights, and one scale."""
    recipe = Recipe.preset("academic", weight_bits=4, activation_bits=4, rule=rule)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 2))
    parts = fxquant.prepare(model, torch.randn(IMAGE), qat=True, recipe=recipe).modules()
    quantizers = [part for part in parts if isinstance(part, FakeQuantize)]
    assert {q.scheme.quantizer for q in quantizers if isinstance(q, WeightQuantize)} == of_weights
    assert {q.scheme.quantizer for q in quantizers if not isinstance(q, WeightQuantize)} == of_tensors


def test_a_target_without_the_bits_refuses_the_preset():
    recipe = Recipe.preset("academic", weight_bits=4, activation_bits=4)
    with pytest.raises(
        RecipeError, match=r"target 'onnxruntime' cannot run: .* takes tensors of 8 or 16 bits"
    ) as caught:
        fxquant.prepare(ResNet(), torch.randn(IMAGE), recipe=recipe, target="onnxruntime")
    assert "the preset academic W4A4" in str(caught.value) and "leave activation_bits= out" in str(caught.value)


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt", "tflite", "xnnpack", "openvino"])
def test_weights_of_few_bits_on_every_target(target):
    """The schemes are the target's own, signs and zero points included."""
    torch.manual_seed(0)
    recipe = Recipe.preset("academic", weight_bits=4)
    model = fxquant.prepare(ResNet().eval(), torch.randn(IMAGE), recipe=recipe, target=target)
    fxquant.calibrate(model, [torch.randn(IMAGE)], progress=False)
    assert weights(model) == {8: 2, 4: 7} and set(tensors(model)) == {8}
    images = torch.randn(IMAGE)
    frozen, integer = fxquant.freeze(model)(images), fxquant.convert(model)(images)
    if target in ("tflite", "xnnpack"):  # results are rounded: of two floats around a half, one may go up
        steps = (frozen - integer).abs() / integer.unique().diff().min()
        assert float(steps.max()) < 1.01 and float((steps > 0.5).float().mean()) < 0.1
    else:
        assert decibels(frozen, integer) >= 60


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(Recipe.preset, "acadmic"), "Did you mean 'academic'"),
        (partial(Recipe.preset, "deploy", rule="lqs"), "Did you mean 'lsq'"),
        (lambda: Setting(input=4), "write input=fxquant.Scheme.activation"),
        (lambda: Setting(input=Scheme.weight(4)), "input scheme .* one scale"),
    ],
)
def test_what_cannot_be_is_said(make, words):
    with pytest.raises(RecipeError, match=words):
        make()


def test_bits_that_no_scheme_has_and_a_second_default_are_refused():
    images = torch.randn(IMAGE)
    with pytest.raises(RecipeError, match="preset deploy W1: bits=1"):
        fxquant.prepare(ResNet(), images, recipe=Recipe.preset("deploy", weight_bits=1))
    twice = Recipe(default=Setting(weight=Scheme.weight(4)), base=Recipe.preset("deploy").base)
    with pytest.raises(RecipeError, match="leave one of them out"):
        fxquant.prepare(ResNet(), images, recipe=twice)


def test_on_the_command_line(capsys):
    arguments = ["--preset", "academic", "--weight-bits", "4", "--activation-bits", "4", "--shape", "1x3x32x32"]
    assert main(["diff", "torchvision:resnet18", *arguments]) == 0
    told = capsys.readouterr().out
    assert (
        "preset academic W4A4" in told and told.count("rounded anew for") == 5
    )  # behind the pool, and behind each stage's first
