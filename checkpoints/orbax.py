"""What makes a directory of chunks an Orbax checkpoint of zarr version 3: its metadata.

Knows no weights. Arrays lie side by side, one directory each, without OCDBT: so a chunk is a file
that can be written under its final name when it is whole, and read with nothing but pread.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from checkpoints.layout import CHUNK_PREFIX, Grid

TREE_NAME = "_METADATA"
STEP_NAME = "_CHECKPOINT_METADATA"
ARRAY_NAME = "zarr.json"
_DTYPES = {"F8_E4M3": "float8_e4m3fn", "BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_HANDLER = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
_DICT_KEY = 2  # Orbax's number for a key of a dictionary


def array_json(dtype: str, grid: Grid) -> bytes:
    """zarr.json of an array whose chunks are its elements in C order, little-endian, uncompressed."""
    layout = {} if dtype == "F8_E4M3" else {"configuration": {"endian": "little"}}
    content = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": grid.shape,
        "data_type": _DTYPES[dtype],
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": grid.chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [{"name": "bytes", **layout}],
        "fill_value": 0.0,
        "attributes": {},
    }
    assert CHUNK_PREFIX == "c", "the default encoding's prefix"
    return json.dumps(content, indent=1).encode()


def step_json() -> bytes:
    """_CHECKPOINT_METADATA: that there is a tree, and nothing that differs from one run to the next."""
    return json.dumps(
        {
            "item_handlers": _HANDLER,
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": None,
            "commit_timestamp_nsecs": None,
            "custom_metadata": {},
        },
        indent=1,
    ).encode()


def tree_json(grids: Mapping[str, Grid]) -> bytes:
    """_METADATA of a flat dictionary of arrays."""
    tree: dict[str, Any] = {
        f"('{path}',)": {
            "key_metadata": [{"key": path, "key_type": _DICT_KEY}],
            "value_metadata": {
                "value_type": "jax.Array",
                "skip_deserialize": False,
                "write_shape": grid.shape,
            },
        }
        for path, grid in sorted(grids.items())
    }
    content = {
        "tree_metadata": tree,
        "use_ocdbt": False,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    return json.dumps(content, indent=1).encode()
