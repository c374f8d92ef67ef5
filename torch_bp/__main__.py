"""`python -m torch_bp`: as the command `torch-bp`."""

import sys

from torch_bp.cli import main

if __name__ == "__main__":
    sys.exit(main())
