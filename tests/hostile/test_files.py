"""FileSource that mean harm: each is refused or passed over with one clear sentence, and does nothing."""

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
from safetensors.torch import load_file
from untrained import make_run, write_data

from racnn_cli import api
from racnn_cli.errors import RacnnError
from racnn_cli.export.loading import load
from racnn_cli.run import Run
from racnn_cli.training import checkpoint
from racnn_cli.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "<script>alert(1)<\\script> [bold red]"
WICKED = "x\n\x1b[2J[red]\u202egnp.png"  # clears the screen, breaks the line, turns the text around


@pytest.fixture
def said(racnn) -> Callable[..., tuple[int, str]]:
    """Exit code of a command, and all that it printed."""

    def call(*words: object) -> tuple[int, str]:
        code, out, err = racnn(*words)
        assert "Traceback" not in out + err
        return code, out + err

    return call


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    place = tmp_path_factory.mktemp("hostile")
    return make_run(place / "run", write_data(place / "data", count=2), scales=2)


# ---- pickles


class Shell:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, ("harm",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_runs_nothing(here: Path, said) -> None:
    write_recipe(here / "mine.toml", write_blobs(here / "data"))
    torch.save({"state_dict": {"a": torch.ones(1)}, "more": Shell()}, here / "zipped.pth")
    (here / "plain.pt").write_bytes(pickle.dumps(Shell()))
    (here / "bare.bin").write_bytes(b"\x80\x02}.")
    for name in ("zipped.pth", "plain.pt", "bare.bin"):
        code, text = said("train", "mine.toml", "--weights", name, "--out", "mine")
        assert code == 2, text
        assert text.startswith(f"error: weights '{name}'"), text
    assert not (here / "harm").exists()
    assert not (here / "mine").exists()


def test_a_zip_bomb_of_weights_is_refused(here: Path, said) -> None:
    """A .pth is a zip file; its members are stored as they are, and what says otherwise is refused."""
    torch.save({"a": torch.zeros(4)}, here / "good.pth")
    with (
        zipfile.ZipFile(here / "good.pth") as good,
        zipfile.ZipFile(here / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for member in good.namelist():
            bomb.writestr(member, bytes(2**28) if member.endswith("data/0") else good.read(member))
    assert (here / "bomb.pth").stat().st_size < 2**20
    write_recipe(here / "mine.toml", write_blobs(here / "data"))
    code, text = said("train", "mine.toml", "--weights", "bomb.pth", "--out", "mine")
    assert code == 2, text
    assert text.startswith("error: weights 'bomb.pth'"), text


# ---- images


@pytest.fixture
def odd(here: Path) -> Path:
    """A folder of files that call themselves images."""
    folder = here / "odd"
    folder.mkdir()
    Image.new("RGB", (100_000, 1), "red").save(folder / "long.png")
    Image.new("RGB", (1, 60_000), "red").save(folder / "tall.jpg")
    Image.new("1", (20_000, 9_500)).save(folder / "bomb.png")
    Image.new("RGB", (30, 20), "blue").save(folder / WICKED)
    with open(os.fsencode(folder) + b"/caf\xe9.png", "wb") as file:  # from a time before UTF-8
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
    "page.jpg": "is not a JPEG, PNG, WebP, BMP or TIFF image",
    "zero.jpg": "is not a regular file",
    "secret.png": "is not a JPEG, PNG, WebP, BMP or TIFF image",
    "nothing.png": "does not exist",
    "round.png": "symbolic links",
    "pipe.png": "is not a regular file",
}


def test_odd_images_are_rows_of_a_prediction(run: Run, odd: Path, said) -> None:
    names = [str(odd / name) for name in sorted(os.listdir(odd))]
    code, text = said("predict", *names, "--run", run.folder, "--format", "jsonl", "--save", "drawn")
    rows = {Path(row["path"]).name: row for row in map(json.loads, text.splitlines()[: len(names)])}
    assert code == 1
    for name, reason in REFUSED.items():
        assert reason in rows[name]["error"], name
    good = {name for name, row in rows.items() if not row["error"]}
    assert good == {"long.png", "tall.jpg", WICKED, os.fsdecode(b"caf\xe9.png")}
    assert len(os.listdir("drawn")) == 4
    for name, (width, height) in {"long.png": (100_000, 1), "tall.jpg": (1, 60_000)}.items():
        (x0, y0, x1, y1), *_ = rows[name]["boxes"]
        assert 0 <= x0 < x1 <= width, name
        assert 0 <= y0 < y1 <= height, name
    for style in ("table", "csv"):
        _, text = said("predict", *names, "--run", run.folder, "--format", style)
        assert ("\x1b" in text) == (style == "csv")  # a name in a CSV file must stay what it is


def test_csv_on_a_terminal_does_nothing_to_it(run: Run, odd: Path) -> None:
    pty = pytest.importorskip("pty")
    reader, writer = pty.openpty()
    words = [sys.executable, "-m", "racnn_cli", "predict", str(odd / WICKED), "--run", str(run.folder)]
    subprocess.run([*words, "--format", "csv"], stdout=writer, stderr=subprocess.PIPE, check=True)
    os.close(writer)
    text = os.read(reader, 10_000)
    assert b"[2J[red]" in text
    assert b"\x1b" not in text


def test_odd_images_among_the_training_data_are_named_at_once(odd: Path, here: Path, said) -> None:
    data = write_blobs(here / "data")
    for path in odd.iterdir():
        path.rename(data / "train" / "red" / path.name)
    write_recipe(here / "mine.toml", data)
    code, text = said("train", "mine.toml", "--out", "mine")
    assert code == 2
    assert f"{len(REFUSED)} error(s)" in text
    assert all(name in text and reason in text for name, reason in REFUSED.items())
    assert not (here / "mine").exists()
    code, text = said("train", "mine.toml", "--out", "mine", "--skip-bad")
    assert code == 0, text
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_names_are_text_and_nothing_else(here: Path, said) -> None:
    data = write_blobs(here / "data")
    for split in ("train", "val", "test"):
        (data / split / "red").rename(data / split / SCRIPT)
        (data / split / "blue" / "00.png").rename(data / split / "blue" / WICKED)
    write_recipe(here / "mine.toml", data)
    for words in (["train", "mine.toml", "--out", "mine"], ["eval"], ["report"], ["predict", "data"]):
        code, text = said(*words)
        assert code == 0, text
        assert "\x1b" not in text
        assert "\u202e" not in text
    page = (here / "mine" / "report.html").read_text()
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page


def test_a_class_name_that_moves_the_cursor_is_refused(here: Path, said) -> None:
    data = write_blobs(here / "data")
    (data / "train" / "red").rename(data / "train" / "r\x1b[2Jed")
    write_recipe(here / "mine.toml", data)
    code, text = said("train", "mine.toml", "--out", "mine")
    assert code == 2
    assert r"'r\x1b[2Jed' contains control characters" in text


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"path,label\na\0b.png,red\n", "is not a file name"),
        (b"path,label\n\0\0\0\n", "has not 2 cells"),
        (b"\0path,label\nx.png,red\n", "has no column path"),
        (b"path,label\nx.png,r\0d\n", "control characters"),
        (b"path,label\n/dev/zero,red\n/dev/stdin,blue\n", "is not a regular file"),
        (b"path,label\n" + b"../" * 2000 + b"x.png,red\n", "x.png"),
        (b"path,label\nx.png," + b"r" * 10**6 + b"\n", "field larger than field limit"),
    ],
)
def test_a_hostile_csv(here: Path, content: bytes, reason: str, said) -> None:
    Image.new("RGB", (4, 4)).save(here / "x.png")
    (here / "mine.csv").write_bytes(content)
    code, text = said("train", "tiny", "--data", "mine.csv", "--out", "mine")
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
def test_a_hostile_recipe(here: Path, line: str, said) -> None:
    file = write_recipe(here / "mine.toml", write_blobs(here / "data"))
    key = line.partition(" =")[0]
    code, text = said("train", file, "--set", line.replace(" = ", "="), "--out", "mine")
    assert code == 2, text
    assert key in text
    assert "\x1b" not in text
    assert not (here / "mine").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="limits its address space")
def test_a_network_that_no_memory_holds(here: Path) -> None:
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))

    words = ["train", "tiny", "--out", "mine", "--set", "model.apn_hidden=65536"]
    words += ["--scales", "2", "--set", "model.sizes=[4096,4096]"]
    done = subprocess.run(
        [sys.executable, "-m", "racnn_cli", *words],
        preexec_fn=limit,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.startswith("error: out of memory"), done.stderr
    assert "model.apn_hidden" in done.stderr.splitlines()[-1]
    assert not (here / "mine").exists()


# ---- what the system refuses


def test_names_that_are_too_long_are_said_to_be(here: Path, said) -> None:
    name = "x" * 300
    for words in (["predict", name], ["eval", "--run", name], ["train", name], ["train", "own", "--data", name]):
        code, text = said(*words)
        assert code
        assert name[:50] in text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no such device")
def test_output_that_goes_nowhere(run: Run, here: Path) -> None:
    command = f"{sys.executable} -m racnn_cli predict {run.folder} {run.folder.parent / 'data'}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for place, code in ((">/dev/full", 1), (">&-", 0), ("| true", 0)):
        done = subprocess.run(
            f"{command} {place}", shell=True, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        assert "Exception" not in done.stderr
        assert ("No space left" in done.stderr) == (code == 1)


# ---- run folders that somebody else packed


@pytest.fixture
def mine(here: Path) -> Run:
    trainer = Trainer.start(tiny(write_blobs(here / "data")), here / "mine", quiet=True)
    trainer.run_stage("pretrain-cnn")
    trainer.close()
    return Run(here / "mine")


@pytest.mark.parametrize("name", ["log.jsonl", "state", "state/lock"])
def test_a_link_in_a_run_folder_is_not_written_through(mine: Run, here: Path, name: str, said) -> None:
    path = mine.folder / name
    assert said("predict", here / "data", "--run", mine.folder)[0] == 0  # to read from it is no harm
    path.rename(here / "own")
    path.symlink_to(here / "own")
    (here / ".secret").write_text("mine")
    before = sorted(p.stat().st_mtime_ns for p in (here / "own", here / ".secret"))
    for words in (["train", "--resume"], ["alternate"], ["pretrain-apn"]):
        code, text = said(*words, "--run", mine.folder)
        assert code == 2
        assert f"{path} is a link" in text
    assert sorted(p.stat().st_mtime_ns for p in (here / "own", here / ".secret")) == before


@pytest.mark.parametrize("name", ["baseline", "baseline/log.jsonl", "baseline/state"])
def test_nor_is_one_of_its_baseline(here: Path, name: str, said) -> None:
    data = write_blobs(here / "data")
    api.train(tiny(data, baseline=True, alternate__rounds=1), out=here / "mine", quiet=True)
    path = here / "mine" / name
    path.rename(here / "own")
    path.symlink_to(here / "own")
    before = (here / "own").stat().st_mtime_ns
    (here / "mine" / "eval.json").unlink()
    code, text = said("train", "--resume", "--run", "mine")
    assert code == 2
    assert f"{Path('mine') / name} is a link" in text
    assert (here / "own").stat().st_mtime_ns == before


def test_a_run_folder_may_itself_be_a_link(mine: Run, here: Path) -> None:
    (here / "short").symlink_to(mine.folder)
    api.resume(Run.open(here / "short"), quiet=True)
    assert mine.eval.is_file()


@pytest.mark.parametrize("names", [["\x1b[2J", "b", "c"], ["a\nb", "b", "c"], [], [1, 2, 3], {"a": 1}, None])
def test_classes_that_are_no_names(run: Run, names: object, tmp_path: Path) -> None:
    copy = Run(tmp_path)
    copy.recipe_file.write_text(run.recipe_file.read_text())
    copy.classes_file.write_text(json.dumps(names))
    with pytest.raises(RacnnError, match="is not a list of class names"):
        load(copy)


def forge(run: Run, change: Callable[[dict[str, torch.Tensor], dict[str, object]], None]) -> None:
    """A checkpoint whose checksum is right and whose contents are not."""
    newest = checkpoint.saved(run)[0]
    tensors = load_file(newest)
    position = vars(checkpoint.Progress()).copy()
    change(tensors, position)
    for path in checkpoint.saved(run)[1:]:
        path.unlink()
    told = json.dumps(position)
    checkpoint.save_tensors(newest, tensors, {"progress": told, "sha256": checkpoint._checksum(tensors, told)})


@pytest.mark.parametrize(
    ("place", "value"),
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
def test_a_forged_position(mine: Run, place: str, value: object, said) -> None:
    def change(tensors: dict[str, torch.Tensor], position: dict[str, object]) -> None:
        position[place] = value

    forge(mine, change)
    code, text = said("train", "--resume", "--run", mine.folder)
    assert code == 1
    assert "does not say where the run stood" in text


@pytest.mark.parametrize("shape", [(3, 2, 1), (1,), ()])
@pytest.mark.parametrize("name", ["optimizer.x.step", "evil.weight", "optimizer.0.exp_avg", "averaged.none"])
def test_forged_tensors(mine: Run, name: str, shape: tuple[int, ...], said) -> None:
    def change(tensors: dict[str, torch.Tensor], position: dict[str, object]) -> None:
        tensors[name] = torch.ones(shape)
        position |= {"stage": "pretrain-cnn", "epoch": 1}

    forge(mine, change)
    code, text = said("train", "--resume", "--run", mine.folder)
    assert code == 1
    assert "no checkpoint of racnn does" in text or "is of other parameters" in text


def test_files_without_an_end_are_not_read(run: Run, tmp_path: Path, said) -> None:
    for name, command in (("classes.json", "eval"), ("eval.json", "report")):
        copy = Run(tmp_path / name)
        shutil.copytree(run.folder, copy.folder)
        (copy.folder / name).unlink(missing_ok=True)
        os.mkfifo(copy.folder / name)
        code, text = said(command, "--run", copy.folder)
        assert code
        assert f"{name} is " in text


@pytest.mark.parametrize("name", ["log.jsonl", "state/lock", "state"])
def test_nor_are_they_written_to(mine: Run, name: str, said) -> None:
    path = mine.folder / name
    path.rename(mine.folder.parent / "own")
    os.mkfifo(path)
    code, text = said("alternate", "--run", mine.folder)
    assert code == 2
    assert f"{path} is no " in text


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
def test_a_report_of_a_damaged_log(run: Run, tmp_path: Path, event: dict[str, object], said) -> None:
    copy = Run(tmp_path / "copy")
    shutil.copytree(run.folder, copy.folder)
    said("eval", "--run", copy.folder)
    good = {"event": "epoch", "stage": "alternate", "phase": "CNN phase", "round": 1, "epoch": 1, "seconds": 1.0}
    good |= {"train_loss": {"loss": 1.0}, "val": {"scales": [{"top1": 0.5, "nll": 1.0}]}}
    copy.log.write_text("".join(json.dumps(entry) + "\n" for entry in (good, good | event)))
    code, text = said("report", "--run", copy.folder)
    assert code == 0 or "is not UTF-8" in text


@pytest.mark.skipif(sys.platform != "linux", reason="its file names are bytes")
def test_a_name_that_is_not_utf8_is_no_hindrance(here: Path, said) -> None:
    data = write_blobs(here / "data")
    for split in ("train", "test"):
        place = os.fsencode(data / split / "red")
        os.rename(place + b"/00.png", place + b"/caf\xe9.png")
    write_recipe(here / "mine.toml", data, alternate__rounds=1)
    code, text = said("train", "mine.toml", "--out", "mine")
    assert code == 0, text
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8:strict"}
    for style in ("csv", "jsonl", "table"):
        words = [sys.executable, "-m", "racnn_cli", "predict", "data/test", "--run", "mine", "--format", style]
        done = subprocess.run(words, env=environment, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        assert rb"caf\udce9.png" in done.stdout


# ---- ONNX files


def write_onnx(file: Path, location: str = "", shape: tuple[int, ...] = (1, 3), **metadata: object) -> Path:
    """A graph that answers with one stored tensor, which may lie in another file."""
    names = ("probabilities", "scales", "boxes")
    tensor = TensorProto(name="stored", data_type=TensorProto.FLOAT, dims=shape)
    if location:
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": location, "offset": "0", "length": "12"}.items():
            tensor.external_data.add(key=key, value=value)
    else:
        tensor.raw_data = np.zeros(shape, np.float32).tobytes()
    names_of_nodes = ("Identity", "Identity", "Identity") if shape else ("Evil\x1b[2J", "Identity", "Identity")
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node(kind, ["stored"], [name]) for kind, name in zip(names_of_nodes, names, strict=True)],
            "graph",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["b", 3, "h", "w"])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names],
            [tensor],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    told = {"classes": '["a", "b", "c"]', "source": 64, "sizes": "[64, 64]", "fit": "crop", "layout": "NCHW"}
    for key, value in (told | metadata).items():
        model.metadata_props.add(key=key, value=str(value))
    onnx.save(model, file) if not location else file.write_bytes(model.SerializeToString())
    return file


@pytest.mark.parametrize("location", ["{}/secret.bin", "../secret.bin", "link.bin", "/dev/zero", "in/../../secret.bin"])
def test_weights_elsewhere_are_not_read(here: Path, location: str) -> None:
    (here / "secret.bin").write_bytes(np.ones(3, np.float32).tobytes())
    (here / "got").mkdir()
    (here / "got" / "link.bin").symlink_to(here / "secret.bin")
    with pytest.raises(RacnnError, match=r"cannot load .*xternal data"):
        load(write_onnx(here / "got" / "model.onnx", location.format(here)))


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
def test_metadata_that_lie(here: Path, metadata: dict[str, object]) -> None:
    key = next(iter(metadata))
    with pytest.raises(RacnnError, match=f"missing or invalid metadata: {key}"):
        load(write_onnx(here / "model.onnx", **metadata))


def test_a_graph_whose_parts_have_wicked_names(here: Path, said) -> None:
    Image.new("RGB", (9, 9)).save(here / "a.png")
    code, text = said("predict", write_onnx(here / "model.onnx", shape=()), "a.png")
    assert code == 1
    assert "\x1b" not in text
    assert r"Evil\x1b[2J" in text


@pytest.mark.parametrize("shape", [(1,), (1, 3), (2, 2, 3), (0,)])
def test_a_graph_that_answers_something_else(here: Path, shape: tuple[int, ...], said) -> None:
    Image.new("RGB", (9, 9)).save(here / "a.png")
    file = write_onnx(here / "model.onnx", shape=shape)
    code, text = said("predict", file, "a.png")
    assert code == 2
    assert "\x1b" not in text
    assert "is not a network that racnn can use: its" in text
