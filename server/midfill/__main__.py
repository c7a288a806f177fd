"""`python -m midfill`: the same as the `midfill` command."""

from midfill.cli.main import main

main()
