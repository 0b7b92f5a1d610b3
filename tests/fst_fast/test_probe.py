import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from fst_fast.commands.probe import probe
from fst_fast.config.load import load
from fst_fast.errors import UserError
from fst_fast.mini.tokenizer import make_tokenizer


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape = Qwen3Config(
        vocab_size=len(tokenizer),
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        **sizes,
    )
    Qwen3ForCausalLM(shape).save_pretrained(folder)
    return load(
        None,
        [
            f"--model.path={folder}",
            "--task_args={form: mini, arms: 2, path: 3, ids: 40, train: 4, validation: 4}",
            "--rollout.max_response_tokens=6",
            "--rollout.max_prompt_tokens=200",
        ],
    )


def test_probe_shows_prompt_responses_rewards_and_feedback(config):
    lines = list(probe(config, context="be polite .", problems=2, samples=3, split="validation"))
    text = "\n".join(lines)
    assert text.count("problem star_graph/validation/") == 2
    assert text.count("be polite .") == 3  # once in each prompt, once in the closing line
    assert text.count("  sample ") == 6
    assert text.count("reward 0, ") + text.count("reward 1, ") == 6
    assert "feedback: " in text
    assert lines[0].startswith("chat template: the context is the system message")
    assert lines[-1].endswith("over 6 of 6 rollouts")


def test_without_a_context_the_seed_context_is_probed_and_the_same_seed_answers_the_same(config):
    first = list(probe(config, context=None, problems=1, samples=2, split="train"))
    assert repr(config.fast.seed_context) in first[-1]
    assert list(probe(config, context=None, problems=1, samples=2, split="train")) == first


def test_a_split_that_is_not_there_is_refused(config):
    with pytest.raises(UserError, match="there is no split 'exam'; allowed are train, validation, ood"):
        list(probe(config, context=None, problems=1, samples=1, split="exam"))
