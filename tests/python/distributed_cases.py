"""What each of the two processes of test_distributed_modules.py runs.

    python distributed_cases.py RANK

writes RANK.json in the working directory: of each case "passed" or its error. A case compares two
results: what two processes compute on halves of a batch, and what each computes alone on the whole
of it.
"""

import datetime
import faulthandler
import json
import os
import sys
import traceback
from pathlib import Path

import distributed_files as _files  # registers its cases
import distributed_training as _training  # so does this
import torch.distributed as dist
from distributed_setting import CASES, PROCESSES

__all__ = ["CASES", "PROCESSES", "_files", "_training"]

# Most take 0.2 s, the compiled ones 6 s, on a machine that may be busy.
SECONDS_A_CASE = 60


def main(rank: int) -> None:
    dist.init_process_group(
        "gloo",
        init_method=Path("rendezvous").resolve().as_uri(),
        rank=rank,
        world_size=PROCESSES,
        timeout=datetime.timedelta(seconds=20),
    )
    results = {}
    for name, function in CASES.items():
        # A process that hangs ends with its stack on stderr.
        faulthandler.dump_traceback_later(SECONDS_A_CASE, exit=True)
        try:
            function()
            results[name] = "passed"
        except Exception:
            results[name] = traceback.format_exc()
            break  # the two may now be at different collectives
    Path(f"{rank}.json").write_text(json.dumps(results), encoding="utf-8")
    os._exit(0)  # see processes_in_group.py


if __name__ == "__main__":
    main(int(sys.argv[1]))
