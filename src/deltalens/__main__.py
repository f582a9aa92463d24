"""`python -m deltalens` is the `deltalens` command."""

from deltalens.cli import main

main()
