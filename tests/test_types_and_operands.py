"""A tensor made of integers is a float to whoever asks, and masks, counts and positions are operands like any other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trap_inputs import normal

import fxquant


class Asking(nn.Module):
    """Two layers, and between them or behind them whatever asks for the type of what the first gives."""

    def __init__(self, ask: Callable[..., Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.ask = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), ask

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        return self.ask(y, self.b, *more)


def _if(answer: bool, y: Tensor, b: nn.Module) -> Tensor:
    return b(y) if answer else b(y) * 0


QUESTIONS: dict[str, Callable[[Tensor, nn.Module], Tensor]] = {
    "to(dtype)": lambda y, b: F.normalize(b(y), dim=1).to(y.dtype),
    "type(dtype)": lambda y, b: F.normalize(b(y), dim=1).type(y.dtype),
    "type_as": lambda y, b: F.normalize(b(y), dim=1).type_as(y),
    "to(tensor)": lambda y, b: F.normalize(b(y), dim=1).to(y),
    "to(device, dtype)": lambda y, b: F.normalize(b(y), dim=1).to(y.device, y.dtype),
    "linspace": lambda y, b: b(y) + torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype),
    "arange": lambda y, b: b(y) + (torch.arange(4, dtype=y.dtype)[:, None, None] + 0.5) / 4,
    "zeros_like": lambda y, b: b(y) + (torch.zeros_like(y[:, :4]) - 0.25),
    "new_full": lambda y, b: b(y) + y.new_full((4, 1, 1), -0.75),
    "full_like": lambda y, b: b(y) + torch.full_like(y[:, :4], -0.75),
    "empty_like and fill": lambda y, b: b(y) + torch.empty_like(y[:, :4]).fill_(-0.75),
    "a buffer to dtype": lambda y, b: b(y) + torch.tensor([0.1, 0.2, 0.3, 0.4]).to(y.dtype)[:, None, None],
    "softmax and back": lambda y, b: F.normalize(b(y), dim=1).softmax(1, dtype=torch.float64).to(y.dtype),
    "finfo": lambda y, b: b(y) * (1.0 if torch.finfo(y.dtype).eps < 1e-6 else 0.0),
    "is_floating_point()": lambda y, b: _if(y.is_floating_point(), y, b),
    "torch.is_floating_point": lambda y, b: _if(torch.is_floating_point(y), y, b),
    "dtype ==": lambda y, b: _if(y.dtype == torch.float32, y, b),
    "dtype in": lambda y, b: _if(y.dtype in (torch.float32, torch.float64), y, b),
    "is_signed": lambda y, b: _if(y.is_signed() and not y.is_complex(), y, b),
    "element_size": lambda y, b: _if(y.element_size() == 4, y, b),
    "itemsize": lambda y, b: _if(y.itemsize == 4, y, b),
    "dtype.is_floating_point": lambda y, b: _if(y.dtype.is_floating_point, y, b),
    "type()": lambda y, b: _if(y.type() == "torch.FloatTensor", y, b),
    "result_type": lambda y, b: F.normalize(b(y), dim=1).to(torch.result_type(y, y)),
    "promote_types": lambda y, b: F.normalize(b(y), dim=1).to(torch.promote_types(y.dtype, torch.float16)),
    "of a view": lambda y, b: F.normalize(b(y), dim=1).to(y.permute(0, 2, 3, 1)[:, 1:].dtype),
    "of a concatenation": lambda y, b: F.normalize(b(y), dim=1).to(torch.cat([y, y], 1).dtype),
}


def stages(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """What the float, the frozen and the integer model give."""
    prepared = fxquant.calibrate(fxquant.prepare(model, inputs, verify=True), [inputs], progress=False)
    with torch.no_grad():
        return (
            model(*inputs),
            fxquant.freeze(prepared)(*inputs),
            fxquant.convert(prepared, kernels="reference")(*inputs),
        )


def assert_near(wanted: Tensor, frozen: Tensor, got: Tensor, share: float = 0.04) -> None:
    assert got.dtype == frozen.dtype == wanted.dtype
    assert (frozen.double() - wanted.double()).abs().max() < share * wanted.abs().max()
    assert (got.double() - frozen.double()).abs().max() < share * wanted.abs().max()


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_type_asked_of_a_quantized_tensor_is_the_float_models(name):
    torch.manual_seed(0)
    assert_near(*stages(Asking(QUESTIONS[name]).eval(), (normal(2, 3, 8, 8),)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["to(dtype)", "linspace", "a buffer to dtype"])
def test_the_type_is_that_of_a_model_of_another_float_type(name, dtype):
    torch.manual_seed(0)
    assert_near(*stages(Asking(QUESTIONS[name]).eval().to(dtype), (normal(2, 3, 8, 8).to(dtype),)), share=0.08)


def test_a_type_is_known_at_conversion_and_costs_no_way_back_to_floats():
    torch.manual_seed(0)
    model = Asking(lambda y, b: b(y) + torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype)).eval()
    x = normal(2, 3, 8, 8)
    integer = fxquant.convert(fxquant.calibrate(fxquant.prepare(model, x), [x], progress=False))
    names = [type(part).__name__ for part in integer.modules()]
    assert names.count("Dequantize") == 1, "only the result leaves the integers"


# Operands that are not real numbers.


def _lengths(y: Tensor, m: Tensor) -> Tensor:
    return m.sum((1, 2, 3), keepdim=True)


OPERANDS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {
    "y * mask": (lambda y, m: y * m, True),
    "mask * y": (lambda y, m: m * y, True),
    "y *= mask": (lambda y, m: y.mul_(m), True),
    "y * mask.expand": (lambda y, m: y * m.expand(-1, 8, -1, -1), True),
    "y * ~mask": (lambda y, m: y * ~m, True),
    "y * (y > 0)": (lambda y, m: y * (y > 0), True),
    "y + mask": (lambda y, m: y + m, True),
    "y * (m & m)": (lambda y, m: y * (m & (m | ~m)), True),
    "y * m.float()": (lambda y, m: y * m.float(), True),
    "y + int": (lambda y, m: y + m.long(), False),
    "y * arange": (lambda y, m: y * torch.arange(8)[:, None, None], False),
    "y - arange": (lambda y, m: y - torch.arange(8)[:, None, None], False),
    "y / lengths": (lambda y, m: y / _lengths(y, m), False),
    "lengths / total": (lambda y, m: y * (_lengths(y, m) / m.numel()), True),
    "uint8 mask": (lambda y, m: y * m.to(torch.uint8), False),
    "cat bool": (lambda y, m: torch.cat([y[:, :7], m], 1), False),
    "y * (m * m)": (lambda y, m: y * (m.expand(-1, 8, -1, -1) * m), True),
    "masked_fill": (lambda y, m: y.masked_fill((~m) * ~m, 0), True),
    "where": (lambda y, m: torch.where(m, y, y * 0.5), True),
    "y ** int": (lambda y, m: y ** m.long().add(1), True),
}


class WithMask(nn.Module):
    def __init__(self, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.use = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), use

    def forward(self, x: Tensor, m: Tensor) -> Tensor:
        return self.b(self.use(F.relu(self.a(x)), m))


def masked() -> tuple[Tensor, Tensor]:
    return normal(3, 3, 8, 8), normal(3, 1, 6, 6, seed=2) > -0.2


@pytest.mark.parametrize("name", OPERANDS)
def test_masks_and_whole_numbers_are_operands(name):
    torch.manual_seed(0)
    use, in_integers = OPERANDS[name]
    model = WithMask(use).eval()
    assert_near(*stages(model, masked()))
    reasons = [op.reason for op in fxquant.coverage(fxquant.prepare(model, masked())).float_ops]
    assert in_integers or any("values" in reason and "not rounded" in reason for reason in reasons), reasons


def test_a_mask_is_exact_whatever_calibration_saw():
    """Calibrated with a mask of zeros alone, then given ones: 0 and 1 are on the mask's grid all the same."""
    torch.manual_seed(0)
    model, (x, m) = WithMask(lambda y, m: y * m).eval(), masked()
    for example in ((x, m), None):
        prepared = fxquant.prepare(model, example)
        batches = [(x, torch.zeros_like(m)), (x, torch.ones_like(m))]
        fxquant.calibrate(prepared, batches[::-1], progress=False)
        masks = [q for n, q in fxquant.calibration.activation_quantizers(prepared).items() if n.startswith("m_")]
        assert [float(mask.scale) for mask in masks] == pytest.approx(
            [1 / 255] * (example is None)
        )  # else it is not rounded
        with torch.no_grad():
            assert_near(model(x, m), fxquant.freeze(prepared)(x, m), fxquant.convert(prepared)(x, m))


def test_whole_numbers_that_nobody_told_of_are_named():
    model, (x, m) = WithMask(lambda y, m: y * m).eval(), masked()
    prepared = fxquant.calibrate(fxquant.prepare(model), [(x, m.long())], progress=False)
    with pytest.raises(fxquant.errors.CalibrationError, match=r"saw whole numbers.*m_quantizer[\s\S]*example_inputs"):
        fxquant.freeze(prepared)


@pytest.mark.long
def test_a_mask_goes_to_a_file(tmp_path):
    onnxruntime: Any = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model, (x, m) = WithMask(lambda y, m: y * m + (~m) * 0.5).eval(), masked()
    integer = fxquant.convert(fxquant.calibrate(fxquant.prepare(model, (x, m)), [(x, m)], progress=False))
    fxquant.export_onnx(integer, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    names = [given.name for given in session.get_inputs()]
    (got,) = session.run(None, dict(zip(names, (x.numpy(), m.numpy()), strict=True)))
    with torch.no_grad():
        assert (torch.from_numpy(got) - integer(x, m)).abs().max() < 0.02


class AsksOfMemory(nn.Module):
    """Facts of a tensor that are no values: a float tensor's, in the integer model too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        if y.is_quantized or y.is_sparse or y.is_conj() or not (y.is_cpu and y.is_contiguous()):
            return self.last(y) * 2
        return self.last(y) * (y.nbytes / y.numel() / 4) + y.storage_offset()


def test_facts_of_memory_are_those_of_the_float_tensor():
    """Bytes were those of uint8; a number that was added was taken for a tensor: calibrate refused the user's input."""
    torch.manual_seed(0)
    model, x, other = AsksOfMemory().eval(), torch.randn(16, 6), torch.randn(5, 6)
    prepared = fxquant.prepare(model, x, verify=True)
    fxquant.calibrate(prepared, [x, other], progress=False)
    with torch.no_grad():
        for data in (x, other):
            wanted, found = model(data), fxquant.convert(prepared)(data)
            assert 10 * torch.log10(wanted.pow(2).sum() / (wanted - found).pow(2).sum()) > 28
