"""`python -m align`: the command, where its folder is not on the path."""

import sys

from align.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
