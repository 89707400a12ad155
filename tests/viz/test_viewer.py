"""The page of a result: self-contained, small, and in a real browser it toggles and matches the overlay."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hmdiff.body.body import load_body
from hmdiff.cli.main import main
from hmdiff.errors import UserError
from hmdiff.geometry import axis_angle_to_matrix
from hmdiff.viz.export import save_npz
from hmdiff.viz.overlays import overlay, person_crop
from hmdiff.viz.viewer import read_result, save_viewer, viewer_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (Debian: chromium)")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--virtual-time-budget=8000",
)
FOCAL, POINT = 700.0, (230.0, 260.0)


@pytest.fixture(scope="module")
def result() -> dict[str, np.ndarray]:
    """Three bodies that differ in an arm, off the photo's centre, with the names of `hmdiff sample`."""
    body = load_body()
    pose = torch.zeros(3, body.num_joints, 3)
    pose[:, 0, 0] = torch.pi
    pose[:, body.joint_names.index("left_shoulder"), 2] = torch.tensor([-0.4, -1.0, 0.5])
    bodies = body(torch.zeros(3, body.num_betas), axis_angle_to_matrix(pose))
    pelvis = bodies.joints[:, :1]
    vertices = (bodies.vertices - pelvis).numpy()
    return {
        "vertices": vertices,
        "joints": (bodies.joints - pelvis).numpy(),
        "faces": body.faces.numpy(),
        "translation": np.tile([0.25, 0.1, 4.0], (3, 1)).astype(np.float32),
        "focal": np.float32(FOCAL),
        "principal_point": np.float32(POINT),
        "spread_mm": 1000 * np.linalg.norm(vertices - vertices.mean(0), axis=-1).mean(0),
        "selected": np.int64(2),
        "modes": np.array([2, 0, 2]),
        "mode_weights": np.float32([0.67, 0.33, 0.0]),
        "joint_names": np.array(body.joint_names),
        "joint_parents": np.array(body.parents),
    }


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    return np.random.default_rng(0).integers(90, 160, (520, 480, 3), np.uint8)


@pytest.fixture(scope="module")
def page(result: dict[str, np.ndarray], photo: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "person.html"
    save_viewer(path, result, photo)
    return path


def browse(page: Path, *flags: str, fragment: str = "") -> str:
    """The browser's output. A browser that hangs, which happens on a busy machine, is restarted once."""
    try:
        done = started(page, "profile", *flags, fragment=fragment)
    except subprocess.TimeoutExpired:
        done = started(page, "another-profile", *flags, fragment=fragment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def started(page: Path, profile: str, *flags: str, fragment: str) -> subprocess.CompletedProcess[str]:
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={page.parent / profile}", *flags, page.as_uri() + fragment]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def screenshot(page: Path, fragment: str, size: tuple[int, int]) -> np.ndarray:
    file = page.with_suffix(".png")
    browse(page, f"--window-size={size[0]},{size[1]}", f"--screenshot={file}", fragment=fragment)
    return np.asarray(Image.open(file).convert("RGB"))


def in_page(page: Path, script: str) -> dict:
    """The return value in the browser of `script`, the body of an async function with the argument `viewer`."""
    tested = page.with_name("tested.html")
    extra = f"""<pre id="answer"></pre><script>
      const wait = setInterval(() => {{ if (window.viewer && ready.photo) {{ clearInterval(wait);
        (async viewer => {{ {script} }})(window.viewer).then(answer => {{
          document.getElementById("answer").textContent = JSON.stringify(answer); }}); }} }}, 20);</script></body>"""
    tested.write_text(page.read_text().replace("</body>", extra))
    dom = browse(tested, "--window-size=700,520", "--dump-dom")
    found = re.search(r'<pre id="answer">(.*?)</pre>', dom, re.S)
    assert found and found[1], dom[-600:]
    return json.loads(unescape(found[1]))


def test_the_page_needs_nothing_else(page: Path) -> None:
    text = page.read_text()
    assert not re.findall(r'(?:src|href)\s*=\s*["\']?(?:https?:)?//', text)
    assert "The MIT License" in text and "fetch(person" not in text


def test_hypotheses_come_back_from_the_page_within_its_unit(page: Path, result: dict[str, np.ndarray]) -> None:
    import base64
    import zlib

    person = json.loads(re.search(r'id="person">(.*?)</script>', page.read_text(), re.S)[1])

    def unpack(name: str) -> np.ndarray:
        array = person["arrays"][name]
        planes = np.frombuffer(zlib.decompress(base64.b64decode(array["data"])), np.uint8)
        return np.ascontiguousarray(planes.reshape(np.dtype(array["dtype"]).itemsize, -1).T).view(array["dtype"])[:, 0]

    mean, delta = unpack("mean").reshape(1, -1, 3), unpack("delta").reshape(3, -1, 3)
    assert np.abs((mean + delta.astype(int)) * person["unit"] - result["vertices"]).max() < 6e-5
    assert np.array_equal(unpack("faces").reshape(-1, 3), result["faces"])
    assert [mode["hypothesis"] for mode in person["modes"]] == [2, 0]  # an empty mode is omitted


def test_25_hypotheses_take_less_than_3_megabytes(result: dict[str, np.ndarray], photo: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    bend = rng.normal(size=(25, 3, 4)) * 0.05  # each hypothesis leans differently
    base = np.concatenate([result["vertices"][0], np.ones((result["vertices"].shape[1], 1))], 1)
    many = result["vertices"][:1] + np.einsum("vk,nck->nvc", base, bend)
    large = {
        **result,
        "vertices": many,
        "joints": np.repeat(result["joints"][:1], 25, 0),
        "translation": np.repeat(result["translation"][:1], 25, 0),
    }
    assert len(viewer_page(large, photo, "many")) < 3e6


def test_a_title_cannot_end_the_page(result: dict[str, np.ndarray], photo: np.ndarray) -> None:
    text = viewer_page(result, photo, "</script><b>me")
    assert "</script><b>me" not in text and "&lt;/script&gt;&lt;b&gt;me" in text


@pytest.mark.slow
@needs_browser
def test_it_toggles_without_a_network(page: Path) -> None:
    answer = in_page(
        page,
        """
      const box = number => document.querySelectorAll("#nodes input")[number];
      const drawn = () => {  // pixels that are not the background
        const copy = document.createElement("canvas");
        [copy.width, copy.height] = [viewer.canvas.width, viewer.canvas.height];
        copy.getContext("2d").drawImage(viewer.canvas, 0, 0);
        const p = copy.getContext("2d").getImageData(0, 0, copy.width, copy.height).data;
        let count = 0;
        for (let i = 0; i < p.length; i += 4) if (Math.abs(p[i] - 242) + Math.abs(p[i + 2] - 246) > 9) count++;
        return count;
      };
      const photo = document.getElementById("photo"), counts = {};
      counts.photo = drawn(); photo.click(); counts.mean = drawn();
      box(0).click(); counts.none = drawn();
      box(1).click(); counts.first = drawn(); box(2).click(); counts.two = drawn();
      document.getElementById("all").click(); const all = [...viewer.shown].sort();
      const step = document.getElementById("step"); step.value = 1; step.oninput();
      const first_mode = [...viewer.shown];
      const words = document.getElementById("stepped").textContent;
      viewer.look(90); counts.side = drawn();
      viewer.look(null); viewer.showOnly([1]); const r = viewer.canvas.getBoundingClientRect();
      let pointed = null;
      for (let y = r.top; y < r.bottom && !pointed; y += 20)
        for (let x = r.left; x < r.right && !pointed; x += 10) pointed = viewer.values(x, y);
      const loaded = performance.getEntriesByType("resource").map(entry => entry.name);
      const fetched = loaded.filter(name => !name.startsWith("data:"));
      return {counts, all, first_mode, words, pointed, fetched};
    """,
    )
    counts = answer["counts"]
    assert counts["none"] == 0 < counts["first"] < counts["two"] < counts["photo"]
    assert counts["mean"] > 0 and counts["side"] > 0
    assert answer["all"] == [1, 2, 3] and answer["first_mode"] == [3]
    assert answer["words"] == "mode 1 of 2: 67 % of the hypotheses"
    assert "hypothesis 0" in answer["pointed"] and "mm" in answer["pointed"]
    assert answer["fetched"] == []


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("number", [1, 2])
def test_it_draws_what_the_overlay_draws(
    page: Path, result: dict[str, np.ndarray], photo: np.ndarray, number: int
) -> None:
    absolute = torch.as_tensor(result["vertices"] + result["translation"][:, None]).float()
    crop, centre, scale, _ = person_crop(photo, absolute, FOCAL, POINT, len(photo))
    height, width = crop.shape[:2]
    shot = screenshot(page, f"#panel=0&photo=0&show={number}", (width, height)).astype(int)
    drawn = np.abs(shot - [242, 243, 246]).max(-1) > 6
    black = np.zeros_like(crop)

    def mask(index: int) -> np.ndarray:
        return (
            overlay(
                black, result["vertices"][index], result["faces"], result["translation"][index], FOCAL * scale, centre
            ).max(-1)
            > 20
        )

    def overlap(other: np.ndarray) -> float:
        return (drawn & other).sum() / (drawn | other).sum()

    assert drawn.shape == (height, width)
    assert overlap(mask(number - 1)) > 0.985
    assert overlap(mask(2 - number)) < 0.96  # the other hypothesis is distinguished
    assert overlap(mask(number - 1)[:, ::-1]) < 0.9  # and so is a mirror image


def test_view_makes_the_page_from_the_npz(
    result: dict[str, np.ndarray], photo: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "photo.png"
    Image.fromarray(photo).save(picture)
    save_npz(tmp_path / "one.npz", **result, photo=np.array(str(picture)))
    for name in ("one_smpl", "clip_track_0", "photo_heatmaps"):  # from an export, a video, an estimator
        np.savez(tmp_path / f"{name}.npz", poses=np.zeros(3), spread_mm=np.zeros(3))
    assert main(["view", str(tmp_path), "--no-open"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert (tmp_path / "one.html").stat().st_size > 1e5 and len(printed) == 1 and "one.html" in printed[0]
    picture.unlink()
    (tmp_path / "one.html").unlink()
    assert main(["view", str(tmp_path / "one.npz"), "--no-open"]) == 2
    assert "--photo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vertices", np.zeros((3, 10))),
        ("vertices", np.full((3, 10, 3), np.nan)),
        ("joints", np.full((3, 24, 3), 1e30)),
        ("faces", np.array([[0, 1, 10**6]])),
        ("faces", np.zeros((5, 3))),
        ("focal", np.array(0.0)),
        ("focal", np.array("500")),
        ("translation", np.zeros((2, 3))),
        ("selected", np.array(3)),
        ("modes", np.array([-1])),
        ("spread_mm", np.zeros(3)),
        ("joint_parents", np.full(24, 24)),
    ],
)
def test_a_damaged_array_is_named(result: dict[str, np.ndarray], tmp_path: Path, name: str, value: np.ndarray) -> None:
    np.savez(tmp_path / "one.npz", **{**result, name: value})
    with pytest.raises(UserError, match=r"one\.npz: damaged .*run hmdiff sample again"):
        read_result(tmp_path / "one.npz")


def test_what_is_no_result_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "other.npz", vertices=np.zeros(3))
    with pytest.raises(UserError, match=r"lacks joints, faces.*run hmdiff sample again"):
        read_result(tmp_path / "other.npz")
    (tmp_path / "broken.npz").write_bytes(b"PK")
    with pytest.raises(UserError, match="not an npz or npy file; run hmdiff sample again"):
        read_result(tmp_path / "broken.npz")
    assert main(["view", str(tmp_path / "missing.npz"), "--no-open"]) == 2
    assert "no such file" in capsys.readouterr().err
