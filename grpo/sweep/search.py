"""A search: each trial is a job; Optuna chooses its values from the results of the others.

Optuna only proposes values (ask) and receives results (tell). The results are read from the jobs'
folders, so it doesn't matter where a job ran, or whether this process survived.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import optuna
from omegaconf import OmegaConf
from optuna.study import StudyDirection as Direction
from optuna.trial import FrozenTrial, TrialState, create_trial

from grpo.config.validation import check_writable
from grpo.errors import RunError
from grpo.runs.files import FINISHED, RUNNING, note_failure
from grpo.runs.lock import is_locked, locked
from grpo.sweep.check_search import (
    build_overrides,
    check_search,
    count_trials,
    format_distribution,
    list_corner_jobs,
)
from grpo.sweep.folder import (
    JobState,
    Record,
    SweepResult,
    count_by_status,
    read_job_state,
    read_record,
)
from grpo.sweep.launch import Launch, SweepPlan
from grpo.sweep.objectives import read_final_values, read_job_values
from grpo.sweep.open_study import exclusive, open_study
from grpo.sweep.space import Space, format_override, list_combinations
from grpo.sweep.study import (
    DATABASE_ERRORS,
    SearchOptions,
    check_connection,
    format_reason,
    hide_password,
)

NO_FOLDER = ""  # the folder of a trial that is not run: it exceeds the total or repeats another


def run_search(
    launch: Launch, params: Mapping[str, object], arguments: Sequence[str], options: SearchOptions
) -> SweepResult:
    """Runs trials until there are `n_trials` in all.

    Args:
        params: what to search, from a file in conf/sweep/; the arguments win over them.
        arguments: the overrides of the command line.

    Raises:
        ConfigError: the search is not possible as given, or the study is of another search.
        RunError: the study can't be reached any more.
    """
    space, fixed, objectives = check_search(launch, params, arguments, options)
    folder = launch.folder
    asked = OmegaConf.to_container(launch.config.hydra.sweeper)["storage"]  # type: ignore[call-overload, index]
    if options.storage is not None:
        check_connection(options.storage)
    check_writable(folder, "sweep_dir")
    study, name = open_study(options, asked, objectives, space, fixed, folder)
    return Search(launch, options, study, space, fixed, list(objectives), folder, name).run()


def plan_search(
    launch: Launch, params: Mapping[str, object], arguments: Sequence[str], options: SearchOptions
) -> SweepPlan:
    """Plans a search without opening its study. Its arguments are those of `run_search`."""
    space, fixed, objectives = check_search(launch, params, arguments, options)
    total = count_trials(options, space)
    record = read_record(launch.folder)
    begun = 0 if record is None else len(record.jobs)
    ended = sum(read_job_state(launch.folder, number).ended for number in range(begun))
    shown = {key: format_distribution(d) for key, d in space.items()}
    jobs = list(list_corner_jobs(fixed, space))
    return SweepPlan(launch, "search", total, max(0, total - ended), jobs, objectives, shown)


@dataclass(frozen=True)
class Search:
    """One process's part in a search."""

    launch: Launch
    options: SearchOptions
    study: optuna.Study
    space: Space
    fixed: list[str]
    objectives: list[str]
    folder: Path
    folder_id: str  # the folder's id in the study
    tried: set[int] = field(default_factory=set)  # the trials that this process has run

    def run(self) -> SweepResult:
        """Runs trials until none is left; raises RunError if the study is lost."""
        print(f"search of {self.total} trials in {self.folder}: {self.describe_jobs()}", flush=True)
        minimized = self.study.directions[0] == Direction.MINIMIZE
        try:
            from grpo.sweep.view import viewed  # late: a refusal needs no terminal

            with viewed(self.folder, self.total, self.read_objective, minimized):
                while self.run_batch():
                    pass
            answer = self.format_best()
        except (KeyboardInterrupt, SystemExit):
            print(f"search stopped; to resume: grpo -m sweep_dir={self.folder}", flush=True)
            raise
        except DATABASE_ERRORS as error:
            raise RunError(
                f"hydra.sweeper.storage={hide_password(self.options.storage)}: lost "
                f"({format_reason(error)}); when it is back: grpo -m sweep_dir={self.folder}"
            ) from error
        print(answer, flush=True)
        after = self.read_job_states()
        return SweepResult(self.folder, after, [job for job in after if self.is_unsuccessful(job)])

    def is_unsuccessful(self, job: JobState) -> bool:
        """Returns whether a job failed, was killed, or was run by this process but left nothing."""
        lost = job.status == "none" and job.number in self.tried
        return lost or job.status in ("failed", "killed")

    def read_objective(self, job: JobState) -> float | None:
        """Returns the first objective of a finished job, or None."""
        metric = self.objectives[0]
        return read_job_values(job, [metric])[metric]

    @property
    def total(self) -> int:
        return count_trials(self.options, self.space)

    def describe_jobs(self) -> str:
        jobs = self.read_job_states()
        return count_by_status(job.status for job in jobs) if jobs else "none yet"

    def run_batch(self) -> bool:
        """Runs up to `n_jobs` trials at once; returns False if none is left."""
        with ExitStack() as claims:
            with exclusive(self.folder):
                taken = self.claim_trials(claims)
            if not taken:
                return False
            jobs = [(trial.number, build_overrides(self.fixed, trial.params)) for trial in taken]
            self.launch.run([job for job in jobs if not read_job_state(self.folder, job[0]).ended])
            for trial in taken:
                self.tried.add(trial.number)
                if not trial.state.is_finished():
                    self.tell(read_job_state(self.folder, trial.number))
        return True

    def claim_trials(self, claims: ExitStack) -> list[FrozenTrial]:
        """Claims trials whose jobs are left to do, then new ones; other processes skip them."""
        begun = self.list_begun_trials()
        taken = [trial for trial in begun if self.is_available(trial)][: self.options.n_jobs]
        while len(taken) < self.options.n_jobs and len(begun) < self.total:
            if added := self.add_trial(self.propose_trial(begun)):
                taken.append(added)
            begun = self.list_begun_trials()
        for trial in taken:
            self.locate_claim(trial.number).touch()
            claims.enter_context(locked(self.locate_claim(trial.number)))
        trials = self.study.get_trials(deepcopy=False)
        jobs = [
            build_overrides(self.fixed, t.params) if self.is_in_folder(t) else [] for t in trials
        ]
        Record(self.launch.arguments, self.launch.config_dir, jobs).write(self.folder)
        return taken

    def propose_trial(self, begun: Sequence[FrozenTrial]) -> FrozenTrial:
        """Returns a new trial with all its values, which is not in the study yet.

        The values are chosen in a copy of the study, so a process that dies can't leave a trial
        with only some of them.
        """
        if self.options.sampler == "grid":
            past = [trial.params for trial in begun]
            values = next(new for new in list_combinations(self.space) if new not in past)
            return create_trial(state=TrialState.RUNNING, params=values, distributions=self.space)
        copy = optuna.create_study(
            study_name=self.study.study_name,  # Hyperband assigns brackets by it
            directions=self.study.directions,
            pruner=self.study.pruner,
            sampler=self.options.make_sampler(len(begun)),
        )
        copy.add_trials(begun)
        number = copy.ask(self.space).number
        return copy.trials[number]

    def add_trial(self, proposed: FrozenTrial) -> FrozenTrial | None:
        """Adds a trial to the study; returns None if a process of another folder was faster."""
        known = {trial.number for trial in self.study.get_trials(deepcopy=False)}
        self.study.add_trial(
            create_trial(
                state=TrialState.RUNNING,
                params=proposed.params,
                distributions=proposed.distributions,
                system_attrs=proposed.system_attrs,
                user_attrs={"folder": self.folder_id},
            )
        )
        begun = self.list_begun_trials()
        (added,) = [t for t in begun if self.is_in_folder(t) and t.number not in known]
        before = [trial for trial in begun if trial.number < added.number]
        twice = self.options.sampler == "grid" and added.params in [t.params for t in before]
        if len(before) < self.total and not twice:
            return added
        optuna.trial.Trial(self.study, added._trial_id).set_user_attr("folder", NO_FOLDER)
        self.study.tell(added.number, state=TrialState.FAIL)
        return None

    def list_begun_trials(self) -> list[FrozenTrial]:
        return [
            trial
            for trial in self.study.get_trials(deepcopy=False)
            if trial.state != TrialState.WAITING and trial.user_attrs.get("folder") != NO_FOLDER
        ]

    def is_in_folder(self, trial: FrozenTrial) -> bool:
        """Returns whether a trial's job is in this folder; a study may have several folders."""
        return bool(trial.user_attrs.get("folder") == self.folder_id)

    def is_available(self, trial: FrozenTrial) -> bool:
        """Returns whether a trial's job is left to do and no process is running it.

        A failed trial stays open in the study, and each process tries it once. A finished trial
        runs again if its folder was deleted. Trials of other folders are left to those.
        """
        if not self.is_in_folder(trial) or trial.number in self.tried:
            return False
        claim, status = (
            self.locate_claim(trial.number),
            read_job_state(self.folder, trial.number).status,
        )
        if status == RUNNING or (claim.exists() and is_locked(claim)):
            return False
        gone = trial.state == TrialState.COMPLETE and status == "none"
        return trial.state == TrialState.RUNNING or gone

    def locate_claim(self, number: int) -> Path:
        claims = self.folder / ".claims"
        claims.mkdir(exist_ok=True)
        return claims / str(number)

    def tell(self, job: JobState) -> None:
        """Tells the study how a job ended; the trial of a job that can be resumed stays open."""
        if job.status == "pruned":
            self.study.tell(job.number, state=TrialState.PRUNED)
        elif job.status == FINISHED:
            values, missing = read_final_values(job.folder, self.objectives)
            if missing:
                note_failure(job.folder, f"{missing}: has no value at the end")
                self.study.tell(job.number, state=TrialState.FAIL)
            else:
                self.study.tell(job.number, values)

    def read_job_states(self) -> list[JobState]:
        return [
            read_job_state(self.folder, trial.number)
            for trial in self.list_begun_trials()
            if self.is_in_folder(trial)
        ]

    def format_best(self) -> str:
        """Formats the best trial or, with several objectives, the Pareto-optimal ones."""
        try:
            best = self.study.best_trials if len(self.objectives) > 1 else [self.study.best_trial]
        except ValueError:
            return "\nno trial has finished."
        lines = [
            f"  job {trial.number}: "
            + " ".join(f"{m}={v:.4g}" for m, v in zip(self.objectives, trial.values, strict=True))
            + "  "
            + " ".join(format_override(key, value) for key, value in trial.params.items())
            for trial in best
        ]
        return "\nbest:\n" + "\n".join(lines)
