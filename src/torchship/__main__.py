"""`python -m torchship` is the command line."""

from torchship.cli import main

main()
