"""The grader `http`: a service of the user's judges. It is sent the problem and the response as JSON and answers with a verdict."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass

from fst_fast.contracts import Problem, Verdict


@dataclass(frozen=True)
class Http:
    """POST {"id", "messages", "answer", "meta", "response"} to `url`; the answer is {"reward", "feedback", "metrics"}.

    A fault of the network or the service makes the rollout unjudged (reward None). Keep timeout_s below verify.timeout_s."""

    url: str
    timeout_s: float = 5.0

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")) or "@" in self.url:
            raise ValueError(f"url={self.url!r}; allowed: http:// or https:// without user name and password")

    def __call__(self, problem: Problem, response: str) -> Verdict:
        body = {"id": problem.id, "messages": list(problem.messages), "answer": problem.answer, "meta": dict(problem.meta), "response": response}  # fmt: skip
        request = urllib.request.Request(
            self.url, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout_s) as answer:
                found = json.loads(answer.read(1 << 20))
        except (urllib.error.URLError, OSError, ValueError) as error:
            return Verdict(None, f"the grader at {self.url} does not answer: {error}")
        if not isinstance(found, dict) or "reward" not in found:
            return Verdict(None, f"the grader at {self.url} answers without a reward")
        return Verdict(found["reward"], str(found.get("feedback") or ""), found.get("metrics") or {})
