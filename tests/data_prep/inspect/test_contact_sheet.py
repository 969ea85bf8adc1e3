"""The contact sheet shows every kind of sample with its caption."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.cli import main
from data_prep.inspect.contact_sheet import draw_contact_sheet
from data_prep.write.build import build_shards
from data_prep.write.options import ShardOptions


def _tile(sheet: np.ndarray, number: int) -> np.ndarray:
    left, top = 8 + number % 8 * 168, 8 + number // 8 * 186
    return sheet[top : top + 160, left : left + 160]


def test_every_kind_of_sample_is_drawn(tmp_path: Path) -> None:
    source = tmp_path / "images"
    for name, colour in (("blue", (0, 0, 255)), ("\udcff\nodd", (255, 0, 0))):
        (source / name).mkdir(parents=True)
        Image.new("RGB", (300, 200), colour).save(source / name / "a.png")
    ramp = np.linspace(0, 9000, 100 * 80).reshape(100, 80, 1).repeat(5, 2).astype(np.float32)
    ramp[3, 3] = np.nan
    np.save(source / "c.npy", ramp)
    deep = np.linspace(100, 4000, 50 * 50).reshape(50, 50).astype(np.uint16)
    Image.fromarray(deep).save(source / "d.png")
    options = ShardOptions(samples_per_shard=3, shuffle=False)
    manifest = build_shards(source, tmp_path / "out", options).manifest
    path = tmp_path / "sheet.png"
    draw_contact_sheet(manifest, path)
    with Image.open(path) as image:
        sheet = np.asarray(image)
    assert sheet.shape == (8 + 186, 8 + 4 * 168, 3)
    blue, array, grey, red = (_tile(sheet, number) for number in range(4))
    assert (blue[80, 80] == (0, 0, 255)).all()
    assert (red[80, 80] == (255, 0, 0)).all()
    for shown in (array, grey):
        assert shown[20, 80].max() < 80 < 180 < shown[140, 80].min()
    for number in range(4):
        caption = sheet[8 + 160 : 8 + 180, 8 + number * 168 : 8 + number * 168 + 160]
        assert (caption < 100).any(), "the name is missing"


def test_a_sample_that_does_not_decode_has_its_place(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, format="PNG")
    (tmp_path / "images" / "a.png").write_bytes(buffer.getvalue()[:60])
    options = ShardOptions(check=False)
    manifest = build_shards(tmp_path / "images", tmp_path / "out", options).manifest
    draw_contact_sheet(manifest, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.getpixel((12, 12)) == (224, 224, 224)


@pytest.mark.parametrize("samples", [1, 9, 60])
def test_a_sheet_has_at_most_48_samples(samples: int, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(samples):
        Image.new("L", (8, 8), number).save(tmp_path / "images" / f"{number}.png")
    manifest = build_shards(tmp_path / "images", tmp_path / "out", ShardOptions()).manifest
    draw_contact_sheet(manifest, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as image:
        lines = -(-min(samples, 48) // 8)
        assert image.size == (8 + 168 * min(samples, 8), 8 + 186 * lines)


def test_bands_are_chosen_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out, sheet = tmp_path / "images", tmp_path / "out", tmp_path / "sheet.png"
    source.mkdir()
    values = np.zeros((64, 64, 5), dtype=np.uint8)
    values[..., 4], values[..., 1] = 200, 100
    np.save(source / "a.npy", values)
    np.save(source / "b.npy", values[..., :2])
    build_shards(source, out, ShardOptions(shuffle=False))
    command = ["info", str(out), "--workers", "1"]
    drawn = [*command, "--contact-sheet", str(sheet)]
    for bands, colour, named in (
        ([], (0, 100, 0), "bands 0, 1, 2 as red, green, blue; --bands chooses others"),
        (["4", "1", "0"], (200, 100, 0), "bands 4, 1, 0 as red, green, blue"),
        (["4"], (200, 200, 200), "band 4 in grey"),
    ):
        assert main([*drawn, *(["--bands", *bands] if bands else [])]) == 0
        assert f"{sheet}: {named}\n" in capsys.readouterr().out
        with Image.open(sheet) as image:
            assert image.getpixel((88, 88)) == colour
            if bands:  # b.npy lacks band 4: its place is empty
                assert image.getpixel((168 + 12, 12)) == (224, 224, 224)
    before = sheet.read_bytes()
    for wrong, named in (
        ([*drawn, "--bands", "5"], "at most 5 bands"),
        ([*drawn, "--bands", "0", "1"], "one or three"),
        ([*drawn, "--bands", "-1"], "at least 0"),
        ([*command, "--bands", "0"], "--contact-sheet"),
    ):
        assert main(wrong) == 2
        assert named in capsys.readouterr().err
    assert sheet.read_bytes() == before
