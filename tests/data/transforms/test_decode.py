import collections
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from evit_jax.data.transforms.decode import decode, decode_mask
from tests.helpers.encoded import HEIGHT, IMAGE, JPEGS, PICTURE, WIDTH, corrupted, encoded


def by_pillow(file):
    return Image.open(io.BytesIO(file))


def png(width, height, depth, colour, rows=b''):
    """Returns a PNG file of raw rows, for formats that Pillow cannot write; colour 0 is grey, 2 RGB, 4 with alpha."""
    size = len(rows) // height
    rows = b''.join(b'\0' + rows[i:i + size] for i in range(0, size * height, size or 1))
    chunks = (b'IHDR', struct.pack('>IIBBBBB', width, height, depth, colour, 0, 0, 0)), (b'IDAT', zlib.compress(rows))
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
        for name, data in (*chunks, (b'IEND', b'')))


OTHERS = {
    'png': encoded(PICTURE, 'PNG'),
    'webp': encoded(PICTURE, 'WEBP', lossless=True),
    'bmp': encoded(PICTURE, 'BMP'),
    'tiff': encoded(PICTURE, 'TIFF'),
    'gif': encoded(PICTURE, 'GIF'),
}


@pytest.mark.parametrize('name', JPEGS)
def test_decode_jpeg_equals_pillow(name):
    got = decode(JPEGS[name])
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, np.asarray(by_pillow(JPEGS[name]).convert('RGB')))


@pytest.mark.parametrize('name', ['png', 'webp', 'bmp', 'tiff'])
def test_decode_lossless_formats_return_the_original_pixels(name):
    np.testing.assert_array_equal(decode(OTHERS[name]), IMAGE)


@pytest.mark.parametrize('mode', ['1', 'L', 'P', 'CMYK'])
def test_decode_other_modes_returns_rgb(mode):
    picture = PICTURE.convert(mode)
    want = np.asarray(picture.convert('RGB'))
    np.testing.assert_array_equal(decode(encoded(picture, 'TIFF' if mode == 'CMYK' else 'PNG')), want)


def test_decode_array_returns_it():
    assert decode(IMAGE) is IMAGE


def test_decode_16_bit_grey_is_scaled():
    ramp = np.linspace(0, 65535, WIDTH * HEIGHT).astype(np.uint16).reshape(HEIGHT, WIDTH)
    grey = decode(encoded(Image.fromarray(ramp), 'PNG'))
    np.testing.assert_array_equal(grey, np.repeat(ramp[..., None] >> 8, 3, 2))
    assert grey.min() == 0 and grey.max() == 255
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(ramp), 'TIFF')), grey)
    colours = np.stack([ramp, ramp[::-1], ramp[:, ::-1]], -1)
    np.testing.assert_array_equal(decode(png(WIDTH, HEIGHT, 16, 2, colours.astype('>u2').tobytes())), colours >> 8)
    opaque = np.stack([ramp, np.full_like(ramp, 65535)], -1)
    np.testing.assert_array_equal(decode(png(WIDTH, HEIGHT, 16, 4, opaque.astype('>u2').tobytes())), grey)


def test_decode_32_bit_pixels_raise():
    with pytest.raises(ValueError, match=r'32 bits .mode F.*save it with 8 or 16 bits'):
        decode(encoded(Image.fromarray(np.ones((3, 3), np.float32)), 'TIFF'))


@pytest.mark.parametrize('mode', ['LA', 'RGBA'])
def test_decode_transparent_pixels_are_composited_over_white(mode):
    alpha = np.tile(np.linspace(0, 255, WIDTH).astype(np.uint8), (HEIGHT, 1))
    picture = PICTURE.convert(mode)
    picture.putalpha(Image.fromarray(alpha))
    share = alpha[..., None] / 255
    want = share * np.asarray(picture.convert('RGB')) + (1 - share) * 255
    for form in ('PNG', 'TIFF'):
        np.testing.assert_allclose(decode(encoded(picture, form)), want, atol=1)


@pytest.mark.parametrize('form', ['PNG', 'GIF'])
def test_decode_transparent_palette_colour_is_white(form):
    picture = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4))
    picture.putpalette([level for index in range(16) for level in (index, 0, 16 * index)])
    got = decode(encoded(picture, form, transparency=5))
    want = np.stack([np.arange(16), np.zeros(16), 16 * np.arange(16)], -1).reshape(4, 4, 3)
    want[1, 1] = 255
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'WEBP', 'TIFF'])
@pytest.mark.parametrize('orientation', range(10))
def test_decode_any_exif_orientation_is_applied(form, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    file = encoded(PICTURE, form, exif=exif)
    got = decode(file)
    np.testing.assert_array_equal(got, np.asarray(ImageOps.exif_transpose(by_pillow(file)).convert('RGB')))
    assert got.shape[:2] == ((WIDTH, HEIGHT) if orientation in (5, 6, 7, 8) else (HEIGHT, WIDTH))
    assert got.flags.c_contiguous


def test_decode_unreadable_exif_returns_the_image_as_stored():
    exif = Image.Exif()
    exif[0x112] = 6
    file = encoded(PICTURE, 'JPEG', exif=exif)
    at = file.index(b'Exif\0\0') + 6
    assert decode(file).shape == (WIDTH, HEIGHT, 3)
    assert decode(file[:at] + b'XX' + file[at + 2:]).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'WEBP', 'GIF', 'BMP', 'TIFF'])
def test_decode_image_of_one_pixel(form):
    assert decode(encoded(Image.new('RGB', (1, 1), (200, 100, 50)), form)).shape == (1, 1, 3)


def with_size(file, width, height):
    """Returns the file with another size in its header and the same pixels."""
    if file.startswith(b'\x89PNG'):
        head = b'IHDR' + struct.pack('>II', width, height) + file[24:29]
        return file[:12] + head + struct.pack('>I', zlib.crc32(head)) + file[33:]
    if file.startswith(b'BM'):
        return file[:18] + struct.pack('<II', width, height) + file[26:]
    at = file.index(b'\xff\xc0') + 5
    return file[:at] + struct.pack('>HH', height, width) + file[at + 4:]


@pytest.mark.parametrize('file', [JPEGS['baseline'], JPEGS['cmyk'], OTHERS['png'], OTHERS['bmp']])
def test_decode_image_above_the_limit_raises_before_decoding(file):
    with pytest.raises(ValueError, match='20000 x 20000 pixels, more than max_pixels=100000000: shrink it, or raise'):
        decode(with_size(file, 20_000, 20_000))


@pytest.mark.parametrize('file', [*JPEGS.values(), *OTHERS.values()])
def test_decode_image_at_the_limit_is_read(file):
    assert decode(file, max_pixels=WIDTH * HEIGHT).shape == (HEIGHT, WIDTH, 3)
    with pytest.raises(ValueError, match=f'{WIDTH} x {HEIGHT} pixels, more than max_pixels={WIDTH * HEIGHT - 1}'):
        decode(file, max_pixels=WIDTH * HEIGHT - 1)


def test_decode_limit_is_independent_of_pillow(monkeypatch):
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10)
    for file in (*JPEGS.values(), OTHERS['png']):
        assert decode(file).shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize('name', JPEGS)
def test_decode_jpeg_truncated_anywhere_raises(name):
    file = JPEGS[name]
    for end in range(len(file)):
        with pytest.raises(ValueError, match='not a readable image'):
            decode(file[:end])


@pytest.mark.parametrize('name', ['baseline', 'progressive', 'grey', 'cmyk'])
def test_decode_truncated_jpeg_with_end_marker_raises(name):
    for share in (0.6, 0.8, 0.9):
        with pytest.raises(ValueError, match='not a readable image'):
            decode(JPEGS[name][:int(len(JPEGS[name]) * share)] + b'\xff\xd9')


@pytest.mark.filterwarnings('ignore:Truncated File Read')  # Pillow warns twice
@pytest.mark.parametrize('name', OTHERS)
def test_decode_other_truncated_formats_raise(name):
    file = OTHERS[name]
    for end in range(0, len(file) - 21, 97):  # the last 21 bytes of a PNG hold no pixels
        with pytest.raises(ValueError, match='not a readable image'):
            decode(file[:end])


@pytest.mark.parametrize('file', [
    JPEGS['baseline'] + b'behind the end', JPEGS['baseline'][:-2] + bytes(18) + JPEGS['baseline'][-2:],
    JPEGS['baseline'].replace(b'JFIF\0\x01', b'JFIF\0\x07')])
def test_decode_jpeg_with_harmless_warnings_is_read(file):
    np.testing.assert_array_equal(decode(file), decode(JPEGS['baseline']))


@pytest.mark.parametrize('file, message', [
    (b'', r'0 bytes, first b..\): the file is empty'),
    (b'<html>404</html>', "16 bytes, first b'<htm'.*neither JPEG, PNG, WebP, GIF, BMP nor TIFF"),
    (b'%!PS-Adobe-3.0 EPSF-3.0', 'neither JPEG'),
    (b'\xff\xd8', '2 bytes'), (b'\x89PNG\r\n\x1a\n', '8 bytes'), (b'RIFF', '4 bytes'), (b'MM', '2 bytes'),
])
def test_decode_other_bytes_raise(file, message):
    with pytest.raises(ValueError, match='not a readable image.*' + message):
        decode(file)


def outcomes(files, variants):
    """Counts decoded and rejected files; any other exception fails the test."""
    counts, rng = collections.Counter(), np.random.default_rng(0)
    for i in range(variants):
        try:
            image = decode(corrupted(rng, files[i % len(files)]), max_pixels=1_000_000)
        except ValueError:
            counts['refused'] += 1
        else:
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
            assert 0 < image.size <= 3_000_000
            counts['read'] += 1
    return counts


@pytest.mark.filterwarnings('ignore::UserWarning')  # Pillow warns of damaged EXIF
def test_decode_3000_corrupted_jpegs_return_an_image_or_raise_value_error():
    exif = Image.Exif()
    exif[0x112] = 6
    counts = outcomes([*JPEGS.values(), encoded(PICTURE, 'JPEG', exif=exif)], 3000)
    assert counts.total() == 3000
    assert counts['refused'] > 1000 and counts['read'] > 500


@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('name', OTHERS)
def test_decode_corrupted_other_formats_return_an_image_or_raise_value_error(name):
    assert outcomes([OTHERS[name]], 200).total() == 200


def test_decode_mask_is_true_for_bright_pixels_at_any_size():
    mask = np.where(IMAGE[..., 0] > 99, np.uint8(255), np.uint8(100))
    for stored in (mask, encoded(Image.fromarray(mask), 'PNG')):
        np.testing.assert_array_equal(decode_mask(stored), mask == 255)
        larger = decode_mask(stored, (4 * HEIGHT, 4 * HEIGHT))
        assert larger.dtype == bool and larger.shape == (4 * HEIGHT, 4 * HEIGHT)
        np.testing.assert_array_equal(larger[::4], larger[3::4])  # nearest neighbour repeats each row 4 times
    with pytest.raises(ValueError, match='not a readable image'):
        decode_mask(encoded(Image.fromarray(mask), 'PNG')[:50])
