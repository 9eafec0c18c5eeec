"""`python -m fedlora` is the command line."""

from fedlora.cli import main

raise SystemExit(main())
