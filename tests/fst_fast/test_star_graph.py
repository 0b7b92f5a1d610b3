"""The star graph task: what the generator guarantees, and that a wrong path gets 0 with feedback that says what is
wrong.
"""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fst_fast.contracts import Problem, Task
from fst_fast.errors import UserError
from fst_fast.tasks.star_graph import StarGraph, draw_graph, judge

sizes = st.tuples(st.integers(2, 8), st.integers(2, 8), st.integers(0, 30), st.integers(0, 2**32 - 1))


@given(sizes)
def test_a_drawn_graph_is_a_star_of_equal_arms_with_distinct_nodes(size: tuple[int, int, int, int]) -> None:
    arms, path, spare, seed = size
    ids = 1 + arms * (path - 1) + spare
    graph = draw_graph(np.random.default_rng(seed), arms=arms, path=path, ids=ids)
    nodes = {v for _, v in graph.edges} | {graph.path[0]}
    assert len(graph.chains) == arms
    assert all(len(c) == path and c[0] == graph.path[0] for c in graph.chains)
    assert len(nodes) == 1 + arms * (path - 1)
    assert nodes <= set(range(ids))
    assert len(graph.edges) == arms * (path - 1) == len(set(graph.edges))
    assert sum(u == graph.path[0] for u, _ in graph.edges) == arms
    for chain in graph.chains:
        assert set(itertools.pairwise(chain)) <= set(graph.edges)


def test_every_node_of_the_range_can_be_start_and_goal() -> None:
    graphs = [draw_graph(np.random.default_rng(i), arms=2, path=3, ids=6) for i in range(200)]
    assert {g.path[0] for g in graphs} == {g.path[-1] for g in graphs} == set(range(6))


@settings(max_examples=20)
@given(sizes)
def test_the_gold_path_gets_one_and_a_perturbed_path_gets_zero(size: tuple[int, int, int, int]) -> None:
    arms, path, spare, seed = size
    task = StarGraph(
        "paper", arms, path, 40 + 1 + arms * (path - 1) + spare, train=4, validation=1, seed=seed
    )
    rng = np.random.default_rng(seed)
    for problem in task.problems("train"):
        assert task.verify(problem, task.gold(problem)).reward == 1.0
        other = list(problem.answer)
        other[int(rng.integers(path))] = 10**6
        assert task.verify(problem, box(other)).reward == 0.0


def test_the_paper_form_has_the_paper_numbers() -> None:
    problem = StarGraph().problems("train")[0]
    assert len(problem.meta["edges"]) == 25 * 19
    assert len(problem.answer) == 20
    assert max(max(e) for e in problem.meta["edges"]) < 500
    text = problem.messages[0]["content"]
    assert " ".join(f"{u},{v}" for u, v in problem.meta["edges"]) in text
    assert f"from node {problem.answer[0]} to node {problem.answer[-1]}" in text
    assert "\\boxed{}" in text
    assert [len(StarGraph().problems(s)) for s in ("train", "validation")] == [2000, 256]


def test_the_shuffled_edges_do_not_give_the_gold_path_away() -> None:
    task = StarGraph("mini", 5, 4, 40)
    first = [p.meta["edges"].index([p.answer[0], p.answer[1]]) for p in task.problems("train")[:300]]
    assert abs(np.mean(first) - 7) < 1.0
    assert set(first) == set(range(15))


def test_splits_are_disjoint_and_no_graph_repeats_even_where_graphs_are_few() -> None:
    task = StarGraph("mini", arms=2, path=2, ids=6, train=70, validation=40)  # 6 x 5 x 4 = 120 graphs in all
    problems = [*task.problems("train"), *task.problems("validation")]
    graphs = {(tuple(p.answer), frozenset(map(tuple, p.meta["edges"]))) for p in problems}
    assert len(graphs) == 110
    assert len({p.id for p in problems}) == 110


def test_a_space_with_too_few_graphs_is_refused() -> None:
    with pytest.raises(UserError, match="too few different problems for number 80 of the train split"):
        StarGraph("mini", arms=2, path=2, ids=6, train=90, validation=40).problems("train")


def test_problems_depend_on_seed_split_and_index_only() -> None:
    def texts(seed: int, split: str) -> list[str]:
        return [p.messages[0]["content"] for p in StarGraph("mini", 5, 4, 40, 20, 20, seed).problems(split)]

    assert texts(0, "train") == texts(0, "train")
    assert not set(texts(0, "train")) & set(texts(1, "train"))
    assert not set(texts(0, "train")) & set(texts(0, "validation"))
    few, many = (StarGraph("mini", 5, 4, 40, 20, n).problems("train")[5] for n in (1, 20))
    assert few == many  # the other split's size plays no part
    split = StarGraph("mini", 5, 4, 40, 20, 20).problems("train")
    assert split[7] == list(split)[7] == split[-13] == split[5:9][2]
    with pytest.raises(IndexError):
        split[20]


def test_the_task_keeps_the_contract_and_travels_to_other_processes() -> None:
    task = StarGraph("mini", 5, 4, 40)
    assert isinstance(task, Task)
    problem = task.problems("validation")[3]
    again: StarGraph = pickle.loads(pickle.dumps(task))
    assert again.verify(pickle.loads(pickle.dumps(problem)), task.gold(problem)).reward == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": 475}, "ids=475 is too small for arms=25, path=20.*= 476"),
        ({"form": "mini"}, "ids=500 with form=mini"),
        ({"form": "maxi"}, "form='maxi'.*paper and mini"),
        ({"arms": 1}, "arms=1 must be a whole number of at least 2"),
        ({"path": 2.5}, "path=2.5 must be a whole number"),
        ({"train": 0}, "train=0 must be"),
    ],
)
def test_impossible_numbers_are_refused_by_name(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        StarGraph(**arguments)  # type: ignore[arg-type]


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(UserError, match="no split 'test'"):
        StarGraph("mini", 5, 4, 40).problems("test")


GOLD = (3, 7, 12, 9)
EDGES = {(3, 7), (7, 12), (12, 9), (3, 1), (1, 2), (2, 5)}


def box(nodes: list[int] | tuple[int, ...]) -> str:
    return "\\boxed{" + ", ".join(map(str, nodes)) + "}"


@pytest.mark.parametrize(
    ("response", "feedback"),
    [
        ("3,7,12,9", "no \\boxed{}"),
        ("\\boxed{3,7,12,9", "not closed"),
        ("\\boxed{ }", "empty"),
        ("\\boxed{3 to 9}", "must hold numbers separated by commas, but it holds 'to'"),
        ("\\boxed{3,7,,9}", "numbers separated by commas"),
        ("\\boxed{" + "9" * 5000 + "}", "numbers separated by commas"),
        (box((9, 12, 7, 3)), "reversed: it must go from the start 3 to the goal 9"),
        (box((9,)), "the goal 9 only"),
        (box((7, 12, 9)), "begins at 7, which is not the start 3"),
        (box((3, 12, 9)), "3,12 does not exist: the path skips 7"),
        (box((3, 9)), "3,9 does not exist: the path skips 7, 12"),
        (box((3, 2, 5)), "3,2 does not exist: the path skips 1"),
        (box((3, 7, 5, 9)), "the edge 7,5 does not exist."),
        (box((3, 7, 12, 9, 9)), "the edge 9,9 does not exist."),
        (box((3, 7)), "stops at 7 before it reaches the goal 9"),
        (
            box((3, 1, 2, 5)),
            "ends at 5, which is not the goal 9: the wrong arm was taken at the first step, from 3 to 1",
        ),
        (box(GOLD) + " no, " + box((3, 1)), "wrong arm"),
    ],
)
def test_feedback_names_what_is_wrong(response: str, feedback: str) -> None:
    verdict = judge(GOLD, EDGES, response)
    assert verdict.reward == 0.0
    assert feedback in verdict.feedback


@pytest.mark.parametrize(
    "response",
    [
        "\\boxed{3,7,12,9}",
        "so \\boxed{ 3 , 7 , 12 , 9 } .",
        "\\boxed {3 7 12 9}",
        box((3, 1)) + box(GOLD),
        "\\boxed{\n3,\n7,12,9}",
    ],
)
def test_white_space_and_earlier_boxes_do_not_matter(response: str) -> None:
    verdict = judge(GOLD, EDGES, response)
    assert (verdict.reward, verdict.feedback) == (1.0, "right.")


def test_metrics_tell_boxed_from_walk_from_goal() -> None:
    def metrics(response: str) -> tuple[float, ...]:
        return tuple(judge(GOLD, EDGES, response).metrics.values())

    assert metrics("3,7,12,9") == (0, 0, 0)
    assert metrics(box((3, 12, 9))) == (1, 0, 0)
    assert metrics(box((3, 1, 2, 5))) == (1, 1, 0)
    assert metrics(box(GOLD)) == (1, 1, 1)


def test_the_problem_is_a_plain_record() -> None:
    problem = StarGraph("mini", 5, 4, 40).problems("train")[0]
    assert isinstance(problem, Problem)
    assert [m["role"] for m in problem.messages] == ["user"]
    assert (problem.meta["start"], problem.meta["goal"]) == (problem.answer[0], problem.answer[-1])


@pytest.mark.parametrize(
    ("response", "reward", "feedback"),
    [
        (box((9, 12, 7, 3)), 1.0, "right."),
        (box(GOLD), 0.0, "reversed: it must go from the goal 9 to the start 3"),
        (box((3, 1, 2, 5)), 0.0, "reversed: it must go from the goal 9 to the start 3"),
        (box((9, 12, 7)), 0.0, "ends at 7, which is not the start 3"),
        (box((9, 7, 3)), 0.0, "7,9 does not exist: the path skips 12"),
        (box((5, 2, 1, 3)), 0.0, "ends at 5, which is not the goal 9"),
        (box((9,)), 0.0, "the goal 9 only"),
    ],
)
def test_backward_the_path_goes_from_the_goal_to_the_start(
    response: str, reward: float, feedback: str
) -> None:
    verdict = judge(GOLD[::-1], EDGES, response, backward=True)
    assert verdict.reward == reward
    assert feedback in verdict.feedback


def test_the_order_changes_the_answer_and_not_the_question() -> None:
    forward, backward = (StarGraph("mini", 5, 4, 40, order=order) for order in ("forward", "backward"))
    a, b = (task.problems("train")[3] for task in (forward, backward))
    assert a.messages == b.messages
    assert a.answer == b.answer[::-1]
    assert backward.verify(b, backward.gold(b)).reward == forward.verify(a, forward.gold(a)).reward == 1
    assert backward.verify(b, forward.gold(a)).reward == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            {"form": "mini", "arms": 5, "path": 4, "ids": 40, "order": "both"},
            "allowed are forward and backward",
        ),
        ({"order": "backward"}, "needs form=mini"),
    ],
)
def test_an_order_that_is_not_there_is_refused(args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        StarGraph(**args)
