"""Types of the compiled module, which snapshots.c documents."""

from array import array

from torch import Tensor

VERSION: int

def describe(tensors: list[Tensor | None], exchange: object) -> bytes: ...
def unchanged(tensors: list[Tensor | None], described: bytes, exchange: object) -> bool: ...
def gradients(
    params: list[Tensor | None],
    described: bytes,
    exchange: object,
    type: type,
    is_neg: object,
    addresses: array[int],
) -> tuple[list[Tensor | None], bytes, bool]: ...
def shows(shown: dict[Tensor, dict[str, Tensor]], keys: tuple[str, ...], kept: list[object]) -> bool: ...
def same(a: list[Tensor], b: list[Tensor]) -> bool: ...
def pick(addresses: array[int], picks: array[int], out: array[int]) -> None: ...
