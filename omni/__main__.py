"""`python -m omni` is the command `omni`; so is `torchrun -m omni train ...`, which needs a module to start."""

from omni.cli.app import main

main()
