"""C3 in a process whose memory comes from the system in large pages, which takes most page faults out of torch's step.

Torch asks for memory at every step, and what it has given back may have to be cleared page by page again; a captured
step asks for none. glibc reads how large pages are when a process starts, hence the process: `compared` starts it, and
`python -m tests.benchmarks.huge_pages WORKLOAD PAIRS` is what it runs.
"""

import json
import os
import subprocess
import sys

from tests.benchmarks import honesty
from tests.benchmarks.loops import WORKLOADS
from tests.benchmarks.protocol import paired

TUNABLE = "glibc.malloc.hugetlb=1"


def compared(workload: str, pairs: int) -> dict[str, tuple[float, ...]]:
    """Return what `paired` has found for our step and each of torch's settings, by its name, in such a process."""
    environment = os.environ | {"GLIBC_TUNABLES": TUNABLE}
    command = [sys.executable, "-m", "tests.benchmarks.huge_pages", workload, str(pairs)]
    printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return {name: tuple(found) for name, found in json.loads(printed.splitlines()[-1]).items()}


if __name__ == "__main__":
    from tests.benchmarks.train_step import sides

    runs = sides(*WORKLOADS[sys.argv[1]])
    honesty.check(runs, {})
    mine = runs.pop("torch_bp")
    print(json.dumps({name: paired(mine, run, int(sys.argv[2])) for name, run in runs.items()}))
