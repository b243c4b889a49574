"""Artifacts are there whole or not at all."""

import errno
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from fourfold.artifacts import artifact, read_manifest, read_provenance, write_artifact
from fourfold.artifacts.files import atomic_file, dump_json, read_jsonl, sha256_file, write_jsonl, write_text
from fourfold.errors import FourfoldError

SLOW_WRITER = """
import sys, time
from pathlib import Path
from fourfold.artifacts import write_artifact
with write_artifact(Path(sys.argv[1]), stage="slow", settings={}) as staging:
    (staging.path / "half").write_text("x")
    print("writing", flush=True)
    time.sleep(60)
"""


def write(manifest: Path, **files: str) -> None:
    with write_artifact(manifest, stage="test", settings={"n": 1}) as staging:
        for name, text in files.items():
            (staging.path / name).write_text(text)


def test_manifest_states_files_settings_and_inputs(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_text("input")
    manifest = tmp_path / "artifact" / "manifest.json"
    with write_artifact(
        manifest, stage="test", settings={"n": 1}, inputs={"source": source}, libraries=["torch", "no-such-library"]
    ) as staging:
        (staging.path / "sub").mkdir()
        (staging.path / "sub" / "a.txt").write_text("abc")
        staging.facts["answer"] = 42
    content = read_manifest(manifest)
    assert content["files"] == {"sub/a.txt": {"bytes": 3, "sha256": sha256_file(manifest.parent / "sub" / "a.txt")}}
    assert content["inputs"] == {"source": sha256_file(source)}
    assert content["settings"] == {"n": 1}
    assert content["answer"] == 42
    assert read_provenance(manifest)["libraries"] == {"torch": torch.__version__, "no-such-library": "absent"}


def test_manifest_counts_tensor_bytes_by_dtype(tmp_path: Path) -> None:
    manifest = tmp_path / "artifact" / "manifest.json"
    tensors = {"a": torch.zeros(3, 5, dtype=torch.bfloat16), "b": torch.zeros(7).to(torch.float8_e4m3fn)}
    with write_artifact(manifest, stage="test", settings={}) as staging:
        save_file(tensors, staging.path / "model.safetensors")
    assert read_manifest(manifest)["tensor_bytes"] == {"BF16": 30, "F8_E4M3": 7}


def test_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name / "manifest.json", a="1", b="2")
    assert (tmp_path / "one" / "manifest.json").read_bytes() == (tmp_path / "two" / "manifest.json").read_bytes()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_nothing_and_keeps_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    manifest = tmp_path / "artifact" / "manifest.json"

    def fail() -> None:
        with write_artifact(manifest, stage="test", settings={}) as staging:
            (staging.path / "half").write_text("x")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []
    write(manifest, a="old")
    before = manifest.read_bytes()
    with pytest.raises(error):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]
    assert manifest.read_bytes() == before
    assert sorted(path.name for path in manifest.parent.iterdir()) == ["a", "manifest.json", "provenance.json"]


def test_a_killed_writer_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    manifest = tmp_path / "artifact" / "manifest.json"
    with subprocess.Popen([sys.executable, "-c", SLOW_WRITER, str(manifest)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    assert not manifest.parent.exists()
    write(manifest, a="new")
    assert sorted(read_manifest(manifest)["files"]) == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_of_two_writers_the_second_is_refused(tmp_path: Path) -> None:
    manifest = tmp_path / "artifact" / "manifest.json"
    with subprocess.Popen([sys.executable, "-c", SLOW_WRITER, str(manifest)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        with pytest.raises(FourfoldError, match=r"\.artifact\.partial: another process is writing it"):
            write(manifest, a="mine")
        assert (tmp_path / ".artifact.partial" / "half").read_text() == "x", "the first one's files are left alone"
        process.kill()


def test_the_same_files_have_the_same_manifest_whoever_made_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that nothing is made again behind an artifact that was made again."""
    write(tmp_path / "one" / "manifest.json", a="1")
    monkeypatch.setattr(artifact, "git_commit", lambda: "another")
    with write_artifact(
        tmp_path / "two" / "manifest.json", stage="test", settings={"n": 1}, libraries=["torch"], device="another"
    ) as staging:
        (staging.path / "a").write_text("1")
    manifests = [tmp_path / name / "manifest.json" for name in ("one", "two")]
    assert manifests[0].read_bytes() == manifests[1].read_bytes()
    assert read_provenance(manifests[1])["fourfold"]["commit"] == "another"
    assert read_provenance(manifests[1])["device"] == "another"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "x"),
        OSError(errno.EDQUOT, "Disk quota exceeded", "x"),
    ],
)
def test_a_full_disk_is_one_line_whoever_notices(tmp_path: Path, error: Exception) -> None:
    manifest = tmp_path / "artifact" / "manifest.json"

    def fail() -> None:
        with write_artifact(manifest, stage="test", settings={}):
            try:
                raise error
            except Exception:
                raise RuntimeError("the writer failed")  # noqa: B904 (as libraries do)

    with pytest.raises(FourfoldError, match=r"artifact: (No space left|Disk quota exceeded).*; free some space there"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def fail() -> None:
        with atomic_file(path) as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_provenance_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FourfoldError, match=r"provenance\.json: cannot be read"):
        read_provenance(tmp_path / "manifest.json")


def test_a_new_artifact_replaces_all_files_of_the_old(tmp_path: Path) -> None:
    manifest = tmp_path / "artifact" / "manifest.json"
    write(manifest, a="1", b="2")
    write(manifest, c="3")
    assert sorted(path.name for path in manifest.parent.iterdir()) == ["c", "manifest.json", "provenance.json"]


def test_an_artifact_is_named_by_its_manifest(tmp_path: Path) -> None:
    with pytest.raises(FourfoldError, match=r"named by the path of its manifest\.json"):
        write(tmp_path / "artifact" / "other.json")


def test_a_missing_manifest_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(FourfoldError, match="cannot be read") as error:
        read_manifest(tmp_path / "manifest.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": []}', '{"files": {"a": {}}}', "\xff"])
def test_a_broken_manifest_is_one_line(tmp_path: Path, text: str) -> None:
    manifest = tmp_path / "manifest.json"
    manifest.write_bytes(text.encode("latin-1"))
    with pytest.raises(FourfoldError, match=r"manifest\.json: (cannot be read|is no manifest)") as error:
        read_manifest(manifest)
    assert "\n" not in str(error.value)


def test_a_cut_or_missing_file_is_named(tmp_path: Path) -> None:
    manifest = tmp_path / "artifact" / "manifest.json"
    write(manifest, a="12345")
    (manifest.parent / "a").write_text("123")
    with pytest.raises(FourfoldError, match=r"artifact/a: has 3 bytes, 5 expected"):
        read_manifest(manifest)
    (manifest.parent / "a").unlink()
    with pytest.raises(FourfoldError, match=r"artifact/a: is missing, 5 expected"):
        read_manifest(manifest)


@given(
    st.lists(
        st.dictionaries(
            st.text(max_size=5), st.one_of(st.none(), st.integers(), st.text(), st.floats(allow_nan=False)), max_size=4
        )
    )
)
def test_json_lines_survive_a_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[dict]) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    write_jsonl(path, rows)
    assert read_jsonl(path) == rows


def test_write_text_replaces_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text() == "two"
    assert [file.name for file in path.parent.iterdir()] == ["file"]


def test_json_has_one_form() -> None:
    assert dump_json({"b": 1, "a": [1]}) == dump_json(json.loads('{"a": [1], "b": 1}'))


def test_a_reader_never_sees_a_mix_of_old_and_new(tmp_path: Path) -> None:
    """While one process replaces the artifact again and again, a reader finds it whole or not there."""
    manifest = tmp_path / "artifact" / "manifest.json"
    code = (
        "import sys\nfrom pathlib import Path\nfrom fourfold.artifacts import write_artifact\n"
        "for i in range(200):\n"
        "    with write_artifact(Path(sys.argv[1]), stage='t', settings={}) as s:\n"
        "        (s.path / 'a').write_text('x' * i)\n        (s.path / 'b').write_text('y' * i)\n"
    )
    seen = 0
    with subprocess.Popen([sys.executable, "-c", code, str(manifest)]) as process:
        while process.poll() is None:
            try:
                text = manifest.read_text()
            except OSError:
                continue
            content = json.loads(text)
            assert content["files"]["a"]["bytes"] == content["files"]["b"]["bytes"]
            seen += 1
            time.sleep(0.001)
    assert process.returncode == 0
    assert seen > 0


def test_files_are_as_readable_as_their_folder(tmp_path: Path) -> None:
    linked = tmp_path / "own"
    linked.write_text("x")
    linked.chmod(0o600)
    with write_artifact(tmp_path / "a" / "manifest.json", stage="s", settings={}) as staging:
        staging.path.chmod(0o755)
        private = staging.path / "private"
        private.write_text("x")
        private.chmod(0o600)
        (staging.path / "link").hardlink_to(linked)
    assert (tmp_path / "a" / "private").stat().st_mode & 0o777 == 0o644
    assert linked.stat().st_mode & 0o777 == 0o600
