"""What the real MindSpore says. Run by the interpreter that has it; see test_mindspore.py.

A request is a line of JSON on stdin, [verb, word, ...]; its answer is a line that begins with
ANSWER, and an object.
"""

from __future__ import annotations

import hashlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import mindspore as ms  # pyright: ignore[reportMissingImports]: it has an environment of its own

Json = dict[str, Any]


def digest(tensor: ms.Tensor) -> str:
    return hashlib.sha256(bytes(tensor.get_bytes())).hexdigest()[:16]


def save(path: str, folder: str) -> Json:
    """Loads a file and saves its tensors, in their order, with save_checkpoint."""
    found = ms.load_checkpoint(path)
    tensors = [{"name": name, "data": value} for name, value in found.items()]
    ms.save_checkpoint(tensors, f"{folder}/plain.ckpt")
    ms.save_checkpoint(tensors, f"{folder}/crc.ckpt", crc_check=True)
    return {"ok": True}


def load(path: str, check: str) -> Json:
    """Everything that load_checkpoint finds: dtype, shape, digest."""
    found = ms.load_checkpoint(path, crc_check=check == "crc")
    return {k: [str(v.dtype), list(v.shape), digest(v)] for k, v in found.items()}


def transform(src: str, dst: str, src_strategy: str, dst_strategy: str) -> Json:
    """transform_checkpoints; `-` is no strategy. Returns every rank's tensors."""
    ms.transform_checkpoints(
        src,
        dst,
        "checkpoint_",
        None if src_strategy == "-" else src_strategy,
        None if dst_strategy == "-" else dst_strategy,
    )
    return {p.parent.name: load(str(p), "") for p in sorted(Path(dst).glob("rank_*/*.ckpt"))}


def merge(folder: str, target: str) -> Json:
    """merge_pipeline_strategys."""
    ms.merge_pipeline_strategys(folder, target)
    return {"ok": Path(target).is_file()}


def strategies(path: str) -> Json:
    """The message of a strategy file, written again by protobuf."""
    from mindspore.train.node_strategy_pb2 import (  # pyright: ignore[reportMissingImports]: as above
        ParallelStrategyMap,
    )

    message = ParallelStrategyMap()
    message.ParseFromString(Path(path).read_bytes())
    return {"again": message.SerializeToString().hex()}


def parse(folder: str) -> Json:
    """Which files protobuf can parse as a Checkpoint, and the number of values in each."""
    from mindspore.train.checkpoint_pb2 import (  # pyright: ignore[reportMissingImports]: as above
        Checkpoint,
    )

    found: Json = {}
    for path in sorted(Path(folder).iterdir()):
        message = Checkpoint()
        try:
            message.ParseFromString(path.read_bytes())
        except Exception:  # whatever protobuf raises: it refuses the file
            found[path.name] = None
        else:
            found[path.name] = [
                [v.tag, list(v.tensor.dims), v.tensor.tensor_type, v.tensor.tensor_content.hex()]
                for v in message.value
            ]
    return found


def main() -> None:
    """Answers one request for each line."""
    verbs = {f.__name__: f for f in (save, load, transform, merge, strategies, parse)}
    for line in sys.stdin:
        verb, *words = json.loads(line)
        try:
            answer = verbs[verb](*words)
        except Exception:  # whatever MindSpore raises belongs to the answer
            answer = {"error": traceback.format_exc()[-3000:]}
        print("ANSWER", json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
