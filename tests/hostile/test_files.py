"""Malicious files: each is refused or skipped with one clear message, and does no harm."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from blobs import tiny, write_blobs, write_recipe
from onnx import TensorProto, helper
from PIL import Image
from processes import call_racnn, run_racnn, start
from safetensors.torch import load_file
from untrained import make_run, write_data

from racnn_cli import api
from racnn_cli.core import store
from racnn_cli.errors import ExportError, RunError
from racnn_cli.export.loading import load
from racnn_cli.run import Run
from racnn_cli.training import checkpoint, stages
from racnn_cli.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "<script>alert(1)<\\script> [bold red]"
MALICIOUS_NAME = "x\n\x1b[2J[red]\u202egnp.png"  # clears the screen, breaks the line, reverses the text


@pytest.fixture
def command(racnn) -> Callable[..., tuple[int, str]]:
    """A function that runs a command and returns its exit code and everything that it printed."""

    def call(*arguments: object) -> tuple[int, str]:
        code, out, err = racnn(*arguments)
        assert "Traceback" not in out + err
        return code, out + err

    return call


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("hostile")
    return make_run(folder / "run", write_data(folder / "data", count=2), scales=2)


# ---- pickles


class Payload:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, ("harm",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_executes_no_code(here: Path, command) -> None:
    write_recipe(here / "mine.toml", write_blobs(here / "data"))
    torch.save({"state_dict": {"a": torch.ones(1)}, "more": Payload()}, here / "zipped.pth")
    (here / "plain.pt").write_bytes(pickle.dumps(Payload()))
    (here / "bare.bin").write_bytes(b"\x80\x02}.")
    for name in ("zipped.pth", "plain.pt", "bare.bin"):
        code, text = command("train", "mine.toml", "--weights", name, "--out", "mine")
        assert code == 2, text
        assert text.startswith(f"error: weights '{name}'"), text
    assert not (here / "harm").exists()
    assert not (here / "mine").exists()


def test_weights_in_a_zip_bomb_are_refused(here: Path, command) -> None:
    """A .pth file is a zip file whose members are stored; a file with compressed members is refused."""
    torch.save({"a": torch.zeros(4)}, here / "good.pth")
    with (
        zipfile.ZipFile(here / "good.pth") as good,
        zipfile.ZipFile(here / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for member in good.namelist():
            bomb.writestr(member, bytes(2**28) if member.endswith("data/0") else good.read(member))
    assert (here / "bomb.pth").stat().st_size < 2**20
    write_recipe(here / "mine.toml", write_blobs(here / "data"))
    code, text = command("train", "mine.toml", "--weights", "bomb.pth", "--out", "mine")
    assert code == 2, text
    assert text.startswith("error: weights 'bomb.pth'"), text


# ---- images


@pytest.fixture
def odd_images(here: Path) -> Path:
    """A folder of unusual images, and of other files that are named like images."""
    folder = here / "odd"
    folder.mkdir()
    Image.new("RGB", (100_000, 1), "red").save(folder / "long.png")
    Image.new("RGB", (1, 60_000), "red").save(folder / "tall.jpg")
    Image.new("1", (20_000, 9_500)).save(folder / "bomb.png")
    Image.new("RGB", (30, 20), "blue").save(folder / MALICIOUS_NAME)
    with open(os.fsencode(folder) + b"/caf\xe9.png", "wb") as file:  # a name in Latin-1, not UTF-8
        Image.new("RGB", (20, 30), "blue").save(file, "PNG")
    (folder / "page.jpg").write_text("<!DOCTYPE html><html><body>404</body></html>")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    (folder / "secret.png").symlink_to("/etc/passwd")
    (folder / "nothing.png").symlink_to(here / "gone")
    (folder / "round.png").symlink_to("round.png")
    os.mkfifo(folder / "pipe.png")
    return folder


REFUSED = {
    "bomb.png": "is oversized",
    "page.jpg": "is an HTML page",
    "zero.jpg": "is not a regular file",
    "secret.png": "is not a JPEG, PNG, WebP, BMP, TIFF or GIF image",
    "nothing.png": "does not exist",
    "round.png": "symbolic links",
    "pipe.png": "is not a regular file",
}


def test_odd_images_are_rows_of_a_prediction(run: Run, odd_images: Path, command) -> None:
    names = [str(odd_images / name) for name in sorted(os.listdir(odd_images))]
    code, text = command("predict", *names, "--run", run.folder, "--format", "jsonl", "--save", "drawn")
    rows = {Path(row["path"]).name: row for row in map(json.loads, text.splitlines()[: len(names)])}
    assert code == 1
    for name, reason in REFUSED.items():
        assert reason in rows[name]["error"], name
    readable = {name for name, row in rows.items() if not row["error"]}
    assert readable == {"long.png", "tall.jpg", MALICIOUS_NAME, os.fsdecode(b"caf\xe9.png")}
    assert len(os.listdir("drawn")) == 4
    for name, (width, height) in {"long.png": (100_000, 1), "tall.jpg": (1, 60_000)}.items():
        (x0, y0, x1, y1), *_ = rows[name]["boxes"]
        assert 0 <= x0 < x1 <= width, name
        assert 0 <= y0 < y1 <= height, name
    for style in ("table", "csv"):
        _, text = command("predict", *names, "--run", run.folder, "--format", style)
        assert ("\x1b" in text) == (style == "csv")  # a name in a CSV file must not be changed


def test_csv_on_a_terminal_has_no_escape_sequences(run: Run, odd_images: Path) -> None:
    pty = pytest.importorskip("pty")
    reader, writer = pty.openpty()
    arguments = ("predict", str(odd_images / MALICIOUS_NAME), "--run", str(run.folder), "--format", "csv")
    done = start(call_racnn, *arguments, folder=odd_images, out=os.ttyname(writer)).wait()
    assert done.code == 0, done.err
    os.close(writer)
    text = os.read(reader, 10_000)
    assert b"[2J[red]" in text
    assert b"\x1b" not in text


def test_odd_images_in_the_training_data_are_all_named(odd_images: Path, here: Path, command) -> None:
    data = write_blobs(here / "data")
    for path in odd_images.iterdir():
        path.rename(data / "train" / "red" / path.name)
    write_recipe(here / "mine.toml", data)
    code, text = command("train", "mine.toml", "--out", "mine")
    assert code == 2
    assert f"{len(REFUSED)} error(s)" in text
    assert all(name in text and reason in text for name, reason in REFUSED.items())
    assert not (here / "mine").exists()
    code, text = command("train", "mine.toml", "--out", "mine", "--skip-bad")
    assert code == 0, text
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_names_are_shown_as_text_only(here: Path, command) -> None:
    data = write_blobs(here / "data")
    for split in ("train", "val", "test"):
        (data / split / "red").rename(data / split / SCRIPT)
        (data / split / "blue" / "00.png").rename(data / split / "blue" / MALICIOUS_NAME)
    write_recipe(here / "mine.toml", data)
    for arguments in (["train", "mine.toml", "--out", "mine"], ["eval"], ["report"], ["predict", "data"]):
        code, text = command(*arguments)
        assert code == 0, text
        assert "\x1b" not in text
        assert "\u202e" not in text
    page = (here / "mine" / "report.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_a_class_name_with_control_characters_is_refused(here: Path, command) -> None:
    data = write_blobs(here / "data")
    (data / "train" / "red").rename(data / "train" / "r\x1b[2Jed")
    write_recipe(here / "mine.toml", data)
    code, text = command("train", "mine.toml", "--out", "mine")
    assert code == 2
    assert r"'r\x1b[2Jed' contains control characters" in text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"path,label\na\0b.png,red\n", "is not a file name"),
        (b"path,label\n\0\0\0\n", "does not have 2 cells"),
        (b"\0path,label\nx.png,red\n", "has no column path"),
        (b"path,label\nx.png,r\0d\n", "control characters"),
        (b"path,label\n/dev/zero,red\n/dev/stdin,blue\n", "is not a regular file"),
        (b"path,label\n" + b"../" * 2000 + b"x.png,red\n", "x.png"),
        (b"path,label\nx.png," + b"r" * 10**6 + b"\n", "field larger than field limit"),
    ],
)
def test_a_malicious_csv_file(here: Path, content: bytes, reason: str, command) -> None:
    Image.new("RGB", (4, 4)).save(here / "x.png")
    (here / "mine.csv").write_bytes(content)
    code, text = command("train", "tiny", "--data", "mine.csv", "--out", "mine")
    assert code == 2
    assert reason in text
    assert not (here / "mine").exists()


# ---- recipes


@pytest.mark.parametrize(
    "line",
    [
        "model.scale = 3",
        "nothing = 1",
        "model.apn_hidden = 99999999999999999999999",
        "model.sizes = [999999999, 999999999]",
        "train.batch = -1",
        "train.batch = 1e300",
        "pretrain_cnn.epochs = 10000000000",
        "pretrain_cnn.lr = nan",
        "seed = 4294967296",
        "data.workers = 100000",
        "name = '../../elsewhere'",
        "name = '\\u001b[2J'",
    ],
)
def test_a_malicious_recipe(here: Path, line: str, command) -> None:
    file = write_recipe(here / "mine.toml", write_blobs(here / "data"))
    key = line.partition(" =")[0]
    code, text = command("train", file, "--set", line.replace(" = ", "="), "--out", "mine")
    assert code == 2, text
    assert key in text
    assert "\x1b" not in text
    assert not (here / "mine").exists()


def call_racnn_in_8_gib(*arguments: str) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
    call_racnn(*arguments)


@pytest.mark.skipif(sys.platform != "linux", reason="the test limits the address space")
def test_a_network_that_does_not_fit_in_memory(here: Path) -> None:
    arguments = ["train", "tiny", "--out", "mine", "--set", "model.apn_hidden=65536"]
    arguments += ["--scales", "2", "--set", "model.sizes=[4096,4096]"]
    done = start(call_racnn_in_8_gib, *arguments, folder=here).wait()
    assert done.code == 1, done.err
    assert done.err.startswith("error: out of memory"), done.err
    assert "model.apn_hidden" in done.err.splitlines()[-1]
    assert not (here / "mine").exists()


# ---- limits of the system


def test_names_that_are_too_long_are_in_the_message(here: Path, command) -> None:
    name = "x" * 300
    for arguments in (["predict", name], ["eval", "--run", name], ["train", name], ["train", "own", "--data", name]):
        code, text = command(*arguments)
        assert code
        assert name[:50] in text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_output_that_cannot_be_written(run: Run, here: Path) -> None:
    predict = f"predict {run.folder} {run.folder.parent / 'data'}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    cases = (
        (predict, ">/dev/full", 1),
        (predict, "| true", 0),
        ("recipes ls", ">/dev/full", 1),
        ("recipes ls", ">&-", 0),
    )
    for arguments, redirection, code in cases:
        program = f"{sys.executable} -m racnn_cli {arguments}"
        done = subprocess.run(
            f"{program} {redirection}", shell=True, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert "Exception" not in done.stderr
        assert ("No space left" in done.stderr) == (code == 1)


# ---- run folders from somebody else


@pytest.fixture
def trained_run(here: Path) -> Run:
    """A run whose first stage is finished."""
    trainer = Trainer.start(tiny(write_blobs(here / "data")), out=here / "mine", quiet=True)
    stages.run_stage(trainer, "pretrain-cnn")
    trainer.close()
    return Run(here / "mine")


@pytest.mark.parametrize("name", ["log.jsonl", "state", "state/lock"])
def test_a_link_in_a_run_folder_is_not_written_through(trained_run: Run, here: Path, name: str, command) -> None:
    path = trained_run.folder / name
    assert command("predict", here / "data", "--run", trained_run.folder)[0] == 0  # reading from it is allowed
    path.rename(here / "target")
    path.symlink_to(here / "target")
    (here / ".secret").write_text("mine")
    before = sorted(p.stat().st_mtime_ns for p in (here / "target", here / ".secret"))
    for arguments in (["train", "--resume"], ["alternate"], ["pretrain-apn"]):
        code, text = command(*arguments, "--run", trained_run.folder)
        assert code == 2
        assert f"{path} is a link" in text
    assert sorted(p.stat().st_mtime_ns for p in (here / "target", here / ".secret")) == before


@pytest.mark.parametrize("name", ["baseline", "baseline/log.jsonl", "baseline/state"])
def test_a_link_in_the_folder_of_a_baseline_is_not_written_through(here: Path, name: str, command) -> None:
    data = write_blobs(here / "data")
    api.train(tiny(data, baseline=True, alternate__rounds=1), out=here / "mine", quiet=True)
    path = here / "mine" / name
    path.rename(here / "target")
    path.symlink_to(here / "target")
    before = (here / "target").stat().st_mtime_ns
    (here / "mine" / "eval.json").unlink()
    code, text = command("train", "--resume", "--run", "mine")
    assert code == 2
    assert f"{Path('mine') / name} is a link" in text
    assert (here / "target").stat().st_mtime_ns == before


def test_a_run_folder_may_itself_be_a_link(trained_run: Run, here: Path) -> None:
    (here / "short").symlink_to(trained_run.folder)
    api.resume(Run.open(here / "short"), quiet=True)
    assert trained_run.eval.is_file()


@pytest.mark.parametrize("names", [["\x1b[2J", "b", "c"], ["a\nb", "b", "c"], [], [1, 2, 3], {"a": 1}, None])
def test_classes_that_are_not_names(run: Run, names: object, tmp_path: Path) -> None:
    copy = Run(tmp_path)
    copy.recipe_file.write_text(run.recipe_file.read_text())
    copy.classes_file.write_text(json.dumps(names))
    with pytest.raises(RunError, match="is not a list of class names"):
        load(copy)


def forge(run: Run, change: Callable[[dict[str, torch.Tensor], dict[str, object]], None]) -> None:
    """Write a checkpoint with changed contents and a valid checksum as the only one of the run."""
    newest, *older = checkpoint.list_checkpoints(run)
    tensors = load_file(newest)
    progress = vars(checkpoint.Progress()).copy()
    change(tensors, progress)
    for path in older:
        path.unlink()
    text = json.dumps(progress)
    store.save_tensors(newest, tensors, {"progress": text, "sha256": checkpoint._checksum(tensors, text)})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("phase", "sleep"),
        ("epoch", -3),
        ("step", "many"),
        ("done", 7),
        ("sums", [1]),
        ("smoothed", {"x": 1.0}),
        ("views", 2**70),
        ("number", -1),
        ("logged", -5),
    ],
)
def test_forged_progress(trained_run: Run, key: str, value: object, command) -> None:
    def change(tensors: dict[str, torch.Tensor], progress: dict[str, object]) -> None:
        progress[key] = value

    forge(trained_run, change)
    code, text = command("train", "--resume", "--run", trained_run.folder)
    assert code == 1
    assert "does not say where the run stood" in text


@pytest.mark.parametrize("shape", [(3, 2, 1), (1,), ()])
@pytest.mark.parametrize("name", ["optimizer.x.step", "evil.weight", "optimizer.0.exp_avg", "averaged.none"])
def test_forged_tensors(trained_run: Run, name: str, shape: tuple[int, ...], command) -> None:
    def change(tensors: dict[str, torch.Tensor], progress: dict[str, object]) -> None:
        tensors[name] = torch.ones(shape)
        progress |= {"stage": "pretrain-cnn", "epoch": 1}

    forge(trained_run, change)
    code, text = command("train", "--resume", "--run", trained_run.folder)
    assert code == 1
    assert "no checkpoint of racnn does" in text or "is of other parameters" in text


def test_named_pipes_in_a_run_folder_are_not_read(run: Run, tmp_path: Path, command) -> None:
    for name, subcommand in (("classes.json", "eval"), ("eval.json", "report")):
        copy = Run(tmp_path / name)
        shutil.copytree(run.folder, copy.folder)
        (copy.folder / name).unlink(missing_ok=True)
        os.mkfifo(copy.folder / name)
        code, text = command(subcommand, "--run", copy.folder)
        assert code
        assert f"{name} is " in text


@pytest.mark.parametrize(
    ("name", "kind"), [("log.jsonl", "regular file"), ("state/lock", "regular file"), ("state", "folder")]
)
def test_named_pipes_in_a_run_folder_are_not_written_to(trained_run: Run, name: str, kind: str, command) -> None:
    path = trained_run.folder / name
    path.rename(trained_run.folder.parent / "target")
    os.mkfifo(path)
    code, text = command("alternate", "--run", trained_run.folder)
    assert code == 2
    assert f"{path} is not a {kind}" in text


@pytest.mark.parametrize(
    "event",
    [
        {"val": {"scales": [{"top1": 0.5, "nll": 1.0}], "average": None}},
        {"val": {"scales": []}},
        {"phase": "\ud800"},
        {"train_loss": {"\ud800": 1.0}},
        {"train_loss": {"loss": 1e308}},
        {"seconds": "long"},
    ],
)
def test_a_report_of_a_damaged_log(run: Run, tmp_path: Path, event: dict[str, object], command) -> None:
    copy = Run(tmp_path / "copy")
    shutil.copytree(run.folder, copy.folder)
    command("eval", "--run", copy.folder)
    epoch = {"event": "epoch", "stage": "alternate", "phase": "CNN phase", "round": 1, "epoch": 1, "seconds": 1.0}
    epoch |= {"train_loss": {"loss": 1.0}, "val": {"scales": [{"top1": 0.5, "nll": 1.0}]}}
    copy.log.write_text("".join(json.dumps(entry) + "\n" for entry in (epoch, epoch | event)))
    code, text = command("report", "--run", copy.folder)
    assert code == 0 or "is not UTF-8" in text


@pytest.mark.skipif(sys.platform != "linux", reason="needs file names that are bytes")
def test_a_file_name_that_is_not_utf8_works(here: Path, command) -> None:
    data = write_blobs(here / "data")
    for split in ("train", "test"):
        folder = os.fsencode(data / split / "red")
        os.rename(folder + b"/00.png", folder + b"/caf\xe9.png")
    write_recipe(here / "mine.toml", data, alternate__rounds=1)
    code, text = command("train", "mine.toml", "--out", "mine")
    assert code == 0, text
    for style in ("csv", "jsonl", "table"):  # written to a stream in strict UTF-8
        done = run_racnn("predict", "data/test", "--run", "mine", "--format", style, folder=here)
        assert done.code == 0, done.err
        assert r"caf\udce9.png" in done.out


# ---- ONNX files


def write_onnx(file: Path, location: str = "", shape: tuple[int, ...] = (1, 3), **metadata: object) -> Path:
    """Write a graph whose outputs are one stored tensor, which may be in another file."""
    names = ("probabilities", "scales", "boxes")
    tensor = TensorProto(name="stored", data_type=TensorProto.FLOAT, dims=shape)
    if location:
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, "offset": "0", "length": "12"}.items():
            tensor.external_data.add(key=key, value=value)
    else:
        tensor.raw_data = np.zeros(shape, np.float32).tobytes()
    operators = ("Identity", "Identity", "Identity") if shape else ("Evil\x1b[2J", "Identity", "Identity")
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node(operator, ["stored"], [name]) for operator, name in zip(operators, names, strict=True)],
            "graph",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["b", 3, "h", "w"])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names],
            [tensor],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    valid = {"classes": '["a", "b", "c"]', "source": 64, "sizes": "[64, 64]", "fit": "crop", "layout": "NCHW"}
    for key, value in (valid | metadata).items():
        model.metadata_props.add(key=key, value=str(value))
    onnx.save(model, file) if not location else file.write_bytes(model.SerializeToString())
    return file


@pytest.mark.parametrize("location", ["{}/secret.bin", "../secret.bin", "link.bin", "/dev/zero", "in/../../secret.bin"])
def test_weights_outside_of_the_file_are_not_read(here: Path, location: str) -> None:
    (here / "secret.bin").write_bytes(np.ones(3, np.float32).tobytes())
    (here / "downloads").mkdir()
    (here / "downloads" / "link.bin").symlink_to(here / "secret.bin")
    with pytest.raises(ExportError, match=r"cannot load .*xternal data"):
        load(write_onnx(here / "downloads" / "model.onnx", location.format(here)))


@pytest.mark.parametrize(
    "metadata",
    [
        {"classes": "[["},
        {"classes": "[1, 2, 3]"},
        {"classes": '["\\u001b[2J", "b", "c"]'},
        {"source": 99999999},
        {"source": "x"},
        {"sizes": "5"},
        {"sizes": "[" * 5000},
        {"fit": "sideways"},
        {"layout": ""},
    ],
)
def test_invalid_metadata(here: Path, metadata: dict[str, object]) -> None:
    key = next(iter(metadata))
    with pytest.raises(ExportError, match=f"missing or invalid metadata: {key}"):
        load(write_onnx(here / "model.onnx", **metadata))


def test_a_graph_with_malicious_operator_names(here: Path, command) -> None:
    Image.new("RGB", (9, 9)).save(here / "a.png")
    code, text = command("predict", write_onnx(here / "model.onnx", shape=()), "a.png")
    assert code == 1
    assert "\x1b" not in text
    assert r"Evil\x1b[2J" in text


@pytest.mark.parametrize("shape", [(1,), (1, 3), (2, 2, 3), (0,)])
def test_a_graph_with_outputs_of_another_shape(here: Path, shape: tuple[int, ...], command) -> None:
    Image.new("RGB", (9, 9)).save(here / "a.png")
    file = write_onnx(here / "model.onnx", shape=shape)
    code, text = command("predict", file, "a.png")
    assert code == 2
    assert "\x1b" not in text
    assert "is not a network that racnn can use: its" in text
