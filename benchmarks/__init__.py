"""Side-by-side measurements: omni beside what else there is, in one run, on the machine of whoever asks.

    python -m benchmarks                      # everything
    python -m benchmarks encoder files        # some jobs
    python -m benchmarks --quick              # does it run? The figures mean little
    python -m benchmarks --device cuda        # on a GPU: encoder, training, generation

    measure.py      contestants take turns; medians, ratios, their intervals
    peers.py        the others, written as well as they can be, with the same weights
    ceiling.py      the matrix products that no encoder of this shape can do without
    pictures.py     what they are shown
    machine.py      where it was measured
    report.py       tables, and the JSON document that is the last line of output
    jobs/           what is measured; one file each

Run it on a machine that does nothing else.
"""
