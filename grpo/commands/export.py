"""`grpo export RUN DIR`: writes a plain model folder with a card that says where it comes from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from grpo.commands.arguments import CommandParser
from grpo.config.schema import flatten_config
from grpo.config.secrets import find_texts
from grpo.errors import ConfigError, RunError
from grpo.models.files import PACKAGE_FOLDER
from grpo.models.hub import find_cached_model
from grpo.report.run.page import describe_end, format_config_value
from grpo.report.run.read import Run, diagnose_run, diff_configs, load_default_config, read_run
from grpo.runs.folder import MODEL_ID, find_checkpoint_model, find_run

USAGE = "grpo export RUN DIR [--push ORG/NAME [--private]] [--trust]"
PRIVATE_SECTIONS = (
    "tracking",
    "hydra",
    "name",
    "resume",
    "sweep_dir",
)  # said of a run, not a model
PRIVATE_KEY_NAME = re.compile(r"(path|url|dir|folder|file|host|address|email|user|_env|notes)$")
PROSE_KEY_NAME = re.compile(r"(prompt|stop|prefix|suffix)$")  # whose texts may begin with a /
START = r"(?<![^\s'\"\[({,:=])"  # of a text, or of a word in it
PATH_OR_ADDRESS = re.compile(
    r"\w+://|\$\{oc\.env:"
    rf"|{START}(~/|/[^\s/]+/|\.{{1,2}}/|\w:\\)"
    rf"|{START}(?=[^\s:]*[A-Za-z.])[\w.-]+:\d{{1,5}}(?![\w:.%-])"  # host:port; no slice
    rf"|{START}(\d{{1,3}}\.){{3}}\d{{1,3}}(?![\w.])|{START}\[[0-9a-fA-F]*:[0-9a-fA-F:]+\]"
)
TOP_LEVEL_PATH = re.compile(rf"{START}/[\w.-]+")
CARD_METRICS = ("eval/accuracy", "eval/sampled_accuracy", "eval/pass_at_k", "eval/reward")


def export(arguments: Sequence[str]) -> dict[str, Any]:
    """Writes the model of a run, or of one of its checkpoints, merged with its adapter.

    Raises:
        ConfigError: there is no run, the folder is not empty, or the hub refuses the upload.
        RunError: the upload failed; the folder is written.
    """
    needs = "the model's id on the hub, ORG/NAME"
    parser = CommandParser(USAGE)
    parser.add_argument("places", nargs="*")
    parser.add_value("--push", needs=needs)
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--trust", action="store_true")  # of a base model under an adapter
    options = parser.parse_intermixed_args(arguments)
    hub_id = options.push
    if options.private and hub_id is None:
        raise ConfigError("--private: says how --push makes the model's page on the hub.")
    if hub_id is not None and not MODEL_ID.fullmatch(hub_id):
        raise ConfigError(f"--push {hub_id}: needs {needs}.")
    if len(options.places) != 2:
        raise ConfigError(f"{USAGE}: name a run and the folder to write.")
    source, folder = options.places[0], Path(options.places[1]).expanduser()
    home = find_run(Path(source).expanduser())
    if home is None:
        raise ConfigError(f"{source}: holds no run; a plain model needs no export.")
    model = find_checkpoint_model(source)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder}: is there already; give a new or an empty folder.")
    if hub_id is not None:
        check_hub(hub_id)
    run = cut_to_checkpoint(read_run(home), model)
    from grpo.models.merged import write_merged

    write_merged(model, folder, options.trust)
    (folder / "README.md").write_text(format_card(run, hub_id or folder.name), encoding="utf-8")
    print(f"written to {folder}: a model that transformers loads by path, and its card", flush=True)
    if hub_id is not None:
        push_model(folder, hub_id, options.private)
    return {"export": {"source": str(model), "folder": str(folder), "hub_id": hub_id}}


def cut_to_checkpoint(run: Run, model: Path) -> Run:
    """Returns the run as it was when it saved this model; its card must not tell of later steps."""
    step = re.fullmatch(r"step_(\d+)", model.resolve().parent.name)
    if step is None or int(step[1]) >= run.lines[-1]["step"]:
        return run
    lines = [line for line in run.lines if line["step"] <= int(step[1])]
    evaluated = [line for line in lines if "eval/accuracy" in line]
    summary = {**run.summary, "last_evaluation": evaluated[-1] if evaluated else None}
    found = diagnose_run(lines, run.config)
    return replace(run, lines=lines, summary=summary, diagnoses=found)


def check_hub(hub_id: str) -> None:
    """Checks that the user may upload there, before anything is written here."""
    from huggingface_hub import HfApi

    try:
        HfApi().whoami()
    except Exception as error:  # not logged in, no network: the library has an error for each
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"--push {hub_id}: {reason} `hf auth login` logs in.") from error


def push_model(folder: Path, hub_id: str, private: bool) -> None:
    """Uploads a model.

    Raises:
        RunError: the upload failed, or the repository should be private, but is public.
    """
    from huggingface_hub import HfApi

    try:
        # As its owner's account has it, if nothing is asked for; of one that is there it stays.
        HfApi().create_repo(hub_id, private=private or None, exist_ok=True)
        shown = private and not HfApi().repo_info(hub_id).private
        if not shown:
            HfApi().upload_folder(repo_id=hub_id, folder_path=folder)
    except Exception as error:  # as above
        raise RunError(f"--push {hub_id}: {error}; {folder} is whole.") from error
    if shown:
        raise RunError(
            f"--private: {hub_id} is there already and is public, so nothing was uploaded; "
            f"{folder} is whole."
        )
    print(f"pushed to https://huggingface.co/{hub_id}", flush=True)


def format_card(run: Run, name: str) -> str:
    """Writes README.md: the model, its data, how it was trained and how good it is."""
    first = run.summary.get("first_evaluation") or {}
    last = run.summary.get("last_evaluation") or {}
    rows = [
        f"| {key} | {first[key]:.4g} | {last[key]:.4g} |"
        for key in CARD_METRICS
        if first.get(key) is not None and last.get(key) is not None
    ]
    changed = diff_configs([load_default_config(), run.config])
    config = [
        f"| `{key}` | {format_markdown_cell(value)} | {format_markdown_cell(usual)} |"
        for key, (usual, value) in changed.items()
        if not is_private(key, value)
    ]
    versions = ", ".join(f"{k} {v}" for k, v in (run.summary.get("versions") or {}).items())
    troubles = [f"- **{one.title}**: {one.evidence}" for one in run.diagnoses]
    parts = [
        format_front_matter(run),
        f"# {name}",
        f"`{get_base_name(run)}`, trained by group-relative policy optimization (GRPO) with "
        f"grpo-bench. {describe_end(run, '')}",  # an error names paths and addresses
        "## Use",
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n```',
        "## Data",
        format_list(select_public(run.config["dataset"])),
        "## Reward",
        format_list(select_public(run.config["reward"])),
        "## How good it is",
        "On the evaluation rows, before and after training.\n\n"
        "| metric | before | after |\n|---|---|---|\n" + "\n".join(rows)
        if rows
        else "Not known.",
        *(["## What the doctor said", "\n".join(troubles)] if troubles else []),
        "## How it was trained",
        f"```bash\ngrpo {' '.join(select_public_overrides(run.overrides))}\n```",
        "Keys that differ from the shipped config:\n\n| key | here | as shipped |\n|---|---|---|\n"
        + "\n".join(config)
        if config
        else "With the shipped config.",
        f"Commit {run.summary.get('git_commit') or 'unknown'}; {versions}; on "
        f"{run.summary.get('device')}.",
    ]
    return "\n\n".join(parts) + "\n"


def format_front_matter(run: Run) -> str:
    """Writes the metadata for the hub: base model, data, and the base model's licence if known."""
    model, data = run.config["model"], run.config["dataset"]
    content: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["grpo", "grpo-bench", "reinforcement-learning"],
        "license": read_licence(model.get("path") or find_own_folder(model)) or "unknown",
    }
    if model.get("id"):
        content["base_model"] = model["id"]
    if sources := [
        part["id"] for part in list_sets(data) if part.get("id") and not part.get("path")
    ]:
        content["datasets"] = sources
    return f"---\n{yaml.safe_dump(content, sort_keys=False).rstrip()}\n---"


def list_sets(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns the data set, or each set of a mix."""
    return list((data.get("sets") or {"": data}).values())


def find_own_folder(model: Mapping[str, Any]) -> str | None:
    """Returns the folder of a packaged model, or of a hub model at its revision in the cache."""
    if model.get("packaged"):
        return str(PACKAGE_FOLDER / model["packaged"])
    if not model.get("id"):
        return None
    found = find_cached_model(model["id"], model.get("revision"))
    return str(found) if found else None


def read_licence(folder: str | None) -> str | None:
    """Reads the licence from the card in a base model's folder."""
    readme = Path(folder or "") / "README.md"
    if not folder or not readme.is_file():
        return None
    found = re.search(r"^license:\s*(\S+)", readme.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else None


def get_base_name(run: Run) -> str:
    model: Mapping[str, Any] = run.config["model"]
    return str(model.get("id") or model["name"])


def select_public(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys that are set, by dotted name, without private values such as paths."""
    return {
        key: value
        for key, value in flatten_config(config).items()
        if value not in (None, [], {}) and not is_private(key, value)
    }


def select_public_overrides(overrides: Sequence[str]) -> list[str]:
    """Returns a command's overrides; shows a key with a private value as `key=…`."""
    shown = []
    for override in overrides:
        key, equals, value = override.partition("=")
        if key.lstrip("+~").startswith(PRIVATE_SECTIONS):
            continue
        shown.append(f"{key}=…" if equals and is_private(key, value.strip("'\"")) else override)
    return shown


def is_private(key: str, value: object) -> bool:
    """Returns whether a value says where something is on a machine, or how it is reached."""
    if key.lstrip("+~").startswith(PRIVATE_SECTIONS) or PRIVATE_KEY_NAME.search(key):
        return True
    patterns = [PATH_OR_ADDRESS]
    if not PROSE_KEY_NAME.search(key):
        patterns.append(TOP_LEVEL_PATH)
    return any(pattern.search(text) for _, text in find_texts(value) for pattern in patterns)


def format_list(config: Mapping[str, Any]) -> str:
    return "\n".join(
        f"- `{key}`: {json.dumps(value, ensure_ascii=False)}" for key, value in config.items()
    )


def format_markdown_cell(value: object) -> str:
    return format_config_value(value).replace("|", "\\|").replace("\n", " ")
