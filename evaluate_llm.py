"""`python evaluate_llm.py` is `fedlora evaluate_llm`: let an LLM judge compare two sets of answers."""

import sys

try:
    from fedlora.cli import main
except ModuleNotFoundError as error:
    raise SystemExit(
        f"error: no module {error.name}\n  hint: pip install -r requirements.txt && pip install -e ."
    ) from None

if __name__ == "__main__":
    raise SystemExit(main(["evaluate_llm", *sys.argv[1:]]))
