"""`python -m cm3` is the `cm3` command."""

import sys

from cm3.cli import main

if __name__ == "__main__":
    sys.exit(main())
