"""Grids of images, descriptions inside PNG files, and animations."""

import numpy as np
import pytest
from PIL import Image

from sdiff_jax.io import image_io

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
GREY = (image_io.GAP_COLOR,) * 3


def test_grid_places_every_pixel():
  colors = np.array([RED, GREEN, BLUE], np.uint8)
  images = np.broadcast_to(colors[:, None, None], (3, 1, 2, 3))
  canvas = image_io.grid(images, columns=2, scale=2)
  first = [RED] * 4 + [GREY] * 2 + [GREEN] * 4
  second = [BLUE] * 4 + [GREY] * 6
  expected = [first] * 2 + [[GREY] * 10] * 2 + [second] * 2
  assert canvas.dtype == np.uint8
  np.testing.assert_array_equal(canvas, expected)


def test_grid_enlarges_small_images_without_blending():
  images = np.arange(5 * 64, dtype=np.uint8).reshape(5, 8, 8, 1)
  canvas = image_io.grid(images)
  assert canvas.shape == (2 * 32 + 2, 3 * 32 + 2 * 2, 3)
  for k, image in enumerate(images):
    y, x = k // 3 * 34, k % 3 * 34
    cell = canvas[y : y + 32, x : x + 32]
    np.testing.assert_array_equal(cell, np.kron(image, np.ones((4, 4, 3))))


@pytest.mark.parametrize(("side", "cell"), [(28, 56), (32, 32), (33, 33), (64, 64)])
def test_grid_cells_have_sides_of_32_or_more(side, cell):
  assert image_io.grid(np.zeros((1, side, side, 3), np.uint8)).shape == (
    cell,
    cell,
    3,
  )


def test_a_text_inside_a_picture(tmp_path):
  path = tmp_path / "new" / "a.png"
  image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
  image_io.save_png(path, image, "seed 3, Bär \N{CAT}")
  assert image_io.about(path) == "seed 3, Bär \N{CAT}"
  with Image.open(path) as opened:
    np.testing.assert_array_equal(np.asarray(opened), image)
  image_io.save_png(path, image)
  assert image_io.about(path) == ""
  assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_films_of_several_lengths_run_side_by_side(tmp_path):
  white, black = (np.full((40, 40, 3), v, np.uint8) for v in (255, 0))
  path = tmp_path / "film.gif"
  image_io.save_gif(path, [[white, black, white], [black]], rate=10)
  with Image.open(path) as film:
    assert film.n_frames == 3
    assert film.info["duration"] == 100
    for k, left in enumerate((255, 0, 255)):
      film.seek(k)
      picture = np.asarray(film.convert("RGB"))
      assert picture.shape == (40, 82, 3)
      assert (picture[:, :40] == left).all()
      assert (picture[:, 42:] == 0).all()
