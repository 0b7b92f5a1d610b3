"""Seeds: every use of randomness has its own seed, a hash of what it is for. No generator's state carries over between steps.

So no generator state has to be saved, a resumed run draws the same numbers as an uninterrupted one, and the number of
processes changes no rollout. Code outside our control (dropout, a user's task or reflector) draws from the global
generators of Python, numpy and torch, which are reseeded at the start of every phase of every step.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def stream_seed(*parts: object) -> int:
    """A 63-bit seed hashed from the parts' text: the random stream of one sequence, in whatever process or batch it runs."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_globals(*parts: object) -> None:
    """Seed the global generators of Python, numpy and torch (all devices) from the parts' text."""
    seed = stream_seed("global", *parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
