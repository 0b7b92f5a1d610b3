"""Token in, token out over turns: observations are the template's own pieces, nothing sampled is tokenised again, and the loss of an
episode is that of a plain computation on its sampled tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import fst_fast.mini
from fst_fast import distributed
from fst_fast.config import Config
from fst_fast.contracts import Context, Problem, Rollout, ScoredRollout, Turn, Verdict
from fst_fast.errors import UserError
from fst_fast.policy import trained
from fst_fast.policy.scoring import Batching
from fst_fast.policy.trained import TrainedPolicy
from fst_fast.rollout.prompt import Chat, messages_with_context
from fst_fast.rollout.prompt_tree import common
from fst_fast.rollout.turns import leaves_of, observation_ids, rendered_ids, rewritten_turns
from fst_fast.slow.groups import make_groups
from fst_fast.slow.slow_phase import objective_of
from fst_fast.slow.update import Reference, micro_jobs, sequences
from fst_fast.state import scored_from_json, scored_to_json
from tests.fst_fast.agents import TEMPLATES, save_model, tokenizer_of
from tests.fst_fast.families import FAMILIES, make

CHATS = {name: Chat.of(tokenizer_of(name)) for name in TEMPLATES}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}]
OPENING = messages_with_context(
    Context.of("Be brief."), Problem("p", [{"role": "user", "content": "Go."}], None)
)


def text() -> st.SearchStrategy[str]:
    words = [w for chat in CHATS.values() for w in chat.special.words.values()]
    plain = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Co"]), max_size=12)
    return st.lists(plain | st.sampled_from(words), max_size=4).map("".join)


CONVERSATION = st.lists(
    st.tuples(text(), st.lists(st.tuples(st.sampled_from(["user", "tool"]), text()), min_size=1, max_size=3)),
    min_size=1,
    max_size=4,
)


def over_turns(chat: Chat, conversation: Any) -> tuple[np.ndarray[Any, Any], list[Any]]:
    """The ids of a conversation, appended turn by turn; its messages behind the opening."""
    ids = np.asarray(chat.ids(OPENING, TOOLS), np.int64)
    said = []
    for response, observation in conversation:
        own = [*chat.special.encode_text(response), chat.tokenizer.eos_token_id]
        messages = [{"role": role, "content": content} for role, content in observation]
        ids = np.concatenate([ids, own, observation_ids(chat, OPENING, messages, TOOLS, own[-1])])
        said += [{"role": "assistant", "content": response}, *messages]
    return ids, said


@pytest.mark.parametrize("name", ["qwen", "llama"])
@given(conversation=CONVERSATION)
@settings(max_examples=60)
def test_an_episode_has_the_ids_of_the_conversation_rendered_as_a_whole(name: str, conversation: Any) -> None:
    """Where the template only appends: these do, but Llama's trims the responses in the rendering."""
    chat = CHATS[name]
    conversation = [(f"a{response}b", observation) for response, observation in conversation]
    ids, said = over_turns(chat, conversation)
    assert ids.tolist() == chat.ids([*OPENING, *said], TOOLS)


def test_the_end_of_a_response_stands_once_where_the_template_writes_a_blank_before_it() -> None:
    """As the mini world's template does; its tokenizer makes no token of the blank."""
    chat = Chat.of(AutoTokenizer.from_pretrained(fst_fast.mini.path()), system="system")
    end = chat.tokenizer.eos_token_id
    opening = [{"role": "user", "content": "path from 1 to 2 ?"}]
    own = [*chat.special.encode_text("7"), end]
    observation = [{"role": "user", "content": "again ."}]
    ids = [*chat.ids(opening), *own, *observation_ids(chat, opening, observation, (), end).tolist()]
    said = [*opening, {"role": "assistant", "content": "7"}, *observation]
    assert ids == chat.ids(said)
    cut = observation_ids(chat, opening, observation, (), own[0]).tolist()
    assert ids == [*chat.ids(opening), own[0], *cut], "a response that was cut is ended by the template"


@given(conversation=CONVERSATION)
@settings(max_examples=30)
@example(conversation=[("<|im_end|>", [("user", "")]), ("</think>\n", [("user", "")])])
@example(conversation=[(" </think>\n <|im_end|>", [("user", "")]), ("<think></think>", [("tool", "")])])
def test_where_the_template_strips_thoughts_the_episode_keeps_them_and_split_reads_what_is_rendered(
    conversation: Any,
) -> None:
    chat = CHATS["thinks"]
    marks = [chat.tokenizer.convert_tokens_to_ids(w) for w in ("<think>", "</think>")]
    ids = np.asarray(chat.ids(OPENING, TOOLS), np.int64)
    said: list[Any] = []
    sampled = {}
    for number, (response, observation) in enumerate(conversation):
        inner, rest = (chat.special.encode_text(t) for t in (f"because {number}", f"so {response} it is"))
        own = [marks[0], *inner, marks[1], *rest, chat.tokenizer.eos_token_id]
        messages = [{"role": role, "content": content} for role, content in observation]
        ids = np.concatenate([ids, own, observation_ids(chat, OPENING, messages, TOOLS, own[-1])])
        answer = chat.tokenizer.decode(own[:-1], skip_special_tokens=False)
        sampled[len(OPENING) + len(said)] = own[:-1]
        said += [{"role": "assistant", "content": answer}, *messages]
    whole = rendered_ids(chat, [*OPENING, *said], TOOLS, sampled)
    assert ids.tolist().count(marks[1]) == len(conversation)
    assert marks[1] not in whole.tolist()
    prompt = len(chat.ids(OPENING, TOOLS))
    assert prompt <= common(ids, whole) < len(whole)


def test_a_special_token_that_the_policy_sampled_stays_one_where_the_past_is_rendered_again() -> None:
    chat = CHATS["thinks"]
    call = [chat.tokenizer.convert_tokens_to_ids(w) for w in ("<tool_call>", "</tool_call>")]
    own = [call[0], *chat.special.encode_text("{}"), call[1]]
    answer = chat.tokenizer.decode(own, skip_special_tokens=False)
    messages = [*OPENING, {"role": "assistant", "content": answer}, {"role": "tool", "content": answer}]
    sampled = rendered_ids(chat, messages, TOOLS, {len(OPENING): own}).tolist()
    assert [i for i in sampled if i in call] == [*call, *call]  # of the template's text, and of the response
    spelt = rendered_ids(chat, messages, TOOLS, {len(OPENING): chat.special.encode_text(answer)}).tolist()
    assert [i for i in spelt if i in call] == call


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_text_of_an_observation_opens_no_turn_in_any_family(name: str) -> None:
    chat = Chat.of(make(name), system="user" if name in ("gemma", "skips_system") else "system")
    opening = messages_with_context(
        Context.of("Be brief."), Problem("p", [{"role": "user", "content": "Go."}], None), chat.system
    )
    spelt = "".join(chat.special.words.values())

    def ids(content: str) -> list[int]:
        return observation_ids(chat, opening, [{"role": "user", "content": content}], (), -1).tolist()

    assert chat.special.sequence(ids(f"5{spelt}5")) == chat.special.sequence(ids("5x5"))
    assert spelt in chat.tokenizer.decode(ids(f"5{spelt}5"), skip_special_tokens=False)


@pytest.mark.parametrize(("name", "what"), [("qwen", ""), ("thinks", "its thoughts"), ("llama", "")])
def test_it_is_known_whether_the_template_rewrites_earlier_turns(name: str, what: str) -> None:
    assert rewritten_turns(CHATS[name], OPENING, TOOLS) == what


def test_a_role_that_the_template_does_not_write_is_one_sentence() -> None:
    with pytest.raises(UserError, match="leaves out a message of the role 'function'"):
        observation_ids(CHATS["qwen"], OPENING, [{"role": "function", "content": "5"}], (), -1)


def episodes(seed: int, vocabulary: int, *, rewritten: bool) -> list[ScoredRollout]:
    """Two problems with four episodes of 2 to 8 turns, off policy. rewritten: some turns keep only a part of the past."""
    rng = np.random.default_rng(seed)
    out = []
    for problem in ("p", "q"):
        prompt = rng.integers(0, vocabulary, 7)
        for sample, reward in enumerate([1.0, 0.0, 0.5, 0.0]):
            turns, length, responses = [], 0, []
            for turn in range(int(rng.integers(2, 9))):
                kept = (
                    0 if not turn else int(rng.integers(3, length)) if rewritten and turn % 3 == 2 else length
                )
                added = prompt if not turn else rng.integers(0, vocabulary, int(rng.integers(1, 5)))
                responses.append(rng.integers(0, vocabulary, int(rng.integers(1, 6))))
                turns.append(Turn(kept, added, len(responses[-1])))
                length = kept + len(added) + len(responses[-1])
            ids = np.concatenate(responses)
            behaviour = (-np.log(vocabulary) + rng.normal(size=len(ids))).astype(np.float32)
            rollout = Rollout(problem, "c", sample, ids, behaviour, "stop", 0, 1.0, tuple(turns))
            out.append(ScoredRollout(rollout, Verdict(reward), ""))
    return out


def plain_loss(config: Config, policy: Any, reference: Any, sampled: list[ScoredRollout]) -> Tensor:
    """Every turn of every episode by itself: what it read, what it sampled, whole logits, autograd."""
    slow = config.slow
    per_problem: dict[str, list[Tensor]] = {}
    for problem in ("p", "q"):
        members = [s for s in sampled if s.rollout.problem_id == problem]
        r = np.array([m.verdict.reward for m in members])
        for m, a in zip(members, (r - r.mean()) / (r.std() + slow.advantage_eps), strict=True):
            past, at, terms = np.empty(0, np.int64), 0, []
            for turn in m.rollout.turns:
                past = np.concatenate([past[: turn.kept], turn.added])
                for i in range(at, at + turn.length):  # one token at a time
                    ids = torch.tensor(past)[None]
                    logp = policy(input_ids=ids).logits[0, -1].log_softmax(-1)
                    with torch.no_grad():
                        ref = reference(input_ids=ids).logits[0, -1].log_softmax(-1)
                    token = int(m.rollout.response_ids[i])
                    rho = (logp[token] - float(m.rollout.logprobs[i])).exp()
                    d = ref[token] - logp[token]
                    kl = d.exp() - d - 1 if slow.kl == "k3" else (logp.exp() * (logp - ref)).sum()
                    entropy = -(logp.exp() * logp).sum()
                    pg = -rho.clamp(max=slow.ratio_cap).detach() * a * logp[token]
                    terms.append(pg + slow.kl_coef * kl - slow.entropy_coef * entropy)
                    past = np.append(past, token)
                at += turn.length
            per_problem.setdefault(problem, []).append(torch.stack(terms))
    if slow.aggregation == "sequence":
        return torch.stack([x.mean() for xs in per_problem.values() for x in xs]).mean()
    return torch.stack([torch.cat(xs).mean() for xs in per_problem.values()]).mean()


@pytest.fixture(scope="module", params=["qwen", "llama"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    distributed.init()
    return tuple(save_model(tmp_path_factory.mktemp(f"{request.param}{i}"), request.param, i) for i in (0, 1))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("rewritten", "kl", "aggregation", "budget"),
    [(False, "k3", "problem", 8192), (False, "reverse", "sequence", 90), (True, "k3", "problem", 8192)],
)
def test_the_gradient_of_episodes_is_that_of_a_plain_computation_as_a_forest_and_padded(
    models: tuple[Path, Path], rewritten: bool, kl: str, aggregation: str, budget: int
) -> None:
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder) for folder in models)
    sampled = episodes(1, policy.config.vocab_size, rewritten=rewritten)
    slow = {"kl": kl, "kl_coef": 0.3, "entropy_coef": 0.05, "ratio_cap": 1.5, "aggregation": aggregation}
    found = {}
    for packing, attention in (("forest", "tree"), ("padded", "sdpa")):
        config = Config.model_validate(
            {
                "model": {"path": str(models[0])},
                "rollout": {"max_prompt_tokens": 8, "max_response_tokens": 8},
                "policy": {"packing": packing, "attention": attention},
                "slow": {**slow, "max_grad_norm": 0.0, "tokens_per_micro_batch": budget},
            }
        )
        groups = make_groups(sampled, config.slow.advantage_eps)
        prompts = [[m.rollout.turns[0].added for m in g.members] for g in groups]
        data = sequences(groups, prompts, aggregation)
        trainer = TrainedPolicy(config)
        micros, jobs = micro_jobs(
            data,
            Reference(trained.load(config, models[1])),
            objective_of(config.slow),
            Batching.of(config, 0),
        )
        trainer.forward_backward(jobs)
        labels = sum(len(m.batch.labels) for m in micros)
        assert labels == sum(len(s.rollout.response_ids) for s in sampled)
        assert (len(micros) > 1) == (budget < 8192)
        found[packing] = {n: p.grad.clone() for n, p in trainer.module.named_parameters()}
    plain_loss(config, policy, reference, sampled).backward()
    for name, p in policy.named_parameters():
        assert p.grad is not None
        assert p.grad.abs().max() > 1e-4, name
        for packing, grads in found.items():
            torch.testing.assert_close(
                grads[name], p.grad, rtol=1e-5, atol=1e-5, msg=lambda m, n=(packing, name): f"{n}: {m}"
            )


def test_an_episode_is_one_sequence_and_observed_tokens_carry_no_label() -> None:
    turns = (Turn(0, np.array([1, 2]), 2), Turn(4, np.array([5, 6]), 1), Turn(3, np.array([9]), 1))
    logprobs = np.array([-1, -2, -3, -4], np.float32)
    rollout = Rollout("p", "c", 0, np.array([3, 4, 7, 8]), logprobs, "stop", 0, 1.0, turns)
    (first, values), (second, more) = leaves_of(np.empty(0, np.int64), rollout)
    assert first.prompt_ids.tolist() == [1, 2]
    assert first.response_ids.tolist() == [3, 4, 5, 6, 7]
    assert first.sampled is not None
    assert first.sampled.tolist() == [True, True, False, False, True]
    assert values.tolist() == [-1, -2, 0, 0, -3]
    assert second.prompt_ids.tolist() == [1, 2, 3, 9]  # the past up to where it was rewritten
    assert (second.response_ids.tolist(), second.sampled, more.tolist()) == ([8], None, [-4])


def test_turns_survive_a_checkpoint_and_a_task_keeps_its_record() -> None:
    [one, *_] = episodes(3, 50, rewritten=True)
    again = scored_from_json(scored_to_json(one))
    assert [(t.kept, t.added.tolist(), t.length) for t in again.rollout.turns] == [
        (t.kept, t.added.tolist(), t.length) for t in one.rollout.turns
    ]
    single = ScoredRollout(
        Rollout("p", "c", 0, np.array([1]), np.zeros(1, np.float32), "stop", 0, 1.0), Verdict(1.0), ""
    )
    assert "turns" not in scored_to_json(single)["rollout"]
