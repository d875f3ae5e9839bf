"Pictures as one sees them: depth, transparency, orientation, colour models, formats by content"

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, features

from vlkd_lab.data import BadSample, decode_image


def saved(image, kind="png", **options):
    image.save(out := io.BytesIO(), kind, **options)
    return out.getvalue()


def seen(image, kind="png", **options):
    return np.asarray(decode_image(saved(image, kind, **options))).astype(int)


RAMP = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
BYTES = (RAMP / 257).round().astype(int)


def png(width, height, depth, colour, rows, *chunks):
    "A PNG by hand: rows of packed bytes"
    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    every = [(b"IHDR", header), *chunks, (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in every)


@pytest.mark.parametrize("form", ["I;16 png", "I;16 tiff", "I;16B tiff", "I tiff", "pgm", "8 bits in 32"])
def test_sixteen_bits_are_scaled_by_their_depth(form):
    mode, _, kind = form.partition(" ")
    if form == "pgm":
        data = b"P5 16 16 65535\n" + RAMP.astype(">u2").tobytes()
    elif form == "8 bits in 32":
        data = saved(Image.fromarray(BYTES.astype(np.int32)), "tiff")
    elif mode == "I;16B":
        data = saved(Image.frombytes("I;16B", (16, 16), RAMP.astype(">u2").tobytes()), kind)
    else:
        data = saved(Image.fromarray(RAMP if mode == "I;16" else RAMP.astype(np.int32)), kind)
    values = np.asarray(decode_image(data)).astype(int)
    assert np.abs(values - BYTES[..., None]).max() <= 1 and values.min() == 0 and values.max() == 255


def test_sixteen_bit_colour_and_twelve_bits_and_white_that_is_zero():
    row = b"".join(struct.pack(">HHH", 0xFFFF, 0x8000, 0) for _ in range(4))
    assert np.asarray(decode_image(png(4, 4, 16, 2, [row] * 4)))[0, 0].tolist() == [255, 128, 0]
    tiff = saved(Image.fromarray(np.full((8, 8), 65535, np.uint16)), "tiff", tiffinfo={262: 0})
    assert (np.asarray(decode_image(tiff)) == 0).all()


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_few_bits_use_the_whole_range(depth):
    white = bytes([255] * 8)
    black = bytes(8)
    values = np.asarray(decode_image(png(8, 2, depth, 0, [white[:depth], black[:depth]])))
    assert (values[0] == 255).all() and (values[1] == 0).all()
    hidden = np.asarray(decode_image(png(8, 2, depth, 0, [white[:depth], black[:depth]], (b"tRNS", b"\0\0"))))
    assert (hidden == 255).all(), "black is transparent here"
    hidden = np.asarray(decode_image(png(8, 2, depth, 0, [white[:depth], black[:depth]], (b"tRNS", struct.pack(">H", 2**depth - 1)))))
    assert (hidden[0] == 255).all() and (hidden[1] == 0).all(), "white is"


def glyph(mode):
    "A black square in the middle; around it what is not seen, in another colour"
    image = Image.new("RGBA", (12, 12), (200, 0, 90, 0))
    image.paste((0, 0, 0, 255), (4, 4, 8, 8))
    image.putpixel((0, 0), (0, 0, 0, 128))
    if mode == "P":
        paletted = Image.new("P", (12, 12), 1)
        paletted.putpalette([0, 0, 0, 200, 0, 90])
        paletted.paste(0, (4, 4, 8, 8))
        return paletted
    return image.convert(mode)


@pytest.mark.parametrize("mode, kind, options", [
    ("RGBA", "png", {}), ("LA", "png", {}), ("P", "png", dict(transparency=1)), ("P", "png", dict(transparency=bytes([255, 0]))),
    ("P", "gif", dict(transparency=1)), ("RGBA", "webp", dict(lossless=True, exact=True)), ("RGBA", "tiff", {}),
])  # fmt: skip
def test_what_is_transparent_is_white(mode, kind, options):
    values = seen(glyph(mode), kind, **options)
    assert (values[5, 5] == 0).all() and (values[1, 1] == 255).all() and (values[11, 11] == 255).all()
    if mode in ("RGBA", "LA"):
        assert np.abs(values[0, 0] - 127).max() <= 2, "half black on white is grey"


def test_a_transparent_colour_of_any_depth():
    colours = Image.new("RGB", (8, 8), (9, 8, 7))
    colours.paste((1, 2, 3), (0, 0, 4, 8))
    assert seen(colours, transparency=(9, 8, 7))[0, ::7].tolist() == [[1, 2, 3], [255, 255, 255]]
    grey = Image.new("L", (8, 8), 40)
    grey.paste(10, (0, 0, 4, 8))
    assert seen(grey, transparency=40)[0, ::7, 0].tolist() == [10, 255]
    deep = struct.pack(">HH", 0x1234, 0x4321) * 4
    values = np.asarray(decode_image(png(8, 8, 16, 0, [deep] * 8, (b"tRNS", b"\x12\x34"))))
    assert values[0, :2, 0].tolist() == [255, 0x43], "sixteen bits"
    row = struct.pack(">HHH", 0x1200, 0x3400, 0x5600) * 4
    assert (np.asarray(decode_image(png(4, 4, 16, 2, [row] * 4, (b"tRNS", row[:6])))) == 255).all()


def corners():
    image = Image.new("RGB", (24, 16), "black")
    for colour, place in (("red", (0, 0, 12, 8)), ("lime", (12, 0, 24, 8)), ("blue", (0, 8, 12, 16))):
        image.paste(colour, place)
    return image


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_camera_held_in_any_way_gives_the_same_picture(kind, orientation):
    if kind == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    turns = [None, "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90", "TRANSVERSE", "ROTATE_270"]  # as stored
    turn = turns[orientation - 1]
    stored = corners() if turn is None else corners().transpose(Image.Transpose[turn])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = dict(quality=95, subsampling=0) if kind == "jpeg" else dict(lossless=True) if kind == "webp" else {}
    values = seen(stored, kind, exif=exif, **options)
    assert values.shape == (16, 24, 3)
    for (x, y), colour in {(5, 3): (255, 0, 0), (18, 3): (0, 255, 0), (5, 12): (0, 0, 255), (18, 12): (0, 0, 0)}.items():
        assert np.abs(values[y, x] - colour).max() < 24, (x, y)


@pytest.mark.parametrize("exif", [
    b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"",
    b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0",
])  # fmt: skip
def test_a_broken_orientation_does_not_cost_the_picture(exif):
    assert seen(corners(), "jpeg", exif=exif).shape == (16, 24, 3)


def reads_its_own(image, kind):
    "Whether this Pillow can open what it has saved"
    try:
        Image.open(io.BytesIO(saved(image, kind))).load()
    except OSError:
        return False
    return True


def test_colour_models():
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    for data in (saved(red.convert("CMYK"), "jpeg", quality=95), saved(red.convert("CMYK"), "tiff")):
        assert np.abs(np.asarray(decode_image(data)).astype(int) - (255, 0, 0)).max() < 8, "Adobe's inverted CMYK, and a plain one"
    for mode in ("1", "L", "P", "YCbCr"):
        kind = "tiff" if mode == "YCbCr" else "png"
        white = Image.new("RGB", (16, 16), "white").convert(mode)
        if mode == "YCbCr" and not reads_its_own(white, kind):
            continue  # the newest Pillow for Python 3.10 writes such a TIFF and calls it truncated
        assert np.abs(seen(white, kind) - 255).max() <= 2
    with pytest.raises(BadSample, match="floating-point"):
        decode_image(saved(Image.new("F", (9, 9)), "tiff"))


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "bmp", "gif", "tiff", "ppm", "avif"])
def test_formats_by_what_is_in_the_file(kind):
    if kind == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    assert np.abs(seen(Image.new("RGB", (16, 16), (200, 30, 40)), kind) - (200, 30, 40)).max() < 12


def test_of_several_frames_the_first():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("gif", "webp", "tiff", "png"):
        assert np.abs(seen(frames[0], kind, save_all=True, append_images=frames[1:]) - (255, 0, 0)).max() < 24, kind


@pytest.mark.parametrize("data, words", [
    (b"\0\0\0\x18ftypheic" + bytes(20), "HEIC"), (b"\0\0\0\x18ftypmif1" + bytes(20), "HEIC"), (b"\xff\x0a" + bytes(9), "JPEG XL"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"), (b'<?xml version="1.0"?><svg/>', "SVG"), (b"<svg/>", "SVG"), (b" <!DOCTYPE html>", "HTML"),
    (b"8BPS\0\1", "Photoshop"), (b"%PDF-1.7", "PDF"), (b"%!PS-Adobe EPSF", "PostScript"), (b"", "an empty file"),
    (b"GIF89a", "no JPEG, PNG or WebP"),
])  # fmt: skip
def test_what_is_not_read_is_named(data, words):
    with pytest.raises(BadSample, match=words):
        decode_image(data)


def test_every_format_keeps_the_limits_of_size():
    for kind in ("bmp", "gif", "tiff", "ppm", "webp"):
        with pytest.raises(BadSample, match="larger than max_pixels"):
            decode_image(saved(Image.new("RGB", (40, 40)), kind), max_pixels=1000)
        with pytest.raises(BadSample, match="narrower"):
            decode_image(saved(Image.new("RGB", (400, 2)), kind))
        with pytest.raises(BadSample, match="cannot be (decoded|opened)|no JPEG"):
            decode_image(saved(Image.effect_noise((64, 64), 80).convert("RGB"), kind)[:-1500])
