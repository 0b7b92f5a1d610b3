"""A run's newest checkpoint as things other programs read: a Hugging Face model folder with a model card, contexts.json and the run's
configuration beside the weights; of a run with policy.lora also the adapters alone, as peft reads them, in adapter/.

The checkpoint holds the whole weights as safetensors, so nothing is unpickled and neither the number of processes nor the ZeRO stage of
the run matters.
"""

from __future__ import annotations

import json
import os
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

from fst_fast.commands.model_card import CONFIG, model_card
from fst_fast.config import Config
from fst_fast.config import load as config_load
from fst_fast.config.components import components_of
from fst_fast.errors import UserError
from fst_fast.policy import lora
from fst_fast.rollout.template import configured_chat
from fst_fast.run import checkpoint
from fst_fast.run.folder import MARKER, disk_errors
from fst_fast.state import State

COMPONENTS = "choose one member of the population: tool:NAME is the description of that tool; put its other components, a blank line between them"
USAGE = {
    "system": "into the system message of the model's chat template",
    "user": "before the text of the first user message, a blank line between them",
}


def newest(run_dir: Path) -> tuple[Config, Path]:
    """The configuration of a run and its newest whole checkpoint. Raises UserError where there is none."""
    if not (run_dir / MARKER).is_file():
        raise UserError(f"{run_dir} is not a run of fst; it has no {MARKER}")
    found = checkpoint.latest(run_dir)
    if found is None:
        raise UserError(
            f"{run_dir} has no whole checkpoint yet; one is written every checkpoint.every steps and at the end"
        )
    return config_load.load(run_dir / "config.yaml"), found


def export(run_dir: Path, out: Path) -> Path:
    """Write the trained model, its tokenizer, contexts.json, a model card and the configuration to the new folder `out`, whole or not at all."""
    config, found = newest(run_dir)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty; choose a new folder")
    state = State.load(found / "state.json")
    date = datetime.fromisoformat(state.date) if state.date else None
    chat, _ = configured_chat(config.model, saved=found / "model", date=date)
    usage = f"put one text of the population {USAGE[chat.system]}"
    card = model_card(
        config,
        state,
        run_dir,
        system=chat.system,
        usage=usage,
        versions=checkpoint.written_by(found).get("versions", {}),
    )
    contexts: dict[str, Any] = {
        "population": [{"id": c.id, "text": c.text} for c in state.population],
        "seed": config.fast.seed_context,
        "usage": usage,
        "step": state.step,
    }
    if config.fast.components:
        for line in contexts["population"]:
            line["components"] = components_of(line["text"])
        contexts["usage"] = f"{COMPONENTS}, {USAGE[chat.system]}"
    tmp = out.with_name(f".tmp-{out.name}-{os.getpid()}")
    with disk_errors(f"{out} cannot be written"):
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copytree(found / "model", tmp)
            if (found / lora.FOLDER).is_dir():
                shutil.copytree(found / lora.FOLDER, tmp / lora.FOLDER)
            # Who renders a prompt with the exported model does not know our configuration: the template brings its variables along.
            tokenizer = chat.tokenizer
            tokenizer.chat_template = chat.template.with_defaults(config.model.chat_template_kwargs)
            tokenizer.save_pretrained(tmp)
            (tmp / "contexts.json").write_text(json.dumps(contexts, indent=1, ensure_ascii=False) + "\n")
            (tmp / "README.md").write_text(card, encoding="utf-8")
            (tmp / CONFIG).write_text(config_load.dump(config), encoding="utf-8")
            if out.is_dir():
                out.rmdir()
            os.rename(tmp, out)
        except BaseException:
            shutil.rmtree(tmp, ignore_errors=True)
            raise
    return out
