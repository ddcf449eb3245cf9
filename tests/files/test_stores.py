"""Paths and atomic writes on object stores: an S3 server and a GCS emulator."""

import asyncio
import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image

from mvar_jax.errors import InputError, RunError
from mvar_jax.files import paths
from mvar_jax.files.atomic import replacing, write_atomically, write_json
from mvar_jax.files.directories import check_new, local_folder, new_directory, remove_tree
from mvar_jax.files.images import save_png
from mvar_jax.files.locks import acquire
from mvar_jax.files.npz import save_npz
from mvar_jax.files.paths import as_path, local_path
from mvar_jax.files.stores import filesystem


@pytest.fixture
def folder(store, request):
    """A folder of its own for every test, with brackets in its name."""
    return as_path(store.url, "workdir") / request.node.name


def test_path_names_its_parts_and_stays_what_it_is(store):
    path = as_path(f"{store.url}/a/b.txt")
    assert str(path) == f"{store.url}/a/b.txt" == str(path.absolute()) == str(path.resolve())
    assert (path.name, path.stem, path.suffix, str(path.parent)) == ("b.txt", "b", ".txt", f"{store.url}/a")
    assert str(path.parent / "c" / "d.e") == f"{store.url}/a/c/d.e" == str(path.parent.joinpath("c/d.e"))
    assert str(path.with_name("z")) == f"{store.url}/a/z"
    assert path.relative_to(store.url).as_posix() == "a/b.txt" and path.is_relative_to(path.parent)
    assert as_path(path) == path == epath.Path(str(path)) and isinstance(path, epath.Path)
    assert type(epath.Path(path)) is type(path) is type(epath.Path(str(path)))


def test_path_that_pathlib_has_seen_names_the_store(store):
    assert as_path(Path(f"{store.url}/a")) == as_path(f"{store.url}/a")


def test_files_and_folders_are_found(folder):
    assert not folder.exists() and not folder.is_dir()
    for name in ("a.txt", "b/c.txt", "b/d/e.png"):
        write_atomically(folder / name, name)
    assert folder.is_dir() and not folder.is_file() and (folder / "a.txt").is_file()
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "b"] and folder.list_folders() == ["b"]
    assert list(folder.glob("*.txt")) == [folder / "a.txt"]
    assert sorted(folder.rglob("*.txt")) == [folder / "a.txt", folder / "b/c.txt"]
    assert folder.find() == ["a.txt", "b/c.txt", "b/d/e.png"]
    assert [(str(top), files) for top, _, files in folder.walk()][0] == (str(folder), ["a.txt"])
    (folder / "a.txt").unlink()
    assert not (folder / "a.txt").exists()
    with pytest.raises(FileNotFoundError):
        (folder / "a.txt").read_text()
    remove_tree(folder)
    remove_tree(folder)
    assert not folder.exists()


def test_object_is_read_whole_in_parts_and_as_a_file(folder):
    path = folder / "a.bin"
    write_atomically(path, b"0123456789")
    assert path.read_bytes() == b"0123456789" and path.read_range(3, 4) == b"3456" and path.stat().st_size == 10
    with path.open("rb") as file:
        file.seek(8)
        assert file.read() == b"89"
    with path.open("w") as file:
        file.write("new")
    assert path.read_text() == "new"


def test_object_and_folder_are_renamed_whole(folder):
    for name in ("old/a", "old/deep/b[1]", "old/deep/b1", "older/c"):
        (folder / name).write_text(name)
    (folder / "old").rename(folder / "new")
    (folder / "older/c").rename(folder / "older/d")
    assert folder.find() == ["new/a", "new/deep/b1", "new/deep/b[1]", "older/d"]
    assert (folder / "new/deep/b[1]").read_text() == "old/deep/b[1]"


def test_file_appears_only_after_the_block(folder):
    path = folder / "a.txt"
    write_atomically(path, "old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and folder.find() == ["a.txt"]


def test_block_that_raises_keeps_the_old_object_and_leaves_nothing_else(folder):
    path = folder / "a.txt"
    write_atomically(path, "old")
    with pytest.raises(KeyError), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyError
    with pytest.raises(KeyError), path.open("wb") as file:
        file.write(b"half")
        raise KeyError
    assert path.read_text() == "old" and folder.find() == ["a.txt"]


def test_json_images_and_arrays_read_back_equal(folder):
    image = np.random.default_rng(1).integers(0, 256, (5, 7, 3), np.uint8)
    write_json(folder / "a.json", {"a": 1})
    save_png(folder / "x.png", image)
    save_npz(folder / "y.npz", image=image)
    assert (folder / "a.json").read_text() == '{\n "a": 1\n}\n'
    with (folder / "x.png").open("rb") as file:
        np.testing.assert_array_equal(np.asarray(Image.open(file)), image)
    with (folder / "y.npz").open("rb") as file:
        np.testing.assert_array_equal(np.load(file)["image"], image)


def test_directory_appears_when_the_block_succeeds_its_last_file_last(folder, monkeypatch):
    written = []
    upload = type(folder).upload
    monkeypatch.setattr(type(folder), "upload", lambda path, file: (written.append(path.name), upload(path, file)))
    with new_directory("out", folder, last="model.json") as temporary:
        (temporary / "sub").mkdir()
        for name in ("model.json", "sub/x", "z"):
            (temporary / name).write_text(name)
        assert folder.find() == [".lease"]
    assert folder.find() == ["model.json", "sub/x", "z"] and written[-1] == "model.json"
    with pytest.raises(InputError, match="--out must be a new or an empty directory"):
        check_new("out", folder)


def test_directory_whose_upload_fails_leaves_nothing(folder, monkeypatch):
    upload = type(folder).upload

    def fail_at_last(path, file):
        if path.name == "model.json":
            raise OSError(5, "lost")
        upload(path, file)

    monkeypatch.setattr(type(folder), "upload", fail_at_last)
    with (
        pytest.raises(RunError, match="out .* cannot be written .*lost.*; nothing was written"),
        new_directory("out", folder, "model.json") as temporary,
    ):
        (temporary / "a").write_text("a")
        (temporary / "model.json").write_text("{}")
    assert not folder.exists()


def test_object_is_written_new_only_once(folder):
    (folder / "a").write_new(b"first")
    with pytest.raises(FileExistsError):
        (folder / "a").write_new(b"second")
    assert (folder / "a").read_bytes() == b"first"


def test_missing_bucket_is_refused(store):
    missing = as_path(store.url.replace("bucket", "no-such-bucket") + "/run", "out")
    with pytest.raises(InputError, match="out .*no-such-bucket/run cannot be written: ") as caught:
        acquire(missing, "out")
    assert caught.value.field == "out" and not missing.parent.exists()


def test_traceback_of_a_task_that_nobody_waits_for_is_not_printed(store, caplog):
    """A part of an upload that fails with its server: the upload itself raises."""

    async def fail():
        raise ConnectionResetError("the server went away")

    async def lose_a_task():
        task = asyncio.ensure_future(fail())
        await asyncio.sleep(0)
        assert task.done()
        del task
        gc.collect()

    loop = filesystem(store.url.partition(":")[0]).loop
    asyncio.run_coroutine_threadsafe(lose_a_task(), loop).result(60)
    assert [record for record in caplog.records if record.name == "asyncio"] == []


@pytest.mark.parametrize("text", ["gcs://bucket/a", "hdfs://host/a", "S4://b"])
def test_unknown_scheme_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = f"workdir must be a path of this machine, gs://BUCKET/... or s3://BUCKET/..., got '{text}'"
    with pytest.raises(InputError) as caught:
        as_path(text, "workdir")
    assert str(caught.value) == expected and caught.value.field == "workdir" and not list(tmp_path.iterdir())


def test_store_without_bucket_is_refused():
    with pytest.raises(InputError, match="out must be s3://BUCKET/..., got 's3://'"):
        as_path("s3://", "out")


def test_an_empty_path_of_an_unset_variable_is_refused():
    with pytest.raises(InputError, match="out must be a path, got ''"):
        as_path("", "out")


@pytest.mark.parametrize("text", ["runs/a:b", "/tmp/gs", "a:", "c:/x", "."])
def test_path_without_scheme_is_one_of_this_machine(text):
    assert as_path(text) == Path(text) and not paths.is_store(text)


def test_what_must_be_local_refuses_a_store():
    with pytest.raises(InputError, match="data.path must be a path of this machine's file systems, since it is") as e:
        local_path("gs://bucket/a", "data.path", "it is read by C++")
    assert e.value.field == "data.path"


def test_missing_package_is_named_with_status_2_and_no_folder_appears(tmp_path):
    code = "import sys; sys.modules['gcsfs'] = None; from mvar_jax.__main__ import main; sys.exit(main(sys.argv[1:]))"
    options = ["--images=gs://bucket/images", "--checkpoint=model", "--out=out"]
    command = [sys.executable, "-c", code, "reconstruct", *options]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    advice = 'pip install ".[gcs]" in the checkout'
    expected = f"error: images=gs://bucket/images needs the package gcsfs, the extra gcs: {advice}\n"
    assert (result.returncode, result.stderr) == (2, expected) and not list(tmp_path.iterdir())


def test_store_that_does_not_answer_is_one_sentence(tmp_path, monkeypatch):
    """A server that is not there, at a port that nobody listens to."""
    code = "from mvar_jax.files.paths import as_path; as_path('s3://bucket/run', 'workdir')"
    environment = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("mvar_jax.errors.InputError: workdir=s3://bucket/run cannot be reached: "), result.stderr
    assert "127.0.0.1:9" in last


def test_folder_of_a_library_that_writes_only_here_is_uploaded(folder, tmp_path):
    with local_folder(folder) as place:
        (place / "plugins").mkdir()
        (place / "plugins/trace").write_text("x")
        assert not folder.exists()
    assert folder.find() == ["plugins/trace"] and not place.exists()
    with local_folder(tmp_path) as place:
        assert place == tmp_path
