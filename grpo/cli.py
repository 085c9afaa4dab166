"""The command `grpo`: picks the job, lets Hydra compose its config, and speaks plainly of errors.

Nothing heavy is imported until a job really starts, so help and refusals answer at once.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import NoReturn

if os.name == "nt":
    print("grpo: runs on Linux and macOS; on Windows, inside WSL (wsl --install).", file=sys.stderr)
    raise SystemExit(2)

os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come here, and are told here

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from grpo import config
from grpo.check import check, check_training
from grpo.errors import ConfigError, RunError
from grpo.help import choices, help_text, version_text
from grpo.memory.allocator import keep_freed_memory
from grpo.runs import folder as past
from grpo.runs import resume as again
from grpo.secrets import cross_out_in_logs
from grpo.sweep.gpus import take_gpu
from grpo.sweep.launch import NOT_THE_JOB
from grpo.sweep.stop import ask_to_stop, asked_to_stop, in_sweep, leave_terminal

log = logging.getLogger(__name__)

JOBS = {"train": "config", "eval": "eval"}  # a first bare word -> its config
WITHOUT_CONFIG = {  # jobs that read what a run left
    "report": "grpo.commands.report",
    "export": "grpo.commands.export",
    "chat": "grpo.commands.chat",
    "dashboard": "grpo.commands.dashboard",
}
HYDRAS_NAMES = {  # of Hydra's own Optuna sweeper, where this one has another
    "hydra/sweeper/sampler": "hydra.sweeper.sampler",
    "hydra/sweeper/pruner": "hydra.sweeper.pruner",
    "hydra.sweeper.sampler.seed": "hydra.sweeper.seed",
    "hydra.sweeper.sampler._target_": "hydra.sweeper.sampler",
    "hydra.sweeper.search_space": "hydra.sweeper.params",
    "hydra.sweeper.custom_search_space": "hydra.sweeper.params",
    "hydra.sweeper.optuna_config": "hydra.sweeper",
}
Argv = Sequence[str]


def main() -> None:
    """Console entry. Exits 0 where the work was done, 2 where it was refused, 1 where it failed."""
    prepare()
    with plainly():
        if {"--help", "-h"} & set(sys.argv):
            print(help_text(sys.argv), flush=True)
            return None
        if "--version" in sys.argv:
            print(version_text(), flush=True)
            return None
        job, overrides = split_job(sys.argv[1:])
        if job in WITHOUT_CONFIG:
            run = getattr(import_module(WITHOUT_CONFIG[job]), job)
            return run(overrides)  # type: ignore[no-any-return]
        trusted = "--trust" in overrides
        overrides = [own for own in overrides if own != "--trust"]
        overrides = again.with_past_overrides(job, overrides, trusted)
        sys.argv = ["grpo", *overrides]
        command = hydra.main(
            version_base="1.3", config_path=str(config.conf_folder()), config_name=JOBS[job]
        )
        try:
            with again.unchanged_if_refused(overrides):
                command(train_job if job == "train" else eval_job)()
        except (HydraException, MissingConfigException, OmegaConfBaseException) as error:
            refuse(ConfigError(explain(error, job, overrides)))
        except AssertionError as error:
            if not str(error).startswith("Unexpected type for root"):  # OmegaConf's, of `none.key`
                raise
            refuse(ConfigError(key_of_nothing(job, overrides)))
        except ValueError as error:
            if not str(error).startswith("Config group override must be"):
                raise
            refuse(ConfigError(no_choice(overrides)))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            where = f"{mark.name}, line {mark.line + 1}" if mark else "a config file"
            refuse(ConfigError(f"{where}: not YAML ({error.problem})."))
    return None


@contextmanager
def plainly() -> Iterator[None]:
    """What the user can do something about ends the process with a line and its exit code."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except ConfigError as error:
        refuse(error)
    except RunError as error:
        stop(str(error))
    except BrokenPipeError:  # who read this has heard enough, as in `grpo --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


def prepare() -> None:
    """Once a process: a sweep's jobs may run in processes of their own."""
    config.register()
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a user's own rewards and data sets lie where they work


def split_job(arguments: Argv) -> tuple[str, list[str]]:
    """The job that a first bare word names, and the rest. A word is never a valid override."""
    if not arguments or arguments[0].startswith(("-", "~")) or "=" in arguments[0]:
        return "train", list(arguments)
    job = arguments[0]
    known = (*JOBS, *WITHOUT_CONFIG)
    if job not in known:
        raise ConfigError(
            f"{job}: no such job; there are {', '.join(known)}{config.nearest(job, known) or '.'} "
            f"An override is written key=value."
        )
    return job, list(arguments[1:])


def train_job(cfg: DictConfig) -> float | None:
    """Trains, and returns the objective that a search maximises."""
    if asked_to_stop():
        return None
    with told() as folder, past.locked(folder):
        from grpo.find import find_for_training

        check(cfg)
        check_training(cfg)
        past.check_folder(folder, cfg.resume, cfg.model, cfg.adapter)
        found = find_for_training(cfg)

        from grpo.run import train_from_config

        return train_from_config(cfg, folder, found)
    return None  # stopped before it began


def eval_job(cfg: DictConfig) -> float | None:
    """Evaluates a checkpoint."""
    with told() as folder:
        from grpo.find import find_for_evaluation

        check(cfg)
        found = find_for_evaluation(cfg)

        from grpo.run import evaluate_from_config

        return evaluate_from_config(cfg, folder, found)


@contextmanager
def told() -> Iterator[Path]:
    """A job's folder; alone, its error ends the process, in a sweep it is the sweep's to report."""
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    is_job = in_sweep()
    if is_job:
        leave_terminal()
        own = [o for o in hydra_config.overrides.task if again.key_of(o) not in NOT_THE_JOB]
        say(f"\njob {folder.name}: {' '.join(own)}")
    prepare()
    cross_out_in_logs()
    keep_freed_memory()  # before anything imports torch
    try:
        if is_job and (gpu := take_gpu(folder.parent)):
            say(f"on GPU {gpu}")
        yield folder
    except (ConfigError, RunError) as error:
        if is_job:
            if isinstance(error, past.Occupied):
                say(str(error))  # and nothing into a folder that is another's
            else:
                past.note_failure(folder, str(error))
            # Hydra keeps the error to the sweep's end; its frames would keep the job's models.
            raise error.with_traceback(None) from None
        if isinstance(error, ConfigError):
            past.forget_unstarted(folder)
            refuse(error)
        stop(str(error))
    except KeyboardInterrupt:
        if not is_job:
            raise
        ask_to_stop()  # nothing is lost: its training had not begun
    except Exception as error:
        if not is_job:
            raise
        # A fault, which ends this job and none of the others; it may have to cross to a process.
        log.exception("job %s failed", folder.name)
        reason = f"{type(error).__name__}: {error}"
        past.note_failure(folder, reason)
        raise RunError(reason) from None


def say(line: str) -> None:
    """Its end goes with it: jobs beside this one write into the same output."""
    print(f"{line}\n", end="", flush=True)


def refuse(error: ConfigError) -> NoReturn:
    print(f"grpo: {error}", file=sys.stderr)
    raise SystemExit(2)


def stop(message: str) -> NoReturn:
    print(f"grpo: {message}", file=sys.stderr)
    raise SystemExit(1)


def explain(error: Exception, job: str, overrides: Argv) -> str:
    """Hydra's error as one line: what was given, and the nearest of what there is."""
    text = str(error).strip()
    for own in overrides:
        if (key := again.key_of(own)) in HYDRAS_NAMES:
            return f"{own}: here it is {own.lstrip('+~').replace(key, HYDRAS_NAMES[key])}"
    if isinstance(error, OverrideParseException):
        return not_an_override(str(error.override), text)
    if isinstance(error, MissingConfigException):
        found = re.search(r"Could not find '([^']+)'", text)
        wanted = found[1] if found else str(error.missing_cfg_file)
        group, _, choice = wanted.rpartition("/")
        options = list(error.options or known_choices(group))
        return (
            f"{group}={choice}: no such choice{config.nearest(choice, options) or '.'} "
            f"There are {', '.join(options)}."
        )
    if there := re.search(r"An item is already at '([^']+)'", text):
        return f"+{there[1]}: this key is there already; leave out the +."
    if isinstance(error, ConfigCompositionException):
        if reason := wrong_value(error):
            return reason
        unknown = re.search(
            r"Could not (?:override|append to config|delete from config)[^']*'([^']+)'", text
        )
        if unknown:
            key = unknown[1]
            return f"{key}: no such key{config.nearest(key, known_keys(job, overrides))}"
        if text.startswith("Error merging override ") and error.__cause__ is not None:
            reason = str(error.__cause__).splitlines()[0]
            return f"{text.removeprefix('Error merging override ')}: {reason}"
    return text.splitlines()[0]


def not_an_override(override: str, said: str) -> str:
    """Why Hydra can't read an override: its own reason where a function in it fails."""
    failed = re.search(r"\w+ while evaluating '(.*?)': (.+)", said, re.DOTALL)
    if failed is None:
        return f"{override}: not an override; write key=value (quote spaces and brackets)."
    call, reason = failed[1], " ".join(failed[2].partition("See https://")[0].split())
    key = again.key_of(override)
    choices_of = re.fullmatch(r"choice\((.*)\)", call, re.DOTALL)
    if choices_of and "NoneType" in reason:
        return f"{override}: choice() takes no null; write {key}={choices_of[1]}"
    reason = re.sub(r"\b(Union|Optional|List|Dict)\[.*\]", "what it takes", reason)
    return f"{override}: {call} can't be evaluated ({reason})."


def wrong_value(error: BaseException) -> str | None:
    """`key: why` where a value has the wrong type."""
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__name__ == "ValidationError":
            key = getattr(cause, "full_key", None)
            return f"{key}: {str(cause).splitlines()[0]}"
        cause = cause.__cause__
    return None


def known_choices(group: str) -> list[str]:
    return choices([config.conf_folder()], group)


def key_of_nothing(job: str, overrides: Argv) -> str:
    """Says which key belongs to a part that is none."""
    composed = of_choices(job, overrides)
    for own in overrides:
        part = again.key_of(own).partition(".")[0]
        if "." in again.key_of(own) and part in composed and composed[part] is None:
            others = [f"{part}={choice}" for choice in known_choices(part) if choice != "none"]
            return (
                f"{own}: {part} is none here, which has no keys; leave it out, or set "
                f"{' or '.join(others)}."
            )
    return "a key is set of a part that is none; leave it out."


def no_choice(overrides: Argv) -> str:
    """Says which override gives a group a number, or nothing, for a choice."""
    for own in overrides:
        group, _, value = own.partition("=")
        if group in groups() and not isinstance(yaml.safe_load(value), str | list):
            known = known_choices(group)
            meant = [key for key in vars(config.Config) if key.startswith(f"{group}_")]
            nothing = value in ("null", "~", "")
            hint = (
                f"; did you mean {group}=none?"
                if nothing and "none" in known
                else f"; did you mean {meant[0]}={value}?"
                if meant and not nothing
                else ""
            )
            return f"{own}: no such choice{hint or '.'} There are {', '.join(known)}."
    return "a group was given something that is no choice of it."


def known_keys(job: str, overrides: Argv) -> list[str]:
    """Every key that can be set, given the groups chosen, and the groups themselves."""
    return [*groups(), *flat_keys(of_choices(job, overrides), "")]


def of_choices(job: str, overrides: Argv) -> DictConfig:
    """The config with the groups chosen and the keys added, and nothing else that was asked for."""
    chosen = [o for o in overrides if o.partition("=")[0] in groups() or o.startswith("+")]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config.conf_folder()), version_base="1.3"):
        try:
            return hydra.compose(JOBS[job], chosen)
        except HydraException:
            return hydra.compose(JOBS[job])


def groups() -> list[str]:
    return sorted(path.name for path in config.conf_folder().iterdir() if path.is_dir())


def flat_keys(node: DictConfig, prefix: str) -> list[str]:
    keys = []
    for key in map(str, node):
        keys.append(f"{prefix}{key}")
        child = node._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation():
            keys += flat_keys(child, f"{prefix}{key}.")
    return keys
