"""`python evaluate_rouge.py` is `fedlora evaluate_rouge`: score answers with ROUGE and exact match."""

import sys

try:
    from fedlora.cli import main
except ModuleNotFoundError as error:
    raise SystemExit(
        f"error: no module {error.name}\n  hint: pip install -r requirements.txt && pip install -e ."
    ) from None

if __name__ == "__main__":
    raise SystemExit(main(["evaluate_rouge", *sys.argv[1:]]))
