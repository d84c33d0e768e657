"""What lars_gpu.py runs on a GPU, in Triton: the norms and the update of many tensors in one launch
each, whatever their shapes.

Formula:  lars.py.
Contract: imported by lars_gpu.py alone, where Triton is; torch's builds for GPUs bring it. A tensor
          is an entry in lists of addresses and sizes; its values are walked in the order of memory,
          which is the same for its w, g and v. Programs take `CHUNK` values each, those from
          `starts` on of the tensor that `owners` names; squares are added in the tensor's own
          precision within a chunk and in float64 over chunks, always in one order: the same bits in
          every run, and on every rank with the same Triton and kind of GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = 4096  # values
AT_ONCE = 256  # chunks whose sums are added at once


@triton.jit
def _pointers(place, at, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    address = tl.load(place).to(tl.pointer_type(TYPE))
    if ALIGNED:  # the compiler then moves 16 bytes at once
        address = tl.multiple_of(address, 16)
    return address + at


@triton.jit
def _read(pointers, at, size, WHOLE: tl.constexpr):
    if WHOLE:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=at < size, other=0.0)


@triton.jit
def _write(pointers, at, size, values, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(pointers, values)
    else:
        tl.store(pointers, values, mask=at < size)


@triton.jit
def _squares(
    addresses,
    number,
    owner,
    at,
    size,
    settings,
    found,
    JOINT: tl.constexpr,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    w = _read(_pointers(addresses + owner, at, TYPE, ALIGNED), at, size, WHOLE)
    g = _read(_pointers(addresses + number + owner, at, TYPE, ALIGNED), at, size, WHOLE)
    if JOINT:
        g += tl.load(settings + 1).to(TYPE) * w
    tl.store(found, tl.sum(w * w).to(tl.float64))
    tl.store(found + 1, tl.sum(g * g).to(tl.float64))


@triton.jit
def _update(
    addresses,
    number,
    owner,
    at,
    size,
    into,
    settings,
    NESTEROV: tl.constexpr,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    w_pointers = _pointers(addresses + owner, at, TYPE, ALIGNED)
    v_pointers = _pointers(addresses + 2 * number + owner, at, TYPE, ALIGNED)
    w = _read(w_pointers, at, size, WHOLE)
    g = _read(_pointers(addresses + number + owner, at, TYPE, ALIGNED), at, size, WHOLE)
    v = _read(v_pointers, at, size, WHOLE)
    momentum, decay, out = (
        tl.load(settings).to(TYPE),
        tl.load(settings + 1).to(TYPE),
        tl.load(settings + 2).to(TYPE),
    )
    u = tl.load(into + owner).to(TYPE) * (g + decay * w)
    v = momentum * v + u
    moved = v
    if NESTEROV:
        moved = momentum * v + u
    _write(v_pointers, at, size, v, WHOLE)
    _write(w_pointers, at, size, w - out * moved, WHOLE)


@triton.jit
def squares(
    addresses,  # int64 (3, number): of every w, g and v
    number,
    sizes,
    owners,
    starts,
    settings,  # float64 (3,): as for `update`
    found,  # float64 (chunks, 2): Σw² and Σg² of each chunk; JOINT: Σ(g + β·w)² in the place of Σg²
    JOINT: tl.constexpr,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The squares of each chunk; one program a chunk."""
    chunk = tl.program_id(0)
    owner = tl.load(owners + chunk)
    start, size = tl.multiple_of(tl.load(starts + chunk), CHUNK), tl.load(sizes + owner)
    at = start + tl.arange(0, CHUNK)
    if start + CHUNK <= size:
        _squares(
            addresses,
            number,
            owner,
            at,
            size,
            settings,
            found + 2 * chunk,
            JOINT,
            TYPE,
            ALIGNED,
            True,
        )
    else:
        _squares(
            addresses,
            number,
            owner,
            at,
            size,
            settings,
            found + 2 * chunk,
            JOINT,
            TYPE,
            ALIGNED,
            False,
        )


@triton.jit
def roots(
    found,
    begins,  # int64 (number + 1,): the first chunk of each tensor
    number,
    norms,  # float64 (2, number)
    AT_ONCE: tl.constexpr,
):
    """The norms of each tensor from the squares of its chunks; one program a tensor."""
    owner = tl.program_id(0)
    begin, end = tl.load(begins + owner), tl.load(begins + owner + 1)
    chunks = tl.arange(0, AT_ONCE)
    w, g = tl.zeros((AT_ONCE,), tl.float64), tl.zeros((AT_ONCE,), tl.float64)
    for place in range(begin, end, AT_ONCE):
        inside = place + chunks < end
        w += tl.load(found + 2 * (place + chunks), mask=inside, other=0.0)
        g += tl.load(found + 2 * (place + chunks) + 1, mask=inside, other=0.0)
    tl.store(norms + owner, tl.sqrt(tl.sum(w)))
    tl.store(norms + number + owner, tl.sqrt(tl.sum(g)))


@triton.jit
def update(
    addresses,
    number,
    sizes,
    owners,
    starts,
    norms,  # float64 (2, number)
    into,  # float64 (number,): what multiplies g + β·w on its way into v
    settings,  # float64 (3,): m, β, and what multiplies v on its way into w
    NESTEROV: tl.constexpr,
    TYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Move w and v; one program a chunk."""
    chunk = tl.program_id(0)
    owner = tl.load(owners + chunk)
    start, size = tl.multiple_of(tl.load(starts + chunk), CHUNK), tl.load(sizes + owner)
    at = start + tl.arange(0, CHUNK)
    if tl.load(norms + number + owner) == 0.0:
        size = size * 0  # a gradient of zeros leaves its tensor alone
    if start + CHUNK <= size:
        _update(addresses, number, owner, at, size, into, settings, NESTEROV, TYPE, ALIGNED, True)
    else:
        _update(addresses, number, owner, at, size, into, settings, NESTEROV, TYPE, ALIGNED, False)
