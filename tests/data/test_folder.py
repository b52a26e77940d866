"""Folders of images: classes, color modes, ADM's crop, files that cannot be read."""

import numpy as np
import pytest
from PIL import Image

from sdiff_jax.data import batches, folder
from sdiff_jax.types import UserError

RNG = np.random.default_rng(0)


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
  return RNG.integers(0, 256, (height, width, channels), dtype=np.uint8)


def save(path, array: np.ndarray, **options) -> None:
  path.parent.mkdir(exist_ok=True)
  Image.fromarray(array).save(path, **options)


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


def test_grey_alpha_palette_and_16_bits_become_rgb(tmp_path):
  grey, rgba = noise(8, 8)[..., 0], noise(8, 8, 4)
  three = np.repeat(grey[..., None], 3, -1)
  save(tmp_path / "grey" / "a.png", grey)
  np.testing.assert_array_equal(taken(tmp_path / "grey"), three)
  save(tmp_path / "rgba" / "a.png", rgba)
  np.testing.assert_array_equal(taken(tmp_path / "rgba"), rgba[..., :3])
  save(tmp_path / "wide" / "a.png", grey.astype(np.uint16) * 257)
  np.testing.assert_array_equal(taken(tmp_path / "wide"), three)
  palette = Image.fromarray(grey).convert("P")
  (tmp_path / "palette").mkdir()
  palette.save(tmp_path / "palette" / "a.png", transparency=bytes(range(256)))
  np.testing.assert_array_equal(
    taken(tmp_path / "palette"), np.asarray(palette.convert("RGB"))
  )


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
  save(tmp_path / "class" / "good.png", noise(32, 32))
  source = folder.build(dir=str(tmp_path), image_size=8)
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
  refuses("image_size=0: must be above 0", image_size=0)
  refuses(r"mean=\(0.0, 1.0\): .* 3 channel", mean=(0.0, 1.0))
  (tmp_path / "b").mkdir()
  refuses(rf"no images in {tmp_path}/b; put \.png")
  save(tmp_path / "b" / "1.png", noise(8, 8))
  save(tmp_path / "2.png", noise(8, 8))
  refuses("has images beside its sub-folders")
