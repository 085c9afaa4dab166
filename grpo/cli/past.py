"""The command line of a run or sweep that is gone on with: its own overrides put before today's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from grpo.config import trust
from grpo.config.overrides import (
    key_of,
    merge_overrides,
    names_config_dir,
    overrides_and_flags,
    value_of,
)
from grpo.errors import ConfigError
from grpo.runs.folder import run_of
from grpo.runs.resume import (
    kl_of_old_run,
    newest_unfinished,
    past_flags,
    past_overrides,
    resumable,
    run_dir,
)
from grpo.sweep.folder import read_record

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
        return [*merge_overrides(kl_of_old_run(unfinished), arguments), run_dir(unfinished)]
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
    return [*flags, *own_flags, *merge_overrides(past, given)]


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
    return [*([] if several else ["-m"]), *flags, *merge_overrides(record.arguments, given)]


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
