"""The peer, in a process of its own: TRL's GRPOTrainer. peer.py WORK SETTING PRECISION OUT"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from settings import SETTINGS
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from work import vowel_share


class Clock(TrainerCallback):
    """Seconds from one optimizer step's end to the next's, and the memory held until then."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *arguments: Any, **named: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *arguments: Any, **named: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)


class Peer(trl.GRPOTrainer):
    """As it is, but that the first step's numbers are kept, and generation's time."""

    kept: list[dict[str, Any]]
    generation: list[float]
    generating: set[str]  # the precisions of products
    updating: set[str]

    def _generate_single_turn(self, *arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        result = super()._generate_single_turn(*arguments, **named)
        self.generation.append(time.perf_counter() - began)
        return result

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
        if self.state.global_step == 0:
            names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages")
            self.kept.append({name: inputs[name].cpu() for name in names})
        return super()._compute_loss(model, inputs)


def watch_products(trainer: Peer) -> None:
    """Notes in which precision the first layer's products come out, in generation and update."""
    trainer.generating, trainer.updating = set(), set()
    names = {torch.float32: "fp32", torch.bfloat16: "bf16"}

    def note(module: nn.Module, inputs: Any, product: torch.Tensor) -> None:
        precisions = trainer.updating if torch.is_grad_enabled() else trainer.generating
        precisions.add(names[product.dtype])

    layer = next(m for m in trainer.model.modules() if isinstance(m, nn.Linear))
    layer.register_forward_hook(note)


def main(work: Path, name: str, precision: str, out: Path) -> None:
    setting = SETTINGS[name]
    rows = setting.prompts * setting.group
    micro = setting.peer_rows or rows
    chats = json.loads((work / "prompts.json").read_text())
    on_cpu = setting.device == "cpu"
    clock = Clock()

    def reward(completions: list[list[dict[str, str]]], **columns: Any) -> list[float]:
        return [vowel_share(completion[0]["content"]) for completion in completions]

    trainer = Peer(
        model=AutoModelForCausalLM.from_pretrained(work / "model", dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(work / "model"),
        reward_funcs=[reward],
        train_dataset=Dataset.from_dict({"prompt": chats}),
        callbacks=[clock],
        args=trl.GRPOConfig(
            output_dir=str(work / "peer"), report_to="none", save_strategy="no", disable_tqdm=True,
            use_cpu=on_cpu, bf16=precision == "bf16", gradient_checkpointing=False,
            max_steps=setting.steps + 1, logging_steps=1, shuffle_dataset=False,
            per_device_train_batch_size=micro, gradient_accumulation_steps=rows // micro,
            num_generations=setting.group, max_completion_length=setting.tokens,
            temperature=setting.temperature, beta=setting.kl_weight, loss_type="grpo",
            learning_rate=setting.learning_rate, lr_scheduler_type="constant",
            use_bias_correction_kl=False,
        ),
    )  # fmt: skip
    trainer.kept, trainer.generation = [], []
    watch_products(trainer)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
    torch.save(trainer.kept, out.with_suffix(".pt"))
    prompts = [
        ids[mask.bool()].tolist()
        for batch in trainer.kept
        for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    ]
    if on_cpu:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    else:
        peak = torch.cuda.max_memory_allocated() / 1e9
    content = {
        "seconds": clock.seconds,
        "generation": trainer.generation,
        "peak_gb": peak,
        "loss": [float(entry["loss"]) for entry in steps],
        "grad_norm": [float(entry["grad_norm"]) for entry in steps],
        "length": [float(entry["completions/mean_length"]) for entry in steps],
        "first_prompts": prompts,
        "computed_in": sorted(trainer.updating),
        "generated_in": sorted(trainer.generating),
        "version": trl.__version__,
    }
    out.write_text(json.dumps(content))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))
