"""From encoded bytes to uint8 [H, W, 3], or a ValueError that says why not. Never a guess at missing pixels.

JPEG goes through simplejpeg, which gives the pixels that Pillow gives and is faster; PNG, WebP, GIF (the first frame),
BMP and TIFF through Pillow. Colours become RGB as by `convert('RGB')` in PyTorch's ImageFolder; colour profiles are
ignored. Departures from ImageFolder, towards what a viewer shows: the orientation (that of EXIF, else that of XMP) is
applied, transparent pixels are laid over white (dropped alpha makes many a drawing black), and 16-bit grey is scaled
and not clipped. And a JPEG whose data end early is refused even where it closes properly, with the rest grey.
"""

import io
import re

import numpy as np
import simplejpeg
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

MAX_PIXELS = 100_000_000  # decoded, 300 MB
# Suffixes of image files. One list for training, evaluation and prediction; masks are looked for in this order.
SUFFIXES = ('.jpg', '.jpeg', '.jfif', '.png', '.webp', '.gif', '.bmp', '.tif', '.tiff')

_JPEG = b'\xff\xd8'
_ORIENTATION = 0x112  # the EXIF tag
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')  # an attribute or an element, as Pillow finds it
_UPRIGHT = {  # from the tag's value to how the stored rows and columns are put right
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: image[::-1].swapaxes(0, 1),
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: image[:, ::-1].swapaxes(0, 1),
}
# What simplejpeg refuses though no pixel need be missing. libjpeg's other warnings mean damage.
_LEFT_TO_PILLOW = ('Could not determine subsampling', 'extraneous bytes before marker', 'unknown JFIF revision',
                   'Unknown Adobe color transform', 'Inconsistent progression sequence')
# The readers themselves and not Image.open, which refuses or warns by a global limit of its own before the size can be
# read here, and which would try formats that nobody takes for a picture (PostScript, run through Ghostscript).
_READERS = {
    b'\x89PNG': PngImagePlugin.PngImageFile,
    b'RIFF': WebPImagePlugin.WebPImageFile,
    b'GIF8': GifImagePlugin.GifImageFile,
    b'BM': BmpImagePlugin.BmpImageFile,
    b'II': TiffImagePlugin.TiffImageFile,
    b'MM': TiffImagePlugin.TiffImageFile,
    _JPEG: JpegImagePlugin.JpegImageFile,
}


def decode(encoded: bytes | np.ndarray, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Encoded bytes to uint8 [H, W, 3]; an array passes as it is.

    Args:
      encoded: a whole file.
      max_pixels: larger images are refused by their header, before memory is taken for them.

    Raises:
      ValueError: no image, a damaged or truncated one, or too large; nothing else is raised, whatever the bytes.
    """
    if isinstance(encoded, np.ndarray):
        return encoded
    try:
        if encoded.startswith(_JPEG):
            return _decode_jpeg(encoded, max_pixels)
        return _decode_by_pillow(encoded, max_pixels)
    except Exception as error:  # Pillow lets out KeyError, struct.error, zlib.error and more
        reason = error if isinstance(error, ValueError | OSError | SyntaxError) else f'damaged, {error!r}'
        raise ValueError(f'not a readable image ({len(encoded)} bytes, first {encoded[:4]!r}): {reason}') from error


def from_picture(picture: Image.Image) -> np.ndarray:
    """What `decode` would make of the picture's file: upright, uint8 [H, W, 3].

    Raises:
      ValueError, OSError: it has pixels of 32 bits; its file is damaged.
    """
    return _upright(np.asarray(_as_rgb(picture)), _orientation(picture))


def decode_mask(mask: bytes | np.ndarray, size: int | None = None) -> np.ndarray:
    """The object's place, bool [size, size]; without a size [H, W] as stored.

    Raises:
      ValueError: as `decode`.
    """
    mask = mask if isinstance(mask, np.ndarray) else decode(mask)[..., 0]
    if size is not None:
        mask = np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST))
    return mask > 127


def _decode_jpeg(encoded: bytes, max_pixels: int) -> np.ndarray:
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(encoded, strict=False)
        _check_size(width, height, max_pixels)
        # Strict by default: libjpeg itself fills up what is missing, and only warns.
        image = simplejpeg.decode_jpeg(encoded, 'CMYK' if space in ('CMYK', 'YCCK') else 'RGB')
    except ValueError as error:
        if any(remark in str(error) for remark in _LEFT_TO_PILLOW):
            return _decode_by_pillow(encoded, max_pixels)
        raise
    if image.shape[2] == 4:  # inverted, as Adobe stores it: 255 for no ink
        inks = Image.frombytes('CMYK', (width, height), image.tobytes(), 'raw', 'CMYK;I')
        image = np.asarray(inks.convert('RGB'))
    return _upright(image, _orientation(JpegImagePlugin.JpegImageFile(io.BytesIO(encoded))))  # reads the header only


def _decode_by_pillow(encoded: bytes, max_pixels: int) -> np.ndarray:
    reader = next((reader for magic, reader in _READERS.items() if encoded.startswith(magic)), None)
    if reader is None:
        raise ValueError('neither JPEG, PNG, WebP, GIF, BMP nor TIFF' if encoded else 'the file is empty')
    with reader(io.BytesIO(encoded)) as picture:
        _check_size(*picture.size, max_pixels)
        picture.load()
        return from_picture(picture)


def _as_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith('I;16'):
        # The upper byte, as Pillow takes it of 16-bit colours; its conversion from grey clips at 255.
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert('RGB')
    if picture.mode in ('I', 'F'):
        raise ValueError(f'pixels of 32 bits (mode {picture.mode}) have no agreed white: save it with 8 or 16 bits')
    if picture.has_transparency_data:
        picture = picture.convert('RGBA')
        picture = Image.alpha_composite(Image.new('RGBA', picture.size, 'white'), picture)
    return picture.convert('RGB')


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise ValueError(f'{width} x {height} pixels')
    if width * height > max_pixels:
        raise ValueError(f'{width} x {height} pixels, more than max_pixels={max_pixels}: shrink it, or raise the limit')


def _orientation(picture: Image.Image) -> int:
    """EXIF's orientation; where EXIF has none or cannot be read, XMP's; else 1, upright.

    A PNG must be loaded first, as both may follow the pixels. `serving.loader` has the same rule.
    """
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        return 1  # Pillow turns a TIFF when it loads it
    try:
        found = picture.getexif().get(_ORIENTATION)
    except Exception:  # Pillow raises many kinds for broken EXIF
        found = None
    if found is None:
        xmp = picture.info.get('XML:com.adobe.xmp') or picture.info.get('xmp') or b''
        match = _XMP_ORIENTATION.search(xmp.encode() if isinstance(xmp, str) else xmp)
        found = int(match[1]) if match else 1
    return found


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    return np.ascontiguousarray(_UPRIGHT[orientation](image)) if orientation in _UPRIGHT else image
