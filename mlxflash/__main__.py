"""`python -m mlxflash`: the command line."""

from mlxflash.cli import main

main()
