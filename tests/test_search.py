"""Nearest neighbours against a comparison in float64, row by row."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from simo_lightning.cli import main
from simo_lightning.embed_files import embed_files
from simo_lightning.embeddings_file import open_embeddings
from simo_lightning.extras import missing_extra
from simo_lightning.search import NearestNeighbors, search_images, write_page
from tests.trained import write_checkpoint, write_images

BACKENDS = ["torch", "faiss"]


def reference(index: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and rows, equal cosines by row."""
    cosines = np.zeros((len(queries), len(index)))
    for row, query in enumerate(queries.astype(np.float64)):
        for column, each in enumerate(index.astype(np.float64)):
            norms = np.linalg.norm(query) * np.linalg.norm(each)
            cosines[row, column] = query @ each / norms if norms else 0.0
    rows = np.argsort(-cosines, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(cosines, rows, axis=1), rows


def normal(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbors_are_those_of_a_comparison_in_float64(backend: str) -> None:
    index, queries = normal(500, 12) * 7, normal(70, 12, seed=1)
    index[3] = 0
    cosines, rows = reference(index, queries, 9)
    found = NearestNeighbors(index, backend).search(queries, 9)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_allclose(found.cosines, cosines, rtol=0, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nearly_equal_cosines_that_float32_cannot_order(backend: str) -> None:
    query = np.array([[1.0, 0.0]])
    angles = 0.001 + 1e-9 * np.random.default_rng(0).permutation(60)
    index = np.stack([np.cos(angles), np.sin(angles)], axis=1)  # cosines differ by 1e-12
    found = NearestNeighbors(index, backend).search(query, 5).rows[0]
    np.testing.assert_array_equal(found, np.argsort(angles)[:5])


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_embeddings_are_in_the_order_of_the_rows_over_chunks(backend: str) -> None:
    base = normal(40, 6)
    index = np.tile(base, (3500, 1))  # 140,000 rows, more than two chunks
    query = base[[7, 20]] + 0.01 * normal(2, 6, seed=1)
    found = NearestNeighbors(index, backend).search(query, 4).rows
    np.testing.assert_array_equal(found, [[7, 47, 87, 127], [20, 60, 100, 140]])


def test_all_embeddings_can_be_asked_for() -> None:
    index = normal(30, 4)
    found = NearestNeighbors(index).search(index[:2], 30).rows
    np.testing.assert_array_equal(np.sort(found, axis=1), np.tile(np.arange(30), (2, 1)))


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_recall_is_the_share_of_neighbors_that_are_found(kind: str) -> None:
    index = normal(1500, 24).astype(np.float64)
    neighbors = NearestNeighbors(index, approximate=kind)  # type: ignore[arg-type]
    found = neighbors.search(index, 10).rows
    unit = index / np.linalg.norm(index, axis=1, keepdims=True)
    exact = np.argsort(-(unit @ unit.T), axis=1)[:, :10]
    expected = np.mean([len(set(one) & set(other)) / 10 for one, other in zip(found, exact, strict=True)])
    assert neighbors.recall(10, sample=1500) == pytest.approx(expected, abs=1e-4)
    assert 0.2 < expected < (0.9999 if kind == "ivf" else 1.0001)


@pytest.mark.parametrize(
    ("index", "query", "k", "message"),
    [
        (normal(3, 4), normal(1, 4), 4, "k must be in 1..3, the number of embeddings, got 4"),
        (normal(3, 4), normal(1, 4), 0, "k must be in 1..3, the number of embeddings, got 0"),
        (normal(3, 4), normal(1, 5), 1, r"queries must have shape \(M, 4\), got \(1, 5\)"),
        (normal(3, 4), np.full((1, 4), np.nan), 1, "queries must be finite"),
        (np.full((3, 4), np.inf), normal(1, 4), 1, "embeddings of the index from row 0 must be finite"),
        (normal(0, 4), normal(1, 4), 1, "index must hold at least 1 embedding"),
        (normal(3, 4)[0], normal(1, 4), 1, r"index must have shape \(N, D\)"),
    ],
)
def test_arguments_out_of_range(index: np.ndarray, query: np.ndarray, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NearestNeighbors(index).search(query, k)


@pytest.fixture
def embedded(tmp_path: Path) -> Path:
    """An index of six images beside the images and the checkpoint, in the current folder."""
    write_images(tmp_path, [f"images/{number}.png" for number in range(5)] + ['images/<b>"&amp;.png'])
    write_checkpoint(tmp_path / "last.ckpt")
    return embed_files("last.ckpt", ["images"], "index.parquet", num_workers=0, device="cpu").path


def test_an_image_finds_itself_and_the_table_is_printed(embedded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["search", str(embedded), "images/3.png", "-k", "2", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "images/3.png"
    assert lines[1].split()[:2] == ["1", "1.0000"]
    assert lines[1].split()[-1] == "images/3.png"
    assert len(lines) == 3
    with open_embeddings(embedded) as file:
        _, embeddings = next(file.chunks())
        paths = file.column("path", range(6))
        classes = file.column("class", range(6))
    _, rows = reference(embeddings, embeddings[[paths.index("images/3.png")]], 2)
    assert lines[2].split()[-2:] == [classes[rows[0, 1]], paths[rows[0, 1]]]


def test_the_page_holds_everything_and_escapes_names(embedded: Path, tmp_path: Path) -> None:
    (tmp_path / "images" / "2.png").rename("elsewhere.png")
    results, recall = search_images(embedded, ["images/0.png", "elsewhere.png"], k=6, device="cpu")
    write_page("page.html", results, embedded)
    page = Path("page.html").read_text()
    assert recall is None
    assert "<b>" not in page
    name = "&lt;b&gt;&#34;&amp;amp;.png"
    assert page.count(f', images/{name}"') == 2  # alternative texts, for two queries
    assert page.count(f">images/<wbr>{name}<") == 2
    assert page.count('src="data:image/jpeg;base64,') == 2 * 7 - 2
    assert page.count("image not found") == 2
    assert "http" not in page


def test_other_weights_are_refused(embedded: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other.ckpt", seed=1)
    with pytest.raises(ValueError, match=r"checkpoint 'other.ckpt' is not the one that made the index"):
        search_images(embedded, ["images/0.png"], checkpoint=other.name)
    other.replace("last.ckpt")
    with pytest.raises(ValueError, match=r"checkpoint 'last.ckpt' is not the one that made the index"):
        search_images(embedded, ["images/0.png"])
    Path("last.ckpt").unlink()
    with pytest.raises(FileNotFoundError, match="pass the one that made the index, --checkpoint FILE"):
        search_images(embedded, ["images/0.png"])


def test_the_checkpoint_is_found_beside_the_index(embedded: Path) -> None:
    Path("moved").mkdir()
    for name in ("last.ckpt", "index.parquet"):
        Path(name).replace(f"moved/{name}")
    results, _ = search_images("moved/index.parquet", ["images/1.png"], k=1, device="cpu")
    assert results[0].matches[0].path == "images/1.png"


def test_a_file_of_another_program_and_bad_k_are_refused(embedded: Path) -> None:
    np.savez("other.npz", embeddings=normal(3, 16), paths=np.array(["a", "b", "c"]))
    with pytest.raises(ValueError, match="must say which checkpoint made it"):
        search_images("other.npz", ["images/0.png"], k=2)
    np.savez("predicted.npz", embeddings=normal(3, 16), labels=np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="must have a column path, got embedding, labels"):
        search_images("predicted.npz", ["images/0.png"])
    with pytest.raises(ValueError, match=r"k must be in 1\.\.6"):
        search_images(embedded, ["images/0.png"], k=7)


def test_an_array_of_objects_is_not_opened() -> None:
    np.savez("objects.npz", embeddings=np.array([[object()]], dtype=object))
    with pytest.raises(ValueError, match=r"is not an .npz file that can be read"):
        open_embeddings("objects.npz")


def test_compressed_and_mapped_arrays_are_read_alike() -> None:
    values = {"embeddings": normal(6, 5), "paths": np.array(list("abcdef"))}
    np.savez("plain.npz", **values)  # type: ignore[arg-type]
    np.savez_compressed("small.npz", **values)  # type: ignore[arg-type]
    for name in ("plain.npz", "small.npz"):
        with open_embeddings(name) as file:
            np.testing.assert_array_equal(np.concatenate([chunk for _, chunk in file.chunks()]), values["embeddings"])
            assert file.column("path", [5, 0]) == ["f", "a"]


def test_without_faiss_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    index, queries = normal(50, 8), torch.from_numpy(normal(4, 8, seed=1))
    with_faiss = NearestNeighbors(index)
    monkeypatch.setitem(sys.modules, "faiss", None)  # an import raises
    without = NearestNeighbors(index)
    assert without.faiss is None
    assert with_faiss.faiss is not None
    np.testing.assert_array_equal(with_faiss.search(queries, 5).rows, without.search(queries, 5).rows)
    with pytest.raises(ModuleNotFoundError, match="faiss"):
        NearestNeighbors(index, approximate="hnsw")
    assert missing_extra("No module named 'faiss'") == "faiss is missing: pip install 'simo_lightning[search]'"
