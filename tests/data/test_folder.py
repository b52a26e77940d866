"""Folders of images: classes, color modes, ADM's crop, files that cannot be read."""

import os
import struct
import zlib

import numpy as np
import pytest
from image_folders import noise, save
from PIL import Image, ImageOps

from sdiff_jax.data import batches, folder
from sdiff_jax.io import image_io
from sdiff_jax.types import UserError


def taken(path, size: int = 8) -> np.ndarray:
  """Returns the one image of a folder."""
  source = folder.build(dir=str(path), image_size=size)
  assert source.size == 1
  return source[np.array([0])][0][0]


def test_classes_are_the_sorted_folders_and_files_are_decoded_by_index(tmp_path):
  arrays = {name: noise(8, 8) for name in ("b/2.png", "a/x.PNG", "b/10.png", "c/1.png")}
  for name, array in arrays.items():
    save(tmp_path / name, array)
  (tmp_path / "b" / "notes.txt").write_text("no image")
  source = folder.build(dir=str(tmp_path), image_size=8)
  assert (source.size, source.shape, source.num_classes) == (4, (8, 8, 3), 3)
  images, cond = source[np.array([3, 0, 1, 2, 0])]
  labels = cond["label"]
  order = ["c/1.png", "a/x.PNG", "b/10.png", "b/2.png", "a/x.PNG"]
  np.testing.assert_array_equal(images, [arrays[name] for name in order])
  assert labels.tolist() == [2, 0, 1, 1, 0]
  assert (images.dtype, labels.dtype) == (np.uint8, np.int32)


def test_every_tenth_image_is_held_out(tmp_path):
  for k in range(25):
    save(tmp_path / f"{k // 20}" / f"{k:02d}.png", np.full((8, 8, 3), k, np.uint8))

  def of(split: str) -> tuple[list[int], list[int]]:
    source = folder.build(dir=str(tmp_path), image_size=8, split=split)
    assert source.num_classes == 2
    images, cond = source[np.arange(source.size)]
    return images[:, 0, 0, 0].tolist(), cond["label"].tolist()

  assert of("test") == ([9, 19], [0, 0])
  train = [k for k in range(25) if k not in (9, 19)]
  assert of("train") == (train, [k // 20 for k in train])
  assert of("all")[0] == [*range(25)]
  (tmp_path / "few").mkdir()
  save(tmp_path / "few" / "1.png", noise(8, 8))
  with pytest.raises(ValueError, match="split='test': needs 10 images"):
    folder.build(dir=str(tmp_path / "few"), image_size=8, split="test")


@pytest.mark.parametrize("ending", ["jpg", "jpeg", "webp"])
def test_formats_with_losses_come_close(tmp_path, ending):
  smooth = np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8)
  save(tmp_path / f"a.{ending}", smooth, quality=100)
  source = folder.build(dir=str(tmp_path), image_size=32)
  assert source.num_classes == 1  # a folder without sub-folders
  difference = source[np.array([0])][0][0].astype(int) - smooth
  assert np.abs(difference).mean() < 4


def adm(image: Image.Image, size: int) -> np.ndarray:
  """`center_crop_arr` of guided-diffusion's image_datasets.py, line by line."""
  while min(*image.size) >= 2 * size:
    image = image.resize(tuple(x // 2 for x in image.size), resample=Image.BOX)
  scale = size / min(*image.size)
  image = image.resize(
    tuple(round(x * scale) for x in image.size), resample=Image.BICUBIC
  )
  arr = np.array(image)
  y, x = (arr.shape[0] - size) // 2, (arr.shape[1] - size) // 2
  return arr[y : y + size, x : x + size]


@pytest.mark.parametrize("shape", [(8, 8), (16, 37), (47, 16), (33, 70), (5, 9)])
@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_the_crop_is_that_of_adm(tmp_path, shape, ending):
  save(tmp_path / f"a.{ending}", noise(*shape))
  with Image.open(tmp_path / f"a.{ending}") as image:
    expected = adm(image.convert("RGB"), 8)
  np.testing.assert_array_equal(taken(tmp_path), expected)


def test_the_crop_is_central(tmp_path):
  wide = noise(8, 14)
  save(tmp_path / "a.png", wide)
  np.testing.assert_array_equal(taken(tmp_path), wide[:, 3:11])


def on_white(image: Image.Image) -> np.ndarray:
  """Pillow's composite of an image over white."""
  white = Image.new("RGBA", image.size, (255, 255, 255, 255))
  composite = Image.alpha_composite(white, image.convert("RGBA"))
  return np.asarray(composite.convert("RGB"))


def test_gray_alpha_palette_and_16_bits_become_rgb(tmp_path):
  grey, rgba = noise(8, 8)[..., 0], noise(8, 8, 4)
  three = np.repeat(grey[..., None], 3, -1)
  save(tmp_path / "grey" / "a.png", grey)
  np.testing.assert_array_equal(taken(tmp_path / "grey"), three)
  save(tmp_path / "rgba" / "a.png", rgba)
  np.testing.assert_array_equal(
    taken(tmp_path / "rgba"), on_white(Image.fromarray(rgba))
  )
  # Over white: 255 + (c - 255) a / 255, whatever is hidden below alpha 0.
  alpha = rgba[..., 3:] / 255
  exact = 255 + (rgba[..., :3] - 255.0) * alpha
  assert np.abs(taken(tmp_path / "rgba") - exact).max() <= 1
  save(tmp_path / "wide" / "a.png", grey.astype(np.uint16) * 257)
  np.testing.assert_array_equal(taken(tmp_path / "wide"), three)
  palette = Image.fromarray(grey).convert("P")
  (tmp_path / "palette").mkdir()
  palette.save(tmp_path / "palette" / "a.png", transparency=bytes(range(256)))
  with Image.open(tmp_path / "palette" / "a.png") as image:
    np.testing.assert_array_equal(taken(tmp_path / "palette"), on_white(image))


def test_colors_below_alpha_zero_are_white(tmp_path):
  hidden = np.zeros((8, 8, 4), np.uint8)
  hidden[..., 0] = 200
  save(tmp_path / "a.png", hidden)
  assert (taken(tmp_path) == 255).all()
  hidden[..., 3] = 255
  save(tmp_path / "a.png", hidden)
  np.testing.assert_array_equal(taken(tmp_path), hidden[..., :3])


def test_one_transparent_value_of_16_bits_is_white(tmp_path):
  levels = np.arange(64, dtype=np.uint16).reshape(8, 8) << 8
  Image.fromarray(levels).save(tmp_path / "a.png", transparency=int(levels[3, 4]))
  read = taken(tmp_path)[..., 0]
  assert read[3, 4] == 255
  read = np.delete(read.ravel(), 28)
  np.testing.assert_array_equal(read, np.delete(np.arange(64), 28))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_exif_orientation_is_applied_as_by_pillow(tmp_path, orientation, ending):
  exif = Image.Exif()
  exif[0x0112] = orientation
  image = Image.fromarray(noise(8, 12))
  options = {"lossless": True} if ending == "webp" else {}
  image.save(tmp_path / f"a.{ending}", exif=exif, **options)
  with Image.open(tmp_path / f"a.{ending}") as opened:
    expected = np.asarray(ImageOps.exif_transpose(opened))
  np.testing.assert_array_equal(folder.decode(tmp_path / f"a.{ending}"), expected)
  assert expected.shape[:2] == ((8, 12) if orientation < 5 else (12, 8))
  turned = {1: lambda x: x, 3: lambda x: x[::-1, ::-1], 6: lambda x: np.rot90(x, -1)}
  if ending != "jpg" and orientation in turned:
    np.testing.assert_array_equal(expected, turned[orientation](np.asarray(image)))


def test_cmyk_becomes_rgb(tmp_path):
  red = Image.new("RGB", (8, 8), (255, 0, 0))
  red.convert("CMYK").save(tmp_path / "a.jpg", quality=100)
  assert np.abs(taken(tmp_path).astype(int) - [255, 0, 0]).max() < 4


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, damage, ending):
  path = tmp_path / "class" / f"bad.{ending}"
  save(path, noise(32, 32))
  data = path.read_bytes()
  path.write_bytes({"cut": data[: len(data) // 2], "text": b"no", "empty": b""}[damage])
  bad = path.read_bytes()
  with pytest.raises(UserError, match="cannot be read .*; replace or remove it") as e:
    folder.build(dir=str(tmp_path), image_size=8)
  assert str(e.value).startswith(str(path))
  # A file that is damaged later is found when it is read.
  path.write_bytes(data)
  save(tmp_path / "class" / "good.png", noise(32, 32))
  source = folder.build(dir=str(tmp_path), image_size=8)
  path.write_bytes(bad)
  source[np.array([1])]
  with pytest.raises(UserError, match="cannot be read .*; replace or remove it") as e:
    source[np.array([1, 0])]
  assert str(e.value).startswith(str(path))
  # The loader's threads hand the message on.
  loader = batches(source, seed=0, batch_size=2, sigma_d=0.5)
  with pytest.raises(UserError, match="cannot be read"):
    next(loader)


def test_folders_and_fields_that_do_not_fit_are_refused(tmp_path):
  def refuses(match, path=tmp_path, **fields):
    with pytest.raises(ValueError, match=match):
      folder.build(dir=str(path), **fields)

  refuses("dir='.*none': is not a folder", tmp_path / "none")
  refuses("dir='': is not a folder", "")
  refuses(rf"no images in {tmp_path}; put \.png")
  save(tmp_path / "a" / "1.png", noise(8, 8))
  refuses("image_size=0: must be from 1 to 8192", image_size=0)
  refuses(r"mean=\(0.0, 1.0\): .* 3 channel", mean=(0.0, 1.0))
  (tmp_path / "b").mkdir()
  refuses(rf"no images in {tmp_path}/b; put \.png")
  save(tmp_path / "b" / "1.png", noise(8, 8))
  save(tmp_path / "2.png", noise(8, 8))
  refuses("has images beside its sub-folders")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_no_other_format_is_opened_whatever_its_name(tmp_path, monkeypatch, suffix):
  """Pillow would start Ghostscript for an EPS file."""
  trace, program = tmp_path / "trace", tmp_path / "bin" / "gs"
  program.parent.mkdir()
  program.write_text(f"#!/bin/sh\ntouch {trace}\n")
  program.chmod(0o755)
  monkeypatch.setenv("PATH", str(program.parent), prepend=":")
  eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
  path = tmp_path / "images" / f"a.{suffix}"
  path.parent.mkdir()
  path.write_bytes(eps)
  for read in (
    lambda: folder.build(dir=str(path.parent), image_size=8),
    lambda: folder.side(str(path.parent)),
    lambda: image_io.about(path),
  ):
    with pytest.raises((UserError, OSError), match="it is no PNG"):
      read()
  assert not trace.exists()


def bomb(width: int, height: int) -> bytes:
  """Returns a small PNG that claims many pixels."""

  def chunk(name: bytes, data: bytes) -> bytes:
    checksum = struct.pack(">L", zlib.crc32(name + data))
    return struct.pack(">L", len(data)) + name + data + checksum

  header = struct.pack(">LLBBBBB", width, height, 8, 2, 0, 0, 0)
  data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100))
  return b"\x89PNG\r\n\x1a\n" + data + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(2**16, 2**16), (2**31 - 1, 1), (30_000, 3_000)])
def test_images_of_too_many_pixels_are_refused(tmp_path, size):
  (tmp_path / "a.png").write_bytes(bomb(*size))
  with pytest.raises(UserError, match="a.png cannot be read .*pixels"):
    folder.build(dir=str(tmp_path), image_size=8)


def test_an_image_that_grows_when_it_is_resized_is_refused(tmp_path):
  save(tmp_path / "a.png", noise(1, 60_000))
  with pytest.raises(UserError, match="an image of 245760000 x 4096 pixels"):
    folder.build(dir=str(tmp_path), image_size=4096)


def test_a_jpeg_of_many_scans_is_refused(tmp_path):
  save(tmp_path / "a.jpg", noise(8, 8), progressive=True)
  data = (tmp_path / "a.jpg").read_bytes()
  scan = data.index(b"\xff\xda")
  end = data.index(b"\xff\xda", scan + 2)
  (tmp_path / "a.jpg").write_bytes(data[:scan] + data[scan:end] * 200 + data[end:])
  with pytest.raises(UserError, match="more than 100 scans"):
    folder.build(dir=str(tmp_path), image_size=8)


def test_what_is_no_regular_file_is_refused(tmp_path):
  os.mkfifo(tmp_path / "a.png")
  with pytest.raises(UserError, match="a.png is not a regular file"):
    folder.build(dir=str(tmp_path), image_size=8)
  (tmp_path / "a.png").unlink()
  (tmp_path / "a.png").symlink_to(tmp_path / "a.png")
  with pytest.raises(UserError, match="a.png cannot be read .*symbolic links"):
    folder.build(dir=str(tmp_path), image_size=8)


def test_fields_without_sense_are_refused(tmp_path):
  save(tmp_path / "a.png", noise(8, 8))
  for fields, match in (
    ({"image_size": 10**6}, "image_size=1000000: must be from 1 to 8192"),
    ({"image_size": 8.5}, "image_size=8.5: must be an integer from 1 to 8192"),
    ({"channels": 2}, "channels=2: must be one of 1, 3"),
    ({"std": (float("nan"),)}, r"std=\(nan,\): must be a tuple of .*numbers"),
    ({"std": (float("inf"),)}, r"std=\(inf,\): must be"),
    ({"std": 0.5}, r"std=0.5: must be a tuple"),
    ({"std": (0.0,)}, r"std=\(0.0,\): must be .*above 0"),
    ({"mean": (float("nan"),)}, r"mean=\(nan,\): must be"),
    ({"mean": "text"}, r"mean='text': must be"),
  ):
    with pytest.raises(ValueError, match=match):
      folder.build(**{"dir": str(tmp_path), "image_size": 8, **fields})
