"""All searches' studies in one storage, as optuna-dashboard shows a single one."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import FrozenTrial

from grpo.dashboard.outputs import SweepFolder, find_outputs
from grpo.errors import ConfigError
from grpo.sweep.folder import StudyFile
from grpo.sweep.study import DATABASE_ERRORS, open_storage, silence_optuna

SECONDS_BETWEEN_REFRESHES = 1.0


class Studies:
    """A copy in memory of the studies in a folder; the studies themselves are only read."""

    def __init__(self, root: Path) -> None:
        silence_optuna()
        self.root, self.storage = root, InMemoryStorage()
        self.sources: dict[Path, tuple[BaseStorage, int]] = {}  # storage, and study id in it
        self.ids: dict[Path, int] = {}  # study ids in the copy
        self.unreadable: dict[Path, str] = {}  # the reasons
        self.refreshed_at = -SECONDS_BETWEEN_REFRESHES
        self.lock = threading.Lock()

    def refresh(self) -> None:
        """Updates the copy, unless that was done less than a second ago."""
        if time.monotonic() - self.refreshed_at >= SECONDS_BETWEEN_REFRESHES:
            self.copy_studies(find_outputs(self.root).sweeps)

    def copy_studies(self, sweeps: Iterable[SweepFolder]) -> None:
        """Copies the studies of these sweeps; one that can't be read is not tried again."""
        with self.lock:
            for sweep in sweeps:
                if sweep.is_search and sweep.folder not in self.unreadable:
                    self._copy_study(sweep.folder)
            self.refreshed_at = time.monotonic()

    def _copy_study(self, folder: Path) -> None:
        try:
            if folder not in self.sources:
                self._open_study(folder)
            storage, study_id = self.sources[folder]
            copy_trials(self.storage, self.ids[folder], storage.get_all_trials(study_id))
        except (*DATABASE_ERRORS, ConfigError, KeyError, json.JSONDecodeError) as error:
            self.unreadable[folder] = str(error).splitlines()[0]

    def _open_study(self, folder: Path) -> None:
        file = StudyFile.read(folder)
        if file is None:
            raise ConfigError("study.json is missing")
        storage = open_storage(file.storage, folder)
        study_id = storage.get_study_id_from_name(file.study_name)
        name = str(folder.relative_to(self.root))
        directions = storage.get_study_directions(study_id)
        self.ids[folder] = self.storage.create_new_study(directions, name)
        for key, value in storage.get_study_user_attrs(study_id).items():
            self.storage.set_study_user_attr(self.ids[folder], key, value)
        for key, value in storage.get_study_system_attrs(study_id).items():
            self.storage.set_study_system_attr(self.ids[folder], key, value)
        self.sources[folder] = storage, study_id


def copy_trials(copy: BaseStorage, study: int, trials: list[FrozenTrial]) -> None:
    """Updates a study in the copy to these trials, which are in order of their numbers."""
    copied = copy.get_all_trials(study)
    for old, new in zip(copied, trials, strict=False):
        if not old.state.is_finished():
            update_trial(copy, old, new)
    for new in trials[len(copied) :]:
        copy.create_new_trial(study, template_trial=new)


def update_trial(copy: BaseStorage, old: FrozenTrial, new: FrozenTrial) -> None:
    """Adds to a running trial what is new; its state comes last, as it can end the trial."""
    trial = old._trial_id
    for name in new.params.keys() - old.params.keys():
        distribution = new.distributions[name]
        value = distribution.to_internal_repr(new.params[name])
        copy.set_trial_param(trial, name, value, distribution)
    for step, value in new.intermediate_values.items():
        copy.set_trial_intermediate_value(trial, step, value)
    for key, content in new.user_attrs.items():
        copy.set_trial_user_attr(trial, key, content)
    for key, content in new.system_attrs.items():
        copy.set_trial_system_attr(trial, key, content)
    if new.state != old.state:
        copy.set_trial_state_values(trial, new.state, new.values)
