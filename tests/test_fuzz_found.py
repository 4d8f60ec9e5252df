"""What random networks found, in a few lines each; all properties of the fuzz must hold of every one."""

from __future__ import annotations

import warnings

import pytest
import torch
from generator import HEADER
from properties import ALL, THOROUGH, Trial, failures, sqnr
from torch import nn
from vocabulary import BRANCH

import fxquant
from fxquant.kernels.agreement import agreement

IMAGE, ROWS, TOKENS = "torch.randn(n, 4, 6 + s, 6 + s)", "torch.randn(n, 16)", "torch.randn(n, 6 + s, 8)"

FOUND: dict[str, tuple[str, str, str]] = {
    # Memory written under one name is not read under another (capture/memory.py).
    "second write through a view": (
        IMAGE,
        "self.c = nn.Conv2d(4, 4, 1)",
        "y = self.c(x); y += y; v = y.flatten(1); v.mul_(2); return y * 1.5",
    ),
    "view made between two writes": (
        IMAGE,
        "self.c = nn.Conv2d(4, 4, 1)",
        "y = self.c(x); y += 1; v = y.flatten(1); y.mul_(2); return v * 1.5",
    ),
    "writes through two names in turn": (
        IMAGE,
        "self.c = nn.Conv2d(4, 4, 1)",
        "y = self.c(x); a = y.relu_(); v = y.flatten(1); a.add_(1); v.mul_(2); return a * 1",
    ),
    "written under one name, assigned elsewhere": (
        IMAGE,
        "self.c = nn.Conv2d(4, 4, 1)",
        "y = self.c(x); g = y[:, 0]; g.mul_(2); y[:, 1] = g; return y * 1.5",
    ),
    "two names of one tensor, both written": (
        IMAGE,
        "self.c = nn.Conv2d(4, 4, 1)",
        "y = self.c(x); y[:, :1] += 2; a = y.relu_(); y.mul_(2); a.add_(1); return y + a",
    ),
    # torch's formula for the layout of a norm's result is not its kernel's: a copy was taken for a view, or the other way.
    "a write through what may be a view": (
        "torch.randn(n, 7 + s, 2)",
        "self.bn = nn.BatchNorm1d(2); self.fc = nn.Linear(2, 2)",
        "y = self.bn(x.transpose(1, 2)); y.flatten(1).mul_(2); return y, self.fc(x)",
    ),
    # Half of all values lie half way between two integers, which torch rounds to even and the reference up.
    "a tensor and itself": (
        "torch.randn(n, 3, 8, 6)",
        "self.fc = nn.Linear(6, 6)",
        "y = x + x; z = self.fc(y.mean(-2)); return z, (y * 2).mean(-1)",
    ),
    # A float accumulator and a rounded tensor are joined, and only leave the model (passes/scale_groups.py).
    "joined with an accumulator that leaves": (
        IMAGE,
        "self.c = nn.Conv2d(4, 4, 1)",
        "return torch.cat([self.c(x), x], 1)",
    ),
    "stacked behind views of it": (
        ROWS,
        "self.a = nn.Linear(16, 8); self.b = nn.Linear(16, 8)",
        "return torch.stack([F.relu(self.a(x)), self.b(x)], 1).flip(1)",
    ),
    "joined, and read by a float op": (
        TOKENS,
        "self.a = nn.Linear(8, 8)",
        "y = torch.cat([self.a(x), x * 2], -1); return y.cumsum(1)",
    ),
    # A selection without values got a quantizer that never saw one (passes/leave_unrounded.py).
    "sum of a selection of nothing": (
        IMAGE,
        "self.c = nn.Conv2d(4, 4, 1)",
        "y = F.interpolate(x, scale_factor=2); y[:, :1] += y[:, :1]; return self.c(y + y[:0].sum() + y[:, 2:2].sum())",
    ),
    # A container that a float op gives was taken for quantized (passes/choose_regions.py).
    "positions stacked from a container": (
        IMAGE,
        "self.c = nn.Conv2d(6, 4, 1)",
        "g = torch.linspace(-1, 1, x.shape[2]); g = torch.stack(torch.meshgrid(g, g, indexing='ij'));"
        " return self.c(torch.cat([x, g.expand(x.shape[0], -1, -1, -1)], 1))",
    ),
    # torch's ONNX exporter refuses attention without an axis for heads (ops/exported_forms.py).
    "attention without heads": (
        TOKENS,
        "self.q = nn.Linear(8, 24)",
        "q, k, v = self.q(x).chunk(3, -1); return F.scaled_dot_product_attention(q, k, v)",
    ),
    # A tensor rounded to zero has no gradient behind a root (passes/scale_groups.py).
    "a root of a layer's magnitudes": (
        ROWS,
        "self.c = nn.Linear(16, 8)",
        "return self.c(x).abs().sqrt()",
    ),
    # ``callable(size == 1)`` was true of the proxy of a bool (capture/proxies.py).
    "asks whether a condition is a function": (
        ROWS,
        "self.a = nn.Linear(16, 8)",
        "k = torch.unique(x > 0).numel() <= 2; k = k() if callable(k) else k; return F.relu(self.a(x))",
    ),
    # Native kernels took a transposed convolution that ends a model for a plain one (kernels/native/weighted.py).
    **{
        f"ends in a transposed convolution: {more}": (
            IMAGE,
            f"self.a = nn.ConvTranspose2d(4, 4, {more})",
            "return self.a(F.relu(x))",
        )
        for more in ("2", "3, padding=1", "3, stride=2, padding=1, output_padding=1", "3, padding=1, groups=4")
    },
    # What the model returns was not asked for writes under other names (capture/one_graph.py).
    "written through a view, and returned": (
        IMAGE,
        "self.c = nn.Conv2d(4, 4, 1)",
        "y = self.c(x); v = y.flatten(1); v.mul_(2); return y",
    ),
    # Behind an island values are not known, and writes in place were not seen (capture/memory.py).
    "a buffer written with what an island gives, and read": (
        IMAGE,
        "self.b = Branch(6); self.register_buffer('s', torch.ones(1))",
        "y = self.b(x); self.s.copy_(0.5 * self.s + y.mean()); return y - self.s",
    ),
    "what an island gives, written through a view": (
        IMAGE,
        "self.c = nn.Conv2d(4, 4, 1); self.b = Branch(6)",
        "y = self.b(self.c(x)); v = y.flatten(1); v.mul_(2); return y * 1.5",
    ),
    "what an island gives, written by several names": (
        IMAGE,
        "self.c = nn.Conv2d(4, 4, 1); self.b = Branch(6)",
        "y = F.relu(self.b(self.c(x)), inplace=True); y[:, :1] = 0; y += 1; v = y[:, :1]; v *= 2; return y, v",
    ),
    # A part that was written in place, and assigned back, may be read as well.
    "a part written in place and read": (
        IMAGE,
        "self.c = nn.Conv2d(4, 4, 1)",
        "y = self.c(x); v = y[:, :1]; v *= 2; z = v + 1; v += 1; return y * 1.5, z, v * 2",
    ),
    # Behind an island whole numbers were taken for real ones (capture/seen_types.py).
    "a class of what an island gives": (
        IMAGE,
        "self.c = nn.Conv2d(4, 4, 1); self.b = Branch(6)",
        "y = self.b(self.c(x)); z = y * y.argmax(-1, keepdim=True); return F.one_hot(y.argmax(-1), y.shape[-1]) * z",
    ),
    # torch reads an image of 1 × 1 by other strides than it writes it with (kernels/elementwise.py).
    "nearest interpolation of one pixel": (
        IMAGE,
        "self.c = nn.Conv2d(4, 4, 1)",
        "s = x.mean((2, 3), keepdim=True); return self.c(x), F.interpolate(s, scale_factor=2)",
    ),
    # Native kernels: padding that is no number where floats leave; memory for what nobody reads (kernels/native).
    "ends in a convolution with other padding": (
        IMAGE,
        "self.c = nn.Conv2d(4, 4, 1, padding_mode='reflect')",
        "return self.c(x)",
    ),
    "a layer that nobody reads": (IMAGE, "self.c = nn.Conv2d(4, 4, 3)", "y = self.c(x); return x[..., 1:]"),
    # Native kernels crashed on a tensor without elements (kernels/native/walk.py).
    "joined with a tensor without elements": (
        "torch.randint(0, 11, (n, 6 + s))",
        "self.e = nn.Embedding(11, 8)",
        "y = self.e(x); return torch.cat([y, y[:, :0]], 1)",
    ),
    # torch crashes in a dilated convolution of one tap over one column in channels last (kernels/weighted.py).
    "a dilated convolution of one tap over one column": (
        "torch.randn(n, 8, 7 + s, 8 + s)",
        "self.c = nn.Conv2d(8, 4, 1, stride=2, padding=1, dilation=2)",
        "y = (x + x).mean(-1, keepdim=True); return self.c(y).mean(-1)",
    ),
    # The bounds of a clamp behind a table of rows were lost (nn/integer.py).
    "a clamp behind an embedding, joined to a wider range": (
        "torch.randint(0, 11, (n, 6 + s))",
        "self.e = nn.Embedding(11, 8); self.a = nn.Linear(8, 4)",
        "y = F.hardtanh(self.e(x), -2, 0.5); return self.a(torch.cat([y, y * 4], 1))",
    ),
    # Dropout gives its input itself in eval mode, whether or not its value is known (capture/memory.py).
    "a write into what dropout gives, behind an island": (
        TOKENS,
        "self.b = Branch(8); self.d = nn.Dropout(0.2); self.n = nn.LayerNorm(8)",
        "y = self.b(x); z = self.d(F.dropout(y, 0.1, self.training)); z.mul_(0.5); return self.n(y), z",
    ),
    "a write into what a flattening gives, behind an island": (
        TOKENS,
        "self.b = Branch(8); self.f = nn.Flatten(); self.n = nn.LayerNorm(8)",
        "y = self.b(x); z = self.f(y); z.mul_(0.5); return self.n(y), z",
    ),
    "a write into what an identity gives, behind an island": (
        TOKENS,
        "self.b = Branch(8); self.i = nn.Identity(); self.n = nn.LayerNorm(8)",
        "y = self.b(x); z = self.i(y).type_as(y); z.mul_(0.5); return self.n(y), z",
    ),
    # Indices in lists and tensors, and masks, select copies, into which a write changes nothing else (capture/tracing.py).
    "a write into a copy that a list of indices selected": (
        IMAGE,
        "self.c = nn.Conv2d(4, 4, 1)",
        "y = F.relu(self.c(x)); z = y[:, [0, 0]]; z.copy_(z * 2); return y + z.mean()",
    ),
    "a write into a copy that a mask selected": (
        IMAGE,
        "self.c = nn.Conv2d(4, 4, 1)",
        "y = F.relu(self.c(x)); y[y > 0.1].mul_(2); y[:, torch.arange(2)].add_(1); return y * 1.5",
    ),
    # A call whose bias does not fit raises the scale of its own weights only (passes/freeze.py).
    "one layer twice, once on what is all but zero": (
        ROWS,
        "self.l = nn.LayerNorm(16, elementwise_affine=False); self.f = nn.Linear(1, 4)",
        "y = self.l(x); return self.f(y.mean(-1, keepdim=True)), self.f(y.abs().mean(-1, keepdim=True))",
    ),
    # What was first used in a part that could not be traced is made anew (capture/proxies.py).
    "a named result, first read by an island": (
        "torch.randn(n, 8, 6 + s, 6)",
        "self.b = Branch(6); self.f = nn.Linear(6, 4)",
        "y = x.max(-2).values; z = self.b(y); v = y[:, :1]; v.mul_(2); return z, self.f(y * 1.5)",
    ),
    # ONNX has no squeeze of an axis of more than one element, which torch lets be (ops/exported_forms.py).
    "a squeeze of what is not one": (
        IMAGE,
        "self.c = nn.Conv2d(4, 4, 1)",
        "y = self.c(x).squeeze(1); z = y.mean(1, keepdim=True).squeeze((1, 2)); return self.c(y), z * 1.5",
    ),
    "a squeeze of what is not one, of real numbers": (
        IMAGE,
        "self.c = nn.Conv2d(4, 4, 1)",
        "y = torch.sin(x).squeeze(1); return self.c(y), torch.cos(y.squeeze(dim=2))",
    ),
    # The calls of one layer share its hooks (collapse.py).
    "one norm twice, where 8 bits leave little": (
        ROWS + " * 1e-3",
        "self.n = nn.BatchNorm1d(16); self.l = nn.LayerNorm(16)",
        "y = self.n(self.l(x + 1)); return self.n(y)",
    ),
}


def source_of(inputs: str, init: str, forward: str) -> str:
    made = "".join(f"        {line.strip()}\n" for line in init.split(";"))
    done = "".join(f"        {line.strip()}\n" for line in forward.split(";"))
    return (
        f"{HEADER}\n\n{BRANCH}\n\n\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        f"        torch.manual_seed(0)\n{made}\n    def forward(self, x):\n{done}\n\n"
        f"def inputs(n=2, s=0):\n    return ({inputs},)\n"
    )


@pytest.mark.parametrize("name", FOUND)
def test_found(name):
    wrong = {prop: str(error) for prop, error in failures(source_of(*FOUND[name]), THOROUGH)}
    assert not wrong, f"{name}: {wrong}"


ASKS_THE_LAYOUT = "a write through what may be a view"
"""torch.export takes the layouts of torch's formulas for real ones."""


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in FOUND if name != ASKS_THE_LAYOUT])
def test_found_in_every_form(name):
    wrong = {prop: str(error) for prop, error in failures(source_of(*FOUND[name]), ALL)}
    assert not wrong, f"{name}: {wrong}"


@pytest.mark.long
def test_a_file_that_asks_the_layout_is_said_to_be_wrong(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trial = Trial(source_of(*FOUND[ASKS_THE_LAYOUT]))
        report = fxquant.export_onnx(trial.reference, tmp_path / "model.onnx", trial.inputs)
    assert any("agrees with the integer model to" in note for note in report.notes)


class Masked(nn.Module):
    """Attention that gives its weights too, with a mask of bools."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attention, self.fc = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 16)

    def forward(self, x, mask):
        y, weights = self.attention(x, x, x, attn_mask=mask, need_weights=True)
        return self.fc(y), weights


def test_scores_and_a_mask_in_one_op():
    """``baddbmm``, which the table lacks, adds minus infinity to scores: the softmax behind it is left in float."""
    torch.manual_seed(1)
    x, mask = torch.randn(2, 6, 16), torch.triu(torch.ones(6, 6, dtype=torch.bool), 1)
    model = Masked().eval()
    int8 = fxquant.quantize(model, [(x, mask)], progress=False)
    with torch.no_grad():
        for got, expected in zip(int8(x, mask), model(x, mask), strict=True):
            assert sqnr(got, expected) > 30


class Magnified(nn.Module):
    """A norm of values that lie much closer together than their distance from zero."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x):
        return self.fc(self.norm(x + 1))


def test_a_collapse_is_said():
    torch.manual_seed(0)
    x = torch.randn(16, 8) * 1e-3
    with pytest.warns(UserWarning, match=r"leaves .* dB of an output .* Most is lost at norm \(LayerNorm\)"):
        fxquant.calibrate(fxquant.prepare(Magnified().eval(), x), [x], progress=False)


class Chosen(nn.Module):
    """An island, then a difference of near values; beside it a norm that no island touches."""

    def __init__(self, behind: bool):
        super().__init__()
        self.behind, self.branch, self.fc, self.magnified = behind, Choosing(), nn.Linear(8, 8), Magnified()

    def forward(self, x):
        if not self.behind:
            return self.branch(self.fc(self.magnified(x * 1e-3)))
        y = self.branch(self.fc(x)).mean(-1, keepdim=True)
        return y - y.mean()


class Choosing(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else x * 2


@pytest.mark.parametrize("behind", [False, True])
def test_a_collapse_is_said_of_models_with_islands(behind):
    """Before the island value by value, behind it as a set."""
    torch.manual_seed(0)
    x = torch.randn(16, 8)
    model = Chosen(behind).eval()
    model.fc.bias.data.add_(100 * behind)
    with pytest.warns(UserWarning, match=r"leaves .* dB of an output"):
        fxquant.calibrate(fxquant.prepare(model, x), [x], progress=False)


class Indexed(nn.Module):
    """Ones where each row is largest, which the rounding of a near tie moves, into an island."""

    def __init__(self):
        super().__init__()
        self.table, self.branch = nn.Embedding(16, 8), Choosing()
        self.table.weight.data[:, 6] = 3.0
        self.table.weight.data[:, 0] = 3.0 - 1e-3

    def forward(self, x):
        y = self.table(x)
        return self.branch(torch.nn.functional.one_hot(y.argmax(-1), 8) * 1.5)


def test_a_collapse_before_an_island_is_said_where_a_function_gives_what_it_reads():
    """Behind the island the values are the same ones as a set."""
    torch.manual_seed(0)
    x = torch.randint(0, 16, (4, 7))
    with pytest.warns(UserWarning, match=r"leaves .* dB of an output"):
        fxquant.calibrate(fxquant.prepare(Indexed().eval(), x), [x], progress=False)


def test_a_collapse_of_the_first_batch_is_said():
    """Where the last batch leaves little, but enough."""
    torch.manual_seed(0)
    x = torch.randn(16, 8)
    prepared = fxquant.prepare(Magnified().eval(), x * 1e-3)
    with pytest.warns(UserWarning, match="on the first calibration batch"):
        fxquant.calibrate(prepared, [x * 1e-3, x * 2e-2], progress=False)


@pytest.mark.parametrize("changes", [{"scale": 1000.0}, {"bits": 4}, {"qat": True}])
def test_a_collapse_is_not_said_of_what_is_sound_or_still_trained(changes, recwarn):
    torch.manual_seed(0)
    x = torch.randn(16, 8) * changes.get("scale", 1e-3)
    four = fxquant.Setting(weight=fxquant.Scheme.weight(4))
    recipe = {"fc": four} if "bits" in changes else None
    prepared = fxquant.prepare(Magnified().eval(), x, qat=changes.get("qat", False), recipe=recipe)
    fxquant.calibrate(prepared, [x], progress=False)
    assert not [w for w in recwarn if "of an output" in str(w.message)]


class Counting(nn.Module):
    """Subtracts an average that each call moves on."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(1))

    def forward(self, x):
        self.average.copy_(0.5 * self.average + 0.5 * x.mean().detach())
        return x - self.average


def test_a_file_has_no_state(tmp_path):
    """The file is compared from the state that it begins with, and the report says that it keeps none."""
    torch.manual_seed(0)
    x = torch.randn(4, 16) + 3
    int8 = fxquant.quantize(Counting().eval(), [x], progress=False)
    report = fxquant.export_onnx(int8, tmp_path / "model.onnx", x, verify="nodes")
    assert int8.average == 0 and min(own.sqnr for own in report.agreement) > 60
    assert any("average" in note and "no state" in note for note in report.notes)


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x, y):
        return self.fc(x + y)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_sums_that_often_end_half_way_are_the_references(parts):
    """Operands on grids whose steps are parts of the result's: torch rounds ties to even, and the reference up."""
    x, y = (torch.randint(-127, 128, (64, 16), generator=torch.Generator().manual_seed(k)) / 64 for k in range(2))
    prepared = fxquant.calibrate(fxquant.prepare(Sum(), (x, y)), [(x, y)], progress=False)
    for name in ("x_quantizer", "y_quantizer"):
        prepared.get_submodule(name).output_quantizer.set_grid(torch.tensor(1 / 64), torch.tensor(128))
    prepared.add.output_quantizer.set_grid(torch.tensor(parts / 64), torch.tensor(128))
    (own,) = (a for a in agreement(fxquant.convert(prepared, kernels="torch"), x, y) if a.node == "add")
    assert own.worst == 0
