"""Writes `grpo --help`: the jobs, the choices, and the page of config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from grpo import __version__
from grpo.config.schema import find_conf_folder

USAGE = """\
grpo: train a language model by group-relative policy optimization (GRPO)

  grpo [overrides]                        train
  grpo -m kl_weight=0,0.02 seed=0,1,2     train once for each combination
  grpo eval checkpoint=DIR [overrides]    evaluate a run or a model
  grpo resume=DIR                         resume a run
  grpo -m sweep_dir=DIR                   resume a sweep
  grpo check [overrides]                  what a run or sweep (-m) would do, or why not
  grpo runs [FOLDER]                      what is in outputs/, and what to do next with each
  grpo report DIR…                        the page of a run, of runs side by side, or of a sweep
  grpo dashboard [FOLDER]                 runs, sweeps and studies in the browser
  grpo chat RUN                           the base and the trained model, side by side
  grpo export RUN DIR [--push ORG/NAME]   a plain model with a card

  --json                  one JSON object as the only output: train, sweep, eval, check, runs,
                          report, export (docs/reference/json.md)
  --cfg job               the config with these overrides, as YAML
  --info defaults-tree    the files it comes from
  --trust                 run what DIR names, though it is neither this package's nor yours
  --config-dir DIR        choices of your own, in folders named as below
  --hydra-help            Hydra's own flags; shell completion: eval "$(grpo -sc install=bash)"

Exit codes: 0 done, 1 failed (what was done is saved), 2 refused (nothing was started),
130 interrupted (saved; can be resumed)
"""


PLUGIN_CHOICES = {  # that come with Hydra and its launchers, and not from a file in conf/
    "hydra/launcher": ("basic", "joblib", "ray", "submitit_local"),
}
CHOICE_NOTES = {"hydra/launcher": "  (ray: extra [ray]; slurm, submitit_local: extra [slurm])"}


JOB_HELP = {
    "check": """\
grpo check [overrides]: what a run would do, or why it would be refused; nothing is started

  overrides               those of the run: model, data, steps, KL, memory and what is ignored
  -m                      the jobs that a sweep would run, and what the first of them would do
  --json                  as one JSON object
""",
    "runs": """\
grpo runs [FOLDER]: runs, sweeps and evaluations, newest first, and what to do next with each

  FOLDER                  outputs where none is given
  --json                  as one JSON object
""",
    "report": """\
grpo report DIR…: a page of what runs left

  grpo report RUN         RUN/report.html: curves, completions, diagnoses
  grpo report RUN RUN…    runs.html in the first: the runs side by side
  grpo report SWEEP       SWEEP/report.html, results.csv, experiment/best.yaml: the ranking, and
                          which differences the data supports (docs/statistics.md)
  grpo report SWEEP SWEEP…   sweeps.html, sweeps.csv, experiment/sweeps_best.yaml in the first: the
                          same of all their jobs together
""",
    "dashboard": """\
grpo dashboard [FOLDER]: runs, sweeps and studies in the browser

  FOLDER                  of runs and sweeps; outputs where none is given
  --host=ADDRESS          this machine alone unless told otherwise
  --port=N                0: any that is free
""",
    "chat": """\
grpo chat RUN: the base and the trained model, side by side

  RUN                     a run's folder, or one of its checkpoints
  --trust                 run the Python code that comes with its model
""",
    "export": """\
grpo export RUN DIR: a folder that transformers loads, with a card that says where it comes from

  RUN                     a run's folder, or one of its checkpoints; an adapter is merged
  DIR                     a new or an empty folder
  --push ORG/NAME         upload it to the hub as well
  --private               a page that only its owner sees
  --trust                 run the Python code that comes with the model under an adapter
""",
}


def format_version() -> str:
    """Formats the versions of this package and of those that its numbers depend on."""
    from importlib.metadata import version  # slow to import, for one flag

    beside = ("torch", "transformers", "hydra-core")
    return f"grpo-bench {__version__} ({', '.join(f'{name} {version(name)}' for name in beside)})"


def format_help(arguments: Sequence[str]) -> str:
    """Formats the help, with the choices in a --config-dir that is given beside it."""
    if len(arguments) > 1 and arguments[1] in JOB_HELP:
        return JOB_HELP[arguments[1]].rstrip()
    folders = [find_conf_folder(), *map(Path, find_config_dirs(arguments))]
    groups = {
        str(path.relative_to(folder))
        for folder in folders
        for path in folder.rglob("*")
        if path.is_dir()
    }
    lines = [USAGE, "Choices: group=choice, several rewards: reward=[answer,length]", ""]
    for group in sorted(groups - {"hydra"}):
        choices = sorted({*list_choices(folders, group), *PLUGIN_CHOICES.get(group, ())})
        lines.append(f"  {group}: {', '.join(choices)}{CHOICE_NOTES.get(group, '')}")
    page = (find_conf_folder() / "config.yaml").read_text().rstrip()
    lines += ["", "Config: key=value, and section.key=value", "", page]
    return "\n".join(lines)


def list_choices(folders: Sequence[Path], group: str) -> list[str]:
    """Returns a group's choices; a file whose name begins with _ is a part of others."""
    return sorted({file.stem for folder in folders for file in folder.glob(f"{group}/[!_]*.yaml")})


def find_config_dirs(arguments: Sequence[str]) -> list[str]:
    """Returns the values of --config-dir, in each of its spellings."""
    folders = []
    for flag, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if flag in ("--config-dir", "-cd"):
            folders.append(following)
        elif flag.startswith("--config-dir="):
            folders.append(flag.partition("=")[2])
    return folders
