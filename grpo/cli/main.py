"""The command `grpo`: picks the job, lets Hydra compose its config, and reports errors in a line.

Nothing heavy is imported before a job starts, so that help and refusals are fast.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

if os.name == "nt":
    print("grpo: runs on Linux and macOS; on Windows, inside WSL (wsl --install).", file=sys.stderr)
    raise SystemExit(2)

os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come here, and are told here

import hydra
import yaml
from hydra.errors import (
    HydraException,
    MissingConfigException,
)
from omegaconf.errors import OmegaConfBaseException

from grpo.cli.composition import composed_once
from grpo.cli.exits import command_errors, refuse
from grpo.cli.explain import (
    check_choices,
    explain_hydra_error,
    explain_key_of_none,
    explain_wrong_choice,
)
from grpo.cli.help import format_help, format_version
from grpo.cli.jobs import eval_job, prepare_process, train_job
from grpo.cli.outcome import CURRENT, begin_outcome, json_output
from grpo.cli.past_overrides import FLAGS_WITHOUT_RUN, add_past_overrides, unchanged_if_refused
from grpo.config import schema
from grpo.config.overrides import split_arguments
from grpo.config.suggest import find_nearest, suggest_names
from grpo.errors import ConfigError
from grpo.parallel.start import get_launched_index, is_launched

JOBS = {"train": "config", "eval": "eval", "check": "config"}  # a first bare word -> its config
JOBS_WITHOUT_CONFIG = {  # jobs that read what a run left
    "report": "grpo.commands.report",
    "export": "grpo.commands.export",
    "chat": "grpo.commands.chat",
    "dashboard": "grpo.commands.dashboard",
    "runs": "grpo.commands.runs",
}
JOBS_WITHOUT_JSON = ("chat", "dashboard")  # which run until they are ended
JSON_FLAG = "--json"


def main() -> None:
    """Runs the command. Exit codes: 0 done, 1 failed, 2 refused, 130 interrupted."""
    if get_launched_index() > 0:  # the first rank composes the config and says what is wrong
        import_module("grpo.cli.rank").main()
        return
    prepare_process()
    begin_outcome()
    asked = {"--help", "-h", "--version"} & set(sys.argv)
    if JSON_FLAG in sys.argv and not asked:
        sys.argv = [word for word in sys.argv if word != JSON_FLAG]
        with json_output():
            run_command(as_json=True)
    run_command()


def run_command(*, as_json: bool = False) -> None:
    """Runs the job that the command line names."""
    with command_errors():
        if {"--help", "-h"} & set(sys.argv):
            print(format_help(sys.argv), flush=True)
            return
        if "--version" in sys.argv:
            print(format_version(), flush=True)
            return
        job, overrides = split_job(sys.argv[1:])
        CURRENT.command = job
        if as_json and (job in JOBS_WITHOUT_JSON or FLAGS_WITHOUT_RUN & set(overrides)):
            asked_for = next(
                (flag for flag in overrides if flag in FLAGS_WITHOUT_RUN), f"grpo {job}"
            )
            raise ConfigError(
                f"{JSON_FLAG}: {asked_for} has no result to put into it; leave it out."
            )
        if job in JOBS_WITHOUT_CONFIG:
            run = getattr(import_module(JOBS_WITHOUT_CONFIG[job]), job)
            CURRENT.content = run(overrides) or {}
            return
        trusted = "--trust" in overrides
        overrides = [override for override in overrides if override != "--trust"]
        overrides = add_past_overrides("eval" if job == "eval" else "train", overrides, trusted)
        if is_launched() and (job == "check" or {"-m", "--multirun"} & set(overrides)):
            raise ConfigError(
                "torchrun: it can start a single run or grpo eval; a sweep's jobs start their own "
                "processes, with parallel.processes=N."
            )
        if job == "train" and {"-m", "--multirun"} & set(overrides):
            CURRENT.command = "sweep"
        given, flags = split_arguments(overrides)
        check_choices(given)
        sys.argv = ["grpo", *given, *flags]  # Hydra reads no override that follows a flag
        command = hydra.main(
            version_base="1.3", config_path=str(schema.find_conf_folder()), config_name=JOBS[job]
        )
        try:
            with unchanged_if_refused(overrides), composed_once(overrides):
                command(eval_job if job == "eval" else train_job)()
        except (HydraException, MissingConfigException, OmegaConfBaseException) as error:
            refuse(explain_hydra_error(error, JOBS[job], overrides))
        except AssertionError as error:
            if not str(error).startswith("Unexpected type for root"):  # OmegaConf's, of `none.key`
                raise
            refuse(explain_key_of_none(JOBS[job], overrides))
        except ValueError as error:
            if not str(error).startswith("Config group override must be"):
                raise
            refuse(explain_wrong_choice(overrides))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            where = f"{mark.name}, line {mark.line + 1}" if mark else "a config file"
            refuse(ConfigError(f"{where}: not YAML ({error.problem})."))


def split_job(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Splits off the job that a first bare word names; a bare word is never a valid override."""
    if not arguments or arguments[0].startswith(("-", "~")) or "=" in arguments[0]:
        return "train", list(arguments)
    job = arguments[0]
    known = (*JOBS, *JOBS_WITHOUT_CONFIG)
    if job not in known:
        raise ConfigError(
            f"{job}: no such job; there are {', '.join(known)}{suggest_names(job, known) or '.'} "
            f"An override is written key=value.",
            value=job, choices=known, nearest=find_nearest(job, known),
        )  # fmt: skip
    return job, list(arguments[1:])
