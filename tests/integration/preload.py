"""What the server of the crash tests loads before it forks the first run: everything that is slow, with one thread."""

import os

from tests.integration.launch import one_thread

os.environ |= one_thread()

from fst_fast.run.environment import prepare_environment

prepare_environment()

import deepspeed  # noqa: E402, F401
import torch  # noqa: E402

import fst_fast.trainer  # noqa: E402, F401
from fst_fast import mini  # noqa: E402
from fst_fast.policy.attention import load_model  # noqa: E402

load_model(
    str(mini.path()), torch.float32, attention="tree"
)  # transformers compiles a thousand patterns for the first model
