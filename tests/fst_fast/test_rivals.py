"""The rivals of the fast phase, each against its paper's code or a plain computation: TrueSkill ratings, E-SPL, GEPA's own loop, contexts by hand."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from gepa import optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from fst_fast.config import Config, FastConfig
from fst_fast.contracts import Context
from fst_fast.errors import UserError
from fst_fast.experiments import rivals
from fst_fast.experiments.runner import Runner
from fst_fast.experiments.runs import FAMILIES, FULL, QUICK, Run
from fst_fast.fast import e_spl, pareto, plain_gepa
from fst_fast.fast.gepa_adapter import GepaBridge
from fst_fast.fast.outcome import Rules
from fst_fast.fast.population import FastState
from fst_fast.fast.ratings import BETA, MARGIN, TAU, Rating, rate
from fst_fast.fast.reflection import ReflectionPrompt
from fst_fast.fast.reflectors import make_reflector
from fst_fast.mini import world
from tests.fst_fast import test_gepa_oracle as toy
from tests.fst_fast.test_evolution import SEED, Scribe, World, additive, edit, half, numbered, problems

# --- ratings


def test_a_match_of_two_gives_trueskills_published_ratings() -> None:
    won, lost = rate([Rating(), Rating()], [1.0, 0.0], tie=0.01)
    assert won == pytest.approx((29.39583, 7.17148), abs=1e-5)
    assert lost == pytest.approx((20.60417, 7.17148), abs=1e-5)
    tied = rate([Rating(), Rating()], [0.5, 0.505], tie=0.01)
    assert tied[0] == tied[1] == pytest.approx((25.0, 6.45752), abs=1e-5)


@pytest.mark.parametrize("scores", [(0.1, 0.5, 0.9), (0.5, 0.5, 0.1), (0.9, 0.2, 0.2)])
def test_a_match_of_three_gives_the_posterior_that_sampling_gives(scores: tuple[float, ...]) -> None:
    ratings = [Rating(), Rating(27, 3), Rating(22, 5)]
    rng = np.random.default_rng(0)
    strength = np.stack([rng.normal(r.mean, math.hypot(r.deviation, TAU), 400_000) for r in ratings])
    played = strength + rng.normal(0, BETA, strength.shape)
    order = sorted(range(3), key=lambda i: -scores[i])
    seen = np.ones(strength.shape[1], dtype=bool)
    for a, b in itertools.pairwise(order):
        ahead = played[a] - played[b]
        seen &= np.abs(ahead) < MARGIN if scores[a] == scores[b] else ahead > MARGIN
    for found, drawn in zip(rate(ratings, scores, tie=0.01), strength[:, seen], strict=True):
        error = drawn.std() / math.sqrt(seen.sum())
        assert found.mean == pytest.approx(drawn.mean(), abs=4 * error + 0.02)
        assert found.deviation == pytest.approx(drawn.std(), rel=0.03)


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.floats(0, 50), st.floats(0.5, 9), st.sampled_from([0.0, 0.2, 0.4, 0.6, 1.0])),
        min_size=1,
        max_size=8,
    )
)
def test_ratings_stay_finite_and_grow_surer_and_do_not_depend_on_the_order_of_the_players(
    players: list[tuple[float, float, float]],
) -> None:
    ratings, scores = [Rating(m, d) for m, d, _ in players], [s for *_, s in players]
    found = rate(ratings, scores, tie=0.01)
    for before, after in zip(ratings, found, strict=True):
        assert math.isfinite(after.mean)
        assert 0 < after.deviation <= math.hypot(before.deviation, TAU) + 1e-9
    if len(set(scores)) == len(scores):
        backwards = rate(ratings[::-1], scores[::-1], tie=0.01)[::-1]
        assert np.allclose(found, backwards, atol=1e-5)


# --- E-SPL


def test_lucb_takes_the_champion_the_most_uncertain_and_always_the_latest() -> None:
    ratings = [Rating(30, 1), Rating(20, 8), Rating(25, 2), Rating(26, 4), Rating(10, 1)]
    # lower bounds 28 4 21 18 8; upper bounds 32 36 29 34 12
    assert e_spl.chosen(ratings, 4) == [0, 1, 3, 4]
    assert e_spl.chosen(ratings, 2) == [0, 4]
    assert e_spl.chosen(ratings, 1) == [0], "the champion is not replaced"
    assert e_spl.chosen(ratings[:2], 4) == [0, 1, 1, 1]


def test_a_child_inherits_its_rating_and_is_less_certain() -> None:
    assert e_spl.mutated(Rating(30, 3)) == (30, pytest.approx(math.sqrt(10)))
    mean, deviation = e_spl.crossed([Rating(30, 1), Rating(20, 2)])
    assert mean == pytest.approx((30 + 20 / 4) / (1 + 1 / 4))
    assert deviation == pytest.approx(math.sqrt(1 / 1.25 + 1))


def rated(state, world, reflect, config, *, step):
    """One step of E-SPL on a toy world: every context of the population gets the same problems."""
    anchor, members = problems(8), state.population_of(config.population)
    seen, requests = {}, []
    for problem in anchor:
        for context in members:
            sample = seen[problem.id, context.id] = seen.get((problem.id, context.id), -1) + 1
            requests.append((context, problem, sample))
    return e_spl.evolve(
        state,
        world(requests),
        anchor,
        reflect=reflect,
        config=config,
        rules=Rules(lambda text: len(text.split()), config.max_context_tokens),
        cycle=step,
        policy_version=world.version,
        seed=0,
        log=lambda line: None,
    )


def test_e_spl_mutates_the_best_of_a_step_samples_nothing_and_can_be_resumed() -> None:
    config = FastConfig(population=3, evolver="e_spl")
    state, texts = FastState.initial(SEED), []
    for step in range(12):
        world_ = World(additive, version=step)
        result = rated(state, world_, scribe := Scribe(edit), config, step=step)
        again = rated(
            FastState.from_json(state.to_json()),
            World(additive, version=step),
            Scribe(edit),
            config,
            step=step,
        )
        assert again.record == result.record
        assert again.state == result.state
        assert result.sampled == []
        assert result.record["fast_rollouts"] == 0
        assert len(result.population) == 3
        [prompt] = scribe.batches[0][0]
        means = {c.id: result.state.contexts[c.id].mean for c in state.members()}
        assert means[Context.of(prompt.context).id] == max(means.values())
        if result.record["contexts"]:
            born = result.record["contexts"][0]["id"]
            assert born in result.state.population, "the latest plays in the next step"
            texts.append(born)
        state = result.state
        assert len(state.ratings) <= e_spl.RECENT
    best = max(state.ratings, key=lambda c: state.ratings[c].mean)
    assert additive(state.contexts[best].context.text, None) > additive(SEED, None)
    assert state.evaluated(result.population) == [result.population[0]], "evaluations use the champion"


def test_e_spl_recombines_contexts_that_solve_different_problems() -> None:
    config = FastConfig(population=2, evolver="e_spl", crossover=1.0)
    odd, even = Context.of("odd"), Context.of("even")

    state = FastState.initial(SEED)
    lines = {c.id: replace(state.contexts[state.seed_id], context=c) for c in (odd, even)}
    ratings = {odd.id: Rating(30, 1), even.id: Rating(20, 2)}
    state = replace(
        state, population=(odd.id, even.id), contexts={**state.contexts, **lines}, ratings=ratings
    )

    # odd solves all but p0; even solves p0 among others, and nothing that odd does not solve but p0
    def scored(text, problem):
        return (
            1.0
            if (text == "odd" and problem.answer) or (text == "even" and problem.answer in (0, 2))
            else 0.0
        )

    scribe = Scribe(
        lambda prompt, seed: f"{prompt.context} and {prompt.partners[0].text}" if prompt.partners else "new"
    )
    result = rated(state, World(scored), scribe, config, step=3)
    crossover, mutation = scribe.batches[0][0]
    assert [p.text for p in crossover.partners] == ["even"]
    assert crossover.partners[0].problems == ["problem number 0"]
    assert "problem number 3" in crossover.solved
    assert not mutation.partners
    after = rate([Rating(30, 1), Rating(20, 2)], [7 / 8, 2 / 8], tie=e_spl.TIE)
    child = Context.of("odd and even").id
    assert result.state.ratings[child] == e_spl.crossed(after)
    assert result.state.ratings[Context.of("new").id] == e_spl.mutated(after[0])
    quiet = rated(
        state, World(scored), Scribe(lambda p, s: "x"), FastConfig(population=2, evolver="e_spl"), step=3
    )
    assert quiet.record["proposed"] == 1, "without crossover only the mutation is asked for"


def test_a_step_that_nobody_could_judge_leaves_ratings_as_they_were() -> None:
    config = FastConfig(population=2, evolver="e_spl")
    result = rated(FastState.initial(SEED), World(lambda text, problem: None), numbered(), config, step=0)
    assert result.record["proposed"] == 0
    assert result.state.ratings == {FastState.initial(SEED).seed_id: Rating()}


# --- GEPA's own loop


@settings(max_examples=25)
@given(toy.proposals)
def test_plain_gepa_accepts_and_spends_what_gepa_does(texts: list[str]) -> None:
    whole = len(toy.PROBLEMS)
    bridge = GepaBridge(toy.score, toy.Proposals(texts), lambda text: len(text.split()), 50, toy.quiet)
    theirs = optimize(
        seed_candidate={"context": toy.SEED},
        trainset=list(toy.PROBLEMS),
        valset=list(toy.PROBLEMS),
        adapter=bridge,
        candidate_selection_strategy="current_best",
        reflection_minibatch_size=whole,
        skip_perfect_score=False,
        stop_callbacks=lambda state: bridge.asked >= len(texts),
        logger=toy.Silent(),
        seed=0,
    )
    config = FastConfig(
        population=1, samples=1, evolver="gepa", failures_shown=whole, max_context_tokens=50,
        rollout_budget=theirs.total_metric_calls + 2 * whole,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:  # the best so far is the parent, as asked of gepa above
        patch.setattr(
            pareto, "parent_weights", lambda scores: np.eye(len(scores))[np.argmax(pareto.row_means(scores))]
        )
        ours = plain_gepa.evolve(
            FastState.initial(toy.SEED), anchor=toy.PROBLEMS, score=toy.score, reflect=toy.Proposals(texts), config=config,
            count_tokens=lambda text: len(text.split()), cycle=0, policy_version=0, seed=1, log=toy.quiet,
        )  # fmt: skip
    admitted = [line["text"] for line in ours.record["contexts"] if line["admitted"]]
    assert [toy.SEED, *admitted] == [candidate["context"] for candidate in theirs.candidates]
    asked_for_nothing = (
        ours.record["refused"].get("unfenced", 0) * whole
    )  # parents sampled after the last text
    assert ours.record["fast_rollouts"] - asked_for_nothing == theirs.total_metric_calls
    best = max(theirs.candidates, key=lambda c: np.mean([toy.reward(c["context"], p) for p in toy.PROBLEMS]))
    mean = {
        t: np.mean([toy.reward(t, p) for p in toy.PROBLEMS])
        for t in (best["context"], ours.population[0].text)
    }
    assert len(set(mean.values())) == 1, "the best is kept"


@settings(max_examples=40)
@given(
    budget=st.integers(0, 200), population=st.integers(1, 4), samples=st.integers(1, 2), seed=st.integers(0, 9),
    quality=st.sampled_from([0.0, 0.5, 1.0, None]),
)  # fmt: skip
def test_plain_gepa_holds_its_budget_gives_k_contexts_and_repeats_itself(
    budget, population, samples, seed, quality
):
    config = FastConfig(population=population, samples=samples, evolver="gepa", rollout_budget=budget)

    def once():
        world_ = World(lambda text, problem: quality, seed=seed)
        result = plain_gepa.evolve(
            FastState.initial(SEED), anchor=problems(8), score=world_, reflect=numbered(), config=config,
            count_tokens=lambda text: len(text.split()), cycle=0, policy_version=0, seed=seed, log=lambda line: None,
        )  # fmt: skip
        assert world_.rollouts == result.record["fast_rollouts"] <= budget
        assert len(result.population) == population
        record = result.record
        assert record["proposed"] == sum(record["refused"].values()) + len(record["contexts"])
        return record, result.state

    assert once() == once()


def test_plain_gepa_counts_what_could_not_be_judged_neither_as_a_failure_nor_as_0() -> None:
    """Every child is as its parent, but for problems on which the seed context could not be judged."""

    def quality(text, problem):
        return None if text == SEED and problem.answer % 2 else float(problem.answer != 0)

    scribe = numbered()
    result = plain_gepa.evolve(
        FastState.initial(SEED), anchor=problems(6), score=World(quality), reflect=scribe,
        config=FastConfig(evolver="gepa", samples=1, rollout_budget=300), count_tokens=len, cycle=0, policy_version=0, seed=0,
        log=lambda line: None,
    )  # fmt: skip
    assert result.record["contexts"]
    assert result.record["admitted"] == 0
    shown = [failure for batch, _ in scribe.batches for prompt in batch for failure in prompt.failures]
    assert {(failure.problem, failure.reward) for failure in shown} == {("problem number 0", 0.0)}


def test_plain_gepa_has_no_defence_against_noise_which_waves_have() -> None:
    config = FastConfig(evolver="gepa", samples=1, rollout_budget=960)
    result = plain_gepa.evolve(
        FastState.initial(SEED), anchor=problems(32), score=World(half), reflect=numbered(), config=config,
        count_tokens=lambda text: len(text.split()), cycle=0, policy_version=0, seed=0, log=lambda line: None,
    )  # fmt: skip
    assert result.record["admitted"] / len(result.record["contexts"]) > 0.2, "of children that change nothing"


# --- contexts by hand


def test_more_seeds_than_the_sign_flip_test_takes_are_refused_before_anything_is_trained(tmp_path) -> None:
    runner = Runner(tmp_path, replace(QUICK, seeds=21), ["star_graph"], 1)
    with pytest.raises(UserError, match="--seeds 21: the sign-flip test of rivals takes at most 20"):
        rivals.rivals(runner)
    assert not list(tmp_path.iterdir())


def test_given_contexts_are_proposed_in_order_whatever_they_hold() -> None:
    texts = ["first .", "second with ``` fences .", "third ."]
    reflect = make_reflector("given", {"contexts": texts}, generate=None)
    prompts = [ReflectionPrompt(SEED, [])] * 4
    rules = Rules(lambda text: len(text.split()), 50)
    found = [rules.extract(reply, known_texts=[]) for reply in reflect(prompts, seeds=[0] * 4)]
    assert found == [*texts, texts[0]]


@pytest.mark.parametrize(
    "args",
    [{}, {"contexts": "one text"}, {"contexts": []}, {"contexts": [""]}, {"contexts": ["a"], "more": 1}],
)
def test_what_is_no_list_of_contexts_is_refused(args: dict) -> None:
    with pytest.raises(UserError, match="contexts"):
        make_reflector("given", args, generate=None)


# --- the configuration and the arms


@pytest.mark.parametrize(
    ("tree", "said"),
    [
        ({"method": "gepa", "fast": {"phases": "first"}}, "fast.phases=first needs slow steps"),
        ({"method": "gepa", "fast": {"evolver": "e_spl"}}, "fast.evolver=e_spl needs slow steps"),
        ({"fast": {"phases": "first", "evolver": "e_spl"}}, "does not go with fast.evolver=e_spl"),
        ({"fast": {"phases": "first_and_last"}, "slow": {"distill_steps": 3}}, "slow.distill_steps=3"),
        ({"fast": {"evolver": "gepa", "rungs": 2}}, "fast.rungs=2 has no effect with fast.evolver=gepa"),
        ({"fast": {"evolver": "e_spl", "keep_seed": True}}, "fast.keep_seed=True has no effect"),
        ({"fast": {"keep_seed": True, "population": 1}}, "fast.population=1; at least 2"),
        ({"fast": {"rungs": 2, "proposals": 8}}, "set one of the two"),
        ({"fast": {"proposals": 20}}, "fast.proposals=20 has no effect with fast.parents=thompson"),
        ({"fast": {"search_budget": 10}}, "fast.search_budget=10 is below fast.rollout_budget=960"),
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_together_are_refused(tree: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Config.model_validate(tree)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_arm_is_a_configuration_and_gets_the_best_context_only_where_it_says_so(family) -> None:
    best = world.best_context(family)
    for budget in (FULL, QUICK):
        for name, (method, changes) in rivals.arms(family, budget, {"slow.lr": 1e-3}).items():
            config = Run(family, method, 0, changes).config(budget, None)
            assert (best in str(config.model_dump())) == (name == rivals.CEILING)
            assert config.slow.problems_per_step * config.slow.group_size == 128
