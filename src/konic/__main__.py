"""`python -m konic` is the command `konic`: no module is taken from the current folder, which may be a stranger's."""

import sys

if not sys.flags.safe_path:
    del sys.path[0]

from konic.cli import main

main()
