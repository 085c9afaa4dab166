"""Puts the overrides of a run or sweep that is continued before those of the command line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from grpo.config import trust
from grpo.config.overrides import (
    find_value,
    has_config_dir,
    merge_overrides,
    parse_key,
    split_arguments,
)
from grpo.errors import ConfigError
from grpo.runs.folder import find_run
from grpo.runs.resume import (
    find_newest_unfinished,
    find_resumable_run,
    format_run_dir,
    read_old_kl,
    read_past_flags,
    read_past_overrides,
)
from grpo.sweep.folder import read_record

FLAGS_WITHOUT_RUN = {"--cfg", "-c", "--info", "-i", "--shell-completion", "-sc", "--run", "-r"}


def add_past_overrides(job: str, arguments: Sequence[str], trusted: bool = False) -> list[str]:
    """Puts the overrides of the run that is resumed or evaluated before the arguments.

    `grpo resume=DIR` therefore repeats how DIR was started, and what is given now wins.

    Args:
        trusted: whether code that the run names may be run, whatever it is.

    Raises:
        ConfigError: the run can't be resumed or evaluated, or names code that isn't trusted.
    """
    trust.OVERRIDE_SOURCE.folder = None  # of this command
    given, flags = split_arguments(arguments)
    several = bool({"-m", "--multirun"} & set(flags))
    if not (several or FLAGS_WITHOUT_RUN & {flag.partition("=")[0] for flag in flags}) and (
        is_study(job, given)
    ):
        arguments, flags, several = ["-m", *arguments], ["-m", *flags], True
    if job == "eval" and several:
        raise ConfigError("grpo eval takes one checkpoint at a time: leave out -m.")
    if job == "train" and (sweep_dir := find_value("sweep_dir", given)):
        return add_sweep_overrides(Path(sweep_dir).expanduser(), given, flags, several, trusted)
    if job == "eval":
        checkpoint = find_value("checkpoint", given)
        run = find_run(Path(checkpoint).expanduser()) if checkpoint else None
        if run is None:
            return list(arguments)
        # Where it is evaluated, there may be other hardware.
        dropped = ("checkpoint.", "parallel.", "rollout.ahead.")
        past = [o for o in read_past_overrides(run) if not f"{parse_key(o)}.".startswith(dropped)]
        return add_overrides_of(run, past, given, flags, trusted)
    resume = find_value("resume", given)
    if resume in (None, "null", "") or several:
        return list(arguments)
    if resume == "auto":
        if find_value("hydra.run.dir", given):
            return list(arguments)
        unfinished = find_newest_unfinished(given)
        if unfinished is None:
            return list(arguments)
        return [*merge_overrides(read_old_kl(unfinished), arguments), format_run_dir(unfinished)]
    run = find_resumable_run(resume)
    return [
        *add_overrides_of(run, read_past_overrides(run), given, flags, trusted),
        format_run_dir(run),
    ]


def add_overrides_of(
    run: Path, past: Sequence[str], given: Sequence[str], flags: Sequence[str], trusted: bool
) -> list[str]:
    """Puts a run's overrides before the given flags and overrides.

    Raises:
        ConfigError: the run names code that isn't trusted.
    """
    own_flags = read_past_flags(run, flags)
    if not trusted:
        trust.check_folder_overrides(run, past, own_flags[-1] if own_flags else None, given)
    if find_value("parallel", given):  # it resumes on other hardware, where old keys mean nothing
        past = [override for override in past if not parse_key(override).startswith("parallel.")]
    return [*flags, *own_flags, *merge_overrides(past, given)]


def is_study(job: str, given: Sequence[str]) -> bool:
    """Returns whether the arguments run a file of conf/sweep/; hydra.mode may say otherwise."""
    chosen = find_value("sweep", given) not in (None, "none")
    return job == "train" and chosen and find_value("hydra.mode", given) is None


def add_sweep_overrides(
    sweep: Path, given: Sequence[str], flags: Sequence[str], multirun: bool, trusted: bool
) -> list[str]:
    """Puts the arguments of the sweep in that folder, if there is one, before these.

    Raises:
        ConfigError: there is none, and none is to be started.
    """
    record = read_record(sweep)
    if record is None:
        if not multirun and find_value("sweep", given) is None:
            raise ConfigError(
                f"sweep_dir={sweep}: holds no sweep; -m starts one.", key="sweep_dir", value=sweep
            )
        return [*flags, *given]
    own_configs = None if has_config_dir(flags) else record.config_dir
    if not trusted:
        trust.check_folder_overrides(sweep, record.arguments, own_configs, given)
    if own_configs is not None:
        flags = [*flags, "--config-dir", own_configs]
    return [*([] if multirun else ["-m"]), *flags, *merge_overrides(record.arguments, given)]


@contextmanager
def unchanged_if_refused(overrides: Sequence[str]) -> Iterator[None]:
    """Within it, a refusal leaves the `.hydra` folder of a resumed run as it was."""
    run = find_value("hydra.run.dir", overrides)
    files = list(Path(run, ".hydra").glob("*.yaml")) if run else []
    before = {file: file.read_bytes() for file in files}
    try:
        yield
    except SystemExit as end:
        if end.code == 2:
            for file, content in before.items():
                file.write_bytes(content)
        raise
