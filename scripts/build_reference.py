#!/usr/bin/env python
"""Writes the parts of docs/ that repeat conf/: scripts/build_reference.py [--check]

A page marks such a part with <!-- generated: NAME --> and <!-- end -->. The keys, their defaults and
their meanings come from the YAML files and their comments, the types from the schema and from the
classes that the files name. --check writes nothing and fails where a page is out of date.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra

from grpo.config import schema

ROOT = Path(__file__).resolve().parents[1]
CONF, DOCS = ROOT / "conf", ROOT / "docs"
MARK = re.compile(r"(<!-- generated: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)
LINE = re.compile(
    r"(?P<indent>\s*)(?P<key>[\w-]+):(?P<value>(\s+('[^']*'|\"[^\"]*\"|[^#\s'\"]+))*)"
)
COMMENT = re.compile(r"(?:^|\s)# (?P<text>.*)$")
ARXIV = re.compile(r"\b(\d{4}\.\d{5})\b")
TYPES = {"int": "whole number", "float": "number", "str": "text", "bool": "true or false"}

# What a table says of keys whose own file says less: there, the name and the lines around it help.
MEANINGS = {
    "name": "name of the run on W&B; null: made of what it trains and its folder",
    "seed": "seeds everything that is random: order of prompts, sampling, adapter",
    "max_steps": "number of steps, instead of num_epochs",
    "batch_size": "prompts in a step",
    "num_generation": "completions of each prompt: the group",
    "temperature": "softmax temperature, in sampling and in the loss",
    "sampling.*": "what else changes the distribution; the defaults change nothing",
    "sampling.repetition_penalty": "divides the positive logits of tokens that were there before",
    "sampling.top_k": "sample only from this many most likely tokens; 0: from all",
    "sampling.top_p": "sample only from the most likely tokens with this probability together",
    "sampling.min_p": "sample only tokens at least this likely, relative to the most likely one",
    "sampling.stop": "texts; a completion also ends with one of these",
    "kl_weight": "weight of the KL to the reference, 0.02 for grpo; 0: no reference model",
    "learning_rate": "learning rate of the optimizer; the default is the model's recommendation",
    "optim.name": "adamw, or adamw_8bit: a quarter of the memory for its state",
    "optim.warmup_steps": "steps in which the learning rate rises from 0",
    "optim.weight_decay": "weight decay of AdamW",
    "optim.betas": "betas of AdamW",
    "curriculum.samples": "completions of each training prompt, to measure before training how "
    "hard it is; 0: not measured",
    "curriculum.at_least": "leave out prompts of which a smaller share is right",
    "curriculum.at_most": "leave out prompts of which a larger share is right",
    "eval.every": "steps between evaluations; 0: only before and after training",
    "eval.samples": "completions of each prompt for sampled accuracy and pass@k",
    "eval.temperature": "temperature of these samples; to compare temperatures, give it one value",
    "eval.greedy": "also evaluate the most likely completion",
    "checkpoint.every": "steps between checkpoints; 0: only at the end",
    "checkpoint.keep": "how many of the newest checkpoints to keep",
    "log_prompts": "prompts of a step whose completions are written to completions.jsonl",
    "objective": "the metric that a run returns, for sweeps and searches",
    "sweep_dir": "the folder of a sweep; an existing one is continued",
    "dataset.system_prompt": "the system message before each question; null: none",
    "dataset.split": "the split to train on",
    "dataset.slice": "its rows to train on: :5%  100:200  -128:",
    "dataset.eval_split": "the split to evaluate on",
    "dataset.eval_slice": "its rows to evaluate on",
    "dataset.question_column": "the column with the question",
    "dataset.answer_column": "the column with the answer, a text or a number; a list, a mapping, "
    "bytes or NaN is refused",
    "dataset.id": "the data set on the hub, ORG/NAME",
    "dataset.subset": "the configuration of the data set on the hub; null: the default one",
    "dataset.digits": "the most digits of each number",
    "dataset.operations": "which operations: +, - or +-",
    "dataset.size": "number of training problems",
    "dataset.eval_size": "number of evaluation problems",
    "dataset.seed": "seeds the problems that are generated",
    "dataset.task": "the name of the task in reasoning-gym",
    "dataset.extract": "where a completion's answer is: tag boxed number text lenient",
    "dataset.max_prompt_tokens": "longer prompts are left out, and counted; with more than 16,384 "
    "rows, when they are drawn",
    "dataset.sets.sums.probability": "how often a prompt is drawn from this set",
    "dataset.sets.differences.probability": "how often a prompt is drawn from this set",
    "dataset.sets.sums.operations": "a key of this set's own data set",
    "dataset.sets.differences.operations": "a key of this set's own data set",
    "device.kind": "auto, cpu, cuda or mps",
    "device.memory_gb": "memory that a run may use; null: most of what is there",
    "device.token_budget": "tokens in one forward and backward pass; null: what memory_gb allows",
    "device.cache_budget": "tokens of prompts and completions that are decoded at once; null: what "
    "memory_gb allows",
    "model.name": "name in reports and of W&B runs",
    "model.id": "the model on the hub, ORG/NAME",
    "model.path": "the folder of a model",
    "model.packaged": "the name of a model inside the package",
    "model.learning_rate": "the recommended learning rate",
    "model.wheel.name": "the PyPI package with the model, for where the hub can't be reached",
    "model.wheel.version": "its version",
    "model.wheel.file": "the model's file in it",
    "model.wheel.sha256": "the checksum of that file",
    "adapter.rank": "rank of the matrices",
    "adapter.target": "all-linear, or the names of modules: [q_proj, v_proj]",
    "kl.estimator": "k1, k2, k3, full, or null for none",
    "kl.within": "loss; or reward: subtracted from it before the advantage, without gradient",
    "kl.target": "the kl/mean to hold by changing kl_weight; null: kl_weight does not change",
    "kl.sync_every": "steps between moves of the reference toward the policy; 0: no moves",
    "kl.sync_share": "how far it moves; 1: it becomes the policy",
    "algorithm.kl_weight": "kl_weight, unless you set it",
    "algorithm.kl_within": "kl.within, unless you set it",
    "algorithm.aggregate": "several rewards: sum_then_normalize, or normalize_then_sum: each in its "
    "group first (GDPO)",
    "algorithm.ratio": "compares policy and sampler: token sequence sequence_product",
    "algorithm.averaging": "averages the loss: sequence_mean token_mean minibatch_token_mean "
    "constant sequence_sum",
    "algorithm.top_entropy": "train only on this share of the tokens, those with the highest entropy",
    "algorithm.importance_cap": "the largest importance weight of a token that its sampler found "
    "less likely than the policy does",
    "algorithm.entropy_weight": "weight of an entropy bonus, which keeps the policy undecided longer",
    "algorithm.minibatches": "optimizer steps in a pass",
    "algorithm.resample": "how often groups with equal rewards are replaced by other prompts",
    "algorithm.policy_loss.clip_low": "the ratio counts from 1 - clip_low",
    "algorithm.policy_loss.clip_high": "the ratio counts to 1 + clip_high",
    "algorithm.policy_loss.clip_dual": "where the advantage is negative, the ratio counts up to "
    "this: 3 is usual",
    "algorithm.policy_loss.sharpness_positive": "of the gate, where the advantage is positive; "
    "higher: a token whose ratio moved loses its gradient sooner",
    "algorithm.policy_loss.sharpness_negative": "of the gate, where the advantage is negative",
    "algorithm.policy_loss.power_positive": "k in w^k, where the advantage is positive",
    "algorithm.policy_loss.decay_positive": "λ in e^(λ(1-w)), where the advantage is positive",
    "algorithm.policy_loss.power_negative": "k in w^k, where the advantage is negative",
    "algorithm.policy_loss.decay_negative": "λ in e^(λ(1-w)), where the advantage is negative",
    "reward.*.weight": "the reward is multiplied by this in the sum",
    "reward.code.column": "the column with the tests: asserts as a string or a list of them, a list "
    "of {input, output}, or {inputs, outputs, fn_name}; JSON of these too",
    "reward.code.seconds": "time limit of one run; longer fails",
    "reward.code.memory_mb": "memory limit of each sandbox",
    "reward.code.file_mb": "limit of what is printed or written",
    "reward.code.workers": "programs that run at once",
    "reward.cosine.max_tokens": "the length at which right_end and wrong_end hold",
    "reward.cosine.right_start": "the reward of a right answer at 0 tokens",
    "reward.cosine.right_end": "the reward of a right answer at max_tokens",
    "reward.cosine.wrong_start": "the reward of a wrong answer at 0 tokens",
    "reward.cosine.wrong_end": "the reward of a wrong answer at max_tokens",
    "reward.cosine.cut_off": "the reward of a completion that max_new_tokens cut off",
    "reward.endpoint.url": "the address of the service: http://localhost:8000/rewards",
    "reward.endpoint.seconds": "time limit of one try",
    "reward.endpoint.retries": "further tries, each after twice the pause of the one before",
    "reward.endpoint.batch_size": "samples in a request",
    "reward.endpoint.workers": "requests at once",
    "reward.endpoint.token_env": "the environment variable that holds a token, sent as "
    "Authorization: Bearer",
    "reward.math.seconds": "time limit of one answer; longer is a failure, not a wrong answer",
    "reward.repetition.max_penalty": "the reward of a text that only repeats",
    "reward.soft_overlong.max_tokens": "the length at which the penalty is -1",
    "reward.reward_model.model": "an id on the hub, or a folder",
    "reward.reward_model.revision": "a branch, tag or commit of an id; null: main",
    "reward.reward_model.batch_size": "texts that are scored at once",
    "reward.reward_model.device": "auto, cpu, cuda or mps",
    "reward.tag_count.tags": "the tags that are counted",
    "tracking.trackio.project": "the project in Trackio",
    "tracking.wandb.project": "the project; null: WANDB_PROJECT, else grpo-bench",
    "tracking.wandb.entity": "user or team on W&B",
    "tracking.wandb.mode": "auto: online where you are logged in, else offline; online; offline",
    "tracking.wandb.group": "null: WANDB_RUN_GROUP, else the sweep, if there is one",
    "tracking.wandb.notes": "a text beside the run",
    "tracking.wandb.log_model": "true: upload the trained model as an artifact",
    "doctor.patience": "steps before the doctor says anything",
    "doctor.spikes": "...so many times within a window",
    "hydra.sweeper.direction": "maximize or minimize: which way `objective` is better",
    "hydra.sweeper.n_trials": "the number of trials, over all starts and processes",
    "hydra.sweeper.sampler_options": "options of Optuna's sampler class",
    "hydra.sweeper.pruner_options": "options of Optuna's pruner class; its steps are training steps",
    "hydra.sweeper.study_name": "name of the study; null: the sweep's folder",
    "hydra.sweeper.seed": "seeds the sampler",
    "hydra.launcher.timeout_min": "minutes that a job may take before it is queued again",
    "hydra.launcher.max_num_timeout": "how often a job out of time is queued again; it continues "
    "from its checkpoint",
    "hydra.launcher.signal_delay_s": "seconds before the end of its time when a job is told to save",
    "hydra.launcher.gpus_per_node": "GPUs of a job",
    "hydra.launcher.cpus_per_task": "CPU cores of a job",
}
GROUPS = {
    "model": "the model that is trained",
    "dataset": "the questions and gold answers",
    "reward": "what is rewarded",
    "kl": "the estimator of the KL to the reference",
    "algorithm": "advantages, loss, averaging; some bring a KL of their own",
    "adapter": "which weights are trained: all, or a LoRA",
    "rollout": "the sampler",
    "device": "CPU or GPU, precision, memory",
    "parallel": "one run uses one device: there is one choice, none",
    "tracking": "where metrics go besides the run's folder",
    "doctor": "when a run is called unhealthy",
    "experiment": "a saved setting, which can set any key",
    "sweep": "a saved sweep",
}
COMMENTS = {  # of files without one
    "model=qwen2_5_0_5b": "Qwen2.5-0.5B-Instruct, from the hub.",
    "model=qwen2_5_1_5b": "Qwen2.5-1.5B-Instruct, from the hub.",
    "tracking=none": "The run's folder is the only record.",
    "parallel=none": "One run uses one device.",
    "device=auto": "The best device that is there.",
    "device=cpu": "The CPU.",
    "device=cuda": "An NVIDIA GPU.",
    "device=mps": "Apple's GPU.",
}
LAUNCHER_MEANINGS = {
    "n_jobs": "jobs at once; -1: as many as there are cores",
    "partition": "SLURM's partition",
    "additional_parameters": "any other option of sbatch, by its name",
    "array_parallelism": "jobs of the array that run at once",
    "setup": "shell commands to run before a job",
    "submitit_folder": "where submitit keeps its files",
    "name": "the name of the jobs in the queue",
}


@dataclass(frozen=True)
class Key:
    """One key of a file: what it is called on the command line, and what there is to say of it."""

    name: str
    default: str
    meaning: str


def main() -> None:
    schema.register_schema()
    check, stale = "--check" in sys.argv, []
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        new = fill_page(text)
        if new != text:
            stale.append(str(page.relative_to(ROOT)))
            if not check:
                page.write_text(new, encoding="utf-8")
    if stale and check:
        raise SystemExit(f"out of date, run scripts/build_reference.py: {', '.join(stale)}")
    print("\n".join(stale) or "every page is up to date")


def fill_page(text: str) -> str:
    """The page with its generated parts made anew."""
    return MARK.sub(lambda m: f"{m[1]}\n{GENERATED[m[2]]().strip()}\n\n{m[3]}", text)


def read_keys(file: Path, prefix: str) -> list[Key]:
    """Every key of a YAML file by its dotted name, with the comments beside, below or before it."""
    found: list[Key] = []
    path: list[tuple[int, str]] = []  # the keys around a line, with their indents
    before: list[str] = []  # comment lines that come before a key
    column = -1  # of the comment beside the last key: one right below goes on with it
    content, skipped = yaml.safe_load(file.read_text()) or {}, False
    for line in file.read_text().splitlines():
        comment = COMMENT.search(line)
        if comment and not line[: comment.start("text") - 2].strip():
            if found and comment.start("text") == column:
                found[-1] = Key(
                    found[-1].name, found[-1].default, f"{found[-1].meaning} {comment['text']}"
                )
            elif line.startswith(" "):
                before.append(comment["text"])
            continue
        code = line[: comment.start()] if comment else line
        match = LINE.fullmatch(code.rstrip()) or re.fullmatch(
            r"(?P<indent>\s*)(?P<key>[\w-]+):(?P<value>\s.*)", code.rstrip()
        )
        if not match:
            continue
        indent, key = len(match["indent"]), match["key"]
        if indent == 0:
            skipped = key == "defaults"
        if skipped:
            continue
        path = [(own, name) for own, name in path if own < indent] + [(indent, key)]
        names = [name for _, name in path]
        text = " ".join([*before, *([comment["text"]] if comment else [])])
        before, column = [], comment.start("text") if comment else -1
        value = content
        try:
            for name in names:
                value = value[name]
        except (KeyError, TypeError, IndexError):
            continue  # within a list, or text
        if key == "_target_":
            continue
        is_section = isinstance(value, dict) and bool(value) and not match["value"].strip()
        found.append(
            Key(
                f"{prefix}{'.'.join(names)}{'.*' if is_section else ''}",
                format_value(match, value),
                text,
            )
        )
    return found


def format_value(match: re.Match[str], value: Any) -> str:
    """A default as it stands in the file; a list over several lines in one."""
    written = match["value"].strip()
    if isinstance(value, dict) and not written:
        return ""
    if written and not written.startswith((">", "|")):
        return f"`{written}`"
    return f"`{yaml.safe_dump(value, default_flow_style=True, width=1000).strip().removesuffix('...').strip()}`"


def read_comment(file: Path) -> str:
    """What a file's first comment says."""
    lines = []
    for line in file.read_text().splitlines():
        if not line.startswith("#"):
            break
        text = line.removeprefix("#").strip()
        if text.startswith("@"):
            continue
        if lines and re.search(r"=\S+\w$", lines[-1]) and text[:1].isupper():
            lines[-1] += "."
        lines.append(text)
    return " ".join(lines)


def take_first_sentence(text: str) -> str:
    return re.split(r"(?<!Dr\.)(?<=[.?]) (?=[A-Z])", text, maxsplit=1)[0]


def link_papers(text: str) -> str:
    """As Markdown: papers and pages are links, and tags are text."""
    text = text.replace("<", "&lt;").replace("|", "\\|")
    text = re.sub(r"\bdocs/(\w+)\.md", r"[\1](../\1.md)", text)
    return ARXIV.sub(r"[\1](https://arxiv.org/abs/\1)", text)


def find_type(name: str, file: Path, key: str) -> str:
    """The type of a key, from the schema, else from the class that its file names, else ''."""
    node: Any = schema.Config
    for part in name.split("."):
        if not is_dataclass(node):
            break
        node = get_type_hints(node).get(part)
        optional = [own for own in get_args(node) if own is not type(None)]
        if type(None) in get_args(node) and len(optional) == 1 and is_dataclass(optional[0]):
            node = optional[0]
    else:
        return spell_type(getattr(node, "__name__", None) if isinstance(node, type) else str(node))
    target = re.search(r"_target_: ([\w.]+)", file.read_text())
    if target and target[1].startswith(("grpo.", "hydra_plugins.")):
        module, _, own = target[1].rpartition(".")
        function = getattr(import_module(module), own)
        parameter = inspect.signature(function).parameters.get(key)
        if parameter is not None:
            return spell_type(str(parameter.annotation))
    return ""


def spell_type(annotation: str | None) -> str:
    """An annotation in words."""
    if annotation is None or "Any" in annotation:
        return ""
    words = []
    for part in re.split(r"\s*\|\s*", annotation.replace("typing.", "")):
        optional = re.fullmatch(r"Optional\[(\w+)\]", part)
        part = optional[1] if optional else part
        if part == "None":
            continue
        name = part.partition("[")[0]
        words.append(
            TYPES.get(name)
            or ("list" if name.lower() in ("list", "sequence", "tuple") else "")
            or ("mapping" if name.lower() in ("dict", "mapping") else "")
        )
    return " or ".join(filter(None, dict.fromkeys(words)))


def guess_type(default: str) -> str:
    """The type of a value in a file, where nothing else says it."""
    try:
        value = yaml.safe_load(default.strip("`"))
    except yaml.YAMLError:
        return ""
    if isinstance(value, bool):
        return TYPES["bool"]
    if isinstance(value, str) and re.fullmatch(r"[\d.]+e-?\d+", value):
        return TYPES["float"]  # which YAML 1.1 takes for a text
    return TYPES.get(
        type(value).__name__, {"list": "list", "dict": "mapping"}.get(type(value).__name__, "")
    )


def format_table(keys: Iterable[Key], file: Path, known: Mapping[str, str]) -> list[str]:
    """The rows of a file's keys. known: meanings from other files of its group."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        leaf = key.name.rpartition(".")[2]
        fallback = re.sub(r"^reward\.\w+\.", "reward.*.", key.name)
        meaning = (
            MEANINGS.get(key.name)
            or MEANINGS.get(fallback)
            or key.meaning
            or known.get(key.name)
            or ""
        )
        if leaf == "*" and not meaning:
            continue
        kind = "" if leaf == "*" else find_type(key.name, file, leaf) or guess_type(key.default)
        cells = [f"`{key.name}`", kind, key.default, link_papers(meaning)]
        rows.append(f"| {' | '.join(cells)} |")
    return rows if len(rows) > 2 else []


def build_keys() -> str:
    """Every key of every file, group by group."""
    parts = ["## Config", "", "`conf/config.yaml`: the keys of every experiment.", ""]
    config = CONF / "config.yaml"
    parts += format_table(read_keys(config, ""), config, {})
    parts += [
        "",
        "The groups, with their defaults:",
        "",
        "| group | default | what it is |",
        "|---|---|---|",
    ]
    for group, choice in re.findall(r"^  - (\w+): (\w+)", config.read_text(), re.MULTILINE):
        if group != "hydra":
            parts.append(f"| `{group}` | `{choice}` | {GROUPS[group]} |")
    parts += ["", "Only `grpo eval` has this key:", ""]
    own = [key for key in read_keys(CONF / "eval.yaml", "") if not key.name.startswith("hydra")]
    parts += format_table(own, CONF / "eval.yaml", {})
    for group in sorted(p.name for p in CONF.iterdir() if p.is_dir() and p.name != "hydra"):
        parts += [
            "",
            f"## {group.capitalize() if group != 'kl' else 'KL'}",
            "",
            *build_group(group),
        ]
    parts += ["", "## hydra/sweeper", "", *build_group("hydra/sweeper")]
    parts += ["", "## hydra/launcher", "", *build_launchers()]
    return "\n".join(parts)


def build_group(group: str) -> Iterator[str]:
    """A section for each choice of a group."""
    files = sorted(
        (CONF / group).rglob("*.yaml"),
        key=lambda f: (f.parent != CONF / group, f.stem != "_base", f.stem),
    )
    known: dict[str, str] = {}
    for file in files:
        known |= {k.name: k.meaning for k in read_keys(file, find_prefix(file)) if k.meaning}
    shown: set[Key] = set()
    for file in files:
        own_prefix = find_prefix(file)
        name = f"{'/'.join(file.parent.relative_to(CONF).parts)}={file.stem}"
        yield from [f"### {'Keys of every ' + group if file.stem == '_base' else f'`{name}`'}", ""]
        yield from [link_papers(read_comment(file) or COMMENTS.get(name, "")), ""]
        keys = read_keys(file, own_prefix)
        if "@package _global_" in file.read_text():
            sets = " ".join(
                f"`{k.name.removeprefix(own_prefix)}={k.default.strip('`')}`"
                for k in keys
                if k.default
            )
            yield from ([f"Sets {sets}", ""] if sets and file.stem != "none" else [])
            continue
        if group == "device":
            keys = [key for key in keys if key not in shown]
            shown |= set(keys)
            yield from ["The other keys as above.", ""] if file.stem != "auto" else []
        bases = re.search(r"^defaults: \[(\w+),", file.read_text(), re.MULTILINE)
        if bases:
            yield from [
                f"Has every key of {'every ' + group if bases[1] == '_base' else f'`{group}={bases[1]}`'}, and sets:",
                "",
            ]
        yield from format_table(keys, file, known)
        yield ""
    if group == "reward":
        yield from [
            "### Keys of every reward", "", "| key | type | default | meaning |", "|---|---|---|---|",
            "| `reward.NAME._target_` | text | | The dotted path of a function or class. |",
            "| `reward.NAME.weight` | number | none for your own: it must be given | What the reward is multiplied by in the sum. |",
            "| `reward.NAME.sources` | list | all | The sets of a mix that it is for: `+reward.answer.sources=[sums]`. |",
        ]  # fmt: skip


def find_prefix(file: Path) -> str:
    """What stands before a file's keys on the command line."""
    return "".join(f"{part}." for part in file.parent.relative_to(CONF).parts)


def build_launchers() -> Iterator[str]:
    """The launchers: this project's file, and what their plugins bring."""
    from hydra_plugins.hydra_joblib_launcher.config import JobLibLauncherConf
    from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf

    file = CONF / "hydra/launcher/slurm.yaml"
    slurm = read_keys(file, "hydra.launcher.")
    yield from [
        "### `hydra/launcher=basic`",
        "",
        "One job after the other: the default. No keys.",
        "",
    ]
    yield from [
        "### `hydra/launcher=slurm`",
        "",
        read_comment(file),
        "",
        *format_table(slurm, file, {}),
        "",
    ]
    for title, plugin, of, left_out in (
        ("The other keys of `hydra/launcher=slurm`", SlurmQueueConf, "submitit's", slurm),
        ("`hydra/launcher=joblib`", JobLibLauncherConf, "joblib.Parallel's", []),
    ):
        yield from [f"### {title}", "", "| key | default | meaning |", "|---|---|---|"]
        for own in fields(plugin):
            name = f"hydra.launcher.{own.name}"
            if own.name == "_target_" or name in {key.name for key in left_out}:
                continue
            default = own.default if isinstance(own.default, str | int | float | None) else "{}"
            shown = (
                "null"
                if default is None
                else str(default).lower()
                if isinstance(default, bool)
                else default
            )
            yield f"| `{name}` | `{shown}` | {LAUNCHER_MEANINGS.get(own.name, f'{of} option of this name')} |"
        yield ""
    yield from [
        "### `hydra/launcher=ray`", "",
        "The keys of [Hydra's Ray launcher](https://hydra.cc/docs/plugins/ray_launcher/): extra `[ray]`.",
    ]  # fmt: skip


def build_rewards() -> str:
    """A line for each reward."""
    rows = ["| `reward=` | what it does |", "|---|---|"]
    for file in sorted((CONF / "reward").glob("*.yaml")):
        rows.append(f"| `{file.stem}` | {link_papers(read_comment(file))} |")
    return "\n".join(rows)


def build_algorithms() -> str:
    """A line for each algorithm, and its parts."""
    meanings = ["| `algorithm=` | what it is |", "|---|---|"]
    parts = [
        "| `algorithm=` | baseline | scale | ratio | policy loss | averaging | KL |",
        "|---|---|---|---|---|---|---|",
    ]
    losses = {
        re.search(r"_target_: (\S+)", f.read_text())[1]: f.stem  # type: ignore[index]
        for f in (CONF / "algorithm/policy_loss").glob("*.yaml")
    }
    files = sorted((CONF / "algorithm").glob("*.yaml"), key=lambda f: (f.stem != "grpo", f.stem))
    for file in files:
        meanings.append(
            f"| `{file.stem}` | {link_papers(take_first_sentence(read_comment(file)))} |"
        )
        GlobalHydra.instance().clear()
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = hydra.compose("config", [f"algorithm={file.stem}"])
        own = cfg.algorithm
        kl = (
            f"`{cfg.kl.estimator}` in the {cfg.kl.within}, weight {cfg.kl_weight:g}"
            if cfg.kl_weight
            else "none"
        )
        cells = [
            own.baseline,
            own.scale,
            own.ratio,
            losses[own.policy_loss._target_],
            own.averaging,
        ]
        parts.append(f"| `{file.stem}` | {' | '.join(f'`{cell}`' for cell in cells)} | {kl} |")
    return "\n".join([*meanings, "", "Their parts:", "", *parts])


GENERATED = {"keys": build_keys, "rewards": build_rewards, "algorithms": build_algorithms}

if __name__ == "__main__":
    main()
