"""Load a trained network: a run folder, an exported folder or an ONNX file."""

from __future__ import annotations

from pathlib import Path

from racnn_cli.export.prediction import Model, Network
from racnn_cli.run import Run


def load(trained: Run | Path | str, device: str = "auto", *, source: int | None = None) -> Model:
    """Load a trained network.

    Args:
        trained: a run or its folder, a folder that `racnn export --format safetensors` wrote, or an ONNX file,
            which does not need torch.
        device: computes a folder's network; an ONNX file always runs on the CPU.
        source: as in `Model`.

    Raises:
        RunError: no such folder, or a file in it is missing or damaged.
        ExportError: no such ONNX file, or not one that racnn exported.
        RacnnError: no such device.
    """
    path = trained.folder if isinstance(trained, Run) else Path(trained)
    network: Network
    if path.suffix == ".onnx" or path.is_file():
        from racnn_cli.export.onnx_network import OnnxNetwork

        network = OnnxNetwork(path)
    else:
        from racnn_cli.export.torch_network import TorchNetwork

        network = TorchNetwork(path, device)
    return Model(network, source)
