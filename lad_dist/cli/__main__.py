"""``python -m lad_dist.cli``: the same as ``lad-dist``."""

from lad_dist.cli import main

main()
