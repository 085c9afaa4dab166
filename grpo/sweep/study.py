"""The Optuna study of a search: its storage, sampler and pruner."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from optuna.distributions import CategoricalDistribution, distribution_to_json
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalStorage

from grpo.config.extras import require_extra
from grpo.config.suggest import suggest_names
from grpo.errors import ConfigError
from grpo.seeds import SEED_LIMIT, derive_seed
from grpo.sweep.objectives import check_directions
from grpo.sweep.space import Space

JOURNAL = "study.journal"
SAMPLERS = ("tpe", "gp", "cmaes", "random", "grid")
PRUNERS = ("none", "median", "hyperband")
DATABASE_ERRORS = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError)


@dataclass(frozen=True)
class SearchOptions:
    """The keys of conf/hydra/sweeper/optuna.yaml, which explains them."""

    n_trials: int
    n_jobs: int
    sampler: str
    sampler_options: Mapping[str, Any]
    pruner: str
    pruner_options: Mapping[str, Any]
    direction: str
    objectives: Mapping[str, str] | None
    storage: str | None
    study_name: str | None
    seed: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> SearchOptions:
        """Checks the options; raises ConfigError if one is wrong."""
        known = [field.name for field in fields(cls)]
        for key in config:
            if key not in known:
                raise ConfigError(f"hydra.sweeper.{key}: no such key{suggest_names(key, known)}")
        options = cls(**config)
        for key in ("n_trials", "n_jobs", "seed"):
            value, least = getattr(options, key), 0 if key == "seed" else 1
            most = SEED_LIMIT - 1 if key == "seed" else 2**31 - 1
            if type(value) is not int or not least <= value <= most:
                raise ConfigError(
                    f"hydra.sweeper.{key}={value}: must be a whole number from {least} to {most}."
                )
        for key, choices in (("sampler", SAMPLERS), ("pruner", PRUNERS)):
            value = getattr(options, key)
            if value not in choices:
                raise ConfigError(
                    f"hydra.sweeper.{key}={value}: use one of {', '.join(choices)}"
                    f"{suggest_names(str(value), choices)}"
                )
        if options.sampler == "cmaes":
            require_extra("hydra.sweeper.sampler=cmaes", "cmaes", "cmaes")
        check_directions(options.objectives, options.direction)
        if "seed" in options.sampler_options:
            raise ConfigError(
                "hydra.sweeper.sampler_options.seed: the sampler's seed is hydra.sweeper.seed.",
                key="hydra.sweeper.sampler_options.seed",
            )
        if options.pruner != "none" and len(options.objectives or {}) > 1:
            raise ConfigError(
                f"hydra.sweeper.pruner={options.pruner}: a pruner compares trials by one "
                f"objective; with several, use pruner=none.",
                key="hydra.sweeper.pruner",
                value=options.pruner,
            )
        options.make_sampler(0)
        options.make_pruner()
        return options

    def make_sampler(self, num_trials: int) -> optuna.samplers.BaseSampler:
        """Makes the next trial's sampler, seeded by the number of trials, so resuming is exact."""
        seed = derive_seed(self.seed, num_trials) % 2**32  # NumPy takes no more
        samplers: dict[str, Callable[..., optuna.samplers.BaseSampler]] = {
            "tpe": optuna.samplers.TPESampler,
            "gp": optuna.samplers.GPSampler,
            "cmaes": optuna.samplers.CmaEsSampler,
            "random": optuna.samplers.RandomSampler,
            "grid": optuna.samplers.RandomSampler,  # not used: its trials are listed beforehand
        }
        defaults = {"constant_liar": True} if self.sampler == "tpe" else {}  # counts running trials
        options = {**defaults, **self.sampler_options, "seed": seed}
        sampler: optuna.samplers.BaseSampler = construct(
            samplers[self.sampler], options, "sampler_options"
        )
        return sampler

    def make_pruner(self) -> optuna.pruners.BasePruner:
        return make_pruner(self.pruner, self.pruner_options)

    def check_space(self, space: Space) -> None:
        """Raises ConfigError if the sampler can't search the space."""
        numbers = [key for key, d in space.items() if not isinstance(d, CategoricalDistribution)]
        if self.sampler == "cmaes" and len(numbers) < 2:
            raise ConfigError(
                "hydra.sweeper.sampler=cmaes: needs at least two keys with numbers "
                "(interval or range); use tpe.",
                key="hydra.sweeper.sampler",
                value="cmaes",
            )


def make_pruner(name: str, options: Mapping[str, Any]) -> optuna.pruners.BasePruner:
    pruners: dict[str, Callable[..., optuna.pruners.BasePruner]] = {
        "none": optuna.pruners.NopPruner,
        "median": optuna.pruners.MedianPruner,
        "hyperband": optuna.pruners.HyperbandPruner,
    }
    pruner: optuna.pruners.BasePruner = construct(pruners[name], options, "pruner_options")
    return pruner


def construct(make: Callable[..., Any], options: Mapping[str, Any], key: str) -> Any:
    """Calls Optuna's class with the options; raises ConfigError if it doesn't take them."""
    try:
        return make(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"hydra.sweeper.{key}={dict(options)}: {error}") from error


def open_storage(url: str | None, folder: Path) -> BaseStorage:
    """Opens a database, or the journal in the sweep's folder.

    Args:
        url: as in study.json: references to the environment are not resolved; None: the journal.

    Raises:
        ConfigError: the storage can't be opened.
    """
    if url is None:
        return JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    url = resolve_url(url)
    options = {"pool_pre_ping": True, **sqlite_timeout(url)}
    with storage_errors(url):
        try:
            return RDBStorage(url, engine_kwargs=options)
        except sqlalchemy.exc.SQLAlchemyError:
            time.sleep(2)  # another process may be creating the tables right now
            return RDBStorage(url, engine_kwargs=options)


def resolve_url(url: str) -> str:
    """Resolves references to the environment in a URL, such as `${oc.env:STORAGE}`.

    Raises:
        ConfigError: the variable isn't set.
    """
    try:
        return str(OmegaConf.create({"url": url}).url)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"hydra.sweeper.storage={url}: {reason}", key="hydra.sweeper.storage", value=url
        ) from error


def check_connection(url: str) -> None:
    """Raises ConfigError if the database doesn't answer; changes nothing in it."""
    with storage_errors(url):
        sqlalchemy.inspect(sqlalchemy.create_engine(url, **sqlite_timeout(url))).get_table_names()


def sqlite_timeout(url: str) -> dict[str, Any]:
    """Returns options to wait 30 seconds for another writer of an SQLite file; else none."""
    if not url.startswith("sqlite") or "timeout=" in url:
        return {}
    return {"connect_args": {"timeout": 30}}


@contextmanager
def storage_errors(url: str | None) -> Iterator[None]:
    """Within it, a storage's errors, of whatever database, become a ConfigError."""
    try:
        yield
    except (
        *DATABASE_ERRORS,
        ImportError,
        OSError,
        json.JSONDecodeError,  # a journal that is damaged
        RuntimeError,  # made by another version of Optuna
    ) as error:
        raise ConfigError(
            f"hydra.sweeper.storage={hide_password(url)}: can't be opened "
            f"({format_reason(error)}).",
            key="hydra.sweeper.storage",
            value=hide_password(url),
        ) from error


def format_reason(error: Exception) -> str:
    """Formats a storage's error in one line, with the database's message if there is one."""
    return str(error.__cause__ or error).splitlines()[0]


def hide_password(url: str | None) -> str:
    """Returns a URL without its password; "null" for None."""
    if url is None:
        return "null"
    try:
        return sqlalchemy.make_url(url).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        return url


def serialize_space(space: Space) -> dict[str, Any]:
    """Converts a space to JSON values, to be stored with a study and compared."""
    return {key: json.loads(distribution_to_json(space[key])) for key in sorted(space)}


def silence_optuna() -> None:
    """Silences Optuna's log lines, which would stand between those of the jobs."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
