"""A grid: each combination of the given values runs once; a resumed grid runs what is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from grpo.config.validation import check_writable
from grpo.errors import ConfigError
from grpo.runs.lock import locked
from grpo.sweep.folder import (
    STUDY,
    JobState,
    Record,
    SweepResult,
    count_by_status,
    number_jobs,
    read_job_state,
    read_job_states,
    read_record,
)
from grpo.sweep.launch import Launch, SweepPlan, combine_overrides
from grpo.sweep.objectives import check_directions, read_job_values, resolve_objectives


def run_grid(plan: SweepPlan) -> SweepResult:
    """Runs the jobs of a grid that are left to do.

    Raises:
        ConfigError: the folder can't be written, or another process is using it.
        RunError: no job could be started.
    """
    launch, jobs = plan.launch, plan.examples
    folder = launch.folder
    metric, way = next(iter(plan.objectives.items()))

    def value_of(job: JobState) -> float | None:
        return read_job_values(job, [metric])[metric]

    check_writable(folder, "sweep_dir")
    with locked(folder):
        Record(launch.arguments, launch.config_dir, jobs, plan.objectives).write(folder)
        before = list(read_job_states(folder))
        counts = count_by_status(job.status for job in before)
        print(f"sweep of {len(jobs)} jobs in {folder}: {counts}", flush=True)
        try:
            from grpo.sweep.view import viewed  # late: a refusal needs no terminal

            with viewed(folder, len(before), value_of, way == "minimize"):
                launch.run([(job.number, jobs[job.number]) for job in before if not job.ended])
        except (KeyboardInterrupt, SystemExit):
            print(f"sweep stopped; to resume: grpo -m sweep_dir={folder}", flush=True)
            raise
        after = list(read_job_states(folder))
    return SweepResult(folder, after, [job for job in after if not job.ended])


def plan_grid(
    launch: Launch,
    params: Mapping[str, object],
    arguments: Sequence[str],
    objectives: Mapping[str, str] | None,
    direction: str,
) -> SweepPlan:
    """Composes and checks the jobs of a grid.

    Args:
        params: values to sweep, from a file in conf/sweep/; the arguments win over them.
        arguments: the overrides of the command line.
        objectives: metrics to compare jobs by, with their directions; None: config.objective.
        direction: of config.objective.

    Raises:
        ConfigError: there is nothing to sweep, a job's config is wrong, or the folder holds
            another sweep.
    """
    check_directions(objectives, direction)
    folder = launch.folder
    if (folder / STUDY).is_file():
        raise ConfigError(
            f"sweep_dir={folder}: holds a search; give another sweep_dir.",
            key="sweep_dir",
            value=folder,
        )
    jobs = number_jobs(read_record(folder), expand_jobs(launch, params, arguments), folder)
    compared = resolve_objectives(objectives, direction, [launch.compose(job) for job in jobs])
    left = sum(not read_job_state(folder, number).ended for number in range(len(jobs)))
    return SweepPlan(launch, "grid", len(jobs), left, jobs, compared)


def expand_jobs(
    launch: Launch, params: Mapping[str, object], arguments: Sequence[str]
) -> list[list[str]]:
    """Returns the overrides of each job.

    Raises:
        ConfigError: no key has several values, or a key has infinitely many.
    """
    parser = OverridesParser.create(launch.context.config_loader)
    parsed = parser.parse_overrides(combine_overrides(params, arguments))
    if not any(override.is_sweep_override() for override in parsed):
        raise ConfigError(
            "-m: nothing to sweep; give a key several values (kl_weight=0,0.1), or a sweep=CHOICE."
        )
    try:
        (jobs,) = BasicSweeper.split_arguments(parsed, None)
    except HydraException as error:
        endless = next(o for o in parsed if o.is_sweep_override() and not o.is_discrete_sweep())
        raise ConfigError(
            f"{endless.input_line}: has infinitely many values; list some, or "
            f"search it with hydra/sweeper=optuna."
        ) from error
    return jobs
