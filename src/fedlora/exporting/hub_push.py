"""An exported folder on a model hub: the one way by which something of a run leaves this machine for a stranger's."""

from __future__ import annotations

from pathlib import Path

from fedlora.errors import UsageError
from fedlora.exporting.exported import Exported
from fedlora.redaction import redact, redacted_logs


def check_pushable(exported: Exported, format: str) -> None:
    """UsageError where others could not load what is pushed: an adapter on a base that only this machine has."""
    if format in ("peft", "gguf-lora") and not exported.is_base_public:
        raise UsageError(
            f"push: the base {exported.base_name!r} lies on this machine alone: others could not load the adapter",
            hint="give --format merged or gguf, which need no base, or --base_model with the hub id of the same base",
        )


def push_folder(folder: Path, repository: str) -> str:
    """Upload a folder; its address. A new repository is private.

    The hub's client finds the token (HF_TOKEN, or `hf auth login`); it is in no message. UsageError where the hub
    refuses or does not answer; the folder stays.
    """
    from huggingface_hub import HfApi

    try:
        with redacted_logs():
            api = HfApi()
            api.create_repo(repository, private=True, exist_ok=True)
            api.upload_folder(folder_path=folder, repo_id=repository, commit_message="Export of fedlora")
            return f"{api.endpoint}/{repository}"
    except Exception as error:  # the client raises many kinds, of its own and of the network below it
        reason = redact(" ".join(str(error).split()))[:300] or type(error).__name__
        raise UsageError(
            f"{repository}: the hub did not take the files: {reason}",
            hint=f"{folder} is complete: log in with `hf auth login`, then `hf upload {repository} {folder}`",
        ) from None
