"""``average_checkpoints()`` and ``average_between()``: averages over several checkpoints, in one process.

The command ``average`` calls the same steps: ``open_sources``, ``plan_average`` or ``plan_between``, and
``write_merge``. Nothing here is collective.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch

from ..format.folder import steps_in
from ..format.layouts import Prefix
from ..format.nearby import checkpoints_in, is_marked
from ..format.paths import AnyPath, UserPath, as_path, is_store
from ..format.safetensors import DEFAULT_MAX_BYTES, check_out
from .average import plan_average
from .between import plan_between
from .combination import Merge, write
from .contents import CheckpointContents, Progress, no_progress
from .convert import with_average

_LOG = logging.getLogger("dist_asgd")


def average_checkpoints(
    sources: UserPath | Sequence[UserPath],
    out: UserPath,
    *,
    weights: Sequence[float] | None = None,
    ema: float | None = None,
    latest: int | None = None,
    last: bool = False,
    average: str | None = None,
    dtype: torch.dtype | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
    overwrite: bool = False,
    verify: bool = True,
    prefix: Prefix = "",
    ties_by_value: bool = True,
) -> list[AnyPath]:
    """Write the mean of the weights of several checkpoints as safetensors, for inference; returns the files.

    Not collective: one process calls it, and needs no GPU. Any number of ranks, in any mode, may have written each
    checkpoint. The value of a parameter in a checkpoint is its average ``ax``, or with ``last=True`` its last iterate.
    With weights w the result is sum(w * x) / sum(w), and with ``ema`` d it is x of the first checkpoint, and then
    d * result + (1 - d) * x for each further one. Sums are formed in float64 and rounded once. In memory are the sum of
    one tensor, in float64, and one tensor of a source.

    Entries that come from no parameter of an optimizer are copied from the last checkpoint: buffers such as the
    statistics of BatchNorm, counters, and frozen weights that the optimizer does not have. If no checkpoint records
    what an optimizer has, all floating-point entries are averaged. If averaging has begun in no checkpoint, or for some
    parameters in none, last iterates are averaged, and the log says so. The metadata of the files has the sources,
    their steps and their weights.

    Args:
        sources: checkpoints, or folders of checkpoints. A folder stands for its checkpoints in the order of their
            steps, those of a ``CheckpointManager`` among them.
        out: the file to write, ``….safetensors``, which appears whole or not at all; see ``export_averaged``.
        weights: the weight of each checkpoint, in the same order; None weighs all alike. A weight of 0 leaves one out.
        ema: the decay of an exponential moving average over the checkpoints, at least 0 and below 1.
        latest: take only so many of the checkpoints, from the end.
        last: average the last iterates, and not the averages. Other optimizers than ASGD have those only, unless
            averages were saved beside them.
        average: which average, if checkpoints have several: the name of one beside the optimizer, or ``"optim"``.
        dtype: the floating-point dtype of the averaged entries in the file; None: each parameter's own, or the wider
            one if checkpoints differ.
        max_bytes: the size above which there are several files and an index.
        overwrite: replace the files that an earlier export wrote to ``out``.
        verify: check every byte that is read against the manifests; False reads checkpoints without one.
        prefix: what the keys begin with if another program wrote the checkpoints; see ``load_checkpoint``.
        ties_by_value: take entries with a parameter's values for that parameter, if a checkpoint records no ties.

    Raises:
        ValueError: an argument is not supported, ``out`` is taken, or checkpoints differ in names, in shapes of
            parameters or in whether averaging has begun; it names the parameter and both checkpoints.
        CheckpointError: a checkpoint is damaged, or has no model, or no averages.
        OSError: the disk is full or not writable.
    """
    target = as_path(out)
    check_out(target, overwrite)
    opened = open_sources(sources, latest=latest, last=last, average=average, verify=verify, prefix=prefix)
    merge = plan_average(opened, weights=weights, decay=ema, last=last, dtype=dtype, ties_by_value=ties_by_value)
    return _written(merge, target, max_bytes, overwrite)


def average_between(
    first: UserPath,
    second: UserPath,
    out: UserPath,
    *,
    average: str | None = None,
    dtype: torch.dtype | None = None,
    max_bytes: int = DEFAULT_MAX_BYTES,
    overwrite: bool = False,
    verify: bool = True,
    prefix: Prefix = "",
    ties_by_value: bool = True,
) -> list[AnyPath]:
    """Write the mean of the iterates between two checkpoints of a run, from their averages; returns the files.

    Not collective. With the averages ``ax1`` of n1 iterates and ``ax2`` of n2 it is
    (n2 * ax2 - n1 * ax1) / (n2 - n1), in float64. After step s the average of a parameter holds s - t0 - 1 iterates.
    Parameters that did not step in between, and entries that come from no parameter, are copied from ``second``.

    Rounding errors of the averages are magnified: they are about eps * n2 / sqrt(12 * (n2 - n1)) of the weights, with
    the eps of the dtype of ``ax``. The log says so above 0.001.

    Args:
        first: the earlier checkpoint, of step t0 + 1 or later.
        second: the later one, of the same run: with the same t0, lambd, alpha and weight_decay.
        out: the file to write; the other arguments are those of ``average_checkpoints``.
        average: which average, as in ``average_checkpoints``.
        dtype: the floating-point dtype of the averaged entries; None: each parameter's own.
        max_bytes: the size above which there are several files and an index.
        overwrite: replace the files that an earlier export wrote to ``out``.
        verify: check every byte that is read against the manifests.
        prefix: what the keys begin with if another program wrote the checkpoints.
        ties_by_value: take entries with a parameter's values for that parameter, if a checkpoint records no ties.

    Raises:
        ValueError: an argument is not supported, averaging had not begun in ``first``, the averages are no uniform
            means since one t0, ``second`` is not the later one, or models or runs differ; it names the parameter and
            both checkpoints.
        CheckpointError: a checkpoint is damaged, or has no averages.
        OSError: the disk is full or not writable.
    """
    target = as_path(out)
    check_out(target, overwrite)
    paths = (as_path(first), as_path(second))
    opened = [with_average(CheckpointContents(path, verify=verify, prefix=prefix), average) for path in paths]
    return _written(plan_between(*opened, dtype=dtype, ties_by_value=ties_by_value), target, max_bytes, overwrite)


def _written(merge: Merge, out: AnyPath, max_bytes: int, overwrite: bool) -> list[AnyPath]:
    for note in merge.notes:
        _LOG.warning("%s: %s", out, note)
    return write_merge(merge, out, max_bytes=max_bytes, overwrite=overwrite)


def write_merge(
    merge: Merge,
    out: AnyPath,
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> list[AnyPath]:
    """Write ``merge`` to ``out``, with its facts as texts in the metadata; returns the files."""
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in merge.facts.items()}
    return write(merge, out, metadata, max_bytes=max_bytes, overwrite=overwrite, progress=progress)


def open_sources(
    sources: UserPath | Sequence[UserPath],
    *,
    latest: int | None = None,
    last: bool = False,
    average: str | None = None,
    verify: bool = True,
    prefix: Prefix = "",
) -> list[CheckpointContents]:
    """Open the checkpoints that ``sources`` name, in their order; ``latest`` takes so many from the end.

    Each has the ``average``, as ``with_average`` finds it, in the optimizer's place; none is needed with ``last``.
    Raises CheckpointError if one cannot be read, and ValueError if there is none, or one is there twice, or it is not
    clear which average is meant.
    """
    # A path may be a str, which is a sequence as well.
    given = cast(Sequence[UserPath], sources if isinstance(sources, list | tuple) else [sources])
    paths = [path for source in given for path in _checkpoints_at(as_path(source), verify)]
    if latest is not None:
        if isinstance(latest, bool) or not isinstance(latest, int) or latest < 1:
            raise ValueError(f"dist_asgd: latest must be a number from 1 on, got {latest!r}.")
        paths = paths[-latest:]
    known: dict[str, AnyPath] = {}
    for path in paths:
        # A folder's link `latest` leads to one of its checkpoints.
        place = str(path if is_store(path) else Path(path).resolve())
        if place in known:
            raise ValueError(
                f"dist_asgd: {path} and {known[place]} are the same checkpoint, which would count twice: name each "
                f"once. Weights (--weights) let one count for more."
            )
        known[place] = path
    opened = [CheckpointContents(path, verify=verify, prefix=prefix) for path in paths]
    return opened if last and average is None else [with_average(contents, average) for contents in opened]


def _checkpoints_at(source: AnyPath, verify: bool) -> list[AnyPath]:
    """Return the checkpoints in the folder ``source``, oldest first, or ``source`` itself if it is no such folder."""
    if is_marked(source) or not (is_store(source) or source.is_dir()):
        return [source]
    # Those that have lost their manifest are not whole; without hashes nobody looks for one.
    found = [path for _, path in steps_in(source)] if verify else []
    return found or checkpoints_in(source) or [source]
