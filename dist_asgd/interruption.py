"""What a call leaves behind that was interrupted while it wrote, and the errors of the calls after it."""

from __future__ import annotations

# The values of ``ParamShards.torn_by`` while ``load_checkpoint()`` writes, and from the first update of a backward with
# ``step_in_backward=True`` to the end of ``step()``.
LOAD_CHECKPOINT = "load_checkpoint()"
IN_BACKWARD = "backward()"
# With what it begins after a write to a parameter that an average in host memory may have been taking.
A_WRITE = "a write"


def torn_problem(torn_by: str) -> RuntimeError:
    """The error of calls after ``torn_by``, a value of ``ParamShards.torn_by``."""
    if torn_by == IN_BACKWARD:
        return RuntimeError(
            "dist_asgd: backward has updated some parameters (step_in_backward=True), and step() has not ended "
            "that step. Call step() first, on every rank. If backward or step() has failed, parameters and state "
            "are torn: load a checkpoint (load_checkpoint()), or restart the job from one."
        )
    if torn_by.startswith(A_WRITE):
        return RuntimeError(
            f"dist_asgd: {torn_by} came after update() and before the step of an optimizer, while its average in "
            f"host memory (average_device) may still have been taking it: the average may be wrong. Call the "
            f"average's wait_for_parameters() before such a write. To go on, load a checkpoint of the average, or "
            f"make a new one."
        )
    return RuntimeError(
        f"dist_asgd: {torn_by} was interrupted while it wrote: parameters and state may be torn, and differ "
        f"between ranks. Load a checkpoint (load_checkpoint()), or restart the job from one."
    )
