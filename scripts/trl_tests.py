"""TRL's own GRPO tests, once with TRL's trainer and once with examples/trl_grpo.py's: `python scripts/trl_tests.py TRL`, a checkout of TRL.

Their models and data sets come from the Hub. Here random models of the same architectures and a few lines of text stand in for them, so no
network is needed. Tests of vision models are left out. Exits with 1 where a test passes with TRL's trainer and not with ours.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, set_seed
from trl import import_utils as trl_imports

ROOT = Path(__file__).parents[1]
HUB = "trl-internal-testing/"
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIALS = ("<|pad|>", "<|im_start|>", "<|im_end|>")
LINES = ("Beautiful is better than", "Explicit is", "Simple is better", "Complex", "Readability", "Unless explicitly",
         "Special cases are not", "Now is better than", "Although never", "Errors should never", "In the face of",
         "If the implementation is", "Flat is better", "Namespaces are", "Sparse is better", "There should be", "Practicality")  # fmt: skip
SIZES = {
    "hidden_size": 8,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 32768,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS = {
    "tiny-Qwen2ForCausalLM-2.5": "Qwen2ForCausalLM",
    "tiny-Qwen2ForSequenceClassification-2.5": "Qwen2ForSequenceClassification",
    "tiny-Qwen3ForCausalLM": "Qwen3ForCausalLM",
    "tiny-Qwen3ForSequenceClassification": "Qwen3ForSequenceClassification",
    "tiny-Qwen3MoeForCausalLM": "Qwen3MoeForCausalLM",
    "tiny-LlamaForCausalLM-3.2": "LlamaForCausalLM",
    "tiny-LlamaForSequenceClassification-3.2": "LlamaForSequenceClassification",
    "tiny-MistralForCausalLM-0.2": "MistralForCausalLM",
    "tiny-Gemma2ForCausalLM": "Gemma2ForCausalLM",
    "tiny-Cohere2ForCausalLM": "Cohere2ForCausalLM",
    "tiny-GptOssForCausalLM": "GptOssForCausalLM",
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and a ChatML template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    pad, start, end = SPECIALS
    made = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, pad_token=pad, eos_token=end, extra_special_tokens=[start]
    )
    made.chat_template = TEMPLATE
    return made


def write_models(folder: Path) -> None:
    words = tokenizer()
    for name, kind in MODELS.items():
        set_seed(0)
        model_class = getattr(transformers, kind)
        config = model_class.config_class(
            vocab_size=len(words),
            pad_token_id=words.pad_token_id,
            eos_token_id=words.eos_token_id,
            bos_token_id=None,
            num_labels=1,
            **SIZES,
            **EXPERTS,
        )
        model_class(config).save_pretrained(folder / name)
        words.save_pretrained(folder / name)


def write_data(folder: Path) -> None:
    """What load_dataset reads of a folder by configuration and split: prompts as texts and as messages."""
    forms = {
        "standard_prompt_only": list(LINES),
        "conversational_prompt_only": [[{"role": "user", "content": line}] for line in LINES],
    }
    card = ["---", "configs:"]
    for form, prompts in forms.items():
        card += [f"- config_name: {form}", "  data_files:"]
        for split, rows in (("train", prompts), ("test", prompts[:3])):
            path = folder / "zen" / f"{form}-{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
            card += [f"  - split: {split}", f"    path: {path.name}"]
    (folder / "zen" / "README.md").write_text("\n".join([*card, "---", ""]))


def write_tests(trl: Path, folder: Path, hub: Path, ours: bool) -> None:
    """TRL's test file with the names of the Hub replaced by folders, and, where `ours`, its trainer by the example's."""
    (folder / "tests").mkdir(parents=True, exist_ok=True)
    for name in ("__init__.py", "conftest.py", "testing_utils.py", "testing_constants.py"):
        (folder / "tests" / name).write_text((trl / "tests" / name).read_text())
    needed = re.findall(r"is_\w+_available", (folder / "tests" / "testing_utils.py").read_text())
    lacking = sorted(
        {name for name in needed if not hasattr(trl_imports, name)} - set(dir(transformers.utils))
    )
    lacking.append("is_liger_kernel_available")  # its kernels need a GPU
    shim = "from trl import import_utils\n" + "".join(
        f"import_utils.{name} = lambda *_, **__: False\n" for name in lacking
    )  # a checkout is seldom of the very version that is installed
    (folder / "tests" / "__init__.py").write_text(shim)
    text = (trl / "tests" / "test_grpo_trainer.py").read_text().replace(HUB, f"{hub}/")
    imports = "from trl import GRPOConfig, GRPOTrainer\n"
    if imports not in text:
        raise SystemExit(
            f"trl_tests: {trl}/tests/test_grpo_trainer.py does not import the trainer as expected"
        )
    if ours:
        text = text.replace(
            imports, "from trl import GRPOConfig\nfrom trl_grpo import FusedGRPOTrainer as GRPOTrainer\n"
        )
    (folder / "tests" / "test_grpo_trainer.py").write_text(text)


def outcomes(folder: Path, only: str) -> dict[str, str]:
    """By test: passed, skipped or the first line of its failure."""
    report = folder / "report.xml"
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "examples"))
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    arguments = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(folder),
        f"--junit-xml={report}",
        "-k",
        f"not vlm and ({only})",
    ]
    command = [sys.executable, "-m", "pytest", *arguments, "tests/test_grpo_trainer.py"]
    with (folder / "log.txt").open("w") as log:
        subprocess.run(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False
        )
    if not report.exists():
        raise SystemExit(f"trl_tests: pytest wrote no report; see {folder / 'log.txt'}")
    found = {}
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        trouble = case.find("failure") if case.find("failure") is not None else case.find("error")
        said = "passed" if trouble is None else trouble.get("message", "failed").splitlines()[0]
        found[case.get("name", "")] = "skipped" if case.find("skipped") is not None else said
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trl", type=Path, help="a checkout of TRL, https://github.com/huggingface/trl")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "trl_tests")
    parser.add_argument("--only", default="test", help="pytest's -k: which of the tests")
    args = parser.parse_args()
    out = args.out.absolute()
    hub = out / "hub"
    write_models(hub)
    write_data(hub)
    results = {}
    for name in ("trl", "ours"):
        write_tests(args.trl, out / name, hub, name == "ours")
        results[name] = outcomes(out / name, args.only)
        counts = Counter(
            said if said in ("passed", "skipped") else "failed" for said in results[name].values()
        )
        print(name, dict(counts), flush=True)
    lost = [name for name, said in results["trl"].items() if said == "passed" != results["ours"].get(name)]
    for name in lost:
        print(f"passes with TRL's trainer only: {name}: {results['ours'].get(name)}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
