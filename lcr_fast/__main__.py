"""``python -m lcr_fast``: the command line ``lcr-fast``."""

from lcr_fast.cli import main

main()
