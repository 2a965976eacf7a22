"""`python -m launch VERB ...` is `nsi VERB ...`."""

from launch.cli import main

main()
