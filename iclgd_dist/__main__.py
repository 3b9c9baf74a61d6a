"""python -m iclgd_dist: the command line, where its script is not in the PATH."""

from iclgd_dist.cli import main

main()
