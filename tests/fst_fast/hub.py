"""A data set in the cache of `datasets`, as if it had been loaded from the Hub before the network went."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

REVISION = "a" * 40


def cached_data_set(
    folder: Path,
    patch: pytest.MonkeyPatch,
    name: str,
    config: str | None,
    splits: dict[str, list[dict[str, Any]]],
) -> str:
    """Put the rows into a cache in `folder` and make it the cache of this process; returns the task `hf:NAME`."""
    import datasets

    cache = folder / "cache"
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    source = folder / "made"
    source.mkdir(exist_ok=True)
    for split, rows in splits.items():
        datasets.Dataset.from_list(rows).to_parquet(source / f"{split}.parquet")
    files = {split: str(source / f"{split}.parquet") for split in splits}
    builder = datasets.load_dataset_builder("parquet", data_files=files)
    builder.download_and_prepare()
    namespace, _, short = name.partition("/")
    snake = datasets.naming.camelcase_to_snakecase(short)
    made = cache / f"{namespace}___{snake}" / (config or "default") / "0.0.0" / REVISION
    shutil.copytree(builder.cache_dir, made)
    info = made / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"config_name": config or "default"}))
    for file in made.glob("*.arrow"):
        file.rename(made / file.name.replace(builder.dataset_name, snake, 1))
    shutil.rmtree(source)
    return f"hf:{name}"
