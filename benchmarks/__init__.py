"""Measure omni beside its peers, in one run, on your machine.

    python -m benchmarks                      # everything
    python -m benchmarks encoder files        # some jobs
    python -m benchmarks --quick              # small inputs: does it run? The figures mean little
    python -m benchmarks --device cuda        # on a GPU: encoder, training, generation

    measure.py      contestants take turns; medians, ratios, their intervals
    peers.py        the peers, written as well as they can be, with the same weights
    ceiling.py      the matrix products that every encoder of this shape needs
    pictures.py     the inputs
    machine.py      the machine, its clock, versions
    tables.py       tables, and the JSON document that is the last line of output
    jobs/           the measurements, one file each

Run it on a machine that does nothing else.
"""
