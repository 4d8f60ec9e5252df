"""A ``Schedule`` as a callback of the trainers of Lightning and Hugging Face."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fxquant.installed import require

if TYPE_CHECKING:
    from fxquant.training.schedule import Schedule

__all__ = ["lightning_callback", "trainer_callback"]


def lightning_callback(schedule: Schedule) -> Any:
    """See ``Schedule.lightning_callback``: accumulated batches are one step."""
    lightning = require("lightning", "A callback for Lightning", "dev")

    def on_train_batch_end(self: Any, trainer: Any, *_: Any) -> None:
        while schedule.count < trainer.global_step:
            schedule.step()

    return _made(
        lightning.Callback,
        on_train_batch_end=on_train_batch_end,
        state_dict=lambda self: schedule.state_dict(),
        load_state_dict=lambda self, state: schedule.load_state_dict(state),
    )


def trainer_callback(schedule: Schedule) -> Any:
    """See ``Schedule.trainer_callback``: a run begins where the trainer does."""
    transformers = require("transformers", "A callback for Hugging Face's Trainer", "dev")

    def on_train_begin(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if schedule.count != state.global_step:
            schedule.go_to(state.global_step)

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        schedule.step()

    return _made(transformers.TrainerCallback, on_train_begin=on_train_begin, on_step_end=on_step_end)


def _made(base: type, **methods: Any) -> Any:
    """An object of a subclass of ``base``, which is known only where its package is installed."""
    return type("ScheduleCallback", (base,), methods)()
