"""Every storage of a frozen weight under its word in a profile or flag.

A store's module is imported when the first weight is stored, so that a machine without its
package runs everything else.
"""

import importlib

from torch import Tensor

from peft.store import Store

STORES = {  # word: (module, class)
    "nf4": ("peft.store_bnb", "FourBitStore"),
    "nf4_double": ("peft.store_bnb", "FourBitStore"),
    "fp4": ("peft.store_bnb", "FourBitStore"),
    "fp4_double": ("peft.store_bnb", "FourBitStore"),
    "int8": ("peft.store_int8", "Int8Store"),
    "fp8": ("peft.store_fp8", "Fp8Store"),
    "fp6": ("peft.store_fpx", "PackedFloatStore"),
    "fp6_e2m3": ("peft.store_fpx", "PackedFloatStore"),
    "fp5": ("peft.store_fpx", "PackedFloatStore"),
}


def store_class(kind: str) -> type[Store]:
    """The class behind a word of STORES."""
    module, name = STORES[kind]
    cls = getattr(importlib.import_module(module), name)
    assert issubclass(cls, Store)
    return cls


def make_store(kind: str, weight: Tensor) -> Store:
    """Quantize a weight [out, in] of any float dtype where it lies.

    Raises:
        RuntimeError: a package that the store needs is missing.
    """
    return store_class(kind)(kind, weight)


def stored_size(kind: str, out_features: int, in_features: int) -> int:
    """Bytes that a weight [out, in] will occupy, without making it."""
    return store_class(kind).size(kind, out_features, in_features)
