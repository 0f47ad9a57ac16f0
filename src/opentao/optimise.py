"""The optimiser loop that policies and reward models share: batches, AdamW, checkpoints, the NaN stop.

Left out: weight averaging; a round is short and has not been seen to need it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from opentao.config import Schedule
from opentao.errors import TrainError
from opentao.policy import native_bf16
from opentao.store import Run

Item = TypeVar("Item")

WARMUP = 0.1  # of all steps, in a linear schedule


class OptimiserSettings(Protocol):
    """What `optimise` needs of a config."""

    @property
    def lr(self) -> float: ...
    @property
    def schedule(self) -> Schedule: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def max_grad_norm(self) -> float: ...


@dataclass(kw_only=True, slots=True)
class Metrics:
    """What one optimiser step saw: ``Metrics(step=3, loss=0.41, grad_norm=0.9, groups=4, tokens=1310)``"""

    step: int
    loss: float
    grad_norm: float
    groups: int
    tokens: int  # packed tokens computed


def optimise(
    model: Any,
    steps: Iterable[list[Item]],
    accumulate: Callable[[list[Item]], tuple[float, int]],
    config: OptimiserSettings,
    checkpoint: Checkpoint,
    on_step: Callable[[Metrics], bool | None],
    on_resume: Callable[[int], None] = lambda done: None,
) -> list[Metrics]:
    """Run the optimiser over `steps`, going on from the checkpoint if there is one.

    `accumulate` adds one step's gradient to the model and returns its loss and the tokens it computed. Training ends
    early after a step for which `on_step` returns True. `on_resume` is told how many steps the checkpoint has.

    Raises:
        TrainError: the loss or gradient is not finite; the model must be thrown away.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(
        trainable, lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True
    )
    history = checkpoint.load(model, optimiser)
    on_resume(len(history))
    steps = list(steps)
    for step, batch in enumerate(steps):
        if step < len(history):
            continue
        for group in optimiser.param_groups:
            group["lr"] = config.lr * rate(config.schedule, step, len(steps))
        optimiser.zero_grad()
        loss, tokens = accumulate(batch)
        norm = float(torch.nn.utils.clip_grad_norm_(trainable, config.max_grad_norm))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainError(f"step {step}: loss {loss}, gradient norm {norm}: training stopped, last good policy kept")
        optimiser.step()
        history.append(Metrics(step=step, loss=loss, grad_norm=norm, groups=len(batch), tokens=tokens))
        stop = on_step(history[-1])
        checkpoint.save(model, optimiser, history)
        if stop:
            break
    return history


def batches(items: Sequence[Item], epochs: int, size: int, seed: int) -> Iterator[list[Item]]:
    """Items of each optimiser step: a new order every epoch; the last step of an epoch may be smaller."""
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(items))
        for start in range(0, len(order), size):
            yield [items[i] for i in order[start : start + size]]


def rate(schedule: Schedule, step: int, total: int) -> float:
    """The learning rate of one step as a share of its peak.

    linear: up over a tenth of the steps, then down to 0; cooldown: constant, then down to 0 over the second half, so
    that what the first half says does not depend on where the end is (Hägele et al., arXiv 2405.18392).

    >>> [rate("linear", step, 10) for step in (0, 1, 5, 9)]
    [1.0, 0.9, 0.5, 0.1]
    >>> [rate("cooldown", step, 8) for step in (0, 4, 5, 7)]
    [1.0, 1.0, 0.75, 0.25]
    """
    if schedule == "constant":
        return 1.0
    if schedule == "cooldown":
        return min(1.0, (total - step) / (total / 2))
    warmup = math.ceil(WARMUP * total)
    return (step + 1) / warmup if step < warmup else (total - step) / (total - warmup + 1)


def num_steps(num_items: int, epochs: int, size: int) -> int:
    return epochs * math.ceil(num_items / size)


def autocast(model: Any) -> AbstractContextManager[Any]:
    """bf16 matrix products where the device has them in hardware; weights, softmax and losses stay fp32."""
    weight = next(model.parameters())
    if weight.dtype == torch.float32 and native_bf16(weight.device):
        return torch.autocast(weight.device.type, torch.bfloat16)
    return nullcontext()


@dataclass(slots=True)
class Checkpoint:
    """Trainable weights and optimiser state between steps, in a run directory, as safetensors."""

    run: Run | None  # None: keep nothing
    name: str
    key: str
    every: int  # steps

    def load(self, model: Any, optimiser: torch.optim.Optimizer) -> list[Metrics]:
        """Restore if there is a checkpoint of the same inputs. Returns the metrics of the steps that are done."""
        if self.run is None or not self.run.have(self.name, self.key):
            return []
        folder = self.run.path(self.name)
        tensors = load_file(folder / "state.safetensors")
        with torch.no_grad():
            for name, parameter in _trainable(model):
                parameter.copy_(tensors[f"weight/{name}"])
                if f"step/{name}" not in tensors:  # it never got a gradient: a tower for images, say
                    continue
                moments = ("step", "exp_avg", "exp_avg_sq")  # a fused AdamW keeps all three beside the parameter
                optimiser.state[parameter] = {key: tensors[f"{key}/{name}"].to(parameter.device) for key in moments}
        return [Metrics(**m) for m in json.loads((folder / "metrics.json").read_text())]

    def save(self, model: Any, optimiser: torch.optim.Optimizer, history: Sequence[Metrics]) -> None:
        """Write every `every` steps."""
        if self.run is None or len(history) % self.every:
            return
        tensors: dict[str, Tensor] = {}
        for name, parameter in _trainable(model):
            tensors[f"weight/{name}"] = parameter.detach().contiguous()
            for key, value in optimiser.state[parameter].items():
                tensors[f"{key}/{name}"] = value.contiguous()

        def write(path: Path) -> None:
            path.mkdir()
            save_file(tensors, path / "state.safetensors")
            (path / "metrics.json").write_text(json.dumps([asdict(m) for m in history]))

        self.run.commit(self.name, self.key, write)

    def discard(self) -> None:
        """The result is written: the way there is no longer needed."""
        if self.run is not None:
            self.run.discard(self.name)


NO_CHECKPOINT = Checkpoint(run=None, name="", key="", every=1)


def _trainable(model: Any) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
