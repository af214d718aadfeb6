"""Nested training state as JSON and tensors, without pickle.

A tree holds None, bool, int of any size, float (inf and nan too), str, list, tuple, dict with str or int keys, Counter,
and dense tensors of the types in `DTYPES`. Values come back exactly: tensors on the CPU, contiguous, each with memory
of its own, without requires_grad. A subclass (OrderedDict, namedtuple, IntEnum) comes back as the type it extends.

None, bool, str, small int, finite float and list are themselves in JSON; so is a dict whose keys are all str, none with
a leading "$". The rest are objects with one key: {"$tensor": name}, {"$int": "-0x1f"}, {"$float": "nan"},
{"$tuple": [...]}, {"$dict": [[key, value], ...]}, {"$counter": [[key, value], ...]}.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from dtrain.errors import DataError

_MAX_DEPTH = 64
_EXACT_INT = 2**53  # other JSON readers round beyond it, and Python's stops at 4300 digits: hex text there
_SURROGATE = re.compile("[\ud800-\udfff]")  # a pair of them would come back from JSON as one character
# What safetensors both writes and reads: 0.8.0 writes float8_e8m0fnu and then cannot read it.
DTYPES = {torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64}
DTYPES |= {torch.int8, torch.int16, torch.int32, torch.int64}
DTYPES |= {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64}
DTYPES |= {torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz}


def dumps(tree: object) -> bytes:
    """A tree as bytes: those of a safetensors file whose metadata hold the structure.

    Raises:
        DataError: a value that cannot be stored.
    """
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(encode(tree, ("tree",), tensors), allow_nan=False)
    return to_bytes(tensors, "tree", {"structure": structure})


def loads(data: bytes, what: str) -> Any:
    """The inverse of `dumps`; `what` names the source in errors.

    Raises:
        DataError: bytes that `dumps` does not write.
    """
    try:
        size = int.from_bytes(data[:8], "little")
        structure = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["structure"])
    except (ValueError, LookupError, TypeError, RecursionError) as exc:
        raise DataError(f"{what}: no tree: {exc!r}") from None
    return decode(structure, from_bytes(data, Path(what)), Path(what))


def encode(value: object, where: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    """The JSON for a value; its tensors go to `tensors` under names such as "state.0.exp_avg"."""
    if len(where) > _MAX_DEPTH:
        raise DataError(f"{'.'.join(where)}: nested deeper than {_MAX_DEPTH}, or a cycle")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        if _SURROGATE.search(value):
            raise DataError(f"{'.'.join(where)}: {value!r} holds a lone surrogate, which is not text")
        return value
    if isinstance(value, int):
        return value if abs(value) <= _EXACT_INT else {"$int": hex(value)}
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(float(value))}
    if isinstance(value, Tensor):
        name = ".".join(where[1:]) or "tensor"
        while name in tensors or name == "__metadata__":  # the second is the format's own
            name += "_"
        tensors[name] = value
        return {"$tensor": name}
    if isinstance(value, (list, tuple)):
        items = [encode(item, (*where, str(index)), tensors) for index, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return _encode_dict(value, where, tensors)
    raise DataError(
        f"{'.'.join(where)}: cannot store a {type(value).__module__}.{type(value).__qualname__}; "
        "use tensors, numbers, str, bool, None, and lists, tuples or dicts of them"
    )


def _encode_dict(value: dict[Any, Any], where: tuple[str, ...], tensors: dict[str, Tensor]) -> dict[str, Any]:
    pairs = []
    for key, item in value.items():
        if not isinstance(key, (str, int)):
            raise DataError(f"{'.'.join(where)}: the key {key!r} is neither str nor int")
        pairs.append([encode(key, where, tensors), encode(item, (*where, str(key)), tensors)])
    if isinstance(value, Counter):
        return {"$counter": pairs}
    if all(isinstance(key, str) and not key.startswith("$") for key in value):
        return dict(pairs)
    return {"$dict": pairs}


def decode(node: Any, tensors: dict[str, Tensor], file: Path) -> Any:
    """Inverse of `encode`; takes the tensors that it uses out of `tensors`."""
    if isinstance(node, list):
        return [decode(item, tensors, file) for item in node]
    if not isinstance(node, dict):
        return node
    if not any(key.startswith("$") for key in node):
        return {key: decode(item, tensors, file) for key, item in node.items()}
    try:
        ((tag, body),) = node.items()
        return _decode_tag(tag, body, tensors, file)
    except (ArithmeticError, LookupError, TypeError, ValueError) as exc:
        raise DataError(f"{file}: bad node {str(node)[:80]}: {exc!r}") from None


def _decode_tag(tag: str, body: Any, tensors: dict[str, Tensor], file: Path) -> Any:
    if tag == "$tensor":
        return tensors.pop(body)
    if tag == "$int":
        return int(body, 16)
    if tag == "$float":
        return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[body]
    items = decode(body, tensors, file)
    if tag not in ("$tuple", "$dict", "$counter") or not isinstance(items, list):
        raise ValueError("unknown tag or no list")
    if tag == "$tuple":
        return tuple(items)
    pairs = dict(items)
    if len(pairs) != len(items) or not all(isinstance(key, (str, int)) for key in pairs):
        raise ValueError("keys repeat, or are neither str nor int")
    return Counter(pairs) if tag == "$counter" else pairs


def to_bytes(tensors: dict[str, Tensor], where: str, metadata: dict[str, str] | None = None) -> bytes:
    """A safetensors file with these tensors. Memory: one copy of them all, and of those to be cloned."""
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided or tensor.device.type == "meta":
            kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}"
            raise DataError(f"{where}: {name}: cannot store a tensor of {kind}; convert it first")
        dense = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
        storage = dense.untyped_storage().data_ptr()
        plain[name] = dense.clone() if storage in storages else dense
        storages.add(storage)
    return safetensors.torch.save(plain, metadata)


def from_bytes(data: bytes, file: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except (SafetensorError, LookupError, ValueError, RuntimeError, AssertionError) as exc:
        raise DataError(f"{file}: not a safetensors file that can be read: {exc!r}") from None
