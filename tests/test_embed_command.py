"""Files of embeddings against the embedder, image by image; stopped, continued and refused."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simo_lightning import Embedder
from simo_lightning.cli import main
from simo_lightning.embed_files import embed_files, find_images, listing, read_classes
from simo_lightning.embeddings_file import open_embeddings, sha256_of
from tests.trained import CLASSES, write_checkpoint, write_images

OPTIONS = {"num_workers": 0, "device": "cpu"}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "last.ckpt")


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    """Six images and three files that are none, in the folder "images"."""
    paths = write_images(tmp_path, [f"images/{name}" for name in ("b.png", "a.JPG", "é/2.png", "é/10.png", "z.webp")])
    (tmp_path / "images" / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "images" / "notes.txt").touch()
    (tmp_path / "images" / ".hidden.png").touch()
    return paths


def flat(paths: list[str]) -> list[str]:
    return [path.replace(os.sep, "/") for path in paths]


def test_columns_of_a_parquet_file(checkpoint: Path, images: list[Path]) -> None:
    done = embed_files(checkpoint, ["images"], "out/all.parquet", scores=True, shares=True, batch_size=2, **OPTIONS)
    assert (done.images, done.broken, done.embedded) == (5, 1, 6)
    assert done.notes == ["not taken (left out: 1 *.txt)"]
    table = pq.read_table("out/all.parquet")
    assert table.schema.field("embedding").type == pa.list_(pa.float32(), 16)
    assert table.schema.field("scores").type == pa.list_(pa.float32(), 3)
    rows = table.to_pylist()
    order = ["images/a.JPG", "images/b.png", "images/z.webp", "images/é/10.png", "images/é/2.png"]
    assert [row["path"] for row in rows] == order
    embedder = Embedder.load(checkpoint, device="cpu")
    for row in rows:
        embedding = embedder(row["path"])[0].astype(np.float64)  # one image at a time
        np.testing.assert_allclose(row["embedding"], embedding, rtol=0, atol=1e-5 * np.abs(embedding).max())
        means = embedder.classes.means.double().numpy()[:2]  # type: ignore[union-attr]
        cosines = means @ embedding / np.linalg.norm(means, axis=1) / np.linalg.norm(embedding)
        np.testing.assert_allclose(row["scores"][:2], cosines, atol=1e-5)
        assert np.isnan(row["scores"][2])
        assert row["class"] == CLASSES[int(cosines.argmax())]
        assert row["score"] == pytest.approx(cosines.max(), abs=1e-5)
        assert min(row["shares"]) >= 0
        assert sum(row["shares"]) + row["rest"] == pytest.approx(1, abs=1e-6)
    info = json.loads(table.schema.metadata[b"simo_lightning"])
    assert info["checkpoint_sha256"] == sha256_of(checkpoint)
    assert info["class_names"] == CLASSES
    assert info["preprocessing"]["image_size"] == 32
    with open("out/all.parquet.broken.csv", newline="") as file:
        broken = list(csv.DictReader(file))
    assert [row["path"] for row in broken] == ["images/broken.jpg"]
    assert "does not decode as an image" in broken[0]["reason"]
    assert sorted(os.listdir("out")) == ["all.parquet", "all.parquet.broken.csv"]


def test_an_npz_file_holds_the_same_and_no_object(checkpoint: Path, images: list[Path]) -> None:
    for name in ("all.parquet", "all.npz"):
        embed_files(checkpoint, ["images"], name, scores=True, shares=True, **OPTIONS)
    table = pq.read_table("all.parquet")
    with np.load("all.npz", allow_pickle=False) as file:
        assert file["paths"].tolist() == table["path"].to_pylist()
        assert file["classes"].tolist() == table["class"].to_pylist()
        assert file["class_names"].tolist() == CLASSES
        for one, other in (("embeddings", "embedding"), ("scores", "scores"), ("shares", "shares"), ("rest", "rest")):
            np.testing.assert_array_equal(file[one], np.array(table[other].to_pylist(), dtype=np.float32))
        info = json.loads(str(file["info"]))
    assert info == json.loads(table.schema.metadata[b"simo_lightning"])
    with open_embeddings("all.npz") as one, open_embeddings("all.parquet") as other:  # type: ignore[assignment]
        for column in ("path", "class", "scores"):
            np.testing.assert_equal(one.column(column, [4, 1]), other.column(column, [4, 1]))


def test_files_patterns_and_tables(tmp_path: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    assert flat(list(find_images(["images/notes.txt"]))) == ["images/notes.txt"]
    assert flat(list(find_images(["images/*.png", "images/a.JPG"]))) == ["images/b.png", "images/a.JPG"]
    assert flat(list(find_images(["images/**/2.png"]))) == ["images/é/2.png"]
    Path("images/list.csv").write_text("Label;Path\nx;é/2.png\ny;b.png\n")
    assert flat(list(find_images(["images/list.csv"]))) == ["images/é/2.png", "images/b.png"]
    assert flat(list(find_images(["images/list.csv"], "images/é"))) == ["images/é/é/2.png", "images/é/b.png"]
    pq.write_table(pa.table({"path": ["b.png"] * 3, "other": [1, 2, 3]}), "images/list.parquet")
    assert flat(list(find_images(["images/list.parquet"]))) == ["images/b.png"] * 3
    all_of_them = list(find_images(["images"]))
    monkeypatch.setattr(listing, "_SORTED_AT_ONCE", 2)  # so that blocks of names are merged from files
    assert list(find_images(["images"])) == all_of_them


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("missing.jpg", FileNotFoundError, "no file, folder or match of 'missing.jpg'"),
        ("*.bmp", FileNotFoundError, "no file, folder or match of"),
        ("empty", FileNotFoundError, r"no image in 'empty' \(left out: 1 \*.txt\)"),
        ("bad.csv", ValueError, "must have one column path, got name, label"),
        ("bad.parquet", ValueError, "is not a Parquet file"),
        ("hole.csv", ValueError, "row 2: path must not be empty"),
    ],
)
def test_what_is_no_list_of_images(checkpoint: Path, given: str, error: type[Exception], message: str) -> None:
    Path("empty").mkdir()
    Path("empty/notes.txt").touch()
    Path("bad.csv").write_text("name,label\na,b\n")
    Path("bad.parquet").write_text("text")
    Path("hole.csv").write_text("path,label\na,b\n,c\n")
    with pytest.raises(error, match=message):
        embed_files(checkpoint, [given], "out.npz", **OPTIONS)
    assert not Path("out.npz.parts").exists()


def test_a_link_that_leads_back_is_refused(images: list[Path]) -> None:
    Path("images/é/back").symlink_to(Path("images").absolute())
    with pytest.raises(ValueError, match="leads back to a folder that contains it"):
        list(find_images(["images"]))


def test_names_that_are_not_utf8_and_missing_files_are_listed_as_broken(checkpoint: Path, images: list[Path]) -> None:
    os.link("images/b.png", b"images/\xff.png")
    Path("images/gone.png").symlink_to("nowhere")
    assert embed_files(checkpoint, ["images"], "out.npz", **OPTIONS).broken == 3
    with open("out.npz.broken.csv", newline="") as file:
        reasons = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    assert reasons[r"images/\xff.png"] == "its name is not UTF-8"
    assert reasons["images/gone.png"] == "No such file or directory"


def test_only_broken_images_are_an_error(checkpoint: Path, images: list[Path]) -> None:
    with pytest.raises(ValueError, match=r"none of 1 images can be read; out.npz.broken.csv lists the reasons"):
        embed_files(checkpoint, ["images/broken.jpg"], "out.npz", **OPTIONS)
    assert Path("out.npz.broken.csv").is_file()
    assert not Path("out.npz").exists()


def many_images(folder: Path, count: int) -> None:
    """Links to seven images and one broken file."""
    sources = write_images(folder, [f"source/{number}.png" for number in range(7)])
    sources.append(folder / "source" / "7.png")
    sources[-1].write_bytes(b"no image")
    (folder / "many").mkdir()
    for number in range(count):
        os.link(sources[number % 8], folder / "many" / f"{number:04}.png")


def words(*options: str) -> list[str]:
    return ["embed", "last.ckpt", "many", *options, "--num_workers", "0", "--device", "cpu", "--batch_size", "32"]


def test_a_killed_command_continues_to_the_same_file(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many_images(tmp_path, 2200)  # three parts
    for suffix in ("parquet", "npz"):
        main(words("--out", f"whole.{suffix}", "--scores", "--no_progress"))
    command = [sys.executable, "-c", "from simo_lightning.cli import main; main()"]
    out = Path("continued.parquet")
    with subprocess.Popen([*command, *words("--out", str(out), "--scores")], stderr=subprocess.DEVNULL) as process:
        while not Path("continued.parquet.parts/part-000000.npz").exists():
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    left = len(list(Path("continued.parquet.parts").glob("part-*.npz")))
    assert left < 3
    with pytest.raises(SystemExit):
        main(words("--out", str(out)))
    assert "was begun with scores True, not False: finish it with the same arguments" in capsys.readouterr().err
    main(words("--out", str(out), "--scores", "--no_progress"))
    assert f"({2200 - 1024 * left:,} in " in capsys.readouterr().out
    assert out.read_bytes() == Path("whole.parquet").read_bytes()
    assert Path("continued.parquet.broken.csv").read_bytes() == Path("whole.parquet.broken.csv").read_bytes()
    assert not Path("continued.parquet.parts").exists()
    main(words("--out", str(out), "--scores"))  # once more
    assert "1,925 embeddings in continued.parquet (all were there already)" in capsys.readouterr().out
    os.link("many/0000.png", "many/new.png")
    with pytest.raises(SystemExit):
        main(words("--out", str(out), "--scores"))
    assert "'continued.parquet' exists, made with images 2200, not 2201" in capsys.readouterr().err


def test_two_processes_give_the_same_as_one(checkpoint: Path, tmp_path: Path) -> None:
    many_images(tmp_path, 1100)
    for devices in (1, 2):
        embed_files(checkpoint, ["many"], f"{devices}.npz", devices=devices, batch_size=64, **OPTIONS)
    with np.load("1.npz") as one, np.load("2.npz") as two:
        assert one["paths"].tolist() == two["paths"].tolist()
        np.testing.assert_allclose(one["embeddings"], two["embeddings"], rtol=1e-5, atol=1e-6)
    assert Path("1.npz.broken.csv").read_bytes() == Path("2.npz.broken.csv").read_bytes()


def test_a_second_command_at_the_same_time_is_refused(checkpoint: Path, images: list[Path]) -> None:
    Path("out.npz.parts").mkdir()
    script = "import fcntl, sys, time; f = open('out.npz.parts/lock', 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(1)"
    holds = [sys.executable, "-u", "-c", f"{script}; sys.stdin.read()"]
    with subprocess.Popen(holds, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(ValueError, match=r"out 'out.npz' is being written by another process"):
            embed_files(checkpoint, ["images"], "out.npz", **OPTIONS)
        process.communicate()
    assert embed_files(checkpoint, ["images"], "out.npz", **OPTIONS).images == 5


def test_class_means_of_a_folder_of_an_npz_and_of_a_parquet_file(checkpoint: Path, tmp_path: Path) -> None:
    paths = write_images(tmp_path, [f"new/{name}/{number}.png" for name in ("fig", "kiwi") for number in range(3)])
    embedder = Embedder.load(checkpoint, device="cpu")
    embeddings = embedder(paths)
    unit = embeddings.astype(np.float64) / np.linalg.norm(embeddings.astype(np.float64), axis=1, keepdims=True)
    expected = np.stack([unit[:3].mean(0), unit[3:].mean(0)])
    labels = np.array([0, 0, 0, 1, 1, 1])
    np.savez("new.npz", embeddings=embeddings, labels=labels, class_names=np.array(["fig", "kiwi"]))
    lists = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.reshape(-1)), 16)
    pq.write_table(pa.table({"embedding": lists, "label": ["fig"] * 3 + ["kiwi"] * 3}), "new.parquet")
    for source in ("new", "new.npz", "new.parquet"):
        found = read_classes(source, embedder)
        assert found.names == ["fig", "kiwi"]
        np.testing.assert_allclose(found.means, expected, rtol=0, atol=1e-6)
    embed_files(checkpoint, ["new"], "out.npz", classes="new", **OPTIONS)
    with np.load("out.npz") as file:
        assert file["class_names"].tolist() == ["fig", "kiwi"]
        nearest = (unit @ (expected / np.linalg.norm(expected, axis=1, keepdims=True)).T).argmax(1)
        assert file["classes"].tolist() == [("fig", "kiwi")[number] for number in nearest]


def test_class_means_of_another_model_are_refused(checkpoint: Path) -> None:
    np.savez("wide.npz", embeddings=np.ones((2, 5), np.float32), labels=np.zeros(2, int), class_names=np.array(["a"]))
    embedder = Embedder.load(checkpoint, device="cpu")
    with pytest.raises(ValueError, match="must hold embeddings of 16 dimensions, got 5"):
        read_classes("wide.npz", embedder)
    np.savez("none.npz", embeddings=np.ones((2, 16), np.float32))
    with pytest.raises(ValueError, match="must have an array labels of 2 integers"):
        read_classes("none.npz", embedder)


def test_without_class_means_there_is_no_class(tmp_path: Path, images: list[Path]) -> None:
    checkpoint = write_checkpoint(tmp_path / "old.ckpt", means=False)
    done = embed_files(checkpoint, ["images/b.png"], "out.parquet", **OPTIONS)
    assert pq.read_schema("out.parquet").names == ["path", "embedding"]
    assert done.notes == ["no column class: the checkpoint holds no class means, and no --classes are given"]
    with pytest.raises(ValueError, match="class means must be known for scores and shares"):
        embed_files(checkpoint, ["images/b.png"], "scores.parquet", scores=True, **OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "out.txt"], "out must end in .parquet or .npz, got 'out.txt'"),
        (["--out", "out.npz", "--devices", "0"], "devices must be at least 1, got 0"),
        (["--out", "out.npz", "--batch_size", "0"], "batch_size must be at least 1, got 0"),
        (["--out", "out.npz", "--num_workers", "-1"], "num_workers must be at least 0, got -1"),
        (["--out", "out.npz", "--device", "gpu"], "device must be one of this machine, got 'gpu'"),
        (["--out", "out.npz", "--classes", "nowhere"], "no file of embeddings at 'nowhere'"),
    ],
)
def test_errors_are_one_line(
    checkpoint: Path, images: list[Path], capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as status:
        main(["embed", "last.ckpt", "images", *options])
    assert status.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("simo embed: error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not Path("out.npz.parts").exists()
