"""Images: reading with its errors, overlays at the projected positions, sheets, colours, keypoints."""

import cv2
import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from hmdiff.body.skeletons import COCO17, OPENPOSE25
from hmdiff.errors import UserError
from hmdiff.viz.canvas import contact_sheet, draw_keypoints, heat_colours, read_picture, save_picture
from hmdiff.viz.overlays import PALETTE, colour_bar, overlay, turntable_view
from hmdiff.viz.sheets import MEAN_COLOUR, hypotheses_sheet


@pytest.fixture(scope="module")
def ball():
    mesh = trimesh.creation.icosphere(subdivisions=3, radius=0.5)
    return torch.tensor(np.array(mesh.vertices) * [1, -1, -1], dtype=torch.float32), np.array(mesh.faces)


def grey(height=120, width=200):
    return np.full((height, width, 3), 90, np.uint8)


def test_overlay_covers_what_the_camera_sees_and_nothing_else(ball):
    vertices, faces = ball
    photo = np.random.default_rng(0).integers(0, 255, (120, 200, 3)).astype(np.uint8)
    drawn = overlay(photo, vertices, faces, [0.4, -0.2, 4.0], 200.0, [100.0, 60.0], opacity=1.0)
    assert drawn.shape == photo.shape and drawn.dtype == np.uint8
    # Centre of the sphere: 100 + 200 * 0.4 / 4 = 120, 60 - 10 = 50; radius about 200 * 0.5 / 4 = 25 pixels.
    yy, xx = np.mgrid[:120, :200] + 0.5
    radius = np.hypot(xx - 120, yy - 50)
    changed = (drawn != photo).any(-1)
    assert changed[radius < 24].all() and not changed[radius > 32].any()
    blue = drawn[radius < 20].mean(0)
    assert blue[2] > blue[0] > 0  # the palette's first colour
    assert np.array_equal(photo, np.random.default_rng(0).integers(0, 255, (120, 200, 3)).astype(np.uint8))


def test_overlay_outlines_are_smooth(ball):
    """Along a row through the outline, the step from photo to mesh passes through intermediate values."""
    vertices, faces = ball
    photo = np.full((120, 200, 3), 255, np.uint8)
    drawn = overlay(photo, vertices, faces, [0.0, 0.0, 4.0], 200.0, [100.3, 60.0], (0.0, 0.0, 0.0), opacity=1.0)
    edge = drawn[30:90, :, 1].astype(int)
    between = ((edge > 100) & (edge < 190)).sum(1)
    assert (between >= 1).mean() > 0.6


def test_overlay_off_the_photo_or_behind_the_camera_changes_nothing(ball):
    vertices, faces = ball
    for place in ([30.0, 0.0, 4.0], [0.0, 0.0, -4.0]):
        assert np.array_equal(overlay(grey(), vertices, faces, place, 200.0, [100.0, 60.0]), grey())


def test_side_view_swaps_depth_and_width():
    """A slab that is thin in x and long in z is thin from the front and long from the side."""
    slab = trimesh.creation.box(extents=[0.1, 1.0, 0.8])
    vertices = np.array(slab.vertices)
    widths = []
    for degrees in (0, 90):
        view = turntable_view(vertices, slab.faces, degrees, 160, (0.9, 0.1, 0.1), extent=0.8)
        red = view[40:100, :, 0].astype(int) - view[40:100, :, 1] > 60
        widths.append(int(red.any(0).sum()))
    assert widths[0] < 0.35 * widths[1] and widths[1] == pytest.approx(160 * 0.8 / 1.6, rel=0.2)


def test_hypotheses_sheet_shows_each_in_its_colour(ball):
    vertices, faces = ball
    bodies = torch.stack([vertices, vertices * torch.tensor([0.7, 1.0, 1.2]), vertices * 0.9])
    points = np.full((17, 3), 60.0)
    sheet = hypotheses_sheet(
        grey(),
        bodies,
        faces,
        [0.0, 0.0, 4.0],
        200.0,
        [100.0, 60.0],
        columns=3,
        keypoints=points,
        height=120,
        selected=1,
    )
    assert sheet.dtype == np.uint8 and sheet.shape[1] > 4 * 0.7 * 120 and sheet.shape[0] > 2 * 120
    cells = np.array_split(sheet[: sheet.shape[0] // 2], 4, axis=1)
    # The mean in grey, the selected one in its own colour before the first of the others.
    for index, colour in ((1, MEAN_COLOUR), (2, PALETTE[1]), (3, PALETTE[0])):
        middle = (
            cells[index][50:80, cells[index].shape[1] // 2 - 10 : cells[index].shape[1] // 2 + 10].mean((0, 1)) / 255
        )
        choices = (*PALETTE[:4], MEAN_COLOUR)
        nearest = min(choices, key=lambda c: np.abs(middle / middle.sum() - np.array(c) / sum(c)).sum())
        assert nearest == colour


def test_save_and_read_again(tmp_path):
    picture = np.random.default_rng(0).integers(0, 255, (13, 17, 3)).astype(np.uint8)
    save_picture(tmp_path / "a.png", picture)
    assert np.array_equal(read_picture(tmp_path / "a.png"), picture)
    save_picture(tmp_path / "deep" / "b.jpg", picture)
    assert read_picture(tmp_path / "deep" / "b.jpg").shape == picture.shape
    assert sorted(p.name for p in tmp_path.rglob("*.*")) == ["a.png", "b.jpg"]  # no temporary file left
    with pytest.raises(UserError, match="suffix"):
        save_picture(tmp_path / "a.tiff", picture)


def test_exif_orientation_is_honoured(tmp_path):
    upright = np.zeros((40, 80, 3), np.uint8)
    upright[:20] = (250, 0, 0)
    turned = Image.fromarray(np.rot90(upright).copy())  # as a phone held upright stores it
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate 90 degrees clockwise to view
    turned.save(tmp_path / "phone.png", exif=exif)
    assert np.array_equal(read_picture(tmp_path / "phone.png"), upright)


def test_other_kinds_of_picture_come_out_as_rgb(tmp_path):
    Image.fromarray(np.full((4, 5), 77, np.uint8)).save(tmp_path / "grey.png")
    cv2.imwrite(str(tmp_path / "deep.png"), np.full((4, 5), 77 * 257, np.uint16))
    Image.fromarray(np.zeros((4, 5, 4), np.uint8)).save(tmp_path / "clear.png")
    assert (read_picture(tmp_path / "grey.png") == 77).all()
    assert (read_picture(tmp_path / "deep.png") == 77).all()
    # 12 bits of a camera in a 16-bit file, grey and colour, png and tiff: not black.
    colours = np.array([[[4095, 2048, 0], [1024, 4095, 512]]], np.uint16)
    for suffix in ("png", "tiff"):
        cv2.imwrite(str(tmp_path / f"grey12.{suffix}"), np.array([[4095, 2048, 0]], np.uint16))
        cv2.imwrite(str(tmp_path / f"rgb12.{suffix}"), colours[..., ::-1])
        assert read_picture(tmp_path / f"grey12.{suffix}")[0, :, 0].tolist() == [255, 128, 0]
        assert read_picture(tmp_path / f"rgb12.{suffix}").tolist() == [[[255, 128, 0], [64, 255, 32]]]
    assert (read_picture(tmp_path / "clear.png") == 255).all()
    assert read_picture(tmp_path / "clear.png").shape == (4, 5, 3)


def test_bad_files_are_named(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("no picture")
    save_picture(tmp_path / "whole.jpg", np.random.default_rng(0).integers(0, 255, (60, 60, 3)).astype(np.uint8))
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    for name, words in (
        ("none.jpg", "no such picture"),
        ("empty.jpg", "empty"),
        ("text.jpg", "not a picture"),
        ("cut.jpg", "damaged"),
        ("", "folder"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            read_picture(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_heat_colours_darken_from_lowest_to_highest():
    colours = heat_colours(np.array([-5.0, 0.0, 5.0, 10.0, 99.0, np.nan]), 0.0, 10.0)
    lightness = colours @ [0.2126, 0.7152, 0.0722]
    assert np.array_equal(colours[0], colours[1]) and np.array_equal(colours[3], colours[4])
    assert lightness[1] > lightness[2] > lightness[3] and np.isfinite(colours).all()
    fine = heat_colours(np.linspace(0, 1, 50), 0, 1) @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(fine[14:]) < 0).all()
    assert colour_bar(0, 80, size=(200, 80)).shape == (200, 80, 3)


def test_contact_sheet_places_cells():
    cells = [np.full((20, 30, 3), value, np.uint8) for value in (10, 20, 30)]
    sheet = contact_sheet(cells, 2, gap=4)
    assert sheet.shape == (2 * 24 + 4, 2 * 34 + 4, 3)
    assert (sheet[4:24, 4:34] == 10).all() and (sheet[4:24, 38:68] == 20).all() and (sheet[28:48, 4:34] == 30).all()
    assert (sheet[28:48, 38:68] == 255).all()
    with pytest.raises(ValueError, match="captions"):
        contact_sheet(cells, 2, ["one"])


def test_keypoints_are_drawn_where_they_are_and_bad_ones_left_out():
    points = np.zeros((17, 3))
    points[COCO17.index("left_knee")] = (50.5, 40.5, 0.9)
    points[COCO17.index("left_ankle")] = (50.5, 80.5, 0.9)
    points[COCO17.index("right_knee")] = (np.nan, 10, 0.9)
    points[COCO17.index("nose")] = (150, 20, 0.01)
    drawn = draw_keypoints(grey(), points)
    changed = np.argwhere((drawn != 90).any(-1))
    assert (np.abs(changed[:, 1] - 50) < 6).all() and changed[:, 0].min() > 32 and changed[:, 0].max() < 88
    assert tuple(drawn[40, 50]) == (255, 140, 66) and drawn[60, 50, 0] > 200 > drawn[60, 50, 2] + 100
    assert np.array_equal(draw_keypoints(grey(), np.zeros((25, 3)), OPENPOSE25), grey())
    with pytest.raises(ValueError, match="17 names"):
        draw_keypoints(grey(), np.zeros((25, 3)))
