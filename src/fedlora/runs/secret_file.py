"""The secret of a private run: a file of 64 hexadecimal digits that only its owner may read.

It is outside model_dir, so that copying or publishing a run does not publish it: anyone who has it can remove the noise
from the adapters. run.json holds its id, a hash. A run does not resume without it, because other cohorts and other
noise for a started round would be a second release.
"""

from __future__ import annotations

from fedlora.errors import StorageError, UsageError
from fedlora.federated.privacy.randomness import SECRET_BYTES, Secret
from fedlora.files import read_text, write_text
from fedlora.paths import secret_file


def save_secret(secret: Secret) -> None:
    """Write a new run's secret, for its owner only, before anything is drawn from it."""
    try:
        write_text(secret_file(secret.id), secret.content.hex() + "\n", mode=0o600)
    except StorageError as error:
        raise StorageError(str(error), hint="let FEDLORA_SECRETS name a folder that can be written") from error


def load_secret(secret_id: str) -> Secret:
    """The secret of this id; UsageError when it is missing, readable by others, or another one."""
    path = secret_file(secret_id)
    if not path.is_file():
        raise UsageError(
            f"{path}: the secret of this run is missing; its cohorts and its noise cannot be drawn again without it",
            hint="restore the file or set FEDLORA_SECRETS to the folder that has it; a run started with --overwrite "
            "draws a new one",
        )
    if path.stat().st_mode & 0o077:
        raise UsageError(f"{path}: the secret of this run is readable by others", hint=f"chmod 600 {path}")
    try:
        content = bytes.fromhex(read_text(path).strip())
    except ValueError:
        content = b""
    if len(content) != SECRET_BYTES or Secret(content).id != secret_id:
        raise UsageError(f"{path}: not the secret of this run", hint="restore the file from a copy")
    return Secret(content)
