"""Reflections for small models: what they are asked, how their replies are read, and that the edits of a run come back as examples."""

from __future__ import annotations

from fst_fast.fast.reflection import Failure, Lesson, ReflectionPrompt, Refusal, Reply, extract
from fst_fast.fast.reflectors import make_reflector, short

LONG = Failure("2+2?", "It is four.", "At most 3 words are allowed, it has 8.", 0.5)
LONGER = Failure("3+3?", "It is surely six.", "At most 3 words are allowed, it has 9.", 0.5)
WRONG = Failure(
    "Capital of Peru?", "Rome is it.", 'It must be "Lima". At most 3 words are allowed, it has 3.', 0.0
)
PROMPT = ReflectionPrompt("answer it", [WRONG, LONG, LONGER])


def requests(prompt, seeds=range(40)):
    return [short.conversation(prompt, seed)[-2]["content"] for seed in seeds]


def test_a_request_shows_the_context_and_what_was_said_and_begins_the_reply_with_its_fence():
    *turns, request, begun = short.conversation(PROMPT, 0)
    assert "answer it" in request["content"]
    assert "At most 3 words are allowed, it has ..." in request["content"]
    assert (begun["role"], begun["content"]) == ("assistant", "```\n")
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
    assert all(turn["content"].endswith("\n```") for turn in turns if turn["role"] == "assistant")


def test_the_failures_closest_to_the_full_reward_are_shown():
    many = [WRONG] * 5 + [LONG] + [WRONG] * 5 + [LONGER, LONG]
    assert not any("Lima" in text for text in requests(ReflectionPrompt("answer it", many)))


def test_complaints_that_differ_by_problem_become_one_with_their_difference_left_out():
    said = short.complaints(["Be brief. It has 8 words.", "Be brief. It has 8 lines.", "No digits!"])
    assert said == ["Be brief.", "It has 8 ...", "No digits!"]
    assert short.complaints([" ", ""]) == []


def test_no_feedback_is_said_by_its_reward():
    (text,) = requests(ReflectionPrompt("answer it", [Failure("p", "r", "", 0.25)]), [0])
    assert "The reward is 0.25." in text


def test_an_accepted_response_and_another_context_get_into_some_requests():
    prompt = ReflectionPrompt(
        "answer it", [LONG], successes=[Failure("p", "Lima!", "", 1.0)], others=["be short"]
    )
    texts = requests(prompt)
    combining = [text for text in texts if "be short" in text]
    assert 0 < len(combining) < len(texts)
    assert all("answer it" in text for text in texts)
    assert all("Lima!" in text for text in texts if text not in combining)
    assert not any("be short" in text for text in requests(PROMPT))


def test_admitted_edits_come_as_the_last_examples():
    lesson = Lesson("old one", ["be kind"], "new one")
    *_, asked, answered, _, _ = short.conversation(ReflectionPrompt("c", [LONG], lessons=[lesson]), 0)
    assert "old one" in asked["content"]
    assert "be kind" in asked["content"]
    assert answered["content"] == "```\nnew one\n```"


def test_one_seed_gives_one_request():
    prompt = ReflectionPrompt("c", [LONG], others=["a", "b"], successes=[LONG, LONGER])
    assert requests(prompt) == requests(prompt)
    assert len(set(requests(prompt))) > 2


def read(continuation, finish="stop"):
    def generate(conversations, seeds, *, system, stop, temperature):
        assert stop == ("```",)
        return [Reply(continuation, finish) for _ in conversations]

    (reply,) = make_reflector("self", {}, generate=generate, style="short")([PROMPT], seeds=[0])
    return extract(reply, known_texts=["answer it"], count_tokens=lambda t: len(t.split()), max_tokens=9)


def test_a_reply_is_the_block_that_was_begun_for_it():
    assert read("in three words\n```\n\n") == "in three words"
    assert read("in three words") == "in three words"  # the model ended its turn
    assert read("answer  it\n```") == Refusal("duplicate")
    assert read("\n```") == Refusal("empty")
    assert read("in three wo", finish="length") == Refusal("length")


def test_an_error_stays_one():
    def generate(conversations, seeds, **how):
        return [Reply.failed("down")]

    (reply,) = make_reflector("self", {}, generate=generate, style="short")([PROMPT], seeds=[0])
    assert (reply.text, reply.error) == (None, "down")
