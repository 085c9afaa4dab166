"""Going back to a run: its overrides put before today's, and nothing of it lost if refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.utils import get_args_parser

from grpo import trust
from grpo.errors import ConfigError
from grpo.runs.folder import is_finished, is_locked, locked, newest_step, run_of
from grpo.sweep.folder import read_record

NOT_THE_EXPERIMENT = ("resume", "hydra.run.dir", "checkpoint")  # where a run goes, not what it is
OTHER_THAN_RUN = {"--cfg", "-c", "--info", "-i", "--shell-completion", "-sc", "--run", "-r"}


def with_past_overrides(job: str, arguments: Sequence[str], trusted: bool = False) -> list[str]:
    """The arguments with those of the run that is resumed or evaluated put before them.

    So `grpo resume=DIR` needs no repetition of how DIR was started, and what is given now wins.

    Args:
        trusted: what that run names may be run, whatever it is.

    Raises:
        ConfigError: that run can't be resumed or evaluated, or names code that isn't trusted.
    """
    trust.SOURCE.folder = None  # of this command
    given, flags = overrides_and_flags(arguments)
    several = bool({"-m", "--multirun"} & set(flags))
    if not (several or OTHER_THAN_RUN & {flag.partition("=")[0] for flag in flags}) and (
        names_study(job, given)
    ):
        arguments, flags, several = ["-m", *arguments], ["-m", *flags], True
    if job == "eval" and several:
        raise ConfigError("grpo eval takes one checkpoint at a time: leave out -m.")
    if job == "train" and (sweep_dir := value_of("sweep_dir", given)):
        return with_past_sweep(Path(sweep_dir).expanduser(), given, flags, several, trusted)
    if job == "eval":
        checkpoint = value_of("checkpoint", given)
        run = run_of(Path(checkpoint).expanduser()) if checkpoint else None
        if run is None:
            return list(arguments)
        past = [o for o in past_overrides(run) if not key_of(o).startswith("checkpoint.")]
        return with_overrides_of(run, past, given, flags, trusted)
    resume = value_of("resume", given)
    if resume in (None, "null", "") or several:
        return list(arguments)
    if resume == "auto":
        if value_of("hydra.run.dir", given):
            return list(arguments)
        unfinished = newest_unfinished(given)
        if unfinished is None:
            return list(arguments)
        return [*merged(kl_of_old_run(unfinished), arguments), run_dir(unfinished)]
    run = resumable(resume)
    return [*with_overrides_of(run, past_overrides(run), given, flags, trusted), run_dir(run)]


def with_overrides_of(
    run: Path, past: Sequence[str], given: Sequence[str], flags: Sequence[str], trusted: bool
) -> list[str]:
    """The flags and overrides given, with a run's own put before them.

    Raises:
        ConfigError: the run names code that isn't trusted.
    """
    own_flags = past_flags(run, flags)
    if not trusted:
        trust.take_from(run, past, own_flags[-1] if own_flags else None, given)
    return [*flags, *own_flags, *merged(past, given)]


def names_study(job: str, given: Sequence[str]) -> bool:
    """Whether a file in conf/sweep/ is to be run; hydra.mode says otherwise."""
    chosen = value_of("sweep", given) not in (None, "none")
    return job == "train" and chosen and value_of("hydra.mode", given) is None


def with_past_sweep(
    sweep: Path, given: Sequence[str], flags: Sequence[str], several: bool, trusted: bool
) -> list[str]:
    """The arguments with those of the sweep in that folder put before them, if one is there.

    Raises:
        ConfigError: there is none, and none is to be started.
    """
    record = read_record(sweep)
    if record is None:
        if not several and value_of("sweep", given) is None:
            raise ConfigError(f"sweep_dir={sweep}: holds no sweep; -m starts one.")
        return [*flags, *given]
    own_configs = None if names_config_dir(flags) else record.config_dir
    if not trusted:
        trust.take_from(sweep, record.arguments, own_configs, given)
    if own_configs is not None:
        flags = [*flags, "--config-dir", own_configs]
    return [*([] if several else ["-m"]), *flags, *merged(record.arguments, given)]


def run_dir(run: Path) -> str:
    """The override that sends a run to a folder, whatever signs are in its name."""
    return f"hydra.run.dir={quoted(run)}"


def quoted(value: object) -> str:
    """As a value in an override, whatever signs are in it."""
    inside = str(value).replace("'", "\\'")
    return f"'{inside}'"


def resumable(resume: str) -> Path:
    """The run's folder that `resume` names.

    Raises:
        ConfigError: it isn't one, has no checkpoint, or is being run just now.
    """
    run = Path(resume).expanduser()
    if not run.is_dir():
        raise ConfigError(f"resume={resume}: there is no such folder.")
    whole = run_of(run)
    if whole is not None and whole.resolve() != run.resolve():
        raise ConfigError(
            f"resume={resume}: give the run, {whole}; it goes on from its newest checkpoint."
        )
    if newest_step(run) is None:
        raise ConfigError(f"resume={resume}: no checkpoint in it, so nothing to go on from.")
    with locked(run):
        return run


def overrides_and_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Hydra's own parser tells `key=value` from flags and the values that belong to flags."""
    known, unknown = get_args_parser().parse_known_args(list(arguments))
    overrides = [*known.overrides, *(word for word in unknown if not word.startswith("-"))]
    return overrides, [word for word in arguments if word not in overrides]


def key_of(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def value_of(key: str, overrides: Sequence[str]) -> str | None:
    """The last value given to a key."""
    values = [o.partition("=")[2] for o in overrides if key_of(o) == key]
    return values[-1].strip("'\"") if values else None


def merged(past: Sequence[str], given: Sequence[str]) -> list[str]:
    """Past overrides that are not given anew, then the new ones.

    A key that was added with a + is one of the run's own: given anew it needs no + again.
    """
    renewed = {key_of(override) for override in given} | set(NOT_THE_EXPERIMENT)
    added = {key_of(o): prefix_of(o) for o in past if prefix_of(o).startswith("+")}
    return [o for o in past if key_of(o) not in renewed] + [
        f"{added.get(key_of(o), '') if not prefix_of(o) else ''}{o}"
        for o in given
        if not (prefix_of(o) == "~" and key_of(o) in added)  # with the past one it is gone
    ]


def prefix_of(override: str) -> str:
    """What says that a key is added or deleted: +, ++ or ~; empty where it is set."""
    return override[: len(override) - len(override.lstrip("+~"))]


def past_overrides(run: Path) -> list[str]:
    return [*recorded_overrides(run), *kl_of_old_run(run)]


def recorded_overrides(run: Path) -> list[str]:
    return [str(override) for override in read_yaml(run / ".hydra" / "overrides.yaml") or []]


def kl_of_old_run(run: Path) -> list[str]:
    """What a run's KL was, as overrides, where it began before algorithms brought their own."""
    config = read_yaml(run / ".hydra" / "config.yaml") or {}
    if "kl_weight" in config.get("algorithm", {}) or "kl_weight" not in config:
        return []
    hydra = read_yaml(run / ".hydra" / "hydra.yaml") or {"hydra": {}}
    choice = hydra["hydra"].get("runtime", {}).get("choices", {}).get("kl", "k3")
    then = {"kl": choice, "kl_weight": config["kl_weight"], "kl.within": config["kl"]["within"]}
    given = {key_of(override) for override in recorded_overrides(run)}
    return [f"{key}={value}" for key, value in then.items() if key not in given]


def past_flags(run: Path, given: Sequence[str]) -> list[str]:
    """The --config-dir that a run was started with, unless one is given now."""
    if names_config_dir(given):
        return []
    written = read_yaml(run / ".hydra" / "hydra.yaml") or {"hydra": {"runtime": {}}}
    sources = written["hydra"]["runtime"].get("config_sources", [])
    own = [source["path"] for source in sources if source["provider"] == "command-line"]
    return ["--config-dir", own[0]] if own else []


def names_config_dir(flags: Sequence[str]) -> bool:
    return any(flag.startswith(("--config-dir", "-cd")) for flag in flags)


def read_yaml(file: Path) -> Any:
    """A file's content, None where there is none.

    Raises:
        ConfigError: it is not YAML, as after a crash in the middle of its writing.
    """
    try:
        return yaml.safe_load(file.read_text()) if file.is_file() else None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not YAML, so how this run was started is lost.") from error


def newest_unfinished(overrides: Sequence[str]) -> Path | None:
    """The newest run under outputs/ of these same overrides that has a checkpoint and no end.

    One that another process is running just now is passed over.
    """
    wanted = experiment(overrides)
    for run in sorted(Path("outputs").glob("[0-9]*/*"), reverse=True):
        if newest_step(run) is None or is_finished(run) or is_locked(run):
            continue
        if experiment(recorded_overrides(run)) == wanted:
            return run
    return None


def experiment(overrides: Sequence[str]) -> list[str]:
    return sorted(o for o in overrides if key_of(o) not in NOT_THE_EXPERIMENT)


@contextmanager
def unchanged_if_refused(overrides: Sequence[str]) -> Iterator[None]:
    """Puts a resumed run's `.hydra` back where what was asked of it is refused."""
    run = value_of("hydra.run.dir", overrides)
    files = list(Path(run, ".hydra").glob("*.yaml")) if run else []
    before = {file: file.read_bytes() for file in files}
    try:
        yield
    except SystemExit as end:
        if end.code == 2:
            for file, content in before.items():
                file.write_bytes(content)
        raise
