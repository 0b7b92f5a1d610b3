"""`fst push RUN REPO`: what `fst export` writes, uploaded to the Hugging Face Hub."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants, errors

from fst_fast.commands.export import export, newest
from fst_fast.errors import UserError
from fst_fast.policy.base_model import first_line
from fst_fast.run.folder import disk_errors


def push(run_dir: Path, repo_id: str, *, private: bool = False, revision: str | None = None) -> str:
    """Upload a run's newest checkpoint with contexts.json and a model card; returns the address. private: of a repository that is made here.
    revision: the branch, made where it is not there; None: main. Raises UserError, before anything is uploaded where the run, the names or the
    token are wrong."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]*[A-Za-z0-9]", repo_id, re.ASCII):
        raise UserError(
            f"REPO={repo_id!r} is not the name of a repository of the Hub; it is written org/name"
        )
    if revision is not None and (not re.fullmatch(r"\w[\w./-]*", revision, re.ASCII) or ".." in revision):
        raise UserError(f"--revision {revision!r} is not the name of a branch")
    _, found = newest(run_dir)
    api = huggingface_hub.HfApi()
    try:
        api.whoami()
        with disk_errors(f"{run_dir} cannot be written"):
            place = tempfile.TemporaryDirectory(prefix=".tmp-push-", dir=run_dir)
        with place as tmp:
            folder = export(run_dir, Path(tmp) / "model")
            api.create_repo(repo_id, private=private or None, exist_ok=True)
            if private and not api.repo_info(repo_id).private:
                raise UserError(
                    f"{repo_id} exists and is public, and --private changes no repository that exists; nothing was uploaded"
                )
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=revision,
                commit_message=f"fst-fast: {run_dir.resolve().name}, {found.name}",
            )
    except UserError:
        raise
    except Exception as error:  # also those of the HTTP library that huggingface_hub uses
        raise UserError(_trouble(error, repo_id)) from error
    return f"{constants.ENDPOINT}/{repo_id}" + (f"/tree/{revision}" if revision else "")


def _trouble(error: Exception, repo_id: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.LocalTokenNotFoundError) or status == 401:
        return "fst push needs a token of the Hub that may write: `hf auth login`, or the environment variable HF_TOKEN"
    if status == 403:
        return f"the token may not write to {repo_id}: {first_line(error)}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "fst push needs the network, which HF_HUB_OFFLINE forbids"
    return f"the upload to {repo_id} failed: {type(error).__name__}: {first_line(error)}; what is there already stays"
