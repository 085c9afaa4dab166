"""A reward model: a sequence classifier of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.errors import ConfigError
from grpo.models.files import require_local_folder
from grpo.models.hub import (
    HubUnreachable,
    fetch_hub_model,
    find_cached_model,
    format_revision,
    require_hub,
)
from grpo.rewards.option_checks import require_at_least
from grpo.types import Sample

if TYPE_CHECKING:
    from torch import Tensor


class RewardModel:
    """The score that a sequence classifier gives to a question and its completion.

    If its tokenizer has a chat template, it reads question and completion as one exchange; else it
    reads the policy's prompt followed by the completion, as plain text. If the classifier has one
    output, that is the reward; if it has several, the reward is the softmax probability of `label`.

    Args:
        model: id on the hub, or a folder.
        revision: branch, tag or commit of a model on the hub; None is main.
        batch_size: completions per forward pass.
        max_tokens: longer texts lose their beginning.
        device: cpu, cuda, cuda:1 …; auto is cuda if available, else cpu.
        label: index of the output to use, if there are several.
    """

    def __init__(
        self,
        model: str,
        batch_size: int = 16,
        max_tokens: int = 2048,
        device: str = "auto",
        label: int | None = None,
        revision: str | None = None,
    ) -> None:
        require_at_least(1, batch_size=batch_size, max_tokens=max_tokens)
        if device not in ("auto", "cpu") and device.partition(":")[0] != "cuda":
            raise ConfigError(
                f"device={device}: use auto, cpu, cuda or cuda:NUMBER.", key="device", value=device
            )
        folder = find_local_model(model, revision)
        if folder is not None:  # else it is checked after the download
            check_label(model, label, count_outputs(folder))
        self.model, self.revision = model, revision
        self.batch_size = batch_size
        self.max_tokens = max_tokens
        self.device = device
        self.label = label
        self.loaded: tuple[Any, Any] | None = None  # classifier, tokenizer

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        if self.loaded is None:
            self.loaded = self.load()
        starts = range(0, len(samples), self.batch_size)
        batches = [samples[start : start + self.batch_size] for start in starts]
        return [reward for batch in batches for reward in self.score(batch).tolist()]

    def score(self, samples: Sequence[Sample]) -> Tensor:
        """Returns the rewards [n], float32, on the CPU."""
        import torch

        assert self.loaded is not None
        classifier, tokenizer = self.loaded
        batch = tokenizer(
            [self.format_text(sample, tokenizer) for sample in samples],
            add_special_tokens=tokenizer.chat_template is None,  # a template writes its own
            truncation=True,
            max_length=self.max_tokens,
            padding=len(samples) > 1,
            return_tensors="pt",
        )
        with torch.no_grad():
            logits_nL = classifier(
                input_ids=batch["input_ids"].to(classifier.device),
                attention_mask=batch["attention_mask"].to(classifier.device),
            ).logits.float()
        label = self.label
        rewards_n: Tensor = logits_nL[:, 0] if label is None else logits_nL.softmax(1)[:, label]
        return rewards_n.cpu()

    def format_text(self, sample: Sample, tokenizer: Any) -> str:
        if tokenizer.chat_template is None:
            return sample.prompt + sample.completion
        question = sample.example.messages or (
            {"role": "user", "content": sample.example.question},
        )
        messages = [*question, {"role": "assistant", "content": sample.completion}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False))

    def load(self) -> tuple[Any, Any]:
        """Loads the classifier, in eval mode on its device, and its tokenizer.

        Raises:
            ConfigError: it can't be downloaded, has no trained head, or `label` doesn't fit it.
        """
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        folder = fetch_model_folder(self.model, self.revision)
        # Loading it must not change what is sampled later.
        with torch.random.fork_rng(devices=[]):
            classifier, info = AutoModelForSequenceClassification.from_pretrained(
                folder,
                trust_remote_code=False,  # without a value, it would ask on stdin
                dtype=torch.float32 if device == "cpu" else "auto",
                output_loading_info=True,
            )
        if missing := ", ".join(sorted(info["missing_keys"])):
            raise ConfigError(
                f"model={self.model}: has no weights for {missing}; it should be a trained "
                f"sequence classifier.",
                key="model",
                value=self.model,
            )
        check_label(self.model, self.label, classifier.config.num_labels)
        tokenizer = AutoTokenizer.from_pretrained(
            folder, truncation_side="left", trust_remote_code=False
        )
        config = classifier.config.get_text_config()
        if config.pad_token_id is None:
            self.batch_size = 1  # without padding, it can't find the ends of several texts
        else:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
        longest = getattr(config, "max_position_embeddings", None)
        self.max_tokens = min(self.max_tokens, longest or self.max_tokens)
        return classifier.eval().to(device), tokenizer


def check_label(model: str, label: int | None, outputs: int) -> None:
    if outputs == 1 and label is not None:
        raise ConfigError(
            f"label={label}: {model} has one output, so leave it out.", key="label", value=label
        )
    if outputs > 1 and label not in range(outputs):
        raise ConfigError(
            f"label={label}: {model} has several outputs; use 0 to {outputs - 1}.",
            key="label",
            value=label,
        )


def is_folder(model: str) -> bool:
    return model.startswith((".", "/", "~")) or Path(model).is_dir()


def find_local_model(model: str, revision: str | None) -> Path | None:
    """Returns the folder of a local or cached model; None if it can be downloaded.

    Raises:
        ConfigError: it is not there, and can't be downloaded.
    """
    if is_folder(model):
        if revision is not None:
            raise ConfigError(
                f"revision={revision}: model={model} is a folder, which has no revisions; leave it "
                f"out.",
                key="revision",
                value=revision,
            )
        return require_local_folder("model", model)
    try:
        cached = find_cached_model(model, revision)
        if cached is None:
            require_hub()
    except HubUnreachable as error:
        raise make_unreachable_error(model, revision, error) from error
    return cached


def make_unreachable_error(model: str, revision: str | None, error: HubUnreachable) -> ConfigError:
    wanted = format_revision(model, revision)
    return ConfigError(
        f"model={wanted}: is not in the local cache and {error}.", key="model", value=wanted
    )


def count_outputs(folder: Path) -> int:
    """Returns the number of outputs of the classifier in a folder."""
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(folder, trust_remote_code=False).num_labels)


def fetch_model_folder(model: str, revision: str | None) -> Path:
    if is_folder(model):
        return require_local_folder("model", model)
    try:
        return fetch_hub_model(model, revision)
    except HubUnreachable as error:
        raise make_unreachable_error(model, revision, error) from error
