"""Prompts encoded one by one and kept: what a chain is given does not depend on the other chains of its batch."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import PIL.Image
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from rlr_ray.utils.memory import GIB

EMBEDDINGS_BYTES = 2 * GIB  # of prompts' embeddings that are kept in main memory; T5's are megabytes each


class ByRow:
    """A pipeline's `encode_prompt`, called for one prompt at a time; results of one length are put together.

    Of arguments those are rows that are lists of as many texts as the first; a row of None is no list at all, as for no
    negative prompt. Where results have different lengths, as of tokenizers that pad to the longest, all are encoded
    together.
    """

    def __init__(self, encode: Callable[..., Any]):
        self.encode = encode
        self.kept: OrderedDict[str, Any] = OrderedDict()  # in main memory
        self.bytes = 0
        self.two: dict[str, Any] = {}  # results of two prompts, by what is asked for besides

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves = tree_leaves((args, kwargs), is_leaf=_is_texts)
        n = next((len(leaf) for leaf in leaves if _is_texts(leaf)), 0)
        if any(isinstance(leaf, Tensor) for leaf in leaves):
            return self.encode(*args, **kwargs)
        if n <= 1:
            return self._one(args, kwargs)
        texts = list(zip(*(leaf for leaf in leaves if _is_texts(leaf) and len(leaf) == n), strict=True))
        firsts = {row: i for i, row in reversed(list(enumerate(texts)))}
        each = {row: self._one(*_row_of((args, kwargs), n, i)) for row, i in firsts.items()}
        rows = [each[row] for row in texts]
        key = repr((tree_map(_shown, args, is_leaf=_is_texts), tree_map(_shown, kwargs, is_leaf=_is_texts)))
        if key not in self.two:
            self.two[key] = self._one(*_twice(_row_of((args, kwargs), n, 0)))
        try:
            return _together(rows, self.two[key])
        except RuntimeError:  # of different length
            return self.encode(*args, **kwargs)

    def _one(self, args: Any, kwargs: Any) -> Any:
        key = repr(tree_map(_told_apart, (args, sorted(kwargs.items(), key=lambda item: item[0]))))
        if key not in self.kept:
            result = self.encode(*args, **kwargs)
            device = next((x.device for x in tree_leaves(result) if isinstance(x, Tensor)), torch.device("cpu"))
            self._keep(key, (tree_map_only(Tensor, torch.Tensor.cpu, result), device))
        result, device = self.kept[key]
        return tree_map_only(Tensor, lambda x: x.to(device), result)

    def _keep(self, key: str, entry: Any) -> None:
        self.kept[key] = entry
        self.bytes += _bytes(entry)
        while self.bytes > EMBEDDINGS_BYTES and len(self.kept) > 1:
            _, dropped = self.kept.popitem(last=False)
            self.bytes -= _bytes(dropped)


def _bytes(entry: Any) -> int:
    return sum(x.nbytes for x in tree_leaves(entry) if isinstance(x, Tensor))


def _told_apart(x: Any) -> Any:
    """An argument; of a picture its contents, since its repr says where it lies in memory, as others did before it."""
    if not isinstance(x, PIL.Image.Image | numpy.ndarray):
        return x
    pixels = numpy.asarray(x)
    return pixels.shape, str(pixels.dtype), hashlib.sha256(pixels.tobytes()).hexdigest()


def _shown(x: Any) -> Any:
    """An argument without what its texts say."""
    return [text is None for text in x[:1]] if _is_texts(x) else x


def _is_texts(x: Any) -> bool:
    return isinstance(x, list) and bool(x) and all(isinstance(one, str | None) for one in x)


def _row_of(arguments: tuple[Any, Any], n: int, i: int) -> tuple[Any, Any]:
    def row(x: Any) -> Any:
        if not (_is_texts(x) and len(x) == n):
            return x
        return None if x[i] is None else [x[i]]

    args, kwargs = arguments
    return tuple(map(row, args)), {name: row(x) for name, x in kwargs.items()}


def _twice(arguments: tuple[Any, Any]) -> tuple[Any, Any]:
    def double(x: Any) -> Any:
        return x * 2 if _is_texts(x) else x

    args, kwargs = arguments
    return tuple(map(double, args)), {name: double(x) for name, x in kwargs.items()}


def _together(rows: Sequence[Any], twice: Any) -> Any:
    """Results of one prompt each as of all; `twice` is of two, which shows where they stand."""
    one = rows[0]
    if isinstance(one, Tensor):
        if twice.shape == one.shape:  # of no prompt
            return one
        dim = [i for i in range(one.dim()) if twice.shape[i] != one.shape[i]]
        if len(dim) != 1 or one.shape[dim[0]] != 1:
            raise RuntimeError("a prompt has no row of its own here")
        return torch.cat(list(rows), dim[0])
    if not isinstance(one, list | tuple):
        return one
    if len(twice) == 2 * len(one):
        return type(one)(x for row in rows for x in row)
    return type(one)(_together([row[i] for row in rows], twice[i]) for i in range(len(one)))
