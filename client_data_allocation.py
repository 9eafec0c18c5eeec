"""`python client_data_allocation.py` is `fedlora allocate`: split one file of rows into client files and a test set."""

import sys

try:
    from fedlora.cli import main
except ModuleNotFoundError as error:
    raise SystemExit(
        f"error: no module {error.name}\n  hint: pip install -r requirements.txt && pip install -e ."
    ) from None

if __name__ == "__main__":
    raise SystemExit(main(["allocate", *sys.argv[1:]]))
