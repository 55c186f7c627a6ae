"""`python -m isomorph` is the command `isomorph`."""

from isomorph.cli import main

main()
