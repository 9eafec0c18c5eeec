"""`python train.py` is `fedlora train`: train a federation of clients with LoRA."""

import sys

try:
    from fedlora.cli import main
except ModuleNotFoundError as error:
    raise SystemExit(
        f"error: no module {error.name}\n  hint: pip install -r requirements.txt && pip install -e ."
    ) from None

if __name__ == "__main__":
    raise SystemExit(main(["train", *sys.argv[1:]]))
