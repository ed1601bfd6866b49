"""A seal tells every change of a model's folder, and is what sha256sum reads."""

import subprocess

import pytest

from longlora.model.seal import SEAL, broken, seal


@pytest.fixture
def folder(tmp_path):
    for name, data in {"b.safetensors": b"bbb" * 99, "a.safetensors": b"aaaa" * 88, "config.json": b"{}"}.items():
        (tmp_path / name).write_bytes(data)
    seal(tmp_path)
    return tmp_path


def test_what_was_written_is_whole_also_to_sha256sum(folder):
    assert broken(folder) == []
    done = subprocess.run(["sha256sum", "--check", "--strict", SEAL], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "a.safetensors: OK\nb.safetensors: OK\nconfig.json: OK\n")


def flip(folder):
    file = folder / "a.safetensors"
    data = bytearray(file.read_bytes())
    data[7] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (flip, "a.safetensors is not the file that was written"),
        (lambda f: (f / "b.safetensors").write_bytes(b"bb"), "b.safetensors is not the file that was written"),
        (lambda f: (f / "b.safetensors").unlink(), "b.safetensors is missing"),
        (lambda f: (f / "c.safetensors").write_bytes(b""), "c.safetensors is not in SHA256SUMS"),
        (lambda f: (f / "pytorch_model.bin").write_bytes(b""), "pytorch_model.bin is not in SHA256SUMS"),
        (lambda f: [(f / "code").mkdir(), (f / "code/model.py").write_text("")], "code/model.py is not in SHA256SUMS"),
        (
            lambda f: (f / "config.json").write_text('{"sliding_window": 64}'),
            "config.json is not the file that was written",
        ),
        (lambda f: (f / SEAL).unlink(), "there is no SHA256SUMS"),
        (lambda f: (f / SEAL).write_bytes(b"\xff\xfe nonsense"), "a.safetensors is not in SHA256SUMS"),
    ],
)
def test_every_change_of_a_file_is_told(folder, change, said):
    change(folder)
    assert said in broken(folder)
