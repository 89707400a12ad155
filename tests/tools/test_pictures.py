"""The README's images are the demo's output, resized to the page's width."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tools.build import pictures


def test_what_the_demo_wrote_becomes_the_readmes_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def demo(words: list[str]) -> int:
        folder = Path(words[words.index("--output") + 1])
        folder.mkdir()
        for name, colour in (("astronaut", "red"), ("astronaut_spread", "blue")):
            Image.new("RGB", (2800, 1000), colour).save(folder / f"{name}.png")
        return 0

    monkeypatch.setattr(pictures, "hmdiff", demo)
    monkeypatch.setattr(pictures, "demo_photo", lambda: (Path("astronaut.png"), None))
    assert pictures.main(["--output", str(tmp_path / "out"), "--assets", str(tmp_path)]) == 0
    with Image.open(tmp_path / "demo.jpg") as first, Image.open(tmp_path / "spread.jpg") as second:
        assert first.size == (1400, 500) and second.size[0] == 1200
        assert first.getpixel((0, 0))[0] > 200 < second.getpixel((0, 0))[2]
    monkeypatch.setattr(pictures, "demo_photo", lambda: (Path("sample.jpg"), Path("sample.json")))
    with pytest.raises(SystemExit):
        pictures.main([])
