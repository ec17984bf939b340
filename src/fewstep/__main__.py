"""`python -m fewstep` is the command `fewstep`; torchrun needs it in this form."""

from fewstep.cli import main

main()
