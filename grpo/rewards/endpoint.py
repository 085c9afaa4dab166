"""A reward that an HTTP service computes."""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from grpo.errors import ConfigError
from grpo.rewards.option_checks import require_at_least, require_positive
from grpo.types import Failure, Sample

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between two attempts
JITTER = random.Random()  # a separate generator, so that a retry doesn't change what is sampled


class Endpoint:
    """The reward that an HTTP service returns for each completion.

    The service gets `{"samples": [{"prompt", "completion", "answer", "columns"}, …]}` and must
    answer `{"rewards": [number or null, …]}`, one for each sample; null means that the reward does
    not apply. A request is repeated, after pauses that double, if it can't connect, runs out of
    time, or gets status 429 or 5xx. If it still has no valid answer, its samples get failures.

    Args:
        url: http or https.
        seconds: time limit of one attempt.
        retries: attempts after the first.
        batch_size: samples per request.
        workers: requests at the same time.
        token_env: environment variable that holds a token, sent as `Authorization: Bearer`.
    """

    concurrent = True

    def __init__(
        self,
        url: str,
        seconds: float = 30.0,
        retries: int = 3,
        batch_size: int = 64,
        workers: int = 4,
        token_env: str | None = None,
    ) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise ConfigError(
                f"url={url}: should be like http://localhost:8000/rewards.", key="url", value=url
            )
        if urlsplit(url).password:
            raise ConfigError(
                "url: takes no user and password; name an environment variable that holds a "
                "token: token_env=NAME."
            )
        if token_env is not None and not os.environ.get(token_env):
            raise ConfigError(
                f"token_env={token_env}: the environment has no such variable.",
                key="token_env",
                value=token_env,
            )
        require_at_least(0, retries=retries)
        require_at_least(1, batch_size=batch_size, workers=workers)
        require_positive(seconds=seconds)
        self.url = url
        self.seconds = seconds
        self.retries = retries
        self.batch_size = batch_size
        self.workers = workers
        self.token_env = token_env
        self.threads: ThreadPoolExecutor | None = None

    def __call__(self, samples: Sequence[Sample]) -> list[float | Failure | None]:
        if self.threads is None:
            self.threads = ThreadPoolExecutor(self.workers, thread_name_prefix="endpoint")
        starts = range(0, len(samples), self.batch_size)
        batches = [samples[start : start + self.batch_size] for start in starts]
        return [
            reward for batch in self.threads.map(self.request_rewards, batches) for reward in batch
        ]

    def close(self) -> None:
        if self.threads is not None:
            self.threads.shutdown(cancel_futures=True)
            self.threads = None

    def request_rewards(self, batch: Sequence[Sample]) -> Sequence[float | Failure | None]:
        body = json.dumps(
            {"samples": [sample_to_json(sample) for sample in batch]}, default=str
        ).encode()
        for attempt in range(self.retries + 1):
            if attempt > 0:
                pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1))
                time.sleep(pause * JITTER.uniform(0.5, 1.5))
            try:
                token = os.environ[self.token_env] if self.token_env else None
                return read_rewards(post(self.url, body, self.seconds, token), len(batch))
            except HTTPError as error:
                error.close()
                reason = f"HTTP {error.code} {error.reason}"
                if error.code != 429 and error.code < 500:
                    break
            except (OSError, HTTPException) as error:
                reason = f"{type(error).__name__}: {error}"
            except (ValueError, OverflowError, RecursionError) as error:
                reason = f"its answer is not valid: {error}"
                break
        return [Failure(f"{self.url}: {reason} (try {attempt + 1})")] * len(batch)


def sample_to_json(sample: Sample) -> dict[str, Any]:
    return {
        "prompt": sample.prompt,
        "completion": sample.completion,
        "answer": sample.answer,
        "columns": dict(sample.example.columns),
    }


def post(url: str, body: bytes, seconds: float, token: str | None = None) -> bytes:
    """Sends a request and returns the whole answer, within a time limit.

    Raises:
        OSError, HTTPException: there is no whole answer; HTTPError if its status is not 2xx.
    """
    request = Request(url, body, {"Content-Type": "application/json"})
    if token is not None:  # not sent on to where the service redirects
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    deadline = time.monotonic() + seconds
    parts = []
    # The timeout limits each wait, not their sum.
    with urlopen(request, timeout=seconds) as response:
        while part := response.read1(2**16):
            parts.append(part)
            if time.monotonic() > deadline:
                raise TimeoutError(f"no whole answer within {seconds:g} s")
        if response.length:
            raise ConnectionError(f"the answer breaks off {response.length} bytes early")
    return b"".join(parts)


def read_rewards(answer: bytes, count: int) -> list[float | None]:
    """Reads the rewards in an answer.

    Raises:
        ValueError: it is not `{"rewards": […]}` with `count` finite numbers or nulls.
    """
    content = json.loads(answer)
    rewards = content.get("rewards") if isinstance(content, dict) else None
    if not isinstance(rewards, list) or len(rewards) != count:
        raise ValueError(f"it should hold {count} rewards, but is {answer[:80]!r}")
    for reward in rewards:
        if reward is not None and not (type(reward) in (int, float) and math.isfinite(reward)):
            raise ValueError(f"{reward!r} is neither a finite number nor null")
    return [None if reward is None else float(reward) for reward in rewards]
