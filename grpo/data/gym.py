"""Tasks of reasoning-gym: endless generated problems, each scored by its task's own scorer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from tokenize import TokenError
from typing import Any

from grpo.config.suggest import suggest_names
from grpo.data.answers import choose_extractor, extract_likely_answer, normalize_answer
from grpo.data.arithmetic import check_count, get_size_key
from grpo.data.rows import GeneratedRows
from grpo.data.source import Source
from grpo.errors import ConfigError
from grpo.types import Example, Failure
from grpo.verifiers.isolated_scoring import score_answer

log = logging.getLogger(__name__)

# Raised by the tasks' scorers for an answer of an unexpected form; such an answer is wrong.
SCORER_ERRORS = (
    *(ValueError, TypeError, LookupError, ArithmeticError, AttributeError, SyntaxError),
    *(AssertionError, TokenError),
)
# Raised where a scorer reaches no verdict: that says nothing of the answer.
SCORER_LIMITS = (RecursionError, MemoryError)
# Answers that are right almost nowhere, but that some scorers accept for every problem.
NO_ANSWER = "I do not know."
NON_ANSWERS = (NO_ANSWER, "0", "nan")
PROBED_PROBLEMS = 8  # problems on which the scorer is tested with NON_ANSWERS


class ReasoningGym(Source):
    """One task with its options; training and evaluation use different seeds.

    The scorers give partial credit for text around an answer, and some even for no answer. So the
    answer is extracted first, and `strict` counts only a full score.
    """

    def __init__(
        self,
        task: str | None,
        size: int,
        eval_size: int,
        options: Mapping[str, Any],
        extract: str = "tag",
        strict: bool = True,
        seed: int = 0,
    ) -> None:
        from reasoning_gym.factory import DATASETS

        if task is None:
            raise ConfigError(
                "dataset.task is not set, for example dataset.task=basic_arithmetic.",
                key="dataset.task",
            )
        if task not in DATASETS:
            raise ConfigError(
                f"dataset.task={task}: no such task{suggest_names(task, DATASETS)}",
                key="dataset.task",
                value=task,
            )
        self.task, self.options, self.seed = task, dict(options), seed
        self.size, self.eval_size = check_count(size, "size"), check_count(eval_size, "eval_size")
        self.extract, self.strict = choose_extractor(extract), strict

    def rows(self, split: str) -> Sequence[Example]:
        size: int = getattr(self, get_size_key(split))
        seed = 2 * self.seed + (split == "test")
        import reasoning_gym

        options = (
            build_composite_options(self.options) if self.task == "composite" else self.options
        )
        try:
            problems = reasoning_gym.create_dataset(self.task, size=size, seed=seed, **options)
            probed = [problems[number] for number in range(min(size, PROBED_PROBLEMS))]
        except (TypeError, AssertionError, ValueError) as error:
            raise ConfigError(f"dataset.options of {self.task}: {error}") from error
        refused = self._find_refused(problems, probed)

        def make(number: int) -> Example:
            entry = problems[number]
            return Example(
                question=entry["question"],
                answer=get_gold_answer(entry),
                verify=self._make_verifier(problems, entry, self.extract, refused),
                columns=entry["metadata"],
                extract_answer=self.extract,
                lenient=self._make_verifier(problems, entry, extract_likely_answer, refused),
            )

        return GeneratedRows(size, make)

    def example(self, row: Example, number: int) -> Example:
        return row

    def _find_refused(self, problems: Any, entries: list[dict[str, Any]]) -> set[object]:
        """Returns the non-answers that the task's scorer accepts for most of the problems.

        Raises:
            ConfigError: it accepts any answer.
        """
        refused = []
        for answer in NON_ANSWERS:
            accepted = [
                is_full_credit(compute_credit(problems, answer, entry))
                and not is_gold(answer, entry)
                for entry in entries
            ]
            if 2 * sum(accepted) > len(accepted):
                refused.append(answer)
        if NO_ANSWER in refused:
            raise ConfigError(
                f"dataset.task={self.task}: reasoning-gym's scorer accepts any answer, "
                f"even {NO_ANSWER!r}, so there is nothing to learn; choose another task.",
                key="dataset.task",
                value=self.task,
            )
        if refused:
            log.warning(
                "dataset.task=%s: reasoning-gym's scorer accepts %s for every problem; "
                "here it counts as wrong.", self.task, " and ".join(map(repr, refused)),
            )  # fmt: skip
        return {normalize_answer(answer) for answer in refused}

    def _make_verifier(
        self,
        problems: Any,
        entry: dict[str, Any],
        read: Callable[[str], str | None],
        refused: set[object],
    ) -> Callable[[str], float | Failure]:
        def verify(completion: str) -> float | Failure:
            answer = read(completion)
            if answer is None or (
                normalize_answer(answer) in refused and not is_gold(answer, entry)
            ):
                return 0.0
            credit = compute_credit(problems, answer, entry)
            if isinstance(credit, Failure) or not self.strict:
                return credit
            return float(is_full_credit(credit))

        return verify


def get_gold_answer(entry: Mapping[str, Any]) -> str:
    """Returns a problem's gold answer; "" if the task has none because several are right."""
    return "" if entry["answer"] is None else str(entry["answer"])


def is_gold(answer: str, entry: Mapping[str, Any]) -> bool:
    return entry["answer"] is not None and normalize_answer(answer) == normalize_answer(
        get_gold_answer(entry)
    )


def is_full_credit(credit: float | Failure) -> bool:
    return not isinstance(credit, Failure) and credit >= 1.0


def compute_credit(problems: Any, answer: str, entry: Mapping[str, Any]) -> float | Failure:
    """Returns the task's score of an answer: 0 if the scorer can't read it, a failure if it exceeds
    a limit of time, memory or depth."""
    try:
        return score_answer(problems, answer, entry)
    except SCORER_LIMITS as error:
        return Failure(f"the task's scorer raised {type(error).__name__}")
    except SCORER_ERRORS:
        return 0.0


def build_composite_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Builds the options of the task `composite` from the data sets that the config names.

    Raises:
        ConfigError: it names none, or one is not a task.
    """
    from reasoning_gym.composite import DatasetSpec
    from reasoning_gym.factory import DATASETS

    key = "dataset.options.datasets"
    datasets = options.get("datasets")
    example = f"'+{key}=[{{name: chain_sum, weight: 1}}]', or use dataset=mix"
    if not isinstance(datasets, list) or not datasets:
        raise ConfigError(f"dataset.task=composite: name its tasks with {example}.")
    specs = []
    for number, spec in enumerate(datasets):
        keys = set(spec) if isinstance(spec, Mapping) else set()
        if not {"name"} <= keys <= {"name", "weight", "config"}:
            raise ConfigError(f"{key}[{number}]={spec}: use name, weight and config, {example}.")
        name = str(spec["name"])
        if name not in DATASETS or name == "composite":
            known = suggest_names(name, DATASETS)
            raise ConfigError(f"{key}[{number}].name={name}: no such task{known}")
        spec_options = dict(spec.get("config") or {})
        specs.append(DatasetSpec(name, spec.get("weight", 1.0), spec_options))
    return {**options, "datasets": specs}
