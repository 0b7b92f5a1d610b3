"""Where random numbers come from: every use has a seed of its own, a hash of what it is; no generator runs on from step to step.

So there is no state of a generator to save, a resumed run draws what the unbroken one would have drawn, and another number of processes changes
no rollout. Code that is not ours (dropout, a user's task or reflector) draws from the global generators of Python, numpy and torch: these are
seeded anew at the beginning of every phase of every step.
"""

from __future__ import annotations

import hashlib
import random

import numpy as np
import torch


def stream_seed(*parts: object) -> int:
    """A 63-bit seed from the parts' text: the random stream of one sequence, whatever process or batch it runs in."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_globals(*parts: object) -> None:
    """Seed the generators that libraries draw from, those of all devices included, by what this process is about to do."""
    seed = stream_seed("global", *parts)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
