"""`python -m microbench`."""

from microbench.cli import run_and_exit

run_and_exit()
