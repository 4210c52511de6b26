"""Tests of image orientation: `decode`, `from_picture` and the exported loader agree on every file."""

import io
import itertools
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from evit_jax.data.transforms.decode import decode, from_picture
from evit_jax.data.transforms.geometry import EvalTransform
from evit_jax.serving.loader import Served, upright

# A grey letter F on a ramp. Every rotation and reflection changes this picture.
PICTURE = np.tile(np.linspace(0, 90, 32, dtype=np.uint8), (48, 1))
PICTURE[8:40, 8:12] = PICTURE[8:12, 8:24] = PICTURE[20:24, 8:20] = 220
STORED = {  # stored pixels of the picture for each value of the EXIF tag
    1: lambda image: image, 2: np.fliplr, 3: lambda image: np.rot90(image, 2), 4: np.flipud,
    5: np.transpose, 6: np.rot90, 7: lambda image: np.rot90(image, 2).T, 8: lambda image: np.rot90(image, -1)}
FORMS = ('JPEG', 'PNG', 'WEBP', 'TIFF')


def exif(orientation, order='<'):
    """Returns the body of an EXIF segment with an orientation tag, or without the tag if `orientation` is None."""
    entries = b'' if orientation is None else struct.pack(f'{order}HHIHH', 0x112, 3, 1, orientation, 0)
    head = (b'II*\0' if order == '<' else b'MM\0*') + struct.pack(f'{order}I', 8)
    return b'Exif\0\0' + head + struct.pack(f'{order}H', len(entries) // 12) + entries + bytes(4)


def xmp(orientation, element=False):
    said = f'><tiff:Orientation>{orientation}</tiff:Orientation></rdf:Description>' if element else (
        f' tiff:Orientation="{orientation}"/>')
    return (b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
            b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/"' + said.encode() + b'</rdf:RDF></x:xmpmeta>')


def segment(body, marker=0xe1, fill=0):
    return b'\xff' * fill + bytes([0xff, marker]) + struct.pack('>H', len(body) + 2) + body


def xmp_segment(*arguments, fill=0):
    return segment(b'http://ns.adobe.com/xap/1.0/\0' + xmp(*arguments), fill=fill)


def jpeg(stored, *segments, first=True):
    """Returns a JPEG file with these segments before or after its JFIF segment."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(stored)).save(file, 'JPEG', quality=95)
    file, at = file.getvalue(), 2 if first else 20
    return file[:at] + b''.join(segments) + file[at:]


def read_by_all(file):
    """Returns the pixels of the file, after checking that the three readers agree."""
    images = [decode(file), from_picture(Image.open(io.BytesIO(file))),
              np.asarray(upright(Image.open(io.BytesIO(file))).convert('RGB'))]
    for other in images[1:]:
        np.testing.assert_array_equal(images[0], other)
    return images[0]


def assert_stands(file):
    image = read_by_all(file)
    assert image.shape == (48, 32, 3)
    assert np.abs(image[..., 0].astype(int) - PICTURE).mean() < 3  # loss of JPEG; at least 30 for a rotated image


SEGMENTS = {
    'exif little endian': lambda turn, other: [segment(exif(turn))],
    'exif big endian': lambda turn, other: [segment(exif(turn, '>'))],
    'xmp attribute': lambda turn, other: [xmp_segment(turn)],
    'xmp element': lambda turn, other: [xmp_segment(turn, True)],
    'exif behind fill bytes': lambda turn, other: [segment(exif(turn), fill=3)],
    'xmp behind fill bytes': lambda turn, other: [xmp_segment(turn, fill=1)],
    'fill bytes in front of others': lambda turn, other: [segment(b'x' * 9, 0xe5, fill=2), segment(exif(turn), fill=1)],
    'exif contradicts xmp': lambda turn, other: [segment(exif(turn)), xmp_segment(other)],
    'xmp in front contradicts exif': lambda turn, other: [xmp_segment(other), segment(exif(turn))],
    'exif without the tag': lambda turn, other: [segment(exif(None)), xmp_segment(turn)],
    'broken exif': lambda turn, other: [segment(b'Exif\0\0XX*\0broken'), xmp_segment(turn)],
    'empty exif': lambda turn, other: [segment(b'Exif\0\0'), xmp_segment(turn)],
    'cut exif': lambda turn, other: [segment(exif(other)[:18]), xmp_segment(turn)],
    'among others': lambda turn, other: [segment(b'y' * 99, 0xed), segment(b'http://ns.adobe.com/xmp/extension/\0'),
                                         segment(b'comment', 0xfe), segment(exif(turn))],
}


@pytest.mark.filterwarnings('ignore::UserWarning')  # Pillow warns of truncated EXIF
@pytest.mark.parametrize('name', SEGMENTS)
def test_decode_and_loaders_jpeg_with_any_segments_is_upright(name):
    for turn, first in itertools.product(STORED, (True, False)):
        assert_stands(jpeg(STORED[turn](PICTURE), *SEGMENTS[name](turn, turn % 8 + 1), first=first))


@pytest.mark.parametrize('turn', [0, 9])
def test_decode_jpeg_with_an_unknown_orientation_is_as_stored(turn):
    assert_stands(jpeg(PICTURE, segment(exif(turn))))
    assert_stands(jpeg(PICTURE, segment(exif(turn)), xmp_segment(6)))


def test_decode_jpeg_decoded_by_pillow_is_upright():
    file = jpeg(STORED[6](PICTURE), xmp_segment(6))
    assert_stands(file.replace(b'JFIF\0\x01', b'JFIF\0\x07'))
    assert_stands(file[:-2] + bytes(18) + file[-2:])


@pytest.mark.parametrize('form', FORMS[1:])
@pytest.mark.parametrize('where', ['exif', 'xmp', 'both'])
def test_decode_and_loaders_other_formats_are_upright(form, where):
    for turn in STORED:
        picture, saved = Image.fromarray(np.ascontiguousarray(STORED[turn](PICTURE))), {}
        told = xmp(turn if where == 'xmp' else turn % 8 + 1)
        if where != 'exif':
            saved = {'PNG': {'pnginfo': png_text(told)}, 'WEBP': {'xmp': told}, 'TIFF': {'tiffinfo': {700: told}}}[form]
        if where != 'xmp':
            saved = saved | ({'exif': exif(turn)} if form != 'TIFF' else
                             {'tiffinfo': saved.get('tiffinfo', {}) | {0x112: turn}})
        file = io.BytesIO()
        picture.save(file, form, **saved, **({'lossless': True} if form == 'WEBP' else {}))
        assert_stands(file.getvalue())


def png_text(told):
    from PIL import PngImagePlugin
    info = PngImagePlugin.PngInfo()
    info.add_itxt('XML:com.adobe.xmp', told.decode())
    return info


def test_decode_broken_exif_uses_xmp():
    for form in ('PNG', 'WEBP'):
        saved = {'pnginfo': png_text(xmp(6))} if form == 'PNG' else {'xmp': xmp(6), 'lossless': True}
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(STORED[6](PICTURE))).save(file, form, exif=b'Exif\0\0broken!!', **saved)
        assert_stands(file.getvalue())


@pytest.mark.parametrize('form', FORMS)
def test_from_picture_upright_image_is_not_rotated_again(form):
    file, tag = io.BytesIO(), Image.Exif()
    tag[0x112] = 6
    Image.fromarray(np.ascontiguousarray(STORED[6](PICTURE))).save(file, form, exif=tag)
    for again in (ImageOps.exif_transpose, lambda picture: ImageOps.exif_transpose(picture.convert('RGB'))):
        assert from_picture(again(Image.open(file))).shape == (48, 32, 3)


@pytest.mark.parametrize('segments', [(xmp_segment(6),), (segment(exif(6), fill=2),)])
def test_exported_loader_returns_the_pixels_of_the_evaluation(tmp_path, segments):
    (tmp_path / 'a.jpg').write_bytes(jpeg(STORED[6](PICTURE), *segments))
    served = Served.__new__(Served)
    for crop in (None, 0.875):
        served.manifest = {'image': {'size': (16, 16), 'crop': crop, 'interpolation': 'bicubic'}}
        np.testing.assert_array_equal(served.read(tmp_path / 'a.jpg'),
                                      EvalTransform(16, crop=crop)(decode((tmp_path / 'a.jpg').read_bytes())))
