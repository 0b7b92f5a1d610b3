"""What the fork server imports before it forks a run: one thread for each run, then the trainer.

The environment is set before numpy and torch load, since that is when they read it. Importing starts no OpenMP threads, which a forked
process could not use. Asking NVML for GPUs leaves CUDA uninitialised, for the same reason.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

from fst_fast.run.environment import prepare_environment

prepare_environment()

import fst_fast.commands.evaluate  # noqa: E402
import fst_fast.commands.export  # noqa: E402
import fst_fast.trainer  # noqa: E402, F401
