"""torchrun, except that a launch that fails ends with its cause on one line, in place of the launcher's own traceback.

`torchrun.sh` starts it with torchrun's arguments. The cause is what `@record` has written down on the rank that failed
first.
"""

import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError


def main() -> None:
    """Run torchrun, and exit with the status of the rank that failed first."""
    try:
        run.main()
    except ChildFailedError as failed:
        rank, failure = failed.get_first_failure()
        if isinstance(failure.message, dict):  # from @record
            cause = failure.message["message"]
        elif failure.exitcode < 0:
            cause = f"it was ended by {failure.signal_name()}"
        else:
            cause = f"it ended with status {failure.exitcode}; what it wrote is above"
        sys.stderr.write(f"error: rank {rank} failed: {cause}\n")
        sys.exit(max(1, failure.exitcode))


if __name__ == "__main__":
    main()
