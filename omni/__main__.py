"""`python -m omni` runs the command `omni`, and so does `torchrun -m omni train ...`."""

from omni.cli.app import main

main()
