"""Derives the seeds of many streams of random numbers from the seed in the config."""

from __future__ import annotations

from hashlib import blake2b

SEED_LIMIT = 2**64  # so many seeds a generator of torch takes
MIN_HASHED_SEED = 2**31


def derive_seed(seed: int, number: int) -> int:
    """Returns the seed of the stream with this number, for any seed that is not negative.

    A large seed is hashed: a product would not fit, and on a CPU torch uses only 32 bits of a seed.
    """
    if seed < MIN_HASHED_SEED:
        return (seed * 1_000_003 + number) % SEED_LIMIT
    return int.from_bytes(blake2b(f"{seed} {number}".encode(), digest_size=8).digest(), "big")
