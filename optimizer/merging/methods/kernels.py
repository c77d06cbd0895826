"""The blends' arithmetic on a CPU, compiled: each number is read once, blended in float32, rounded once and written.

torch passes over a block anew for every elementwise step. Here all steps are made on a few thousand numbers while they
lie in the nearest cache, so that a merge takes as long as memory does. The walks in torch mean the same, and serve
other devices. numba compiles a kernel when it is first used, and keeps it on disk. All kernels are in this one file:
what is on disk is made anew when a kernel's own file changes, and not when one changes that it calls into.

Arrays are flat; bfloat16 is given as its bits in uint16, float16 as its bits in int16 (`bits_of`). What writes returns
the largest magnitude before rounding, as the bits of a float32 (see OVERFLOW). Loops are simple enough to become vector
instructions, hence the buffers, and the many short loops over one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload
from torch import Tensor

from optimizer.merging.methods.randomness import GOLDEN, MIX_1, MIX_2

Array = np.ndarray[Any, np.dtype[Any]]
F16, F32, I16, I32 = ir.HalfType(), ir.FloatType(), ir.IntType(16), ir.IntType(32)

CHUNK = 1 << 11  # numbers at a time: a handful of float32 buffers stay in a core's nearest cache
INFINITY = 0x7F800000  # the bits of a float32
# the bits of the least float32 that a type rounds to infinity
OVERFLOW = {torch.bfloat16: 0x7F7F8000, torch.float16: 0x477FF000, torch.float32: INFINITY}
WHOLE, CUT, CHANCE, MASK = range(4)  # what prunes a delta: nothing, its magnitudes, a stream of numbers, a given mask

# How one expert's delta is pruned, and counted. low, high: magnitudes between which it is kept, and how many of the
# numbers at each, in the order of memory, still count as above it; below: of 65,536ths that keep an element.
PRUNE = np.dtype(
    [
        ("kind", np.int32),
        ("low", np.float32),
        ("low_left", np.int64),
        ("high", np.float32),
        ("high_left", np.int64),
        ("seed", np.uint64),
        ("below", np.int32),
        ("factor", np.float32),
        ("weight", np.float32),
    ]
)


def bits_of(tensor: Tensor) -> Array:
    """Return the flat numbers of a contiguous CPU tensor, or their bits where numpy has no such type; no copy."""
    flat = tensor.detach().reshape(-1)
    if tensor.dtype == torch.bfloat16:
        return flat.view(torch.uint16).numpy()
    return flat.view(torch.int16).numpy() if tensor.dtype == torch.float16 else flat.numpy()


def _kernel(function: Callable[..., Any]) -> Any:
    try:
        return njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:  # there is no folder that the cache can be written to
        return njit(nogil=True, error_model="numpy")(function)


def _inlined(function: Callable[..., Any]) -> Any:
    return njit(forceinline=True, error_model="numpy")(function)


# Numbers and their bits


def _in_llvm(result: Any, *given: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make of a function of llvmlite's builder and values one that kernels can call, with these numba types."""

    def wrap(function: Callable[..., Any]) -> Any:
        def typed(typing: Any, *arguments: Any) -> Any:
            return result(*given), lambda context, builder, signature, values: function(builder, *values)

        names = ["typing", *(f"value_{i}" for i in range(len(given)))]
        parameters = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        vars(typed)["__signature__"] = Signature(parameters)  # numba asks how many values there are
        return intrinsic(typed)

    return wrap


@_in_llvm(types.float32, types.uint16)
def _of_bfloat16(builder: Any, bits: Any) -> Any:
    return builder.bitcast(builder.shl(builder.zext(bits, I32), I32(16)), F32)


@_in_llvm(types.uint16, types.float32)
def _to_bfloat16(builder: Any, number: Any) -> Any:
    """Round to the nearest, and of two to the even one. A NaN may come out as another number."""
    bits = builder.bitcast(number, I32)
    up = builder.add(I32(0x7FFF), builder.and_(builder.lshr(bits, I32(16)), I32(1)))
    return builder.trunc(builder.lshr(builder.add(bits, up), I32(16)), I16)


@_in_llvm(types.float32, types.int16)
def _of_float16(builder: Any, bits: Any) -> Any:
    return builder.fpext(builder.bitcast(bits, F16), F32)


@_in_llvm(types.int16, types.float32)
def _to_float16(builder: Any, number: Any) -> Any:
    return builder.bitcast(builder.fptrunc(number, F16), I16)


@_in_llvm(types.int32, types.float32)
def _magnitude(builder: Any, number: Any) -> Any:
    """Return the bits of |number|, which sort as the magnitudes do, NaN last."""
    return builder.and_(builder.bitcast(number, I32), I32(0x7FFFFFFF))


@_in_llvm(types.int32, types.int32, types.int32)
def _larger(builder: Any, one: Any, other: Any) -> Any:
    return builder.select(builder.icmp_signed(">", one, other), one, other)


def _read(array: Array, i: int) -> Any:
    """Read the number at a place, as float32."""


def _write(array: Array, i: int, number: Any, worst: Any) -> Any:
    """Round a float32 to the array's type; return the larger of `worst` and its magnitude."""


@overload(_read, jit_options={"forceinline": True})
def _read_as(array: Any, i: Any) -> Any:
    def bfloat16(array: Any, i: Any) -> Any:
        return _of_bfloat16(array[i])

    def float16(array: Any, i: Any) -> Any:
        return _of_float16(array[i])

    def float32(array: Any, i: Any) -> Any:
        return array[i]

    return {types.uint16: bfloat16, types.int16: float16}.get(array.dtype, float32)


@overload(_write, jit_options={"forceinline": True})
def _write_as(array: Any, i: Any, number: Any, worst: Any) -> Any:
    def bfloat16(array: Any, i: Any, number: Any, worst: Any) -> Any:
        array[i] = _to_bfloat16(number)
        return _larger(worst, _magnitude(number))

    def float16(array: Any, i: Any, number: Any, worst: Any) -> Any:
        array[i] = _to_float16(number)
        return _larger(worst, _magnitude(number))

    def float32(array: Any, i: Any, number: Any, worst: Any) -> Any:
        array[i] = number
        return _larger(worst, _magnitude(number))

    return {types.uint16: bfloat16, types.int16: float16}.get(array.dtype, float32)


@_inlined
def _load_deltas(base: Array, experts: Any, start: int, n: int, b: Array, deltas: Array) -> None:
    part = base[start : start + n]
    for i in range(n):
        b[i] = _read(part, i)
    for e in range(len(experts)):
        expert, delta = experts[e][start : start + n], deltas[e]
        for i in range(n):
            delta[i] = _read(expert, i) - b[i]


# Lines and mixtures


@_kernel
def line(base: Array, expert: Array, weight: Any, out: Array) -> Any:
    """Compute base + weight * (expert - base), from the nearer end, so that both ends are exact."""
    worst = np.int32(0)
    if weight < 0.5:
        for i in range(out.size):
            b = _read(base, i)
            worst = _write(out, i, b + weight * (_read(expert, i) - b), worst)
    else:
        rest = np.float32(1) - weight
        for i in range(out.size):
            x = _read(expert, i)
            worst = _write(out, i, x - rest * (x - _read(base, i)), worst)
    return worst


@_kernel
def mixture(base: Array, experts: Any, ours: Any, theirs: Array, out: Array) -> Any:
    """Compute ours * base + sum of theirs * expert."""
    worst = np.int32(0)
    total = np.empty(CHUNK, np.float32)
    for start in range(0, out.size, CHUNK):
        n = min(CHUNK, out.size - start)
        part, written = base[start : start + n], out[start : start + n]
        for i in range(n):
            total[i] = ours * _read(part, i)
        for e in range(len(experts)):
            expert, factor = experts[e][start : start + n], theirs[e]
            for i in range(n):
                total[i] += factor * _read(expert, i)
        for i in range(n):
            worst = _write(written, i, total[i], worst)
    return worst


@_kernel
def scaled(base: Array, factor: Any, out: Array) -> Any:
    """Compute factor * base."""
    worst = np.int32(0)
    for i in range(out.size):
        worst = _write(out, i, factor * _read(base, i), worst)
    return worst


@_kernel
def deltas_sum(base: Array, experts: Any, factors: Array, out: Array) -> Any:
    """Compute base + sum of factor * (expert - base)."""
    worst = np.int32(0)
    if len(experts) == 2:  # the usual number is a third faster without buffers
        one, two, factor, other = experts[0], experts[-1], factors[0], factors[-1]
        for i in range(out.size):
            ours = _read(base, i)
            worst = _write(out, i, ours + (factor * (_read(one, i) - ours) + other * (_read(two, i) - ours)), worst)
        return worst
    b, total = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    for start in range(0, out.size, CHUNK):
        n = min(CHUNK, out.size - start)
        part, written = base[start : start + n], out[start : start + n]
        for i in range(n):
            b[i] = _read(part, i)
            total[i] = 0
        for e in range(len(experts)):
            expert, factor = experts[e][start : start + n], factors[e]
            for i in range(n):
                total[i] += factor * (_read(expert, i) - b[i])
        for i in range(n):
            worst = _write(written, i, b[i] + total[i], worst)
    return worst


# Pruned deltas


@_kernel
def pruned_sum(base: Array, experts: Any, prunes: Array, masks: Array, place: int, out: Array) -> Any:
    """Compute base + sum of factor * what is kept of (expert - base).

    Args:
        prunes: (experts,) of PRUNE; what is left of equal magnitudes is counted down, for the next part of a tensor.
        masks: (experts, out.size or more) of 1 and 0 where a delta's kind is MASK, else anything.
        place: of the arrays' first element in its tensor, where the numbers of CHANCE are drawn from.
    """
    worst = np.int32(0)
    b, total = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    deltas = np.empty((len(experts), CHUNK), np.float32)
    words = np.empty(CHUNK // 4 + 1, np.uint64)
    for start in range(0, out.size, CHUNK):
        n = min(CHUNK, out.size - start)
        written = out[start : start + n]
        _load_deltas(base, experts, start, n, b, deltas)
        total[:n] = 0
        for e in range(len(experts)):
            delta, factor = deltas[e], prunes[e].factor
            _prune(delta, n, prunes, e, masks, start, place, words)
            for i in range(n):
                total[i] += factor * delta[i]
        for i in range(n):
            worst = _write(written, i, b[i] + total[i], worst)
    return worst


@_kernel
def agreeing_sum(
    base: Array, experts: Any, prunes: Array, masks: Array, place: int, scale: Any, normalize: bool, out: Array
) -> Any:
    """Compute base + scale * sum of those factor * delta that have the sign of the sum of all (0 counts as +).

    Args:
        normalize: divide by the weights of those that agree, where they do not sum to 0.
    """
    worst = np.int32(0)
    b, deltas = np.empty(CHUNK, np.float32), np.empty((len(experts), CHUNK), np.float32)
    total, agreed, divisor = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    words = np.empty(CHUNK // 4 + 1, np.uint64)
    for start in range(0, out.size, CHUNK):
        n = min(CHUNK, out.size - start)
        written = out[start : start + n]
        _load_deltas(base, experts, start, n, b, deltas)
        total[:n] = 0
        agreed[:n] = 0
        for e in range(len(experts)):
            delta, factor = deltas[e], prunes[e].factor
            _prune(delta, n, prunes, e, masks, start, place, words)
            for i in range(n):
                delta[i] *= factor
                total[i] += delta[i]
        for e in range(len(experts)):
            delta = deltas[e]
            for i in range(n):
                agreed[i] += delta[i] if (delta[i] > 0) == (total[i] >= 0) else np.float32(0)
        if normalize:
            divisor[:n] = 0
            for e in range(len(experts)):
                delta, weight = deltas[e], prunes[e].weight
                for i in range(n):
                    agrees = (delta[i] > 0) == (total[i] >= 0) and delta[i] != 0
                    divisor[i] += weight if agrees else np.float32(0)
            for i in range(n):
                agreed[i] /= divisor[i] if divisor[i] != 0 else np.float32(1)
        for i in range(n):
            worst = _write(written, i, b[i] + scale * agreed[i], worst)
    return worst


@_inlined
def _prune(delta: Array, n: int, prunes: Array, e: int, masks: Array, start: int, place: int, words: Array) -> None:
    kind = prunes[e].kind
    if kind == CUT:
        _keep_band(delta, n, prunes, e)
    elif kind == CHANCE:
        steps, below = _steps(words, prunes[e].seed, place + start, n), prunes[e].below
        for i in range(n):
            delta[i] = delta[i] if np.int32(steps[i]) < below else np.float32(0)
    elif kind == MASK:
        mask = masks[e, start : start + n]
        for i in range(n):
            delta[i] *= mask[i]


@_kernel
def _keep_band(delta: Array, n: int, prunes: Array, e: int) -> None:
    """Zero what is below low or above high; of what is at them as many, in order, as still count as above them stay."""
    low, low_left = _magnitude(prunes[e].low), prunes[e].low_left
    high, high_left = _magnitude(prunes[e].high), prunes[e].high_left
    lowest = low if low_left > 0 else np.int32(low + 1)
    if low_left == 0 and high_left == 0:
        for i in range(n):
            size = _magnitude(delta[i])
            delta[i] = delta[i] if (size >= lowest) & (size <= high) else np.float32(0)
        return
    at_low, at_high = np.int32(0), np.int32(0)
    for i in range(n):
        size = _magnitude(delta[i])
        delta[i] = delta[i] if (size >= lowest) & (size <= high) else np.float32(0)
        at_low += np.int32(1) if size == low else np.int32(0)
        at_high += np.int32(1) if size == high else np.int32(0)
    if 0 < low_left < at_low:
        _zero_equal(delta, n, low, low_left, at_low)
    if high_left > 0 and at_high > 0:
        _zero_equal(delta, n, high, 0, high_left)
    prunes[e].low_left = max(low_left - at_low, 0)
    prunes[e].high_left = max(high_left - at_high, 0)


@_kernel
def _zero_equal(numbers: Array, n: int, size: Any, first: int, stop: int) -> None:
    """Zero the numbers of one magnitude from the first-th of them on, up to the stop-th."""
    seen = 0
    for i in range(n):
        if _magnitude(numbers[i]) == size:
            if first <= seen < stop:
                numbers[i] = 0
            seen += 1


@_kernel
def _mask_above(variance: Array, n: int, threshold: Any, left: int, mask: Array) -> Any:
    """Fill with 1.0 above the threshold, and at it for the first `left`, else 0.0; return how many are left then."""
    lowest = _magnitude(threshold) if left > 0 else np.int32(_magnitude(threshold) + 1)
    equal = np.int32(0)
    for i in range(n):
        mask[i] = np.float32(1) if _magnitude(variance[i]) >= lowest else np.float32(0)
        equal += np.int32(1) if variance[i] == threshold else np.int32(0)
    if 0 < left < equal:
        seen = 0
        for i in range(n):
            if variance[i] == threshold:
                seen += 1
                mask[i] = np.float32(1) if seen <= left else np.float32(0)
    return max(left - equal, 0)


@_inlined
def _steps(words: Array, seed: Any, place: int, n: int) -> Array:
    """Draw `randomness.random_steps` as uint16, in the memory of `words`, which holds n // 4 + 1 of 64 bits."""
    first = place // 4
    for i in range((place + n + 3) // 4 - first):
        x = seed + np.uint64(first + i + 1) * np.uint64(GOLDEN)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX_1)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX_2)
        words[i] = x ^ (x >> np.uint64(31))
    return words.view(np.uint16)[place - 4 * first :]


@_kernel
def magnitudes(base: Array, expert: Array, out: Array) -> None:
    """Compute |expert - base| as the bits of its float32 in int32, which sort as the numbers do."""
    for i in range(out.size):
        out[i] = _magnitude(_read(expert, i) - _read(base, i))


@_kernel
def rank_mask(magnitude: Array, ranked: Array, seed: Any, place: int, scale: Any, shift: Any, mask: Array) -> None:
    """Fill with 1.0 where a number from 0 to 1 asks for a rank that the magnitude reaches in its row, as `pruning`.

    Args:
        magnitude: (rows, width) of int32.
        ranked: (rows, width + 2), its rows sorted, between -1 and INFINITY.
        scale, shift: twice the rank asked for, plus 2, is scale * number in 65,536ths + shift.
        mask: (rows * width,) of float32.
    """
    rows, width = magnitude.shape
    words, asked = np.empty(width // 4 + 2, np.uint64), np.empty(width, np.int32)
    lowest, highest = np.float32(0), np.float32(2 * width + 1)
    for row in range(rows):
        steps, sizes, ascending = _steps(words, seed, place + row * width, width), magnitude[row], ranked[row]
        kept = mask[row * width : (row + 1) * width]
        for i in range(width):
            halves = np.float32(steps[i]) * scale + shift
            halves = halves if halves > lowest else lowest
            asked[i] = np.int32(halves if halves < highest else highest)
        for i in range(width):
            coin = np.int32(asked[i] & 1)
            rank = np.int32(np.int32(asked[i] >> 1) - coin)  # from -1 to width
            asked[i] = np.int32(ascending[np.uint32(rank + 1)] + coin)
        for i in range(width):
            kept[i] = np.float32(1) if sizes[i] >= asked[i] else np.float32(0)


# Element-wise selection among experts


@_inlined
def _variances(deltas: Array, n: int, mean: Array, variance: Array) -> None:
    """Compute the mean square distance of the experts' numbers to their mean, in the steps of `fusion._variance`."""
    if len(deltas) == 2:
        one, other = deltas[0], deltas[1]
        for i in range(n):
            half = (one[i] - other[i]) * np.float32(0.5)
            variance[i] = half * half
        return
    count = np.float32(len(deltas))
    mean[:n] = 0
    variance[:n] = 0
    for e in range(len(deltas)):
        delta = deltas[e]
        for i in range(n):
            mean[i] += delta[i]
    for i in range(n):
        mean[i] /= count
    for e in range(len(deltas)):
        delta = deltas[e]
        for i in range(n):
            away = delta[i] - mean[i]
            variance[i] += away * away
    for i in range(n):
        variance[i] /= count


@_inlined
def _select(deltas: Array, n: int, threshold: Any, left: int, mean: Array, variance: Array, mask: Array) -> Any:
    """Set the mask to 1.0 where the experts vary as much as is asked for, else 0.0."""
    if threshold < 0:
        mask[:n] = 1
        return left
    _variances(deltas, n, mean, variance)
    return _mask_above(variance, n, threshold, left, mask)


@_kernel
def energies(base: Array, experts: Any, threshold: Any, left: int) -> Array:
    """Sum the squares of the deltas where they are selected: (experts,) in float64.

    Args:
        threshold, left: least variance, and how many of the elements at it are selected; negative: all are.
    """
    sums = np.zeros(len(experts), np.float64)
    b, deltas = np.empty(CHUNK, np.float32), np.empty((len(experts), CHUNK), np.float32)
    mean, variance, mask = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    lanes = np.empty(16, np.float32)
    for start in range(0, base.size, CHUNK):
        n = min(CHUNK, base.size - start)
        _load_deltas(base, experts, start, n, b, deltas)
        left = _select(deltas, n, threshold, left, mean, variance, mask)
        for e in range(len(experts)):
            delta = deltas[e]
            lanes[:] = 0
            for i in range(n // 16):
                for lane in range(16):
                    kept = delta[16 * i + lane] * mask[16 * i + lane]
                    lanes[lane] += kept * kept
            for i in range(n // 16 * 16, n):
                lanes[0] += delta[i] * mask[i] * delta[i] * mask[i]
            for lane in range(16):
                sums[e] += lanes[lane]
    return sums


@_kernel
def selected_sum(
    base: Array, experts: Any, threshold: Any, left: int, weights: Array, shares: Array, out: Array
) -> Any:
    """Compute base + the mean, by shares, of the weighted deltas that have the sign of their sum, where selected.

    Args:
        threshold, left: as of `energies`.
    """
    worst = np.int32(0)
    b, deltas = np.empty(CHUNK, np.float32), np.empty((len(experts), CHUNK), np.float32)
    mean, variance, mask = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    for start in range(0, out.size, CHUNK):
        n = min(CHUNK, out.size - start)
        written = out[start : start + n]
        _load_deltas(base, experts, start, n, b, deltas)
        left = _select(deltas, n, threshold, left, mean, variance, mask)
        total, merged, divisor = mean, variance, mask
        total[:n] = 0
        for e in range(len(experts)):
            delta, weight = deltas[e], weights[e]
            for i in range(n):
                delta[i] *= weight * mask[i]
                total[i] += delta[i]
        merged[:n] = 0
        divisor[:n] = 0
        for e in range(len(experts)):
            delta, share = deltas[e], shares[e]
            for i in range(n):
                part = share if ((delta[i] > 0) if total[i] >= 0 else (delta[i] < 0)) else np.float32(0)
                merged[i] += part * delta[i]
                divisor[i] += part
        for i in range(n):
            worst = _write(written, i, b[i] + merged[i] / max(divisor[i], np.float32(1e-6)), worst)
    return worst


@_kernel
def shared_and_unique(base: Array, experts: Any, epsilon: Any, weights: Array, amplified: Array, out: Array) -> Any:
    """Compute base + what one expert changed by more than epsilon, amplified, and the mean of what several did."""
    worst = np.int32(0)
    b, deltas = np.empty(CHUNK, np.float32), np.empty((len(experts), CHUNK), np.float32)
    count, total = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    for start in range(0, out.size, CHUNK):
        n = min(CHUNK, out.size - start)
        written = out[start : start + n]
        _load_deltas(base, experts, start, n, b, deltas)
        count[:n] = 0
        total[:n] = 0
        for e in range(len(experts)):
            delta = deltas[e]
            for i in range(n):
                changed = abs(delta[i]) > epsilon
                delta[i] = delta[i] if changed else np.float32(0)
                count[i] += np.float32(1) if changed else np.float32(0)
        for e in range(len(experts)):
            delta, weight, factor = deltas[e], weights[e], amplified[e]
            for i in range(n):
                part = factor if count[i] <= 1 else np.float32(1) / count[i]
                total[i] += weight * part * delta[i]
        for i in range(n):
            worst = _write(written, i, b[i] + total[i], worst)
    return worst


@_kernel
def step(base: Array, expert: Array, longest: Any, weight: Any, out: Array) -> Any:
    """Compute base + weight * (expert - base), the delta no longer than `longest`."""
    worst = np.int32(0)
    for i in range(out.size):
        b = _read(base, i)
        delta = _read(expert, i) - b
        delta = delta if delta < longest else longest
        worst = _write(out, i, b + weight * (delta if delta > -longest else -longest), worst)
    return worst


@_kernel
def important(base: Array, expert: Array, rows: Array, threshold: Any, weight: Any, out: Array) -> Any:
    """Compute base + weight * those deltas that are, times their row's number, at least a threshold long."""
    worst = np.int32(0)
    width = out.size // max(rows.size, 1)
    for row in range(rows.size):
        importance, part = rows[row], slice(row * width, (row + 1) * width)
        ours, theirs, place = base[part], expert[part], out[part]
        for i in range(width):
            b = _read(ours, i)
            delta = _read(theirs, i) - b
            taken = abs(delta) * importance >= threshold
            worst = _write(place, i, b + weight * (delta if taken else np.float32(0)), worst)
    return worst
