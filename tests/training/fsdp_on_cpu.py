"""`omni train` under FSDP on CPUs: `torchrun ... fsdp_on_cpu.py RECIPE`, with ACCELERATE_USE_FSDP=true in the environment.

torch shards models on CPUs as it does on GPUs. accelerate has a list of the devices for which it asks torch to, without the
CPU; here it is on that list, and nothing else is changed.
"""

import inspect
import re
import sys
import textwrap

from accelerate import state

source = textwrap.dedent(inspect.getsource(state.AcceleratorState.__init__))
listed = r"elif self\.distributed_type in \[\s+DistributedType\.MULTI_GPU,"
source, places = re.subn(f"({listed})", r"\1 DistributedType.MULTI_CPU,", source)
assert places == 1, source
scope = dict(vars(state))
exec(source, scope)
state.AcceleratorState.__init__ = scope["__init__"]

if __name__ == "__main__":
    from omni.cli.app import main

    sys.argv[1:1] = ["train"]
    main()
