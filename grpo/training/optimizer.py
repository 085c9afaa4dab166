"""AdamW on fp32 weights, with a schedule and gradient clipping; skips non-finite gradients."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grpo.errors import ConfigError
from grpo.models.sharded import find_first_row, gather_whole, get_local_part, sum_over_parts

log = logging.getLogger(__name__)

Adam = torch.optim.Optimizer
Schedule = Callable[[float], float]  # share of the steps after warm-up, 0..1 -> factor

SCHEDULES: dict[str, Schedule] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


def make_adamw(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> Adam:
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def make_adamw_8bit(groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> Adam:
    from bitsandbytes.optim import AdamW8bit

    optimizer: Adam = AdamW8bit(groups, lr=lr, betas=betas)
    return optimizer


ADAM_STATE = ("exp_avg", "exp_avg_sq")
SAMPLED_WEIGHTS, SAMPLED_MATRICES = 4096, 64  # weights in a WeightSample, and their matrices
OPTIMIZERS = {"adamw": make_adamw, "adamw_8bit": make_adamw_8bit}


class ScheduleStart(NamedTuple):
    """The step where a schedule begins, and the share of the learning rate it begins with."""

    start: int
    share: float


class WeightSample:
    """A sample of the weights, to see what share of them an optimizer step changes at all.

    Every matrix in it gives equally many weights, whatever its size. Else most of them would be
    embeddings of rare tokens, which have almost no gradient and so show nothing.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        found = [p for p in parameters if p.dim() >= 2] or list(parameters)
        count = min(SAMPLED_MATRICES, len(found))
        chosen = [found[n * len(found) // count] for n in range(count)]
        self.sampled_places = [
            (p, select_local_indices(sample_indices(p, SAMPLED_WEIGHTS // count), p))
            for p in chosen
        ]
        self.weights_T = self.has_gradient_T = torch.empty(0)

    @torch.no_grad()
    def record(self) -> None:
        """Records the weights, and which of them have a gradient."""
        self.weights_T = self._read_weights()
        all_false = [torch.zeros_like(at, dtype=torch.bool) for _, at in self.sampled_places]
        self.has_gradient_T = torch.cat(
            [
                false if p.grad is None else torch.take(get_local_part(p.grad), at) != 0
                for (p, at), false in zip(self.sampled_places, all_false, strict=True)
            ]
        )

    @torch.no_grad()
    def changed_share(self) -> float:
        """Returns the share of weights with a gradient that changed since `record`; 0 if none."""
        changed_T = (self._read_weights() != self.weights_T) & self.has_gradient_T
        counts = torch.stack([changed_T.sum(), self.has_gradient_T.sum()])
        changed, graded = sum_over_parts(counts, self.sampled_places[0][0]).tolist()
        return float(changed / graded) if graded else 0.0

    def _read_weights(self) -> Tensor:
        return torch.cat([torch.take(get_local_part(p), at) for p, at in self.sampled_places])


def sample_indices(matrix: Tensor, count: int) -> Tensor:
    """Returns at most `count` flat indices of a matrix, random but the same at each call."""
    generator = torch.Generator().manual_seed(matrix.numel())
    drawn = torch.randint(matrix.numel(), (count,), generator=generator)
    different: Tensor = drawn.unique()
    return different.to(matrix.device)


def select_local_indices(indices_T: Tensor, matrix: Tensor) -> Tensor:
    """Returns those of a matrix's flat indices that lie in this process's part, counted in it."""
    local_T = indices_T - find_first_row(matrix) * (matrix.numel() // max(1, matrix.shape[0]))
    return local_T[(local_T >= 0) & (local_T < get_local_part(matrix).numel())]


class Optimizer:
    """AdamW with its schedule, clipping and metrics. The learning rate depends on `steps_done`."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        learning_rate: float,
        total_steps: int,
        schedule: Schedule,
        warmup_steps: int,
        weight_decay: float,
        betas: tuple[float, float],
        max_grad_norm: float,
    ) -> None:
        """
        Args:
            name: adamw, or adamw_8bit, whose state takes a quarter of the memory (2110.02861).
            max_grad_norm: gradients with a larger norm are scaled down to this one; 0: never.
        """
        self.name = name
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        # Norms and biases get no weight decay.
        groups = [
            {"params": [p for p in self.parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in self.parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.adamw = OPTIMIZERS[name](groups, learning_rate, betas)
        if name == "adamw":
            self._allocate_state()
        self.learning_rate, self.schedule_end = learning_rate, total_steps
        self.schedule, self.warmup_steps = schedule, warmup_steps
        self.schedule_start = ScheduleStart(warmup_steps, 1.0)
        self.max_grad_norm = max_grad_norm or math.inf
        self.steps_done = 0
        self.weight_sample = WeightSample(self.parameters)

    def _allocate_state(self) -> None:
        """Allocates Adam's state next to the weights, before there are activations around it."""
        state = {
            n: {"step": torch.tensor(0.0), **{name: torch.zeros_like(p) for name in ADAM_STATE}}
            for n, p in enumerate(p for group in self.adamw.param_groups for p in group["params"])
        }
        options = self.adamw.state_dict()["param_groups"]
        self.adamw.load_state_dict({"state": state, "param_groups": options})

    def next_learning_rate(self) -> float:
        """Returns the learning rate of the next step."""
        if self.steps_done < self.warmup_steps:
            return self.learning_rate * (self.steps_done + 1) / self.warmup_steps
        return self.learning_rate * self._schedule_factor()

    def _schedule_factor(self) -> float:
        """Returns the present factor of the learning rate, after warm-up."""
        after = max(1, self.schedule_end - self.schedule_start.start)
        done = min(1.0, (self.steps_done - self.schedule_start.start) / after)
        return self.schedule_start.share * self.schedule(done)

    def end_schedule_after(self, remaining: int) -> None:
        """Makes the schedule end after `remaining` more steps, for a resumed run of another length.

        It continues from the present rate, so that the rate doesn't jump. If that rate is 0, as at
        the end of a run, it continues as if the new length had been planned from the start.
        """
        end = self.steps_done + remaining
        if end == self.schedule_end:
            return
        started = (
            self.steps_done > self.schedule_start.start
            and self.schedule is not SCHEDULES["constant"]
        )
        share = self._schedule_factor() if started else 1.0
        self.schedule_end = end
        if started and share > 0:
            self.schedule_start = ScheduleStart(self.steps_done, share)
            log.info(
                "optim.schedule: continues from the present learning rate, %g, to its new end, "
                "%d updates from here.", self.next_learning_rate(), remaining,
            )  # fmt: skip
        elif started:
            self.schedule_start = ScheduleStart(self.warmup_steps, 1.0)
            log.warning(
                "optim.schedule: it had ended at 0; the learning rate continues at %g, as if "
                "%d updates had been planned from the start.", self.next_learning_rate(), end,
            )  # fmt: skip

    def step(self) -> dict[str, float]:
        """Applies the accumulated gradients, frees them and returns the step's metrics.

        A gradient that is not finite is dropped and counted; the weights then stay as they are.
        """
        rate = self.next_learning_rate()
        norm = float(
            gather_whole(torch.nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm))
        )
        skipped, moved = not math.isfinite(norm), 0.0
        if not skipped:
            for group in self.adamw.param_groups:
                group["lr"] = rate
            self.weight_sample.record()
            self.adamw.step()
            moved = self.weight_sample.changed_share()
        self.clear_gradients()
        self.steps_done += 1
        return {
            "optim/learning_rate": rate,
            "optim/grad_norm": norm,
            "optim/moved": moved,
            "optim/skipped": float(skipped),
        }

    def clear_gradients(self) -> None:
        """Frees the accumulated gradients."""
        self.adamw.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Any]:
        moved_start = (
            None
            if self.schedule_start == ScheduleStart(self.warmup_steps, 1.0)
            else tuple(self.schedule_start)
        )
        return {
            "name": self.name,
            "adamw": self.adamw.state_dict(),
            "steps_done": self.steps_done,
            "end": self.schedule_end,
            "bend": moved_start,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        if state["name"] != self.name:
            raise ConfigError(
                f"optim.name={self.name}: this run's optimizer is {state['name']}, whose state no "
                f"other can use; set optim.name={state['name']}.",
                key="optim.name",
                value=self.name,
            )
        configured = [(group["betas"], group["weight_decay"]) for group in self.adamw.param_groups]
        self.adamw.load_state_dict(state["adamw"])
        # torch restores the saved options, too; the config's present values replace them.
        for group, (betas, weight_decay) in zip(self.adamw.param_groups, configured, strict=True):
            group["betas"], group["weight_decay"] = betas, weight_decay
        self.steps_done = state["steps_done"]
        self.schedule_end = state.get("end", self.schedule_end)  # older checkpoints have none
        if state.get("bend") is not None:
            self.schedule_start = ScheduleStart(*state["bend"])
