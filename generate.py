"""`python generate.py` is `fedlora generate`: answer a test file with the base model or trained adapters."""

import sys

try:
    from fedlora.cli import main
except ModuleNotFoundError as error:
    raise SystemExit(
        f"error: no module {error.name}\n  hint: pip install -r requirements.txt && pip install -e ."
    ) from None

if __name__ == "__main__":
    raise SystemExit(main(["generate", *sys.argv[1:]]))
