"""Schedules of training: what holds at which step, ranges across changes of bits, runs that are stopped and go on."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from comparisons import assert_same_bits
from torch import Tensor, nn

import fxquant
from fxquant import Recipe, Scheme, Setting
from fxquant.calibration import activation_quantizers
from fxquant.errors import InputError, RecipeError
from fxquant.nn.fake_quantize import FakeQuantize, WeightQuantize

PROGRESSIVE = {0: 8, 4: 4, 9: 3, 14: 2}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.sigmoid(self.bn(self.conv(x))).mean((2, 3)))


def batch(step: int) -> Tensor:
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(step))


def setting(rule: str, bits: int) -> Setting:
    weight = "lsq" if rule == "pact" else rule
    return Setting(weight=Scheme.weight(bits, quantizer=weight), activation=Scheme.activation(bits, quantizer=rule))


def prepared_net(rule: str = "observed", bits: int = 2, calibrated: bool = True, **options: Any) -> Any:
    torch.manual_seed(0)
    recipe = Recipe({"fc": setting(rule, 8)}, default=setting(rule, bits))
    prepared = fxquant.prepare(Net().train(), batch(0), qat=True, recipe=recipe, **options)
    return fxquant.calibrate(prepared, [batch(99)], progress=False) if calibrated else prepared


def train(prepared: Any, optimizer: Any, schedule: fxquant.Schedule, steps: range) -> None:
    prepared.train()
    for step in steps:
        optimizer.zero_grad()
        prepared(batch(step)).square().mean().backward()
        optimizer.step()
        schedule.step()


def sgd(prepared: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(fxquant.parameter_groups(prepared, lr=0.01), lr=0.05, momentum=0.9)


def test_each_thing_begins_at_its_step():
    prepared = prepared_net(calibrated=False)
    schedule = fxquant.Schedule(
        prepared, round_activations=3, stop_observing=6, freeze_batchnorm=8, bits={0: 8, 4: 4, 9: 3, 10: 2}
    )
    tensors = activation_quantizers(prepared)
    followed = [q for q in tensors.values() if q.fixed_range is None]
    assert 1 <= len(followed) < len(tensors), "sigmoid's range is known in advance"
    for step in range(12):
        prepared(batch(step))
        assert schedule.count == step
        assert all(q.active == (step >= 3) for q in tensors.values())
        assert all(q.tracking == (step < 6) for q in followed)
        assert prepared.bn.statistics_frozen == (step >= 8)
        bits = 8 if step < 4 else 4 if step < 9 else 3 if step < 10 else 2
        assert prepared.conv.weight_quantizer.scheme.bits == bits and prepared.fc.weight_quantizer.scheme.bits == 8
        assert {q.scheme.bits for q in followed} == {bits}
        schedule.step()


def test_until_activations_are_rounded_ranges_follow_and_values_pass():
    prepared, other = prepared_net(calibrated=False, bits=4), prepared_net(calibrated=False, bits=4)
    fxquant.Schedule(prepared, round_activations=2)
    for step in range(3):
        found = prepared(batch(step))
        other(batch(step))
        entering, expected = prepared.x_quantizer.output_quantizer, other.x_quantizer.output_quantizer
        assert all(torch.equal(value, entering.range_state()[key]) for key, value in expected.range_state().items())
        assert torch.equal(entering.scale, expected.scale)
    plain = copy.deepcopy(prepared)
    for quantizer in activation_quantizers(plain).values():
        quantizer.enabled = False
    with torch.no_grad():
        assert_same_bits(prepared.eval()(batch(7)), plain.eval()(batch(7)))
        assert bool((prepared(batch(7)) != other.eval()(batch(7))).any())
    assert found.grad_fn is not None
    frozen = fxquant.freeze(prepared)  # what ships is rounded, whatever the schedule says
    assert all(q.active for q in activation_quantizers(frozen).values())


@pytest.mark.parametrize("rule", ["lsq", "lsq+", "pact"])
def test_learned_ranges_that_nothing_was_calibrated_for_start_where_rounding_does(rule):
    prepared = prepared_net("lsq" if rule == "pact" else rule, 4, calibrated=False)
    schedule = fxquant.Schedule(prepared, round_activations=2)
    for step in range(2):
        prepared(batch(step))
        assert not any(q.ready for q in activation_quantizers(prepared).values() if q.fixed_range is None)
        schedule.step()
    prepared(batch(2))
    assert all(q.ready for q in activation_quantizers(prepared).values())


@pytest.mark.parametrize("rule", ["observed", "lsq", "lsq+", "ewgs", "pact", "tqt"])
def test_a_range_is_kept_across_bits(rule):
    """LSQ's step grows by 2 per bit, PACT's α and TQT's threshold stay, and what is observed is covered anew."""
    prepared = prepared_net(rule, 3)
    optimizer = sgd(prepared)
    schedule = fxquant.Schedule(prepared, bits={0: 8, 2: 3})
    train(prepared, optimizer, schedule, range(1))
    prepared(batch(1))
    quantizers = {n: q for n, q in prepared.named_modules() if isinstance(q, FakeQuantize) and q.own_bits == 3}
    quantizers = {n: q for n, q in quantizers.items() if q.fixed_range is None}
    before = {n: (q.scale.clone(), getattr(q, "step", torch.zeros(())).detach().clone()) for n, q in quantizers.items()}
    schedule.step()
    assert len(quantizers) >= 2
    for name, quantizer in quantizers.items():
        scale, parameter = before[name]
        assert quantizer.scheme.bits == 3
        if rule == "observed":
            low, high = quantizer.range_state()["low"], quantizer.range_state()["high"]
            levels = 2 * 3 if isinstance(quantizer, WeightQuantize) else 7
            span = (
                2 * torch.maximum(-low, high)
                if isinstance(quantizer, WeightQuantize)
                else high.clamp(0) - low.clamp(max=0)
            )
            assert torch.allclose(quantizer.scale, span / levels, rtol=1e-6)
        elif rule == "tqt" or (rule == "pact" and not isinstance(quantizer, WeightQuantize)):
            assert torch.allclose(quantizer.step, parameter, rtol=1e-6)
        else:
            assert torch.equal(quantizer.scale, scale * 2**5)
            assert torch.equal(quantizer.step.detach().abs(), parameter.abs() * 2**5)


def resumable(rule: str, mode: str) -> tuple[Any, Any, fxquant.Schedule]:
    prepared = prepared_net(rule, calibrated=rule != "observed", batch_norm=mode)
    schedule = fxquant.Schedule(prepared, round_activations=2, stop_observing=12, freeze_batchnorm=13, bits=PROGRESSIVE)
    return prepared, sgd(prepared), schedule


def saved(model: Any, optimizer: Any, schedule: fxquant.Schedule) -> list[Any]:
    """As a checkpoint has them: copies, and plain data through JSON."""
    return [
        copy.deepcopy(model.state_dict()),
        copy.deepcopy(optimizer.state_dict()),
        json.loads(json.dumps(schedule.state_dict())),
    ]


@pytest.mark.parametrize("stop", [4, 10])
@pytest.mark.parametrize(("rule", "mode"), [("observed", "late"), ("lsq", "whitepaper"), ("tqt", "late")])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(rule, mode, stop):
    whole = resumable(rule, mode)
    train(*whole, range(20))
    first = resumable(rule, mode)
    train(*first, range(stop))
    states = saved(*first)
    for order in ((0, 1, 2), (2, 1, 0)):
        again = resumable(rule, mode)
        for part in order:
            again[part].load_state_dict(copy.deepcopy(states[part]))
        train(*again, range(stop, 20))
        for key, value in whole[0].state_dict().items():
            assert torch.equal(again[0].state_dict()[key], value), (order, key)


@pytest.mark.parametrize("rule", ["observed", "lsq"])
@pytest.mark.parametrize("stop", [0, 6])
def test_a_schedule_may_be_made_after_the_model_was_loaded(rule, stop):
    """Which changes the model's ranges, for its step 0, until its own state is loaded."""
    first = resumable(rule, "late")
    train(*first, range(stop))
    states = saved(*first)
    train(*first, range(stop, 16))
    prepared = prepared_net(rule, calibrated=rule != "observed")
    prepared.load_state_dict(states[0])
    schedule = fxquant.Schedule(prepared, round_activations=2, stop_observing=12, freeze_batchnorm=13, bits=PROGRESSIVE)
    optimizer = sgd(prepared)
    optimizer.load_state_dict(states[1])
    if stop:  # at step 0 the state is that which this schedule has changed already
        schedule.load_state_dict(states[2])
        for key, value in states[0].items():
            assert torch.equal(prepared.state_dict()[key], value), key
        train(prepared, optimizer, schedule, range(stop, 16))
        assert all(torch.equal(prepared.state_dict()[key], value) for key, value in first[0].state_dict().items())


def test_it_ends_as_the_recipe_has_it_and_converts(tmp_path):
    prepared, optimizer, schedule = resumable("lsq", "late")
    train(prepared, optimizer, schedule, range(16))
    fxquant.save(prepared, tmp_path / "model.pt")
    loaded = fxquant.load(Net(), tmp_path / "model.pt").eval()
    with torch.no_grad():
        assert_same_bits(loaded(batch(50)), prepared.eval()(batch(50)))
    assert {q.scheme.bits for q in loaded.modules() if isinstance(q, WeightQuantize)} == {2, 8}
    fxquant.convert(prepared)


def test_what_makes_no_sense_is_refused():
    prepared = prepared_net(bits=2)
    before = copy.deepcopy(prepared.state_dict())
    with pytest.raises(InputError, match=r"ends with 3 bits, and the recipe has 2 for .*\n.*end it with 2"):
        fxquant.Schedule(prepared, bits={0: 8, 5: 3})
    with pytest.raises(InputError, match="counts steps from 0"):
        fxquant.Schedule(prepared, freeze_batchnorm=-1)
    with pytest.raises(InputError, match="Linear without quantizers"):
        fxquant.Schedule(nn.Linear(2, 2))
    ternary = fxquant.prepare(
        nn.Linear(3, 3).train(), torch.ones(2, 3), qat=True, recipe=Setting(weight=Scheme.weight(2, quantizer="twn"))
    )
    with pytest.raises(RecipeError, match=r"weight_quantizer cannot have 4 bits on the way: .*set bits=2"):
        fxquant.Schedule(ternary, bits={0: 4, 5: 2})
    assert all(torch.equal(prepared.state_dict()[key], value) for key, value in before.items())
    state = fxquant.Schedule(prepared, stop_observing=5).state_dict()
    with pytest.raises(InputError, match="stop_observing=5 and not 6"):
        fxquant.Schedule(prepared, stop_observing=6).load_state_dict(state)


@contextmanager
def quiet() -> Iterator[None]:
    import logging
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        yield


def lightning_run(folder: Path, epochs: int, resume: Path | None = None) -> tuple[Any, fxquant.Schedule]:
    """Twelve batches an epoch, of which two make one step."""
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader

    class Task(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, x: Tensor, index: int) -> Tensor:
            return self.model(x).square().mean()

        def configure_optimizers(self) -> Any:
            return sgd(self.model)

    prepared = prepared_net("lsq")
    schedule = fxquant.Schedule(prepared, round_activations=2, freeze_batchnorm=13, bits=PROGRESSIVE)
    loader = DataLoader(torch.cat([batch(step) for step in range(12)]), batch_size=8)
    callbacks = [schedule.lightning_callback(), ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)]
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=callbacks, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder, accumulate_grad_batches=2,
    )  # fmt: skip
    trainer.fit(Task(prepared), loader, ckpt_path=resume)
    return prepared, schedule


def trainer_run(folder: Path, epochs: int, resume: Path | None = None) -> tuple[Any, fxquant.Schedule]:
    """Of Hugging Face; twelve batches an epoch, of which two make one step."""
    from transformers import Trainer, TrainingArguments

    class Lossy(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            return model(inputs["x"]).square().mean()

    prepared = prepared_net("lsq")
    schedule = fxquant.Schedule(prepared, round_activations=2, freeze_batchnorm=13, bits=PROGRESSIVE)
    data = [{"x": x} for step in range(12) for x in batch(step)]
    arguments = TrainingArguments(
        str(folder), num_train_epochs=3, per_device_train_batch_size=8, gradient_accumulation_steps=2, seed=1, use_cpu=True,
        report_to=[], save_strategy="epoch", disable_tqdm=True, log_level="error", max_steps=6 * epochs,
        remove_unused_columns=False, lr_scheduler_type="constant", logging_strategy="no",
    )  # fmt: skip
    trainer = Lossy(
        model=prepared, args=arguments, train_dataset=data, optimizers=(sgd(prepared), None),
        callbacks=[schedule.trainer_callback()], data_collator=lambda rows: {"x": torch.stack([r["x"] for r in rows])},
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return prepared, schedule


RUNS: dict[str, tuple[Callable[..., tuple[Any, fxquant.Schedule]], str]] = {
    "Lightning": (lightning_run, "epoch=0.ckpt"),
    "Hugging Face": (trainer_run, "checkpoint-6"),
}


@pytest.mark.long
@pytest.mark.parametrize("trainer", RUNS)
def test_trainers_step_it_and_resume_bit_for_bit(trainer, tmp_path):
    run, checkpoint = RUNS[trainer]
    with quiet():
        prepared, schedule = run(tmp_path / "all", 3)
        again, resumed = run(tmp_path / "again", 3, tmp_path / "all" / checkpoint)
    assert schedule.count == resumed.count == 18
    assert prepared.bn.statistics_frozen and prepared.conv.weight_quantizer.scheme.bits == 2
    for key, value in prepared.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
