"""Decodes image files to uint8 [H, W, 3]. Damaged and truncated files raise a ValueError.

simplejpeg decodes JPEG; it is faster than Pillow and returns the same pixels. Pillow decodes PNG, WebP, GIF (the first
frame), BMP and TIFF. Colours are converted by `convert('RGB')`, as in PyTorch's ImageFolder; colour profiles are
ignored.

Departures from ImageFolder, to match image viewers:
- The orientation is applied. It is read from EXIF, or from XMP if EXIF has none.
- Transparent pixels are composited over white, because dropping alpha would make many drawings black.
- 16-bit grey is scaled instead of clipped.
- A JPEG with missing data is rejected, even if it ends with the closing marker.
"""

import io
import re

import numpy as np
import simplejpeg
from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin

MAX_PIXELS = 100_000_000  # 300 MB when decoded
# Suffixes of image files for training, evaluation and prediction. The search for a mask file tries them in this order.
SUFFIXES = ('.jpg', '.jpeg', '.jfif', '.png', '.webp', '.gif', '.bmp', '.tif', '.tiff')

_JPEG = b'\xff\xd8'
_ORIENTATION = 0x112  # the EXIF tag
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')  # an attribute or an element, as in Pillow
_UPRIGHT = {  # value of the tag -> function that turns the stored image upright
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: image[::-1].swapaxes(0, 1),
    7: lambda image: image[::-1, ::-1].swapaxes(0, 1),
    8: lambda image: image[:, ::-1].swapaxes(0, 1),
}
# Errors of simplejpeg that also occur for complete files. All other warnings of libjpeg mean damage.
_LEFT_TO_PILLOW = ('Could not determine subsampling', 'extraneous bytes before marker', 'unknown JFIF revision',
                   'Unknown Adobe color transform', 'Inconsistent progression sequence')
# First bytes of a file -> its reader. Image.open is not used, because it has a global size limit and also runs other
# formats, such as PostScript through Ghostscript.
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
    """Decodes an image file to uint8 [H, W, 3]. An array is returned unchanged.

    Args:
      encoded: bytes of a whole file.
      max_pixels: maximum number of pixels. The header is checked first, so a larger image allocates no memory.

    Raises:
      ValueError: the bytes are not an image, damaged, truncated, or too large. No other exception is raised.
    """
    if isinstance(encoded, np.ndarray):
        return encoded
    try:
        if encoded.startswith(_JPEG):
            return _decode_jpeg(encoded, max_pixels)
        return _decode_by_pillow(encoded, max_pixels)
    except Exception as error:  # Pillow also raises KeyError, struct.error, zlib.error and others
        reason = error if isinstance(error, ValueError | OSError | SyntaxError) else f'damaged, {error!r}'
        raise ValueError(f'not a readable image ({len(encoded)} bytes, first {encoded[:4]!r}): {reason}') from error


def from_picture(picture: Image.Image) -> np.ndarray:
    """Converts a PIL image to uint8 [H, W, 3], upright. The result equals that of `decode` for the file.

    Raises:
      ValueError: the pixels have 32 bits.
      OSError: the file is damaged.
    """
    return _upright(np.asarray(_as_rgb(picture)), _orientation(picture))


def decode_mask(mask: bytes | np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decodes a mask to bool [H, W], True on the object.

    Args:
      size: (H, W) to resize the mask to; None: the mask keeps its stored size.

    Raises:
      ValueError: see `decode`.
    """
    mask = mask if isinstance(mask, np.ndarray) else decode(mask)[..., 0]
    if size is not None:
        mask = np.asarray(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))
    return mask > 127


def _decode_jpeg(encoded: bytes, max_pixels: int) -> np.ndarray:
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(encoded, strict=False)
        _check_size(width, height, max_pixels)
        # simplejpeg is strict by default; libjpeg itself would fill missing data with grey and only warn.
        image = simplejpeg.decode_jpeg(encoded, 'CMYK' if space in ('CMYK', 'YCCK') else 'RGB')
    except ValueError as error:
        if any(message in str(error) for message in _LEFT_TO_PILLOW):
            return _decode_by_pillow(encoded, max_pixels)
        raise
    if image.shape[2] == 4:  # Adobe stores inverted inks: 255 means no ink
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
        # Keep the upper byte, as Pillow does for 16-bit colours; Pillow's own conversion of grey would clip at 255.
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert('RGB')
    if picture.mode in ('I', 'F'):
        raise ValueError(f'pixels of 32 bits (mode {picture.mode}) have no defined white level: save it with 8 or 16 '
                         'bits')
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
    """Returns the orientation in EXIF, else the one in XMP, else 1 (upright). Unreadable metadata count as absent.

    A PNG must be loaded first, because its metadata may follow the pixels. `serving.loader` has the same rule.
    """
    if isinstance(picture, TiffImagePlugin.TiffImageFile):
        return 1  # Pillow rotates a TIFF when it loads it
    try:
        orientation = picture.getexif().get(_ORIENTATION)
    except Exception:  # Pillow raises exceptions of many types for broken EXIF
        orientation = None
    if orientation is None:
        xmp = picture.info.get('XML:com.adobe.xmp') or picture.info.get('xmp') or b''
        match = _XMP_ORIENTATION.search(xmp.encode() if isinstance(xmp, str) else xmp)
        orientation = int(match[1]) if match else 1
    return orientation


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    return np.ascontiguousarray(_UPRIGHT[orientation](image)) if orientation in _UPRIGHT else image
