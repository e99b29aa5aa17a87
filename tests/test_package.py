"""What `pip install` brings is whole: the wheel, away from the checkout, serves the bundled model."""

import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path

import pytest

from serving.modal_app import start_server, stop_server
from tests.serving.live import free_port

ROOT = Path(__file__).resolve().parents[1]
DATA = (
    "checkpoints/nano/model-00001-of-00001.safetensors",
    "checkpoints/nano/tokenizer.json",
    "checkpoints/nano/chat_template.jinja",
    "glm_jax/targets/b200.txtpb",
    "serving/grafana.json",
    "serving/static/chat.html",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages as an installation has them."""
    folder = tmp_path_factory.mktemp("wheel")
    command = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", str(ROOT))
    subprocess.run([sys.executable, *command, "--wheel-dir", str(folder)], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.mark.parametrize("name", DATA)
def test_the_wheel_carries_what_is_no_code(site: Path, name: str) -> None:
    assert (site / name).read_bytes() == (ROOT / name).read_bytes()


def test_the_wheel_serves_its_own_model_when_nothing_is_said(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setenv("MODEL_DIR", "")  # click takes it as not set
    where = "import serving, checkpoints; print(serving.__file__, checkpoints.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", where], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.split()
    assert all(Path(file).is_relative_to(site) for file in found), found

    port = free_port()
    command = [sys.executable, "-m", "serving", "serve", "--mock", "--port", str(port)]
    process = start_server(command, port, 60, cwd=str(tmp_path))
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=30) as answer:
            assert b'"nano"' in answer.read()
    finally:
        code = stop_server(process, seconds=30)
    assert code == 0
