"""CUDA graphs: a captured step gives the bits of the same steps outside, and what cannot be captured is refused."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.gpu.rows import FAIL, NOTE, PASS, Part, one_line
from benchmarks.gpu.streams import backward, params_on
from dist_asgd import ShardedASGD


def run(part: Part) -> None:
    """On CPUs the same steps run without a graph."""
    with part.attempt("captured step"):
        _replay(part)
    if part.cpu:
        part.add("what cannot be captured", NOTE, "needs a GPU")
        return
    with part.attempt("captured step with scalars on the host"):
        params = params_on(part.device, 4, 300)
        optimizer = ShardedASGD(params, lr=1e-3)
        backward(params, 0)
        optimizer.step()
        _refused(part, "captured step with scalars on the host", optimizer.step)
    with part.attempt("captured backward of stage 2"):
        params = params_on(part.device, 4, 300)
        reducing = ShardedASGD(params, lr=1e-3, stage=2)
        backward(params, 0)
        reducing.step()
        reducing.zero_grad()
        # A replay would reduce into buffers that no step looks at.
        _refused(part, "captured backward of stage 2", lambda: backward(params, 1))


def _replay(part: Part) -> None:
    ours, theirs = params_on(part.device, 4, 300), params_on(part.device, 4, 300)
    rates = [torch.tensor(0.1, device=part.device) for _ in range(2)]
    captured = ShardedASGD(ours, lr=rates[0], t0=2, fused=True, capturable=not part.cpu)
    eager = ShardedASGD(theirs, lr=rates[1], t0=2, fused=True)
    for params in (ours, theirs):
        backward(params, 0)
    stream = None if part.cpu else torch.cuda.Stream()  # type: ignore[no-untyped-call]
    for _ in range(3):
        if stream is None:
            captured.step()
        else:
            with torch.cuda.stream(stream):
                captured.step()
        eager.step()
    replay: Callable[[], object] = captured.step
    if stream is not None:
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured.step()
        replay = graph.replay
    for lr in (0.1, 0.05, 0.2):
        for rate in rates:
            rate.fill_(lr)
        replay()
        eager.step()
    part.wait()
    same = all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))
    part.check("captured step, fused, lr on the device: bits of the same steps", same, "parameters differ")


def _refused(part: Part, what: str, call: Callable[[], object]) -> None:
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            call()
    except Exception as error:
        named = "dist_asgd" in str(error)
        part.add(f"{what} is refused", PASS if named else FAIL, one_line(str(error)))
        return
    part.add(f"{what} is refused", FAIL, "it was captured")
