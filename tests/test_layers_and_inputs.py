"""Layers of torch with several inputs, with their masks and fast paths; and models whose forward takes what it is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from trap_inputs import normal

import fxquant
from fxquant.errors import SpecializationError

X = normal(4, 6, 16)
PAD = torch.arange(6) >= torch.tensor([[4], [5], [6], [4]])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(6)
STATE = (torch.zeros(1, 6, 4), torch.ones(1, 6, 4))


def block() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)


def attention() -> nn.MultiheadAttention:
    return nn.MultiheadAttention(16, 4, batch_first=True)


LAYERS: dict[str, tuple[Any, Any, float]] = {
    "encoder with padding": (lambda: nn.TransformerEncoder(block(), 2), {"src": X, "src_key_padding_mask": PAD}, 1.0),
    "encoder, causal mask": (lambda: nn.TransformerEncoder(block(), 2), {"src": X, "mask": CAUSAL}, 1.0),
    "encoder, said causal": (
        lambda: nn.TransformerEncoder(block(), 2), {"src": X, "mask": CAUSAL, "is_causal": True}, 1.0),
    "encoder layer": (block, {"src": X}, 1.0),
    "encoder layer by position": (block, (X,), 1.0),
    "decoder layer": (lambda: nn.TransformerDecoderLayer(16, 4, 32, batch_first=True), (X, X * 0.5), 0.7),
    "decoder layer by name": (
        lambda: nn.TransformerDecoderLayer(16, 4, 32, batch_first=True),
        {"tgt": X, "memory": X * 0.5, "memory_key_padding_mask": PAD}, 0.7),
    "transformer": (lambda: nn.Transformer(16, 4, 1, 1, 32, batch_first=True), (X, X * 0.5), 0.8),
    "attention": (attention, (X, X * 0.5, X * 2), 1.0),
    "attention by name, padded": (
        attention, {"query": X, "key": X * 0.5, "value": X, "key_padding_mask": PAD, "need_weights": False}, 1.0),
    "linear by name": (lambda: nn.Linear(16, 4), {"input": X}, 1.0),
}  # fmt: skip
SLOW = ("encoder, causal mask", "encoder, said causal", "encoder layer", "decoder layer by name", "transformer")
FLOAT: dict[str, tuple[Any, Any]] = {
    "lstm with a state": (lambda: nn.LSTM(16, 4), (X, STATE)),
    "gru": (lambda: nn.GRU(16, 4), {"input": X}),
    "bilinear": (lambda: nn.Bilinear(16, 16, 4), (X, X * 0.5)),
    "embedding bag": (lambda: nn.EmbeddingBag(9, 4), (torch.tensor([1, 2, 3, 4]), torch.tensor([0, 2]))),
    "cosine": (lambda: nn.CosineSimilarity(-1), (X, X * 0.5)),
}


def call(model: nn.Module, given: Any) -> Any:
    with torch.no_grad():
        return model(**given) if isinstance(given, dict) else model(*given)


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value or () for t in tensors(item)]


@pytest.fixture
def slow_attention() -> Any:
    """The fused kernel gives zeros where the input is padded; its parts, which gradients need, do not."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("fast", [True, False], ids=["fast path", "plain"])
@pytest.mark.parametrize("name", ["encoder with padding"])
def test_a_layer_is_captured_whatever_path_torch_would_take(name, fast):
    torch.manual_seed(0)
    build, given, _ = LAYERS[name]
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        assert not fxquant.coverage(fxquant.prepare(build().eval(), given, verify=True)).islands
        assert torch.backends.mha.get_fastpath_enabled() is fast
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) if n in SLOW else n for n in LAYERS])
def test_a_layer_may_be_the_whole_model(name, slow_attention):
    torch.manual_seed(0)
    build, given, share = LAYERS[name]
    model = build().eval()
    prepared = fxquant.calibrate(fxquant.prepare(model, given, verify=True), [given], progress=False)
    with fxquant.quantizers_off(prepared):
        for got, wanted in zip(tensors(call(prepared, given)), tensors(call(model, given)), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    for got, wanted in zip(tensors(call(fxquant.convert(prepared), given)), tensors(call(model, given)), strict=True):
        assert (got - wanted).abs().max() < 0.1 * wanted.abs().max()
    found = fxquant.coverage(prepared)
    assert not found.islands and found.macs_share >= share
    assert str(fxquant.diff(model, prepared))


@pytest.mark.parametrize("name", FLOAT)
def test_a_layer_without_integers_stays_in_float_and_says_so(name, tmp_path):
    torch.manual_seed(0)
    build, given = FLOAT[name]
    model = build().eval()
    with pytest.warns(UserWarning, match=f"{type(model).__name__} has no op that fxquant can quantize"):
        prepared = fxquant.prepare(model, given, verify=True)
    integer = fxquant.convert(fxquant.calibrate(prepared, [given], progress=False))
    for got, wanted in zip(tensors(call(integer, given)), tensors(call(model, given)), strict=True):
        assert torch.equal(got, wanted)
    assert fxquant.coverage(integer).float_ops


class Star(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(inputs[0]) + inputs[1])) * inputs[-1]


class Names(Star):
    def forward(self, **given: Tensor) -> Tensor:  # type: ignore[override]
        return self.b(torch.relu(self.a(given["x"]) + given["y"]))


class Mixed(Star):
    def forward(self, x: Tensor, *more: Tensor, scale: float = 1.0, **given: Tensor) -> Tensor:  # type: ignore[override]
        for other in more:
            x = x + other
        return self.b(torch.relu(self.a(x) * scale)) * given.get("gain", 1.0)


FIRST, SECOND, THIRD = (normal(3, 4, seed=seed) for seed in range(3))
CALLS: dict[str, tuple[Any, Any]] = {
    "*inputs": (Star, (FIRST, SECOND, THIRD)),
    "**names": (Names, {"x": FIRST, "y": SECOND}),
    "one and *more": (Mixed, (FIRST, SECOND)),
    "one alone": (Mixed, (FIRST,)),
    "one and **names": (Mixed, {"x": FIRST, "gain": SECOND}),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_forward_takes_is_what_every_verb_takes(name, tmp_path):
    torch.manual_seed(0)
    build, given = CALLS[name]
    model = build().eval()
    labelled = {**given, "label": THIRD[:, 0]} if isinstance(given, dict) else (*given, THIRD[:, 0])
    prepared = fxquant.prepare(model, given, verify=True)
    fxquant.calibrate(prepared, [given, labelled], progress=False)
    wanted = call(model, given)
    integer = fxquant.convert(prepared)
    fxquant.save(integer, tmp_path / "saved.pt")
    for made in (prepared, integer, fxquant.load(model, tmp_path / "saved.pt")):
        assert (call(made, given) - wanted).abs().max() < 0.05 * wanted.abs().max()


@pytest.mark.parametrize("name", ["*inputs", "**names"])
def test_quantize_takes_batches_as_forward_does(name):
    torch.manual_seed(0)
    build, given = CALLS[name]
    model = build().eval()
    wanted, got = call(model, given), call(fxquant.quantize(model, [given] * 2, progress=False), given)
    assert (got - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_a_batch_with_too_few_parts_is_named():
    model = Star().eval()
    prepared = fxquant.prepare(model, (FIRST, SECOND, THIRD))
    with pytest.raises(fxquant.errors.InputError, match="a batch has 2 parts, and the model takes 3 inputs"):
        fxquant.calibrate(prepared, [(FIRST, SECOND)], progress=False)


class ToSize(nn.Module):
    """A decoder that asks for the size of what it decodes to, as U-Nets do; by name or by position."""

    def __init__(self, by_name: bool) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 4, 3, 2, 1)
        self.by_name = by_name

    def forward(self, x: Tensor) -> Tensor:
        y, size = self.down(x).relu(), x.shape[-2:]
        return self.up(y, output_size=size) if self.by_name else self.up(y, size)


@pytest.mark.parametrize("qat", [False, True])
@pytest.mark.parametrize("by_name", [True, False])
def test_a_transposed_convolution_that_is_given_its_size_is_in_integers(by_name, qat):
    """The padding of its output follows from the sizes at hand, even and odd."""
    torch.manual_seed(0)
    model = ToSize(by_name).train(qat)
    prepared = fxquant.prepare(model, normal(2, 3, 8, 8), qat=qat, verify=True)
    fxquant.coverage(prepared).require(1.0)
    assert set(model.state_dict()) <= set(prepared.state_dict())
    if qat:
        prepared.train()(normal(4, 3, 8, 8)).sum().backward()
        assert all(p.grad is not None for p in prepared.parameters())
    fxquant.calibrate(prepared.eval(), [normal(4, 3, 8, 8)], progress=False)
    fast, exact = fxquant.convert(prepared), fxquant.convert(prepared, kernels="reference")
    for rows, height, width in ((2, 8, 8), (1, 9, 8), (3, 7, 11)):
        x = normal(rows, 3, height, width)
        with torch.no_grad():
            y, real = exact(x), model.eval()(x)
        assert torch.equal(fast(x), y) and y.shape == real.shape
        assert float((y - real).square().sum() / real.square().sum()) < 0.01


@pytest.mark.long
def test_the_file_of_one_that_is_given_its_size(tmp_path):
    """ONNX has the padding as a number: that of the example's size, which the file keeps and the report tells."""
    pytest.importorskip("onnxscript")
    prepared = fxquant.prepare(ToSize(True).eval(), normal(2, 3, 8, 9))
    fxquant.calibrate(prepared, [normal(4, 3, 8, 9)], progress=False)
    report = fxquant.export_onnx(prepared, tmp_path / "m.onnx", normal(2, 3, 8, 9))
    assert report.inputs == {"x": ["batch", 3, 8, 9]} and any("free sizes" in note for note in report.notes)
    assert min(own.sqnr for own in report.agreement) > 60
    compiled, exact = (
        fxquant.compile(prepared, normal(2, 3, 8, 9), runtime="native"),
        fxquant.convert(prepared, kernels="reference"),
    )
    for size in ((8, 9), (9, 8)):  # computed between native parts: the file's size binds the file alone
        x = normal(2, 3, *size)
        assert torch.equal(compiled(x), exact(x))


@pytest.mark.parametrize("level", ["prepared", "trained", "integer"])
def test_features_of_a_quantized_model(level):
    """torchvision's extractor walks through the graph; each of our layers is one node in what it makes."""
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3)).eval()
    x = normal(2, 3, 8, 8)
    made = fxquant.prepare(model, x, qat=level == "trained")
    made.train()(x).sum().backward() if level == "trained" else fxquant.calibrate(made, [x], progress=False)
    made = fxquant.convert(made, kernels="reference") if level == "integer" else made.eval()
    inner = "0" if level == "integer" else "2"
    features = extraction.create_feature_extractor(made, {inner: "inner", "3": "last"})
    found = features.eval()(x)
    assert found["inner"].shape == (2, 4, 6, 6) and torch.equal(found["last"], made(x))
    if level == "trained":
        features.train()(x)["last"].sum().backward()
        assert made.get_submodule("3").weight.grad is not None


class Loss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, x: Tensor, labels: Tensor | None = None, **kwargs: Any) -> Tensor:
        y = self.fc(x)
        if labels is None:
            return y
        return (y - labels).square().sum() / kwargs.get("num_items", 2)


def test_an_argument_that_the_example_lacked_is_named():
    """None or absent when it was captured, and given later; and the other way round."""
    x, y = normal(2, 4), normal(2, 2)
    plain = fxquant.prepare(Loss(), {"x": x}, qat=True)
    with pytest.raises(SpecializationError, match=r"labels = None, and now .*\n.*include labels, or leave it out"):
        plain(x, labels=y)
    labelled = fxquant.prepare(Loss(), {"x": x, "labels": y}, qat=True)
    with pytest.raises(
        SpecializationError, match=r"without 'num_items', which is given now, in kwargs.*\n.*'num_items': a"
    ):
        labelled(x, labels=y, num_items=torch.tensor(4))
    counted = fxquant.prepare(Loss(), {"x": x, "labels": y, "num_items": torch.tensor(4)}, qat=True)
    with pytest.raises(SpecializationError, match=r"with 'num_items', which is missing now, in kwargs.*\n.*or give it"):
        counted(x, labels=y)
    assert counted(x, labels=y, num_items=torch.tensor(8)) * 2 == counted(x, labels=y, num_items=torch.tensor(4))
