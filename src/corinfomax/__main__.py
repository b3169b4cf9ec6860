"""`python -m corinfomax`: the command line."""

import sys

from corinfomax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
