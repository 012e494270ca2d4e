"""`python -m gatekv` is `gatekv`."""

from gatekv.cli import main

main()
