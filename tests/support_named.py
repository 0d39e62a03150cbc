"""Named datasets on a loopback Hub, several at once in a fresh interpreter: there the clients see its address."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from hub import Hub
from support_hub import Found
from support_parquet import read_file, run

from shmloader import MultimodalConfig, processors
from shmloader.errors import ShmloaderError
from shmloader.sample import RecordLayout
from shmloader.sources.base import Columns

#: Plans and reads each of several requests for a name, and writes what came of it.
_ASK = """
import json, os, sys
from shmloader.errors import ShmloaderError, to_wire
from shmloader.selection import select
from shmloader.sources import make_plan, open_reader
from shmloader.sources.base import SourceRequest
import pyarrow as pa
exec(os.environ.get("BEFORE", ""))
for number, (name, asked) in enumerate(json.loads(sys.argv[1])):
    out = f"{sys.argv[2]}{number}"
    try:
        (request,) = select(name, None, SourceRequest(None, **{"split": "train", **asked}))
        plan = make_plan(request)
        reader = open_reader(request, plan)
        with pa.OSFile(out + ".arrow", "wb") as sink, pa.ipc.new_stream(sink, plan.schema) as writer:
            for chunk in plan.chunks:
                for _, batch in reader.read(chunk):
                    writer.write_batch(batch)
        text = plan.to_json()
    except ShmloaderError as error:
        text = json.dumps({"error": to_wire(error)})
    open(out + ".json", "w").write(text)
sys.stdout.flush()
os._exit(0)
"""


def ask_named(hub: Hub, asked: list[tuple[str, dict[str, Any]]], tmp_path: Path, **env: str) -> list[Found]:
    """What comes of each (name, arguments of the `SourceRequest`), with the caches of ``tmp_path``."""
    run(_ASK, [json.dumps(asked), tmp_path / "named"], tmp_path, HF_ENDPOINT=hub.endpoint, **env)
    found = []
    for number in range(len(asked)):
        told = json.loads((tmp_path / f"named{number}.json").read_text())
        if "error" in told:
            found.append(Found(error=told["error"]))
        else:
            found.append(Found(plan=told, rows=read_file(tmp_path / f"named{number}.arrow").to_pylist()))
    return found


def samples_of(
    found: Found, tokenizer: Any = None, train_on_prompt: bool = False, **sizes: int
) -> list[dict[str, Any]]:
    """The samples that the processors make of what was read, with ``task_type``; of a bad row its error."""
    columns = {key: tuple(v) if isinstance(v, list) else v for key, v in found.plan["columns"].items()}
    config = MultimodalConfig(**{"vision_dim": 8, "max_audio_length": 1600, **sizes})
    built = processors.build(Columns(**columns), config, tokenizer, None, train_on_prompt)
    schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(found.plan["arrow_schema"])))
    (batch,) = pa.Table.from_pylist(found.rows, schema=schema).combine_chunks().to_batches()
    return samples_in(built, batch, found.plan["name"])


def samples_in(built: Any, batch: pa.RecordBatch, name: str = "here") -> list[dict[str, Any]]:
    """The samples that processors make of a batch, with what shares another field's bytes; errors in their place."""
    schema = processors.schema_of(built, name)
    begun = [processor.begin(batch) for processor in built]
    samples: list[Any] = []
    for i in range(batch.num_rows):
        try:
            shapes = {name: shape for rows in begun for name, shape in rows.shapes(i).items()}
            layout = RecordLayout(schema, shapes)
            out = layout.arrays(memoryview(bytearray(layout.num_bytes)))
            for rows in begun:
                rows.write(i, out)
        except ShmloaderError as error:
            samples.append(error)
            continue
        shared = {f.name: out[f.same_as] for f in schema.fields if f.same_as is not None and f.name in shapes}
        samples.append({**out, **shared, "task_type": schema.task_types[0], "source": schema.sources[0]})
    return samples


def text_in(ids: np.ndarray[Any, Any]) -> str:
    """What bytes as ids say."""
    return bytes(ids.astype(np.uint8)).decode()
