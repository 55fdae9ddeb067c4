"""Check that a change to the code leaves every trained weight and every metric unchanged.

    python tests/guard.py HASHES.json                      # train with this checkout, write the hashes
    python tests/guard.py HASHES.json --source CHECKOUT    # train with another checkout
    python tests/guard.py HASHES.json --compare OTHER.json # and exit with 1 if the two files differ

It trains `tiny` (seeds 0 and 1, 0 and 2 worker processes, once with averaged weights and accumulation) and a short
`clutter`, on the CPU with one thread. It records the SHA-256 of `weights.safetensors`, of `eval.json` without times,
and of the outputs of an exported ONNX file for ten images. Hashes are comparable only on the same machine with the same
installed versions; `tests/guard.json` holds those of the last change that was meant to alter them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import struct
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TINY = {
    "tiny, seed 0": ["--seed", "0"],
    "tiny, seed 1": ["--seed", "1"],
    "tiny, seed 0, 2 workers": ["--seed", "0", "--set", "data.workers=2"],
    "tiny, seed 1, 2 workers": ["--seed", "1", "--set", "data.workers=2"],
    "tiny, averaged, accumulated": ["--seed", "0", "--set", "train.ema=0.98", "--set", "train.accumulate=2"],
}
IGNORED_KEYS = ("seconds", "images_per_second", "version", "mean_class", "left_out", "notes", "warnings")
"""Keys of eval.json that may differ: times, and those that commit f4a85a9 did not write."""


def racnn(source: Path, folder: Path, *arguments: str) -> None:
    """Run the command line of the checkout `source` in a folder."""
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "racnn_cli", *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"racnn {' '.join(arguments)} failed:\n{done.stderr}")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def hash_eval(file: Path) -> str:
    """SHA-256 of eval.json as it is written, without `IGNORED_KEYS`."""

    def strip(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in pairs if key not in IGNORED_KEYS}

    metrics = json.loads(file.read_text(), object_pairs_hook=strip)
    return sha256(json.dumps(metrics, indent=1).encode())


def hash_outputs(file: Path) -> str:
    """SHA-256 of the outputs of an exported file for ten images of noise, each of another size."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    generator, digest = np.random.default_rng(0), hashlib.sha256()
    for number in range(10):
        image = generator.random((1, 3, 96 + 8 * number, 120 - 4 * number), dtype=np.float32)
        for output in session.run(["probabilities", "labels", "scales", "boxes"], {"image": image}):
            digest.update(np.ascontiguousarray(output).tobytes())
    return digest.hexdigest()


def write_items(folder: Path, count: int = 400) -> None:
    """Write four files in the format of Fashion-MNIST: ten classes of bright shapes with noise."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for split, images in (("train", count), ("t10k", count // 2)):
        labels = np.arange(images) % 10
        rows, columns = np.mgrid[:28, :28]
        pixels = np.stack(
            [np.where((rows * (label + 1) // 7 + columns * (10 - label) // 7) % 3 == 0, 220, 20) for label in labels]
        ) + generator.integers(0, 30, (images, 28, 28))
        head = struct.pack(">IIII", 2051, images, 28, 28)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(head + pixels.astype(np.uint8).tobytes())
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 2049, images) + labels.astype(np.uint8).tobytes()
        )


def record(source: Path) -> dict[str, Any]:
    """Train everything with the code of the checkout `source`; returns hashes by name."""
    hashes: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number, (name, arguments) in enumerate(TINY.items()):
            run = folder / f"tiny-{number}"
            racnn(source, folder, "train", "tiny", "--out", str(run), *arguments)
            hashes[f"{name}: weights.safetensors"] = sha256((run / "weights.safetensors").read_bytes())
            hashes[f"{name}: eval.json"] = hash_eval(run / "eval.json")
        racnn(source, folder, "export", "--onnx", "--run", str(folder / "tiny-0"))
        hashes["tiny, seed 0: answers of model.onnx"] = hash_outputs(folder / "tiny-0" / "model.onnx")
        write_items(folder / "items")
        racnn(
            source, folder, "bench", "ablation", "--quick", "--seeds", "0", "--data", str(folder / "items"),
            "--arm", "no jitter",
        )  # fmt: skip
        for arm in ("learned", "no-jitter"):
            (run,) = folder.glob(f"runs/bench-attention-clutter-quick/seed-0/{arm}")
            hashes[f"clutter, {arm}: weights.safetensors"] = sha256((run / "weights.safetensors").read_bytes())
    return hashes


def machine() -> dict[str, str]:
    """The CPU and the versions that the hashes depend on."""
    cpu = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")),
        platform.processor(),
    )  # fmt: skip
    return {"cpu": cpu, "python": platform.python_version()} | {
        name: version(name) for name in ("torch", "timm", "onnxruntime", "numpy")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", metavar="HASHES.json", type=Path, help="file to write")
    parser.add_argument("--source", type=Path, default=ROOT, help="checkout to train with (default: this one)")
    parser.add_argument("--compare", type=Path, help="file of an earlier run")
    options = parser.parse_args()
    current = {"machine": machine(), "hashes": record(options.source.resolve())}
    options.output.write_text(json.dumps(current, indent=1) + "\n")
    if options.compare is None:
        return
    before = json.loads(options.compare.read_text())
    if before["machine"] != current["machine"]:
        print(f"note: recorded on {before['machine']}, compared on {current['machine']}")
    names = before["hashes"].keys() | current["hashes"].keys()
    differ = sorted(name for name in names if before["hashes"].get(name) != current["hashes"].get(name))
    for name in differ:
        print(f"differs: {name}")
    print(f"{len(names) - len(differ)} of {len(names)} are the same")
    sys.exit(bool(differ))


if __name__ == "__main__":
    main()
