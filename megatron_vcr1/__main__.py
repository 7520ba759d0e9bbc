"""`python -m megatron_vcr1` is `vcr1`."""

import sys

from megatron_vcr1.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
