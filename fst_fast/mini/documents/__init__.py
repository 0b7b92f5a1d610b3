"""Training documents of the mini base model, generated from the world's law on random problems.

There are two forms. An *answer* document is a chat as the trainer sees it: a context, a question, and a response drawn
from the law. A *drill* practises only what answers are made of (a look-up, one operation of a program, a product);
answers alone contain too little of it for a small model to learn it. One module per kind of problem defines both:

    draw(rng, size)               a random problem; size: 0 (smallest) to 1 (as in the task)
    question(problem)             the user message
    respond(rng, problem, law)    the tokens of one response
    drill(rng, size)              (user message, tokens, which of them count in the loss)
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import numpy as np

from fst_fast.mini import world
from fst_fast.mini.documents import formula_choice, hidden_facts, linked_facts, list_programs, star_graph
from fst_fast.mini.tokenizer import ASSISTANT, END, SYSTEM, TOOLS, USER
from fst_fast.tasks.hidden_facts import TOOL

KINDS: dict[world.Kind, ModuleType] = {
    "star_graph": star_graph,
    "list_programs": list_programs,
    "linked_facts": linked_facts,
    "formula_choice": formula_choice,
    "hidden_facts": hidden_facts,
}


@dataclass(frozen=True)
class Document:
    prompt: str  # up to and including <|assistant|>, as the chat template writes it
    response: list[
        str
    ]  # tokens, the closing <|end|> included; of an episode those of all turns and observations
    supervised: list[bool]  # [len(response)], whether the token counts in the loss


def answer_document(rng: np.random.Generator, kind: world.Kind, size: float = 1.0) -> Document:
    module = KINDS[kind]
    problem = module.draw(rng, size)
    sentences = world.draw_context(rng, kind)
    response = [*module.respond(rng, problem, world.law(sentences, kind)), END]
    tools, context = "", world.context_text(sentences)
    if kind == "hidden_facts":
        context, description = world.place(rng, sentences)
        tools = _tools(description)
    prompt = tools + _chat(context, module.question(problem))
    return Document(prompt, response, hidden_facts.sampled(response))


def drill_document(rng: np.random.Generator, kind: world.Kind, size: float = 1.0) -> Document:
    text, response, supervised = KINDS[kind].drill(rng, size)
    tools = _tools(world.TOOL_SEED["tool:lookup"]) if kind == "hidden_facts" else ""
    return Document(tools + _chat("", text), [*response, END], [*supervised, True])


def _tools(description: str) -> str:
    return f"{TOOLS} {TOOL} : {description} {END}"


def _chat(context: str, text: str) -> str:
    system = f"{SYSTEM} {context} {END}" if context else ""
    return f"{system}{USER} {text} {END}{ASSISTANT}"
