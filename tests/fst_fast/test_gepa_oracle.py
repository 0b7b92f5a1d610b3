"""gepa 0.1.4 as the oracle. Driven with one candidate at a time over the same deterministic scorer, it accepts what we
accept, and its Pareto selection weights every candidate as ours does. Also tests the bridge between the two interfaces.
"""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from gepa import optimize
from gepa.core.adapter import EvaluationBatch
from gepa.gepa_utils import find_dominator_programs, select_program_candidate_from_pareto_front
from gepa.strategies.acceptance import StrictImprovementAcceptance
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fst_fast.config import FastConfig
from fst_fast.config.components import compose
from fst_fast.contracts import Context, Problem, Rollout, RolloutRequest, ScoredRollout, Verdict
from fst_fast.fast import pareto
from fst_fast.fast.evolution import evolve
from fst_fast.fast.gepa_adapter import GepaBridge, problems_of, score_with
from fst_fast.fast.population import FastState
from fst_fast.fast.reflection import Reply

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta"]
SEED = "seed text"
PROBLEMS = [
    Problem(f"p{i}", [{"role": "user", "content": f"needs {WORDS[i % 4]}"}], i % 4) for i in range(12)
]
claim = settings(max_examples=80, deadline=None)


def reward(text, problem):
    """A problem needs its word; two words harm on some problems."""
    value = 0.5 * (WORDS[problem.answer] in text) + 0.25 * ("alpha" in text and "beta" in text)
    return max(0.0, value - 0.5 * ("epsilon" in text and problem.answer == 1) - 0.25 * ("zeta" in text))


def score(items):
    nothing = (np.zeros(0, np.int64), np.zeros(0, np.float32))
    return [
        ScoredRollout(
            Rollout(p.id, c.id, k, *nothing, "stop", 0, 1.0),
            Verdict(reward(c.text, p), f"wants {WORDS[p.answer]}"),
            "r",
        )
        for c, p, k in items
    ]


class Proposals:
    """Proposes a fixed list of word sets one after the other, whatever the parent: the decisions of both are then about the same texts."""

    def __init__(self, texts):
        self.texts = list(texts)

    def __call__(self, prompts, *, seeds):
        return [Reply(f"```\n{self.texts.pop(0)}\n```" if self.texts else "no more", "stop") for _ in prompts]


def quiet(line):
    pass


class Silent:
    def log(self, message):
        pass


proposals = st.lists(
    st.sets(st.sampled_from(WORDS), min_size=1).map(lambda words: " ".join(sorted(words))),
    min_size=1,
    max_size=6,
    unique=True,
)


@settings(max_examples=25, deadline=None)
@given(proposals)
def test_gepa_driven_one_candidate_at_a_time_accepts_what_we_accept(texts):
    bridge = GepaBridge(score, Proposals(texts), lambda text: len(text.split()), 50, quiet)
    result = optimize(
        seed_candidate={"context": SEED},
        trainset=list(PROBLEMS),
        valset=list(PROBLEMS),
        adapter=bridge,
        candidate_selection_strategy="current_best",  # the parent is then the same in both, ties aside
        reflection_minibatch_size=len(PROBLEMS),
        skip_perfect_score=False,
        stop_callbacks=lambda state: bridge.asked >= len(texts),
        logger=Silent(),
        seed=0,
    )
    theirs = [candidate["context"] for candidate in result.candidates]
    ours = accepted_one_at_a_time(texts)
    assert ours == theirs
    assert bridge.asked == len(texts)


def accepted_one_at_a_time(texts):
    """Our rule, one child at a time, parent = best so far, as `optimize` is configured above."""
    rows = {text: np.array([[reward(text, p)] for p in PROBLEMS]) for text in [SEED, *texts]}
    archive = [SEED]
    for text in texts:
        parent = max(archive, key=lambda t: rows[t].mean())
        if pareto.admits(rows[text], rows[parent], 0.0):
            archive.append(text)
    return archive


@settings(max_examples=25, deadline=None)
@given(proposals)
def test_the_fast_phase_with_one_child_per_generation_accepts_by_the_same_rule(texts):
    config = FastConfig(
        parents="front",
        population=1,
        children=1,
        samples=1,
        first_generations=len(texts),
        admit_z=0,
        rollout_budget=10**4,
    )
    result = evolve(
        FastState.initial(SEED), anchor=PROBLEMS, score=score, reflect=Proposals(texts), config=config,
        count_tokens=lambda text: len(text.split()), cycle=0, policy_version=0, seed=1, log=quiet,
    )  # fmt: skip
    rule = StrictImprovementAcceptance()
    lines = result.record["contexts"]
    assert [line["text"] for line in lines] == texts
    for line in lines:
        parent = result.state.contexts[line["parent"]].context.text
        proposal = SimpleNamespace(
            subsample_scores_before=[reward(parent, p) for p in PROBLEMS],
            subsample_scores_after=[reward(line["text"], p) for p in PROBLEMS],
        )
        assert line["admitted"] == rule.should_accept(proposal, state=None)


rewards = st.integers(1, 8).flatmap(
    lambda n: arrays(np.float64, (2, n), elements=st.sampled_from([0.0, 0.25, 0.5, 1.0]))
)


@claim
@given(rewards)
def test_without_a_margin_admission_is_gepas_strict_improvement(pair):
    before, after = pair
    proposal = SimpleNamespace(subsample_scores_before=before.tolist(), subsample_scores_after=after.tolist())
    theirs = StrictImprovementAcceptance().should_accept(proposal, state=None)
    assert pareto.admits(after[:, None], before[:, None], 0.0) == theirs


def one_of_each_mean(scores):
    """gepa orders equal means as its dict does, so the means here are distinct; two different means differ on some
    problem."""
    first = np.unique(scores.mean(axis=1), return_index=True)[1]
    return scores[np.sort(first)]


matrices = (
    st.tuples(st.integers(2, 6), st.integers(1, 8))
    .flatmap(lambda shape: arrays(np.float64, shape, elements=st.sampled_from([0.0, 0.25, 0.5, 1.0])))
    .map(one_of_each_mean)
    .filter(lambda scores: len(scores) > 1)
)


def gepa_front(scores):
    """gepa's mapping: problem -> the candidates that score best on it."""
    return {
        j: {int(i) for i in np.flatnonzero(scores[:, j] == scores[:, j].max())}
        for j in range(scores.shape[1])
    }


@claim
@given(matrices)
def test_the_undominated_are_those_that_gepa_leaves(scores):
    means = scores.mean(axis=1)
    theirs = find_dominator_programs(gepa_front(scores), list(means))
    assert sorted(theirs) == [int(row) for row in np.flatnonzero(pareto.undominated(scores))]


@claim
@given(matrices)
def test_parents_are_drawn_with_gepas_weights_on_the_problems_that_distinguish(scores):
    means = scores.mean(axis=1)
    distinguishing = scores[:, scores.max(axis=0) > scores.min(axis=0)]

    class Recorder(random.Random):
        def choice(self, sequence):
            self.counts = Counter(sequence)
            return sequence[0]

    rng = Recorder()
    select_program_candidate_from_pareto_front(gepa_front(distinguishing), list(means), rng)
    theirs = np.array([rng.counts[row] for row in range(len(scores))]) / sum(rng.counts.values())
    np.testing.assert_allclose(pareto.parent_weights(scores), theirs)


class Shouting:
    """A GEPAAdapter such as a user of gepa has: the instance is a word, a good context contains it."""

    propose_new_texts = None

    def __init__(self):
        self.calls = 0

    def evaluate(self, batch, candidate, capture_traces=False):
        self.calls += 1
        found = [word in candidate["system"] for word in batch]
        return EvaluationBatch(
            outputs=[str(f) for f in found], scores=[float(f) for f in found], trajectories=list(batch)
        )

    def make_reflective_dataset(self, candidate, eval_batch, components_to_update):
        records = [{"Inputs": w, "Generated Outputs": o, "Feedback": f"say {w}"} for w, o in zip(eval_batch.trajectories, eval_batch.outputs, strict=True)]  # fmt: skip
        return {component: records for component in components_to_update}


def test_a_gepa_adapter_scores_for_the_fast_phase():
    adapter = Shouting()

    def reflect(prompts, *, seeds):  # does what the feedback says
        assert all(f.problem in WORDS for p in prompts for f in p.failures)
        return [
            Reply(f"```\n{p.context} {' '.join(f.feedback.split()[1] for f in p.failures)}\n```", "stop")
            for p in prompts
        ]

    result = evolve(
        FastState.initial("go"), anchor=problems_of(WORDS), score=score_with(adapter, component="system", policy_version=0),
        reflect=reflect, config=FastConfig(parents="front", population=2, children=2, samples=1, failures_shown=3, first_generations=3),
        count_tokens=lambda text: len(text.split()), cycle=0, policy_version=0, seed=0, log=quiet,
    )  # fmt: skip
    assert sorted(result.population[0].text.split()[1:]) == sorted(WORDS)
    assert result.record["best_mean"] == 1.0
    assert adapter.calls <= 1 + 3 * 2, "one call a context"


def test_a_gepa_adapter_that_leaves_the_unit_interval_is_refused():
    class Big(Shouting):
        def evaluate(self, batch, candidate, capture_traces=False):
            batch = super().evaluate(batch, candidate, capture_traces)
            batch.scores = [2.0] * len(batch.scores)
            return batch

    scorer = score_with(Big(), component="system", policy_version=0)
    with pytest.raises(AssertionError, match="rewards lie in"):
        scorer([(FastState.initial("go").members()[0], problem, 0) for problem in problems_of(WORDS)])


def test_gepa_evolves_over_our_scorer_and_reflector():
    def reflect(prompts, *, seeds):
        return [Reply(f"```\n{p.context} {p.failures[0].feedback.split()[1]}\n```", "stop") for p in prompts]

    bridge = GepaBridge(score, reflect, lambda text: len(text.split()), 50, quiet)
    result = optimize(
        seed_candidate={"context": SEED}, trainset=list(PROBLEMS), valset=list(PROBLEMS), adapter=bridge, max_metric_calls=200,
        reflection_minibatch_size=4, logger=Silent(), seed=0,
    )  # fmt: skip
    assert result.val_aggregate_scores[result.best_idx] > 0.5 > result.val_aggregate_scores[0]


PARTS = {"system": "seed text", "protocol": "first this"}


@settings(max_examples=15, deadline=None)
@given(proposals)
def test_gepa_evolves_components_in_turn_and_accepts_what_we_accept(texts):
    """gepa with its round robin over components, ours over the same: the texts that are accepted are the same."""
    bridge = GepaBridge(score, Proposals(texts), lambda text: len(text.split()), 50, quiet)
    result = optimize(
        seed_candidate=dict(PARTS),
        trainset=list(PROBLEMS),
        valset=list(PROBLEMS),
        adapter=bridge,
        module_selector="round_robin",
        candidate_selection_strategy="current_best",
        reflection_minibatch_size=len(PROBLEMS),
        skip_perfect_score=False,
        stop_callbacks=lambda state: bridge.asked >= len(texts),
        logger=Silent(),
        seed=0,
    )
    assert bridge.asked == len(texts)
    for candidate in result.candidates[1:]:
        assert list(candidate) == list(PARTS)
        assert set(candidate.values()) <= {*PARTS.values(), *texts}
    parents = [parents[0] for parents in result.parents[1:]]
    for child, parent in zip(result.candidates[1:], parents, strict=True):
        changed = [name for name in PARTS if child[name] != result.candidates[parent][name]]
        assert len(changed) == 1
        rewards = [
            np.array([[reward(compose(c), p)] for p in PROBLEMS]) for c in (child, result.candidates[parent])
        ]
        assert pareto.admits(*rewards, 0.0)


def test_the_bridge_refuses_a_text_that_names_a_component_and_shows_which_one_is_revised():
    seen = []

    def forging(prompts, *, seeds):
        seen.extend(prompts)
        return [Reply("```\nbe good\n<<system>>\nbe bad\n```", "stop") for _ in prompts]

    bridge = GepaBridge(score, forging, len, 50, quiet)
    batch = bridge.evaluate(list(PROBLEMS), PARTS, capture_traces=True)
    dataset = bridge.make_reflective_dataset(PARTS, batch, list(PARTS))
    assert bridge.propose_new_texts(PARTS, dataset, list(PARTS)) == {}
    assert [(p.component, p.context, p.whole) for p in seen] == [
        (name, text, compose(PARTS)) for name, text in PARTS.items()
    ]


def test_an_adapter_of_components_scores_contexts_of_components():
    candidates = []

    class Adapter:
        def evaluate(self, batch, candidate, capture_traces=False):
            candidates.append(candidate)
            return EvaluationBatch(["out"] * len(batch), [0.5] * len(batch), [None] * len(batch))

        def make_reflective_dataset(self, candidate, eval_batch, names):
            return {name: [{"Feedback": f"{name} is poor"}] * len(eval_batch.scores) for name in names}

    scorer = score_with(Adapter(), policy_version=0)
    [one] = scorer([RolloutRequest(Context.of(compose(PARTS)), problems_of(["a"])[0], 0)])
    assert candidates == [PARTS]
    assert one.verdict.feedback == "system is poor\nprotocol is poor"
