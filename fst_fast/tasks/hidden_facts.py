"""Hidden facts: linked facts that only a tool can read. The mini world's counterpart of questions that an agent answers by look-ups.

    find 12 boss city ?     lookup(of=12, what="boss") -> 7     lookup(of=7, what="city") -> 30     ->  \\boxed{ 30 }

An environment of several turns. The facts of a problem are those of `linked_facts`, but the question does not show them: a guess is right one
time in 40. Reward 1 iff the last \\boxed{} of the response that calls no tool holds the city. The feedback says which look-up is missing.
"""

from __future__ import annotations

from typing import Any

from fst_fast.contracts import EpisodeState, Problem, Verdict
from fst_fast.tasks.boxed import NoBoxedAnswer, last_box
from fst_fast.tasks.linked_facts import Fact, LinkedFacts, Web

TOOL = "lookup"
NOTHING = "nothing"


def question(web: Web) -> str:
    return f"find {web.start} {' '.join(web.relations)} ?"


def call_text(who: int, relation: str) -> str:
    """A call of the tool as the model writes it."""
    return f'<tool_call> {{ "name": "{TOOL}" , "arguments": {{ "of": {who} , "what": "{relation}" }}}} </tool_call>'


def lookup(of: int, what: str, state: EpisodeState) -> int | str:
    """look up a fact ."""
    found: dict[tuple[int, str], int] = {
        (who, relation): whom for who, relation, whom in state.problem.meta["facts"]
    }
    state.memory.append((of, what))
    return found.get((of, what), NOTHING)


class HiddenFacts(LinkedFacts):
    """Environment `hidden_facts`, in the mini vocabulary. level: `easy` (two facts in a chain) or `hard` (three)."""

    name = "hidden_facts"
    _question = staticmethod(question)

    def start(self, problem: Problem) -> Any:
        return problem.messages, [lookup], []

    def step(self, state: EpisodeState, response: str) -> Verdict:
        errors = [m["content"] for m in state.messages if m["role"] == "tool" and "error" in m["content"]]
        web = self.instance(state.problem)
        return judge(web, state.memory, errors, response)

    def gold(self, problem: Problem) -> list[str]:  # type: ignore[override]
        """The responses of an episode that gets reward 1."""
        chain = self.instance(problem).chain()
        return [*(call_text(who, relation) for who, relation, _ in chain), f"\\boxed{{ {problem.answer} }}"]


def judge(web: Web, asked: list[tuple[int, str]], errors: list[str], response: str) -> Verdict:
    """Compare the last \\boxed{} with the city. asked: the facts that were looked up; errors: what the tool said of invalid calls. Metrics: boxed,
    called, hops (every fact of the chain was looked up)."""
    chain = web.chain()
    missing = [fact for fact in chain if fact[:2] not in asked]

    def verdict(reward: float, feedback: str, boxed: bool = True) -> Verdict:
        metrics = {"boxed": float(boxed), "called": float(bool(asked)), "hops": float(not missing)}
        return Verdict(reward, feedback, metrics)

    try:
        content = last_box(response, "the city")
    except NoBoxedAnswer as why:
        return verdict(0.0, str(why), "\\boxed" in response)
    if content == str(chain[-1][2]):
        return verdict(1.0, "right.")
    return verdict(0.0, _mistake(web, missing, errors, content[:40], bool(asked)))


def _mistake(web: Web, missing: list[Fact], errors: list[str], content: str, asked: bool) -> str:
    if content == str(web.start):
        return f"the box holds the first name {content}: the question asks where its chain of look-ups ends."
    if errors:
        return f"a call was not valid ({errors[0]}), and the answer {content} was made up."
    if not asked:
        return f"the tool was not called: the answer {content} was made up."
    if missing:
        who, relation, _ = missing[0]
        return (
            f"the look-ups stop too early: {relation} of {who} was not asked, and {content} is not the city."
        )
    return f"every fact was looked up, but the box does not hold {web.chain()[-1][2]}, the last answer."
