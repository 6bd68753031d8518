"""Writing and reading .npy files with the standard library alone."""

import ast
import itertools
import random
import struct

CODES = {"<f4": "f", "<f2": "e", "<f8": "d", "<i4": "i", "<i8": "q", "<u2": "H", "|u1": "B", "|b1": "B"}


def size(shape):
    count = 1
    for extent in shape:
        count *= extent
    return count


def encode(descr, shape, values, fortran=False):
    """The bytes of a file; values may be bytes."""
    header = f"{{'descr': {descr!r}, 'fortran_order': {fortran}, 'shape': {tuple(shape)}, }}"
    header = header.encode()
    header += b" " * (-(11 + len(header)) % 64) + b"\n"
    if not isinstance(values, bytes):
        values = struct.pack(f"<{size(shape)}{CODES[descr]}", *values)
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + values


def write(path, descr, shape, values):
    path.write_bytes(encode(descr, shape, values))
    return path


def write_normal(path, shape, seed, descr="<f4"):
    generator = random.Random(seed)
    return write(path, descr, shape, [generator.gauss(0, 1) for _ in range(size(shape))])


def read(path):
    """(descr, shape, values)"""
    data = path.read_bytes()
    assert data[:8] == b"\x93NUMPY\x01\x00"
    (length,) = struct.unpack("<H", data[8:10])
    assert (10 + length) % 64 == 0
    header = ast.literal_eval(data[10 : 10 + length].decode())
    assert header["fortran_order"] is False
    shape = header["shape"]
    values = struct.unpack(f"<{size(shape)}{CODES[header['descr']]}", data[10 + length :])
    return header["descr"], shape, values


def indices(shape):
    return itertools.product(*(range(extent) for extent in shape))
