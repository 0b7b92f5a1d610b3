"""The fake vLLM answers as the real one did: vllm_answers.json is recorded from vLLM's CPU build by `make vllm`, which also runs this against it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.fst_fast import fake_vllm
from tests.fst_fast.vllm_exchanges import ANSWERS, PROMPT, answers, exchanges, managed, same


def test_every_answer_has_the_recorded_status_fields_tokens_and_log_probs(tmp_path: Path) -> None:
    recorded = json.loads(ANSWERS.read_text())
    real = os.environ.get("FST_VLLM")
    now = answers(managed([real] if real else [sys.executable, fake_vllm.__file__], tmp_path), tmp_path)
    assert [a["asked"] for a in now] == [a["asked"] for a in recorded]
    for then, answer, (_, _, body) in zip(recorded, now, exchanges(tmp_path), strict=True):
        sampled = body is not None and body.get("sampling_params", {}).get("temperature")
        if not sampled or real:
            assert same(then, answer, then["asked"]) == []
        else:  # another generator draws other tokens
            assert same(then["answer"]["prompt_logprobs"], answer["answer"]["prompt_logprobs"]) == []
            for one in (then, answer):
                choice = one["answer"]["choices"][0]
                assert len(choice["token_ids"]) == len(choice["logprobs"]["content"]) <= 8
                assert one["answer"]["prompt_token_ids"] == PROMPT
            assert set(then["answer"]) == set(answer["answer"])
