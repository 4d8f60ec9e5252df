"""Distillation against formulas in float64 and against torch's own, and what a teacher must not do."""

from __future__ import annotations

import copy
from typing import Any

import digits
import pytest
import torch
import torch.nn.functional as F
from comparisons import assert_close_to_scale, assert_same_bits
from torch import Tensor, nn

import fxquant
from fxquant import Scheme, Setting
from fxquant.errors import InputError

NOISE = 1e-6
"""Of a divergence in float32: sums of logarithms of size 2 to 4, each rounded to 2^-23 of it, that cancel."""

FOUR = Setting(weight=Scheme.weight(4, quantizer="lsq"), activation=Scheme.activation(4, quantizer="lsq"))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(self.relu(x))) + x)


class Net(nn.Module):
    def __init__(self, give: str = "tensor") -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 6, 3), Block(), Block()
        self.head, self.give = nn.Linear(6, 5), give

    def forward(self, x: Tensor) -> Any:
        features = self.second(self.first(self.stem(x)))
        logits = self.head(features.mean((2, 3)))
        if self.give == "dict":
            return {"features": features, "logits": logits}
        return logits if self.give == "tensor" else (features, logits)


def data(seed: int = 0) -> Tensor:
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def made(give: str = "tensor") -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Net(give).train()
    model(data(1))  # statistics of some data
    prepared = fxquant.prepare(model, data(), qat=True, recipe=FOUR)
    return model.eval(), fxquant.calibrate(prepared, [data(2)], progress=False).train()


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Σ p·log(p / q) in float64, as it stands in the paper."""
    p, q = ((x.double() / temperature).exp() for x in (teacher, student))
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    return (p * (p / q).log()).sum(-1).mean() * temperature**2


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_logits_are_compared_as_in_the_paper(temperature):
    model, prepared = made()
    distillation = fxquant.distill(prepared, temperature=temperature)
    output, loss = distillation(data(3))
    own = output.detach().double().requires_grad_()
    expected = divergence(own, model(data(3)).detach(), temperature)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=NOISE * temperature**2)
    (found,) = torch.autograd.grad(loss, output)
    expected.backward()
    assert_close_to_scale(found.double(), own.grad, 1e-5)
    log_q, log_p = (F.log_softmax(x / temperature, 1) for x in (output, model(data(3))))
    theirs = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True) * temperature**2
    assert float(loss.detach()) == pytest.approx(float(theirs.detach()), abs=NOISE * temperature**2)


def test_the_float_teacher_is_the_float_network_of_then_and_stays_it():
    model, prepared = made()
    names, mode = set(prepared.state_dict()), {n: m.training for n, m in prepared.named_modules()}
    distillation = fxquant.distill(prepared, temperature=2.0)
    assert set(prepared.state_dict()) == names and not any("teacher" in name for name in names)
    optimizer = torch.optim.SGD(fxquant.parameter_groups(prepared), 0.1)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in distillation.teacher.parameters()}
    losses = []
    for step in range(12):
        optimizer.zero_grad()
        _, loss = distillation(data(step % 3))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        assert all(p.grad is None for p in distillation.teacher.parameters())
    assert losses[-1] < losses[0]
    assert {n: m.training for n, m in prepared.named_modules()} == mode
    with torch.no_grad():
        assert_same_bits(distillation.teacher(data(5)), model(data(5)))
    assert not isinstance(distillation, nn.Module)
    assert not any(part._forward_hooks for part in prepared.modules())
    assert sum(p.numel() for p in copy.deepcopy(prepared).parameters()) == sum(p.numel() for p in prepared.parameters())
    fxquant.convert(prepared)


def kept(model: nn.Module, path: str, x: Tensor) -> Tensor:
    """What a module gives, cloned before an op behind it writes into it."""
    seen: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_hook(lambda part, args, y: seen.append(y.clone()))
    with torch.no_grad():
        model(x)
    hook.remove()
    return seen[-1]


@pytest.mark.parametrize("kind", ["float", "module"])
def test_features_of_layers_and_blocks_are_compared(kind):
    model, prepared = made()
    paths = ["stem", "first", "second.bn"]
    teacher = "float" if kind == "float" else model
    found = fxquant.distill(prepared, teacher, features=paths, feature_weight=0.5, logit_weight=0.0)
    parts = {"stem": "stem", "first": "first.relu_1", "second.bn": "second.bn"}
    x, expected = data(3), 0.0
    again = copy.deepcopy(prepared)
    _, loss = found(x)
    for path, student in parts.items():
        expected += 0.5 * float((kept(again, student, x).double() - kept(model, path, x).double()).square().mean())
    # each pass moves the batch norms' statistics and nothing that training mode computes with
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert float(prepared.second.conv.weight.grad.abs().max()) > 0
    assert prepared.head.weight.grad is None


def test_other_names_of_the_teacher_and_a_wrapped_student():
    class Wrapped(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any) -> Any:
            return self.module(*args)

    model, prepared = made()
    teacher = nn.Sequential(model.stem, model.first, model.second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.head)
    x = data(3)
    plain = fxquant.distill(copy.deepcopy(prepared), model, features=["first"])(x)[1]
    other = fxquant.distill(Wrapped(copy.deepcopy(prepared)), teacher, features={"first": "1"})(x)[1]
    # a mean over two axes and an adaptive pool add in another order: 24 bits of 36 numbers
    assert float(other.detach()) == pytest.approx(float(plain.detach()), rel=1e-4)
    own = fxquant.distill(Wrapped(prepared), features=["first"])(x)[1]
    assert float(own.detach()) == pytest.approx(float(plain.detach()), rel=1e-5)


@pytest.mark.parametrize(("give", "output"), [("dict", None), ("dict", "logits"), ("tuple", 1)])
def test_results_of_several_tensors(give, output):
    _, plain = made()
    _, prepared = made(give)
    x = data(3)
    given, loss = fxquant.distill(prepared, output=output)(x)
    expected, same = fxquant.distill(plain)(x)
    assert_same_bits((given["logits"] if give == "dict" else given[1]).detach(), expected.detach())
    assert torch.equal(loss, same)


@pytest.mark.long
def test_results_of_transformers_with_labels():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 30,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    model = BertForSequenceClassification(BertConfig(**sizes, num_labels=3)).eval()
    ids = torch.randint(0, 30, (4, 6), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 3}
    prepared = fxquant.prepare(model.train(), batch, qat=True)
    distillation = fxquant.distill(prepared, model)
    given, loss = distillation(**batch)
    expected = divergence(given.logits.detach(), model(**batch).logits.detach(), 1.0)
    assert float(loss.detach()) == pytest.approx(float(expected), abs=NOISE)
    (loss + given.loss).backward()
    assert not model.training


def test_parts_that_run_their_own_code():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = (
                nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU()),
                nn.Linear(6, 3),
            )

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return self.head(y) if float(y.sum()) > 0 else self.head(-y)

    torch.manual_seed(0)
    model, x = Branching().train(), torch.randn(8, 4)
    prepared = fxquant.prepare(model, x, qat=True)
    for path in ("body", "body.0", "head"):
        with torch.no_grad():
            loss = fxquant.distill(prepared, model, features=[path], logit_weight=0.0)(x)[1]
        assert 0 < float(loss) < 1e-3


def test_classes_on_another_axis():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1)).eval(), data(4)
    prepared = fxquant.prepare(model.train(), x, qat=True, recipe=FOUR)
    output, loss = fxquant.distill(prepared, model, axis=1)(x)
    expected = divergence(output.detach().movedim(1, -1), model(x).detach().movedim(1, -1), 1.0)
    assert float(expected) > 100 * NOISE and float(loss.detach()) == pytest.approx(float(expected), abs=NOISE)


def test_what_cannot_be_compared_is_refused():
    model, prepared = made()
    before = {key: value.clone() for key, value in prepared.state_dict().items()}
    for arguments, words in (
        ({"teacher": "big"}, 'the teacher is "float", or a module'),
        ({"teacher": prepared}, "other than the student"),
        ({"temperature": 0.0}, "temperature=0.0 has to be positive"),
        ({"features": ["third"]}, "the student has no module 'third'"),
        ({"features": {"first": "third"}}, "the teacher has no module 'third'"),
    ):
        with pytest.raises(InputError, match=words):
            fxquant.distill(prepared, **arguments)
    with pytest.raises(InputError, match="Linear without quantizers"):
        fxquant.distill(nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"second\.bn gives .* in the student and .* in the teacher"):
        fxquant.distill(prepared, model, features={"second.bn": "head"})(data())
    with pytest.raises(InputError, match=r"logits \(6, 5\), the teacher \(6, 6, 6, 6\)"):
        fxquant.distill(prepared, model.stem)(data())
    assert not any(part._forward_hooks for part in (*prepared.modules(), *model.modules()))
    _, several = made("tuple")
    with pytest.raises(InputError, match=r"the student gives a tuple of 2, .*\n.*name them with output="):
        fxquant.distill(several)(data())
    with pytest.raises(InputError, match="which has no output='scores'"):
        fxquant.distill(several, output="scores")(data())
    assert before.keys() == prepared.state_dict().keys()


def test_a_teacher_mends_what_two_bits_break():
    """Trained on unlabelled images alone, from what the float network says of them."""
    torch.manual_seed(0)
    two = Setting(weight=Scheme.weight(2, quantizer="lsq"), activation=Scheme.activation(2, quantizer="lsq"))
    images, _ = digits.data()[:2]
    model = digits.trained()
    prepared = fxquant.prepare(model.train(), images[:2], qat=True, recipe=two)
    fxquant.calibrate(prepared, [images[:256]], progress=False)
    before = digits.accuracy(prepared)
    distillation = fxquant.distill(prepared, temperature=2.0)
    optimizer = torch.optim.Adam(fxquant.parameter_groups(prepared, lr=1e-3), 2e-3)
    prepared.train()
    for _ in range(2):
        for x, _ in digits.training_batches(0):
            optimizer.zero_grad()
            distillation(x)[1].backward()
            optimizer.step()
    whole, after = digits.accuracy(digits.trained()), digits.accuracy(prepared)
    assert before < whole - 20 and whole - after < 0.5 * (whole - before)
