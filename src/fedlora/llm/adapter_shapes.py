"""Which tensors an adapter file of a run lists, where no base model is there to say what is expected.

Only the listing is read. It is held against the file's own size: a listing of tensors that the file cannot hold would
have whoever believes it ask for any amount of memory.
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

from fedlora.errors import UsageError
from fedlora.llm.bin_listing import read_listing
from fedlora.llm.tensor_listing import Unfit

MOST_LISTING_BYTES = 16 << 20


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Key -> shape of a `.bin` file; UsageError when it is none of float32 tensors that lie in it."""
    try:
        with zipfile.ZipFile(path) as archive:
            listing = next(entry for entry in archive.infolist() if entry.filename.endswith("/data.pkl"))
            if listing.file_size > MOST_LISTING_BYTES:
                raise Unfit("its listing is too large")
            views = read_listing(archive.read(listing))
        shapes = {key: view.shape for key, view in views.items()}
        if 4 * sum(math.prod(shape) for shape in shapes.values()) > path.stat().st_size:
            raise Unfit("it lists more than it holds")
    except (Unfit, StopIteration, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        # the last two are zipfile's, of a compression it does not know and of encryption
        raise UsageError(f"{path}: not a readable adapter ({error})", hint="train again") from None
    return shapes
